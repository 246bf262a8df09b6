"""Attention of packed pairs and of whole sequences, with windows and capped scores: what torch has one kernel for, and
what it has none for.

Letters: B sequences, N tokens of a pack, M keys of all its segments, n queries and m keys of one attention, H heads,
K key-value heads, D head size.
"""

import functools
import math
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint

SCORES = 1 << 22  # capped attention: scores in memory at once, in each of about four float32 tensors


class _GatherKeys(torch.autograd.Function):
    """x[keys] for the keys of all segments. A prompt's tokens stand twice among them; their gradient is the sum of
    two, taken by two gathers and an add, which is exact and the same on every run (index_add is neither in bf16)."""

    @staticmethod
    def forward(ctx, x, keys, first, shared, second):
        ctx.save_for_backward(first, shared, second)
        return x[keys]  # [N, K, D] -> [M, K, D]

    @staticmethod
    def backward(ctx, grad):
        first, shared, second = ctx.saved_tensors
        total = grad[first]  # [M, K, D] -> [N, K, D]
        total[shared] = total[shared] + grad[second]
        return total, None, None, None, None


class Segments(NamedTuple):
    """What attention reads of a pack (data.Pack), and nothing else: a compiled block is made anew for what it is given
    and does not read, such as the number of pairs."""

    keys: Tensor
    first: Tensor
    shared: Tensor
    second: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window=None, scale=None, cap=None) -> Tensor:
    """Attention of a pack: q [N, H, D], k and v [N, K, D] -> [N, H, D]; the rest is attention's.

    Each pair has two segments: prompt and chosen over themselves, rejected over prompt and rejected. On CUDA in half
    precision one kernel does all segments, elsewhere and with a cap a loop does one after another."""
    places = (segments.keys, segments.first, segments.shared, segments.second)
    k, v = (_GatherKeys.apply(x, *places) for x in (k, v))  # [M, K, D]
    if _one_kernel(q, cap):
        return _cuda_segments(q, k, v, segments, window, scale)
    return _one_by_one(q, k, v, segments, window, scale, cap)


@torch.compiler.disable  # its lengths are others in every pack
def _one_by_one(q, k, v, segments, window, scale, cap):
    """All segments of a pack in a loop: q [N, H, D], k and v [M, K, D] -> [N, H, D]."""
    lengths_q, lengths_k = segments.cu_q.diff().tolist(), segments.cu_k.diff().tolist()
    out = []
    for q, k, v in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
        if not len(q):  # a rejected response of one token, which predicts nothing
            continue
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H or K, n or m, D]
        out.append(attention(q, k, v, window, scale, cap)[0].transpose(0, 1))  # [n, H, D]
    return torch.cat(out)  # [N, H, D]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Causal attention: q [B, H, n, D], k and v [B, K, m, D] -> [B, H, n, D]. The queries stand at `positions` [B, n]
    of the m keys; where none are given, they are the last n. Scores are the products times `scale` [1/√D], capped
    where a cap is given."""
    n, m = q.shape[2], k.shape[2]
    if positions is None:
        if n == m and (window is None or window >= m) and cap is None:
            k, v = _alike(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        positions = torch.arange(m - n, m, device=q.device)[None]  # [1, n]
    if cap is not None:
        return _capped_attention(q, k, v, window, scale, cap, positions)
    mask = causal_mask(positions, m, window)[:, None]  # [B or 1, 1, n, m]
    k, v = _alike(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap), which lies between -cap and cap; x itself where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


@torch.compiler.disable
def _capped_attention(q, k, v, window, scale, cap, positions):
    """attention with capped scores, which no kernel of torch computes: an explicit product for some queries at a time,
    computed again in the backward pass, so that no more than SCORES scores are in memory. Kept, those of 2 × 2048
    tokens would be 10 GB in Gemma 2 2B."""
    (B, H, n, _), m, out = q.shape, k.shape[2], []
    explicit = functools.partial(checkpoint, _explicit_attention, use_reentrant=False, preserve_rng_state=False)
    for c in equal_slices(n, max(1, SCORES // (B * H * m))):
        seen = slice(m - n + c.stop)  # the keys up to its last query's
        out.append(explicit(q[:, :, c], k[:, :, seen], v[:, :, seen], window, scale, cap, positions[:, c]))
    return torch.cat(out, dim=2)  # [B, H, n, D]


def _explicit_attention(q, k, v, window, scale, cap, positions):
    B, H, n, D = q.shape
    K, m = k.shape[1:3]
    scores = q.reshape(B, K, H // K * n, D) @ k.mT  # a key-value head's queries one after another, [B, K, H/K · n, m]
    scores = soft_cap(scores.view(B, H, n, m).to(torch.promote_types(q.dtype, torch.float32)) * scale, cap)
    hidden = ~causal_mask(positions, m, window)[:, None]  # [B or 1, 1, n, m]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).type_as(v)  # [B, H, n, m]
    return (weights.view(B, K, H // K * n, m) @ v).view(B, H, n, D)


def causal_mask(positions: Tensor, m: int, window: int | None = None) -> Tensor:
    """True where a query at one of `positions` [B, n] sees one of m keys, [B, n, m]: those up to its own, with a
    window the last `window` of them."""
    keys, positions = torch.arange(m, device=positions.device), positions[..., None]  # [m], [B, n, 1]
    return keys <= positions if window is None else (keys <= positions) & (keys > positions - window)


def equal_slices(count, most):
    """Slices of near-equal length, none longer than `most`, that cover range(count)."""
    pieces = math.ceil(count / most)
    edges = [count * i // pieces for i in range(pieces + 1)] if pieces else []
    return [slice(a, b) for a, b in zip(edges, edges[1:])]


# ------------------------------------------------------------------------------- what is there only for CUDA


NAMES_GROUPS = "enable_gqa" in signature(varlen.varlen_attn).parameters  # torch 2.12 on; 2.11 takes them as they are


def _one_kernel(q, cap):
    """Whether _cuda_segments computes this: flash attention knows half precision and no cap."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and cap is None


def _cuda_segments(q, k, v, segments, window, scale):
    """All segments of a pack in one kernel: q [N, H, D], k and v [M, K, D] -> [N, H, D]."""
    more = {"enable_gqa": q.shape[1] != k.shape[1]} if NAMES_GROUPS else {}
    more |= {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
    return varlen.varlen_attn(q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, **more)


def _alike(q, k, v, mask=None):
    """k and v [B, K, m, D], on CUDA with H heads where no kernel groups them (float32, a mask): otherwise the scores of
    all heads stay in memory for the backward pass."""
    if q.is_cuda and k.shape[1] < q.shape[1] and (mask is not None or q.dtype == torch.float32):
        return (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return k, v
