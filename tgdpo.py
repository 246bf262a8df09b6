"""The mathematics of TGDPO: tensors and floats in, tensors out. derive.md proves it under the same labels.

D1-D8 are the derivation, on problems small enough to enumerate. A policy is a table logp [S, A]: the
log-probability of each action (token) in each state (the prompt and the tokens so far). reward and f are
tables of the same shape; child [S, A], int64, is the state that follows, -1 where the response ends. State 0
is the prompt, and a state comes before its children.
D9-D16, with weighted_margin of D7, are what training calls, except token_gradients, which autograd does. A model
is a pair (chosen, rejected) of tensors [B, T] of per-token log-probs, 0 where there is no response token.
D17-D20 say what the guidance adds to DPO; training calls only centred_guide.

Letters: S states, A actions, B pairs, T tokens. Suffix _w chosen, _l rejected. beta > 0, alpha >= 0.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Sides = tuple[Tensor, Tensor]  # (chosen, rejected), [B, T] each; the two T may differ


def sequence_objective(logp: Tensor, ref_logp: Tensor, reward: Tensor, child: Tensor, beta: float) -> Tensor:
    """D1: E_{y~pi} sum_t [ r(s_t,a_t) - beta log pi/pi_ref(a_t|s_t) ], what PPO maximises; a number."""
    value = [logp.new_zeros(())] * (len(logp) + 1)  # one a state; the last, index -1, is the end
    for s in reversed(range(len(logp))):
        to_go = torch.stack([value[c] for c in child[s].tolist()])  # [A]
        value[s] = (logp[s].exp() * (reward[s] - beta * (logp[s] - ref_logp[s]) + to_go)).sum()
    return value[0]


def state_distributions(logp: Tensor, child: Tensor, steps: int) -> Tensor:
    """D2 (Theorem 4.1): D_t(s), the probability that the policy stands in s at step t; [steps, S].

    sequence_objective = sum_t D_t @ token_objective, so its maximum is at most the sum of the steps' maxima.
    """
    goes_on = child >= 0
    d_t = F.one_hot(torch.tensor(0), len(logp)).to(logp.dtype)  # [S]
    rows = [d_t]
    for _ in range(steps - 1):
        flow = d_t[:, None] * logp.exp()  # [S, A]
        d_t = torch.zeros_like(d_t).index_add(0, child[goes_on], flow[goes_on])
        rows.append(d_t)
    return torch.stack(rows)


def token_objective(logp: Tensor, ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """D3: E_{a~pi} [ r(s,a) - beta log pi/pi_ref(a|s) ] of each state, [S]; to be weighed by a fixed D(s)."""
    return (logp.exp() * (reward - beta * (logp - ref_logp))).sum(-1)


def guided_objective(logp: Tensor, ref_logp: Tensor, reward: Tensor, f: Tensor, beta: float) -> Tensor:
    """D4: E_{a~pi} [ r(s,a) / (beta f(r_hat(s,a))) - log pi/pi_ref(a|s) ] of each state, [S]. f > 0."""
    return (logp.exp() * (reward / (beta * f) - (logp - ref_logp))).sum(-1)


def closed_form(ref_logp: Tensor, reward: Tensor, f: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D5 (Theorem 4.3): the maximiser of guided_objective, pi* = pi_ref exp(r / (beta f)) / Z.

    Returns log pi* [S, A] and log Z [S], Z(s) = E_{a~pi_ref} exp(r(s,a) / (beta f(s,a))).
    """
    logits = ref_logp + reward / (beta * f)
    log_z = logits.logsumexp(-1)
    return logits - log_z[:, None], log_z


def inverted_reward(logp: Tensor, ref_logp: Tensor, log_z: Tensor, f: Tensor, beta: float) -> Tensor:
    """D6: r = beta f log pi*/pi_ref + beta f log Z, [S, A]: the reward of which logp is the closed form."""
    return beta * f * (logp - ref_logp + log_z[:, None])


def weighted_margin(logratio_w: Tensor, logratio_l: Tensor, f_w: Tensor, f_l: Tensor, beta: float) -> Tensor:
    """D7: phi = sum_t beta f_w log(pi/pi_ref)_w - sum_t beta f_l log(pi/pi_ref)_l. [B, T] each, [B] out."""
    return beta * ((f_w * logratio_w).sum(-1) - (f_l * logratio_l).sum(-1))


def preference(phi: Tensor, delta: Tensor) -> Tensor:
    """D7: Pr(y_w > y_l | x) = sigma(phi + delta), Bradley-Terry with the rewards of D6. [B]"""
    return torch.sigmoid(phi + delta)


