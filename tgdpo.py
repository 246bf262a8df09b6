"""The mathematics of TGDPO: tensors and floats in, tensors out. derive.md explains it, step by step.

Letters: B pairs, T tokens of the longer response. Suffix _w chosen, _l rejected.
A per-token table of a batch is a [B, T] tensor, 0 where there is no response token.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def token_log_ratios(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log pi(a_t|s_t) / pi_ref(a_t|s_t), [B, T]. Padding, where both are 0, gives 0 and takes no gradient.

    A response token whose log-probs are both exactly 0 (probability 1) is masked likewise: nothing moves it.
    """
    padding = (logp == 0) & (ref_logp == 0)
    return (logp - ref_logp.detach()).masked_fill(padding, 0)


def r_hat(guide_logp: Tensor, ref_logp: Tensor, guide_beta: float) -> Tensor:
    """r_hat = guide_beta log pi_guide(a|s) / pi_ref(a|s), [B, T], a constant: it carries no gradient."""
    return guide_beta * (guide_logp - ref_logp).detach()


def f_w(r_hat: Tensor, alpha: float) -> Tensor:
    """f_w = 1 + alpha r_hat: the weight of each token of the chosen response, the shape of r_hat."""
    return 1 + alpha * r_hat


def f_l(r_hat: Tensor, alpha: float) -> Tensor:
    """f_l = 1 - alpha r_hat: the weight of each token of the rejected response, the shape of r_hat."""
    return 1 - alpha * r_hat


def phi(logratio_w: Tensor, logratio_l: Tensor, f_w: Tensor, f_l: Tensor, beta: float) -> Tensor:
    """phi = sum_t beta f_w log(pi/pi_ref)_w - sum_t beta f_l log(pi/pi_ref)_l. Four [B, T] in, [B] out."""
    return beta * ((f_w * logratio_w).sum(-1) - (f_l * logratio_l).sum(-1))


class Loss(NamedTuple):
    """What every loss returns, a number a pair: each field is [B].

    dpo_margin is beta (logratio_w - logratio_l), logratio_w and _l are log pi(y|x) / pi_ref(y|x) of the
    whole response. SimPO knows no reference: there these three are None.
    """

    losses: Tensor
    phi: Tensor
    dpo_margin: Tensor | None
    logratio_w: Tensor | None
    logratio_l: Tensor | None


def tgdpo_loss(policy, ref, guide, beta: float, alpha: float, guide_beta: float | None = None) -> Loss:
    """-log sigma(phi), pair by pair.

    policy, ref, guide: (chosen, rejected), each [B, T] per-token log-probs, 0 where there is no response
    token; chosen and rejected may have different T. guide_beta scales r_hat; None means beta.
    Only the policy receives a gradient. ValueError: shapes that differ, beta <= 0, guide_beta <= 0, alpha < 0.
    """
    guide_beta = beta if guide_beta is None else guide_beta
    _check_pairs(policy=policy, ref=ref, guide=guide)
    _check_positive(beta=beta, guide_beta=guide_beta)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}: it must be a number >= 0")
    ratio_w, ratio_l = map(token_log_ratios, policy, ref)
    weight_w = f_w(r_hat(guide[0], ref[0], guide_beta), alpha)
    weight_l = f_l(r_hat(guide[1], ref[1], guide_beta), alpha)
    margin = phi(ratio_w, ratio_l, weight_w, weight_l, beta)
    logratio_w, logratio_l = ratio_w.sum(-1), ratio_l.sum(-1)
    return Loss(-F.logsigmoid(margin), margin, beta * (logratio_w - logratio_l), logratio_w, logratio_l)


def largest_alpha(r_hat_w: Tensor, r_hat_l: Tensor, share: float = 1.0) -> float:
    """The supremum of the alpha at which f > 0 on at least `share` of the tokens: exactly, every alpha
    below it does and alpha equal to it does not. inf where no token can reach f <= 0.

    r_hat_w, r_hat_l: r_hat of the response tokens of a cache (no padding), any shape. 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: it must lie in (0, 1]")
    slope = torch.cat([-r_hat_w.flatten(), r_hat_l.flatten()])  # f = 1 - alpha slope on both sides
    if slope.numel() == 0:
        return math.inf
    kept = math.ceil(round(share * slope.numel(), 6))  # rounded: 0.07 * 100 is 7.000000000000001
    steepest = slope.kthvalue(max(kept, 1)).values.item()
    return 1 / steepest if steepest > 0 else math.inf


def dpo_loss(policy, ref, beta: float) -> Loss:
    """DPO: -log sigma(beta log pi(y_w)/pi_ref(y_w) - beta log pi(y_l)/pi_ref(y_l)). Arguments as in tgdpo_loss."""
    _check_pairs(policy=policy, ref=ref)
    _check_positive(beta=beta)
    logratio_w, logratio_l = (token_log_ratios(logp, ref_logp).sum(-1) for logp, ref_logp in zip(policy, ref))
    margin = beta * (logratio_w - logratio_l)
    return Loss(-F.logsigmoid(margin), margin, margin, logratio_w, logratio_l)


def simpo_loss(policy, lengths, beta: float, gamma: float) -> Loss:
    """SimPO: -log sigma(phi - gamma), phi = beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x).

    lengths: (chosen, rejected), each B response lengths in tokens, all at least 1. gamma: the margin itself.
    """
    _check_pairs(policy=policy)
    _check_positive(beta=beta)
    mean_w, mean_l = (logp.sum(-1) / _lengths(length, logp) for logp, length in zip(policy, lengths))
    margin = beta * (mean_w - mean_l)
    return Loss(-F.logsigmoid(margin - gamma), margin, None, None, None)


def _lengths(lengths, logp: Tensor) -> Tensor:
    lengths = torch.as_tensor(lengths, dtype=logp.dtype, device=logp.device)
    if lengths.shape != logp.shape[:1] or not bool((lengths >= 1).all()):
        raise ValueError(f"lengths must be {len(logp)} numbers of at least 1, one a pair")
    return lengths


def _check_pairs(**pairs):
    first = next(iter(pairs))
    for side, name in enumerate(("chosen", "rejected")):
        for model, pair in pairs.items():
            shape, expected = tuple(pair[side].shape), tuple(pairs[first][side].shape)
            if len(shape) != 2 or shape != expected or shape[0] != len(pairs[first][0]):
                raise ValueError(f"{model} {name} is {list(shape)}: every {name} tensor must be one [B, T], "
                                 f"with B that of {first} chosen, {len(pairs[first][0])}")


def _check_positive(**numbers):
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: it must be a number > 0")
