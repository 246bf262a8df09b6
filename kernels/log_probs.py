"""Log-probabilities of tokens without the logits of all of them at once, and divergences of two models.

Letters: R response tokens, r tokens of a chunk, C model size, V vocabulary.
"""

import functools

import torch
from torch import Tensor

from kernels.attention import equal_slices

CUDA_LOGITS, CPU_LOGITS = 1 << 30, 32 << 20  # bytes of float32 logits made at once
KEPT = 4  # chunks of logits that stay for the backward pass, which makes the others again


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """How many tokens' float32 logits are made at once: what fits the budget, 1 GiB on CUDA and 32 MiB on CPU."""
    return max(16, (CUDA_LOGITS if device_type == "cuda" else CPU_LOGITS) // (4 * vocab_size))


def token_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, compiled: bool = False, cap: float | None = None
) -> Tensor:
    """log softmax(soft_cap(hidden · weightᵀ))[target]: hidden [R, C], weight [V, C], targets [R] -> [R] in float32
    (float64 for float64 input). Logits are float32, a chunk of tokens at a time. Any R, 0 among them: the result is
    connected to hidden and weight, so that every rank runs the same collectives. compiled: torch.compile makes one
    kernel of each pass over the logits."""
    most, keep = chunk_tokens(weight.shape[0], weight.device.type), KEPT if torch.is_grad_enabled() else 0
    return _TokenLogProbs.apply(hidden, weight, targets, most, compiled, cap, keep)


class _TokenLogProbs(torch.autograd.Function):
    """With p = softmax(logits) and g the gradient of log p[target]: d/dlogits = g · (one-hot(target) − p). Where logits
    are z = cap · tanh(x / cap), d/dx = (1 − (z / cap)²) · d/dz. At most `most` tokens a chunk; the last `keep` chunks'
    e^(z − max z) are kept."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, most, compiled=False, cap=None, keep=KEPT):
        ctx.chunks, ctx.cap, ctx.kept = equal_slices(len(targets), most), cap, []
        exponentials, ctx.scaled = _passes(compiled)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logp, top, total = (hidden.new_empty(len(targets), dtype=wide) for _ in range(3))  # [R]
        for left, c in zip(range(len(ctx.chunks), 0, -1), ctx.chunks):
            logits = _logits(hidden[c], weight, cap)  # [r, V]
            at_target = logits.gather(1, targets[c, None])[:, 0]
            top[c], total[c] = exponentials(logits)  # in place: e^(z − top) from here on
            logp[c] = at_target - top[c] - total[c].log()
            ctx.kept += [logits] if left <= keep else []
        ctx.save_for_backward(hidden, weight, targets, logp, top, total)
        return logp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, logp, top, total = ctx.saved_tensors
        at_target = (grad * -torch.expm1(logp)).to(hidden.dtype)[:, None]  # g · (1 − p[target]), [R, 1]
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=total.dtype)  # [V, C]
        for c in reversed(ctx.chunks):
            if ctx.kept:
                exps = ctx.kept.pop()
            else:
                exps = _logits(hidden[c], weight, ctx.cap).sub_(top[c, None]).exp_()  # [r, V]
            bend = None
            if ctx.cap is not None:  # the cap's slope, [r, V], from z = log e^(z − top) + top
                bend = exps.log().add_(top[c, None]).clamp_(min=-ctx.cap).div_(ctx.cap).square_().neg_().add_(1)
            slope = ctx.scaled(exps, -grad[c] / total[c], hidden.dtype)  # −g · p, [r, V]
            slope.scatter_(1, targets[c, None], at_target[c])
            if bend is not None:
                slope.mul_(bend)
            grad_hidden[c] = slope @ weight
            if grad_weight is not None:
                _add_product(grad_weight, slope.t(), hidden[c])
            del exps, slope, bend  # before the next are made
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


@torch.no_grad()
def token_divergences(
    hidden: Tensor,
    weight: Tensor,
    cap: float | None,
    other_hidden: Tensor,
    other_weight: Tensor,
    other_cap: float | None,
) -> Tensor:
    """KL(p || q) over the whole vocabulary, p = softmax(soft_cap(hidden · weightᵀ)), q likewise of the other: hidden
    [R, C], weight [V, C], the other's C and cap may differ -> [R], of the type of token_log_probs. Four logits instead
    of one are alive for a quarter of the tokens; no gradient."""
    kl = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))  # [R]
    for c in equal_slices(len(hidden), max(1, chunk_tokens(weight.shape[0], weight.device.type) // 4)):
        p = _logits(hidden[c], weight, cap).log_softmax(-1)  # [r, V]
        q = _logits(other_hidden[c], other_weight, other_cap).log_softmax(-1)
        kl[c] = q.neg_().add_(p).mul_(p.exp_()).sum(-1)  # p · (log p − log q)
    return kl.clamp_(min=0)  # rounding may leave a little less


def _logits(hidden, weight, cap):
    """soft_cap(hidden · weightᵀ) in float32 (float64 for float64): hidden [r, C], weight [V, C] -> [r, V]."""
    logits = _product(hidden, weight.t())
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _product(a, b):
    """a @ b in float32 (float64 for float64). CUDA writes float32 itself; elsewhere the product is cast."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda and a.dtype != wide else (a @ b).to(wide)


def _add_product(total, a, b):
    """total += a @ b, total in float32 (float64 for float64), without the product as a tensor of its own."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)


@functools.cache
def _passes(compiled):
    """The two passes over a chunk's logits [r, V]: e^(logits − max) in place, which gives the max and the sum, [r]
    each; and scale · that, of the type asked for, which may overwrite it. torch.compile makes one kernel of each."""

    def exponentials(logits):
        top = logits.amax(-1)
        logits.sub_(top[:, None]).exp_()
        return top, logits.sum(-1)

    scaled = lambda exps, scale, dtype: exps.mul_(scale[:, None]).to(dtype)
    return (torch.compile(exponentials), torch.compile(scaled)) if compiled else (exponentials, scaled)