def partition_term(log_z_w: Tensor, log_z_l: Tensor, f_w: Tensor, f_l: Tensor, beta: float) -> Tensor:
    """D8 (Theorem 4.4): delta = sum_t beta f_w log Z(s_w) - sum_t beta f_l log Z(s_l), [B]; no policy in it.

    log_z_w, log_z_l: [B, T], log Z of the states in which the tokens were chosen, 0 where there is no token.
    """
    return beta * ((f_w * log_z_w).sum(-1) - (f_l * log_z_l).sum(-1))


def token_reward(guide_logp: Tensor, ref_logp: Tensor, guide_beta: float) -> Tensor:
    """D9, and D16 for SimPO's guides: r_hat = guide_beta log pi_guide/pi_ref(a|s), any shape; no gradient."""
    return guide_beta * (guide_logp - ref_logp).detach()


def chosen_weight(r_hat: Tensor, alpha: float) -> Tensor:
    """D10: f_w = 1 + alpha r_hat, the weight of each token of the chosen response; the shape of r_hat."""
    return 1 + alpha * r_hat


def rejected_weight(r_hat: Tensor, alpha: float) -> Tensor:
    """D10: f_l = 1 - alpha r_hat, the weight of each token of the rejected response; the shape of r_hat."""
    return 1 - alpha * r_hat


def token_log_ratios(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """D11: log pi/pi_ref(a_t|s_t), [B, T]. Padding, where both are exactly 0, gives 0 and takes no gradient.

    So does a token to which both give probability 1: its logits have next to no gradient in any case.
    """
    padding = (logp == 0) & (ref_logp == 0)
    return (logp - ref_logp.detach()).masked_fill(padding, 0)


class Loss(NamedTuple):
    """What each loss returns. None: the loss has no such number (SimPO knows no reference, only TGDPO a guide).

    dpo_margin = beta (logratio_w - logratio_l), and logratio = log pi(y|x) / pi_ref(y|x), summed over tokens.
    """

    losses: Tensor  # [B]
    phi: Tensor  # [B]
    dpo_margin: Tensor | None = None  # [B]
    logratio_w: Tensor | None = None  # [B]
    logratio_l: Tensor | None = None  # [B]
    r_hat: Sides | None = None  # 0 where there is no token
    f: Sides | None = None  # 1 where there is no token


def tgdpo_loss(
    policy: Sides, ref: Sides, guide: Sides, beta: float, alpha: float, guide_beta: float | None = None
) -> Loss:
    """D11: -log sigma(phi), pair by pair; only the policy receives a gradient.

    phi is DPO's margin and a term that does not look at the label (D17). At the start, on pairs drawn from pi_ref,
    that term is distillation into the guide (D18); it does not end there (D20).

    policy, ref, guide: per-token log-probs, 0 where there is no token. guide_beta scales r_hat; None means beta.
    ValueError: shapes that differ, a beta <= 0, alpha < 0.
    """
    guide_beta = beta if guide_beta is None else guide_beta
    _check_shapes(policy, ref=ref, guide=guide)
    _check_positive(beta=beta, guide_beta=guide_beta)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}: it must be a number >= 0")
    (policy_w, policy_l), (ref_w, ref_l), (guide_w, guide_l) = policy, ref, guide
    r_hat_w = token_reward(guide_w, ref_w, guide_beta)  # D9, [B, T]
    r_hat_l = token_reward(guide_l, ref_l, guide_beta)
    f_w = chosen_weight(r_hat_w, alpha)  # D10, [B, T]
    f_l = rejected_weight(r_hat_l, alpha)
    logratio_w = token_log_ratios(policy_w, ref_w)  # D11, [B, T]
    logratio_l = token_log_ratios(policy_l, ref_l)
    phi = weighted_margin(logratio_w, logratio_l, f_w, f_l, beta)  # D7, [B]
    losses = -F.logsigmoid(phi)  # D11, [B]
    chosen, rejected = logratio_w.sum(-1), logratio_l.sum(-1)  # of whole responses, [B] each
    dpo_margin = beta * (chosen - rejected)  # D14, [B]
    return Loss(losses, phi, dpo_margin, chosen, rejected, (r_hat_w, r_hat_l), (f_w, f_l))


