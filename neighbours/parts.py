"""Parts of neighbouring losses, and their composition; neighbours.md gives each its formula and its source.

With c_t = log pi/pi_ref of token t and C = sum_t u c_t over a response, a pair's loss is link(z) + terms,
z = beta g(C_w) - beta g(C_l) + offsets. Without parts u = 1 (f of D10 with a guide), g(C) = C, and the link is
-log sigma(z).

Letters: B pairs, T tokens. `tokens` is (chosen, rejected), [B, T] each, true where there is a response token;
x = log pi_guide/pi_ref, of the same shape. Each function's last argument is the number of its part.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tgdpo
from tgdpo import Sides

# ------------------------------------------------------------------------- links: z [B] -> the loss of each pair [B]


def logistic(z: Tensor) -> Tensor:
    """L(z) = -log sigma(z), the link of DPO and TGDPO."""
    return -F.logsigmoid(z)


def cautious(z: Tensor, epsilon: float) -> Tensor:
    """cdpo: (1 - epsilon) L(z) + epsilon L(-z)."""
    return (1 - epsilon) * logistic(z) + epsilon * logistic(-z)


def robust(z: Tensor, epsilon: float) -> Tensor:
    """robust: [(1 - epsilon) L(z) - epsilon L(-z)] / (1 - 2 epsilon)."""
    return ((1 - epsilon) * logistic(z) - epsilon * logistic(-z)) / (1 - 2 * epsilon)


def identity_link(z: Tensor, beta: float) -> Tensor:
    """ipo: (z / beta - 1 / (2 beta))^2."""
    return (z / beta - 1 / (2 * beta)).square()


def hinge(z: Tensor) -> Tensor:
    """hinge: relu(1 - z)."""
    return F.relu(1 - z)


def exact_optimisation(z: Tensor, epsilon: float) -> Tensor:
    """exo: sigma(z) log[sigma(z) / (1 - epsilon)] + sigma(-z) log[sigma(-z) / epsilon]."""
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-epsilon))
    return chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(epsilon))


# ------------------------------------------------------------------------------ divergences: C [B] -> g(C) [B]


def alpha_divergence(total: Tensor, a: float) -> Tensor:
    """alpha-div: g(C) = (1 - e^(-a C)) / a; a = 1 is forward KL.

    The exponent stops where g would overflow: g stays finite there, and its gradient is 0.
    """
    most = math.floor((math.log(torch.finfo(total.dtype).max) + math.log(a)) * 1e4) / 1e4
    return -torch.expm1((-a * total).clamp(max=most)) / a


def jensen_shannon(total: Tensor) -> Tensor:
    """js: g(C) = log 2 + log sigma(C)."""
    return math.log(2) + F.logsigmoid(total)


# ---------------------------------------------------------- token weights: (u_w, u_l), that broadcast to [B, T] each


def lengths_of(tokens: Sides) -> Sides:
    """T_w, T_l: response tokens, the end token included; [B, 1] each, int64."""
    return tuple(real.sum(-1, keepdim=True) for real in tokens)


def desensitised(tokens: Sides, a: float) -> Sides:
    """ld: 1 up to min(T_w, T_l), then a."""
    shared = torch.minimum(*lengths_of(tokens))  # [B, 1]
    return tuple(torch.where(positions(real) <= shared, 1.0, a) for real in tokens)


def decayed(tokens: Sides, gamma: float) -> Sides:
    """decay: gamma^t, t = 1, 2, ..."""
    return tuple(gamma ** positions(real) for real in tokens)


def positions(real: Tensor) -> Tensor:
    """t = 1, 2, ... of a [B, T] tensor's places; [T], float64, so that a float64 loss is one throughout."""
    return torch.arange(1, real.shape[-1] + 1, device=real.device, dtype=torch.float64)


def normalised(tokens: Sides) -> Sides:
    """norm: 1 / T, with the full T."""
    return tuple(1 / length.double() for length in lengths_of(tokens))


def shifted(tokens: Sides, lam: float) -> Sides:
    """shift: 1 on the chosen response, lambda on the rejected one."""
    chosen, rejected = (torch.ones(real.shape, device=real.device, dtype=torch.float64) for real in tokens)
    return chosen, lam * rejected


def clipped(x: Sides, alpha: float, guide_beta: float, k: float) -> Sides:
    """clip: f = 1 +- alpha guide_beta clamp(x, -k, k), + on the chosen response; in place of D10's f."""
    r_hat_w, r_hat_l = (guide_beta * side.clamp(-k, k) for side in x)
    return tgdpo.chosen_weight(r_hat_w, alpha), tgdpo.rejected_weight(r_hat_l, alpha)


def selected(x: Sides, tokens: Sides, s: float) -> Sides:
    """select: 1 on the n greatest x of the chosen response and the n least of the rejected one, else 0.

    n = max(1, floor(s T)), s T rounded to 6 decimals, as 0.29 * 100 is 28.999999999999996. Ties: the earlier token.
    """
    kept = []
    for score, real, length in zip((x[0], -x[1]), tokens, lengths_of(tokens)):
        n = (s * length.double()).mul(1e6).round().div(1e6).floor().clamp(min=1)  # [B, 1]
        order = score.masked_fill(~real, -math.inf).argsort(dim=-1, descending=True, stable=True)  # [B, T]
        best = torch.arange(real.shape[-1], device=real.device) < n  # [B, T], by rank
        kept.append(torch.zeros_like(score).scatter(-1, order, best.to(score.dtype)))
    return tuple(kept)


