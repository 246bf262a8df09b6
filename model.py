"""The transformer of Llama, Mistral, Qwen and Gemma: configuration, blocks, packs, token log-probs, sampling.

    model = load_model("path/to/checkpoint")            # config.json and *.safetensors
    logits = model(tokens)                              # [B, T] right-padded ids -> [B, T, V]
    logp = model(pack.tokens, pack)                     # packed pairs -> log p [R] of their response tokens
    replies = generate(model, prompts, 64, stop={end})  # lists of ids -> lists of ids

Parameter names are the checkpoint's names, so loading is a copy. The model knows nothing of pairs, losses or
process groups: sharding is applied from outside, and a pack is any named tuple with the fields of data.Pack.

Letters: B sequences, T tokens of a sequence, N tokens of a pack (B = 1), M keys of all its segments, n queries and
m keys of one attention, R response tokens, C model size, H heads, K key-value heads, D head size, V vocabulary.
"""

import functools
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from files import config as config_file
from files import weights

# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """The fields of config.json that change what the model computes, under their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int  # what the checkpoint was trained for, in tokens; longer input is the caller's risk
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict  # {"rope_type": "default" | "linear" | "llama3", and its numbers}
    tie_word_embeddings: bool
    attention_bias: bool  # of q, k and v
    attention_out_bias: bool  # of o
    mlp_bias: bool
    hidden_act: str  # of the MLP's gate: "silu" or "gelu_pytorch_tanh"
    sliding_window: int | None  # a token sees this many keys, itself among them,
    layer_types: tuple  # in the layers that say "sliding_attention" here; in "full_attention", all
    use_qk_norm: bool  # an RMSNorm of each head's queries and keys (Qwen3)
    query_pre_attn_scalar: float  # scores are divided by its root; head_dim but in Gemma
    attn_logit_softcapping: float | None  # scores s become cap · tanh(s / cap) (Gemma 2)
    final_logit_softcapping: float | None  # and so do logits
    norm_offset: int  # RMSNorm multiplies by this + weight: 1 in Gemma, else 0
    post_norms: bool  # what attention and MLP give is normed too, before it is added (Gemma 2)
    scale_embedding: bool  # embeddings are multiplied by √C (Gemma)

    def window(self, layer: int) -> int | None:
        """How many keys a token sees in layer number `layer`, itself among them; None: all."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


def read_config(directory: str | os.PathLike) -> Config:
    """Read DIRECTORY/config.json. Raises BadInput for what this model does not compute."""
    path = os.path.join(directory, "config.json")
    return parse_config(weights.read_json(path), path)


def parse_config(raw: dict, path: str = "config.json") -> Config:
    """A config.json's object -> Config; `path` names it in errors. Raises BadInput."""
    return Config(**config_file.read_fields(raw, path))


# ------------------------------------------------------------------------------------------------ transformer

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh")}
SCORES = 1 << 22  # capped attention: scores in memory at once, in each of about four float32 tensors


def rope_frequencies(config: Config, device: torch.device | None = None) -> Tensor:
    """RoPE's angle per position for each of the D/2 pairs, float32 [D/2] (Su et al. 2021). `linear` divides all by
    the factor; `llama3` divides the slow ones, keeps the fast ones and blends between (Llama 3.1)."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    inv_freq = 1.0 / config.rope_theta**pairs
    scaling = config.rope_scaling
    if scaling["rope_type"] == "linear":
        inv_freq = inv_freq / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # in the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = fast * inv_freq + (1 - fast) * inv_freq / scaling["factor"]
    return inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of x [B, T, H, D] by its angle; cos, sin [T, D/2] or [B, T, D/2], float32."""
    x1, x2 = x.float().chunk(2, dim=-1)  # [B, T, H, D/2] each
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [T, 1, D/2] or [B, T, 1, D/2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)  # [B, T, H, D]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean and the root in float32; Gemma's multiplies by 1 + weight there."""

    def __init__(self, size: int, config: Config):
        super().__init__()
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (normed * (self.offset + self.weight.float())).type_as(x)
        return self.weight * normed.type_as(x)


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
    for c in _equal_slices(n, max(1, SCORES // (B * H * m))):
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


class Attention(nn.Module):
    """Grouped-query attention with RoPE, of layer number `layer`."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, K, D = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.heads, self.kv_heads = H, K
        self.scores = (config.window(layer), config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping)
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_out_bias)
        self.q_norm, self.k_norm = (RMSNorm(D, config) if config.use_qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments, cache) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).view(B, T, self.heads, -1)), cos, sin)  # [B, T, H, D]
        k = rotate(self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, -1)), cos, sin)  # [B, T, K, D]
        v = self.v_proj(x).view(B, T, self.kv_heads, -1)  # [B, T, K, D]
        if segments is not None:
            y = packed_attention(q[0], k[0], v[0], segments, *self.scores)  # [N, H, D], B = 1
        else:
            q, k, v = (h.transpose(1, 2) for h in (q, k, v))  # [B, H or K, T, D]
            k, v, positions = (k, v, None) if cache is None else remember(k, v, *cache)
            y = attention(q, k, v, *self.scores, positions).transpose(1, 2)  # [B, T, H, D]
        return self.o_proj(y.reshape(B, T, -1))  # [B, T, C]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)); GeGLU with hidden_act gelu."""

    def __init__(self, config: Config):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, C, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # [B, T, C]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); with post_norms, norm(attention(…)) and norm(mlp(…)).
    With `recompute` its activations are not kept but computed again in the backward pass."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)
        self.recompute = False

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments, cache) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.layer, x, cos, sin, segments, cache, use_reentrant=False)
        return self.layer(x, cos, sin, segments, cache)

    def layer(self, x: Tensor, cos: Tensor, sin: Tensor, segments, cache) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), cos, sin, segments, cache)
        if self.post_norms:
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))  # [B, T, C]
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, T, C]


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: the part of the checkpoint whose names begin with `model.`."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)