def token_gradients(phi: Tensor, f_w: Tensor, f_l: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D12: the gradient of each pair's loss in its tokens' log-probs, chosen and rejected, [B, T] each.

    -sigma(-phi) beta f_w on a chosen token, +sigma(-phi) beta f_l on a rejected one. phi is [B].
    """
    strength = beta * torch.sigmoid(-phi)[:, None]
    return -strength * f_w, strength * f_l


def largest_alpha(r_hat_w: Tensor, r_hat_l: Tensor, share: float = 1.0) -> float:
    """D13: the supremum of the alpha that keep f > 0 on at least this share of the tokens (0 < share <= 1).

    Every alpha below it does, alpha equal to it does not (f = 0 counts as lost); inf where every alpha does.
    r_hat_w, r_hat_l: r_hat of all chosen and all rejected response tokens, without padding, any shape.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: it must lie in (0, 1]")
    slope = torch.cat([-r_hat_w.flatten(), r_hat_l.flatten()])  # f = 1 - alpha slope on both sides
    kept = math.ceil(round(share * len(slope), 6))  # rounded, because 0.07 * 100 is 7.000000000000001
    steepest = slope.kthvalue(max(kept, 1)).values.item() if len(slope) else 0.0
    return 1 / steepest if steepest > 0 else math.inf


def dpo_loss(policy: Sides, ref: Sides, beta: float) -> Loss:
    """D14: -log sigma(beta log pi/pi_ref(y_w|x) - beta log pi/pi_ref(y_l|x)); arguments as in tgdpo_loss."""
    _check_shapes(policy, ref=ref)
    _check_positive(beta=beta)
    logratio_w, logratio_l = (logratio.sum(-1) for logratio in map(token_log_ratios, policy, ref))  # [B] each
    phi = beta * (logratio_w - logratio_l)  # [B]
    return Loss(-F.logsigmoid(phi), phi, phi, logratio_w, logratio_l)


def mean_reward(logp: Tensor, length: Tensor, beta: float) -> Tensor:
    """D15: beta/|y| log pi(a_t|s_t), a token's part of SimPO's reward. logp: [B, T]; length: [B]; [B, T] out."""
    return beta * logp / length[:, None]


def simpo_loss(policy: Sides, lengths: tuple, beta: float, gamma: float) -> Loss:
    """D15: -log sigma(phi - gamma), phi = beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x); no reference.

    lengths: (chosen, rejected), each B numbers of response tokens, at least 1. gamma: the margin itself.
    """
    _check_shapes(policy)
    _check_positive(beta=beta)
    lengths = [torch.as_tensor(n, dtype=policy[0].dtype, device=policy[0].device) for n in lengths]  # [B] each
    if any(n.shape != policy[0].shape[:1] or bool((n < 1).any()) for n in lengths):
        raise ValueError(f"lengths must be {len(policy[0])} numbers of at least 1 for each side, one a pair")
    reward_w, reward_l = (mean_reward(logp, n, beta).sum(-1) for logp, n in zip(policy, lengths))  # [B] each
    phi = reward_w - reward_l  # [B]
    return Loss(-F.logsigmoid(phi - gamma), phi)


def guidance_term(
    logratio_w: Tensor, logratio_l: Tensor, r_hat_w: Tensor, r_hat_l: Tensor, alpha: float, beta: float
) -> Tensor:
    """D17: phi of TGDPO less phi of DPO, alpha beta sum_{t in w and l} r_hat log pi/pi_ref: no label in it.

    logratio_w, logratio_l, r_hat_w, r_hat_l: [B, T] each; [B] out.
    """
    return alpha * beta * ((r_hat_w * logratio_w).sum(-1) + (r_hat_l * logratio_l).sum(-1))


def divergence(logp: Tensor, guide_logp: Tensor) -> Tensor:
    """D18, D19: KL(pi || pi_guide) at each state, [S]; both are log-probabilities of all tokens, [S, A]."""
    return (logp.exp() * (logp - guide_logp)).sum(-1)


def centred_guide(guide_logp: Tensor, kl: Tensor) -> Tensor:
    """D19: log pi_guide + KL(pi_ref || pi_guide), the guide of which r_hat has mean 0 under pi_ref at each state.

    kl: of the state in which the token was chosen, 0 where there is no token; the shape of guide_logp.
    """
    return guide_logp + kl


def _check_shapes(policy: Sides, **frozen: Sides) -> None:
    for name, pair in {"policy": policy, **frozen}.items():
        for side, tensor, like in zip(("chosen", "rejected"), pair, policy):
            if tensor.dim() != 2 or tensor.shape != like.shape or len(tensor) != len(policy[0]):
                raise ValueError(
                    f"{name} {side} has shape {list(tensor.shape)}: all tensors must be [B, T] "
                    "with one B, with one T for all chosen and one for all rejected"
                )


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: it must be a number > 0")