# -------------------------------------------------------------------- offsets and terms: [B], or a number for all


def length_offset(tokens: Sides, a: float) -> Tensor:
    """length: + a (T_w - T_l)."""
    length_w, length_l = lengths_of(tokens)
    return a * (length_w - length_l)[:, 0].double()


def positive_offset(logratio: Sides, beta: float, lam: float) -> Tensor:
    """dpop: - beta lambda relu(-sum_t c_t) over the chosen response; plain c, with gradient."""
    return -beta * lam * F.relu(-logratio[0].sum(-1))


def target_offset(gamma: float) -> float:
    """target: - gamma."""
    return -gamma


def likelihood_term(policy: Sides, tokens: Sides, lam: float) -> Tensor:
    """nll: lambda (-1 / T_w) sum_t log pi over the chosen response, with gradient."""
    return -lam * policy[0].sum(-1) / lengths_of(tokens)[0][:, 0]


# ------------------------------------------------------------------------------------------------ the composition


class Chosen(NamedTuple):
    """A part to compose: its function is called with what it takes, then the number where there is one."""

    kind: str  # link, divergence, token weight, offset or term
    function: Callable
    takes: tuple[str, ...]
    number: float | None

    def of(self, known):
        numbers = () if self.number is None else (self.number,)
        return self.function(*(known[name] for name in self.takes), *numbers)


class Composed(NamedTuple):
    """tgdpo.Loss, and the token weights u. phi is z without offsets."""

    losses: Tensor  # [B]
    phi: Tensor  # [B]
    dpo_margin: Tensor  # [B]
    logratio_w: Tensor  # [B]
    logratio_l: Tensor  # [B]
    r_hat: Sides | None  # of the guide, before any clip
    f: Sides | None  # D10's, or clip's
    u: Sides | None  # None where no part is a token weight


def guide_log_ratio(guide: Sides, ref: Sides) -> Sides:
    """x = log pi_guide/pi_ref of each token, [B, T] each; no gradient."""
    return tuple(tgdpo.token_reward(g, r, 1.0) for g, r in zip(guide, ref))


def composed(
    parts: list[Chosen],
    policy: Sides,
    ref: Sides,
    guide: Sides | None,
    lengths: tuple,
    beta: float,
    alpha=0.0,
    guide_beta: float | None = None,
) -> Composed:
    """D21: link(beta g(sum u c)_w - beta g(sum u c)_l + offsets) + terms, pair by pair.

    policy, ref, guide: as in tgdpo.tgdpo_loss; guide None: dpo, f = 1. lengths: (chosen, rejected), B numbers each.
    parts: at most one link and one divergence. Only the policy receives a gradient.
    """
    tokens = tuple(
        torch.arange(side.shape[-1], device=side.device) < torch.as_tensor(n, device=side.device)[:, None]
        for side, n in zip(policy, lengths)
    )  # [B, T] each
    logratio = tuple(map(tgdpo.token_log_ratios, policy, ref))  # c, [B, T] each
    known = {"policy": policy, "tokens": tokens, "logratio": logratio, "beta": beta, "alpha": alpha}
    known["guide_beta"] = guide_beta = beta if guide_beta is None else guide_beta
    of_kind = {kind: [part for part in parts if part.kind == kind] for kind in {part.kind for part in parts}}
    weights = of_kind.get("token weight", [])
    r_hat = f = None
    u = tuple(torch.ones_like(c) for c in logratio)
    if guide is not None:
        x = known["x"] = guide_log_ratio(guide, ref)
        r_hat = tuple(guide_beta * side for side in x)  # D9
        clip = [part for part in weights if part.function is clipped]
        f_w_and_l = (tgdpo.chosen_weight(r_hat[0], alpha), tgdpo.rejected_weight(r_hat[1], alpha))  # D10
        u = f = clip[0].of(known) if clip else f_w_and_l
    for part in weights:
        if part.function is not clipped:
            u = tuple(one * more.to(one.dtype) for one, more in zip(u, part.of(known)))  # [B, T] each
    totals = [(weight * c).sum(-1) for weight, c in zip(u, logratio)]  # C, [B] each
    for part in of_kind.get("divergence", []):
        totals = [part.of(known | {"total": total}) for total in totals]
    phi = beta * (totals[0] - totals[1])  # [B]
    z = phi
    for part in of_kind.get("offset", []):
        z = z + torch.as_tensor(part.of(known), device=z.device).to(z.dtype)
    links = of_kind.get("link", [])
    losses = links[0].of(known | {"z": z}) if links else logistic(z)
    for part in of_kind.get("term", []):
        losses = losses + part.of(known)
    chosen, rejected = (c.sum(-1) for c in logratio)
    return Composed(losses, phi, beta * (chosen - rejected), chosen, rejected, r_hat, f, u if weights else None)