class CausalLM(nn.Module):
    """The transformer with its head. Parameters are made on the current device."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.compiled = False  # whether the log-probs' passes over the logits are compiled
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The head's weight [V, C]: the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens: Tensor, pack=None, cache: "Cache | None" = None, states: bool = False) -> Tensor:
        """tokens [B, T] right-padded ids -> logits [B, T, V]. With a pack (data.Pack), tokens is its [N] -> log p [R]
        of the response tokens, float32; with `states` too, what these are made of: hidden [R, C], the head [V, C] and
        the logits' cap. With a Cache, tokens [B, T] are the prompts, and then [B, 1] the next token of each ->
        logits [B, V] after the last token of each."""
        if pack is not None:
            tokens, positions = tokens[None], pack.positions  # [1, N], [N]
        elif cache is not None and tokens.shape[1] == 1:
            positions = cache.last.to(tokens.device)[:, None]  # [B, 1]
        else:
            positions = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        angles = positions[..., None].float() * rope_frequencies(self.config, tokens.device)  # [T, D/2] or [B, 1, D/2]
        cos, sin = angles.cos(), angles.sin()
        x = self.model.embed_tokens(tokens)  # [B, T, C]
        if self.config.scale_embedding:
            x = x * x.new_full((), self.config.hidden_size**0.5)  # √C as x's type has it
        segments = None if pack is None else Segments(*(getattr(pack, name) for name in Segments._fields))
        kept = [None] * len(self.model.layers) if cache is None else cache.of_layers(self.config, x)
        for layer, keys_and_values in zip(self.model.layers, kept):
            x = layer(x, cos, sin, segments, keys_and_values)
        x, cap = self.model.norm(x), self.config.final_logit_softcapping
        if pack is not None:
            hidden = x[0].index_select(0, pack.predictors)  # [R, C]
            if states:
                return hidden, self.head, cap
            return token_log_probs(hidden, self.head, pack.targets, self.compiled, cap)  # [R]
        if cache is not None:
            last = cache.last.to(x.device).clamp(max=x.shape[1] - 1)  # of the prompts, or the only one
            x = x[torch.arange(len(x), device=x.device), last]  # [B, C]
        return soft_cap(F.linear(x, self.head), cap)


def random_model(config: Config, seed: int = 0, std: float = 0.02) -> CausalLM:
    """A CausalLM with weights drawn from N(0, std²), norms that multiply by 1 and biases at 0: a start for pretraining
    and tests."""
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
    return model


# -------------------------------------------------------------------------------------- token log-probabilities


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """How many tokens' float32 logits are made at once: what fits the budget, 1 GiB on CUDA and 32 MiB on CPU."""
    budget = (1 << 30) if device_type == "cuda" else (32 << 20)
    return max(16, budget // (4 * vocab_size))


KEPT = 4  # chunks of logits that stay for the backward pass, which makes the others again


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
        ctx.chunks, ctx.cap, ctx.kept = _equal_slices(len(targets), most), cap, []
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
    for c in _equal_slices(len(hidden), max(1, chunk_tokens(weight.shape[0], weight.device.type) // 4)):
        p = _logits(hidden[c], weight, cap).log_softmax(-1)  # [r, V]
        q = _logits(other_hidden[c], other_weight, other_cap).log_softmax(-1)
        kl[c] = q.neg_().add_(p).mul_(p.exp_()).sum(-1)  # p · (log p − log q)
    return kl.clamp_(min=0)  # rounding may leave a little less


def _logits(hidden, weight, cap):
    """soft_cap(hidden · weightᵀ) in float32 (float64 for float64): hidden [r, C], weight [V, C] -> [r, V]."""
    logits = _product(hidden, weight.t())
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _equal_slices(count, most):
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


# --------------------------------------------------------------------------------------------------- sampling


class Cache:
    """The keys and values that generation keeps from step to step. lengths [B]: tokens of each prompt; most: tokens
    of the longest sequence with all that is to come, T."""

    def __init__(self, lengths: Tensor, most: int):
        self.last, self.most, self.layers = lengths - 1, most, None  # last: position of each one's last token, [B]

    def of_layers(self, config: Config, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Each layer's keys and values [B, K, T, D] and the positions `last` [B]. Made at first, of x's type."""
        if self.layers is None:
            shape = (2, len(x), config.num_key_value_heads, self.most, config.head_dim)
            self.layers = [x.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        return [(*kept, self.last.to(x.device)) for kept in self.layers]


def remember(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, last: Tensor) -> tuple:
    """Write new tokens' k and v [B, K, n, D] into a layer's keys and values [B, K, T, D] -> what attention takes: keys,
    values, positions. Prompts (n > 1) begin at 0 and see themselves alone, their padding is overwritten before a token
    sees it; a single token stands at `last` [B] and sees all before it."""
    n = k.shape[2]
    if n > 1:
        keys[:, :, :n], values[:, :, :n] = k, v
        return k, v, None
    sequences = torch.arange(len(last), device=last.device)
    keys[sequences, :, last], values[sequences, :, last] = k[:, :, 0], v[:, :, 0]  # [B, K, D]
    return keys, values, last[:, None]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    stop: Collection[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_early: bool = True,
) -> list[list[int]]:
    """Continue each prompt: lists of ids -> lists of new ids, ended by an id of `stop` (included) or after max_new.

    Temperature 0 takes the likeliest token, otherwise `generator` draws. stop_early: end when all have ended; without,
    every call makes max_new steps, so that several processes that share the model's collectives make as many."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = pad_sequence([torch.tensor(prompt, device=device) for prompt in prompts], batch_first=True)  # [B, T]
    cache, replies = Cache(lengths, tokens.shape[1] + max_new), [[] for _ in prompts]
    for _ in range(max_new):
        logits = model(tokens, cache=cache).float()  # [B, V]
        if temperature > 0:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)  # [B, 1]
        else:
            tokens = logits.argmax(-1, keepdim=True)  # [B, 1]
        cache.last = cache.last + 1
        for reply, token in zip(replies, tokens[:, 0].tolist()):
            if not reply or reply[-1] not in stop:
                reply.append(token)
        if stop_early and all(reply[-1] in stop for reply in replies):
            break
    return replies


# ---------------------------------------------------------------------------------------------------- loading


def load_model(
    directory: str | os.PathLike, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CausalLM:
    """A CausalLM with the weights of `directory` in the given type on the device. Raises BadInput."""
    with torch.device("meta"):
        model = CausalLM(read_config(directory)).to(dtype)
    model.to_empty(device=device)
    load_weights(model, directory)
    return model


def load_weights(
    model: CausalLM,
    directory: str | os.PathLike,
    local: Callable[[Tensor], tuple[Tensor, int]] = lambda parameter: (parameter.data, 0),
) -> None:
    """Fill every parameter from the checkpoint's safetensors, one tensor at a time, and check that all are finite.

    `local` gives this process's part of a parameter, and where in its first dimension that begins; only that part is
    read. Strict both ways: raises BadInput for a tensor missing, extra, of another shape or type."""
    files = _checked_files(model, directory)
    for name, parameter in model.named_parameters():
        weights.copy_tensor(files[name], name, *local(parameter))
    if model.lm_head is None and weights.HEAD in files:
        weights.check_tied(files[weights.HEAD], *local(model.head))


def check(directory: str | os.PathLike) -> str | os.PathLike:
    """Check a checkpoint by its configuration and its files' headers, reading no weights: the names, types and shapes
    of its tensors. Returns the directory. Raises BadInput."""
    with torch.device("meta"):
        _checked_files(CausalLM(read_config(directory)), directory)
    return directory


def _checked_files(model, directory):
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return weights.checked_files(directory, shapes, tied=model.lm_head is None)
