"""The transformer of Llama and Mistral, and Hugging Face checkpoints in and out.

    model = load_model("path/to/checkpoint")            # config.json and *.safetensors
    logits = model(tokens)                              # [B, T] right-padded ids -> [B, T, V]
    logp = model(pack.tokens, pack)                     # a row of packed pairs -> log p [R] of its response tokens

Parameter names are the checkpoint's names, so loading is a copy. The model knows nothing of pairs, losses or
process groups: sharding is applied from outside, and a pack is any named tuple with the fields of data.Pack.

Letters: B rows, T tokens of a row, N tokens of a packed row (B = 1), S segments, M keys of all segments,
R response tokens, C model size, H heads, K key-value heads, D head size, V vocabulary.
"""

import math
import os
from dataclasses import dataclass
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint

from files.errors import BadInput
from files.weights import PIECE, open_tensors, read_json, tensor_files

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
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None  # Mistral v0.1: a token sees this many keys, itself among them


ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(directory):
    """Read DIRECTORY/config.json -> Config. Both spellings of RoPE are read: `rope_theta` + `rope_scaling`, and
    transformers 5's `rope_parameters`. Raises BadInput for what this model does not compute."""
    path = os.path.join(directory, "config.json")
    return parse_config(read_json(path), path)


def parse_config(raw, path="config.json"):
    """A config.json's object -> Config; `path` names it in errors."""

    def bad(what):
        return BadInput(f"{path}: {what}")

    def number(name, default=None, kind=int, source=raw):
        value = source.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise bad(f"the field {name} is missing")
        fits = isinstance(value, int) if kind is int else isinstance(value, (int, float))
        if not fits or isinstance(value, bool) or not (0 < value < (1 << 31 if kind is int else math.inf)):
            raise bad(f"{name} is {value!r:.60}, where a positive {'whole ' if kind is int else ''}number is expected")
        return value

    def flag(name):
        value = raw.get(name)
        if value not in (None, True, False):
            raise bad(f"{name} is {value!r:.60}, where true or false is expected")
        return bool(value)

    names = raw.get("architectures")
    if not (isinstance(names, list) and names and names[0] in ARCHITECTURES):
        raise bad(f"the architecture {names!r:.80} is not supported; supported are {' and '.join(ARCHITECTURES)}")
    if raw.get("quantization_config") is not None:
        raise bad("the checkpoint is quantised, which is not supported; use the original float weights")
    if raw.get("hidden_act", "silu") != "silu":
        raise bad(f"hidden_act is {raw['hidden_act']!r:.60}; only silu is supported")

    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise bad("rope_parameters or rope_scaling is no object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_NUMBERS:
        raise bad(f"the rope type {rope_type!r:.60} is not supported; supported are {', '.join(ROPE_NUMBERS)}")
    if (raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise bad("partial_rotary_factor other than 1 is not supported")
    theta = number("rope_theta", 10000.0, float, rope if rope.get("rope_theta") is not None else raw)
    scaling = {"rope_type": rope_type} | {n: number(n, kind=float, source=rope) for n in ROPE_NUMBERS[rope_type]}
    if rope_type == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise bad("high_freq_factor must be greater than low_freq_factor")

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    if number("num_hidden_layers") > 1000:
        raise bad(f"num_hidden_layers is {raw['num_hidden_layers']}, more than any model has")
    kv_heads = number("num_key_value_heads", heads)
    if heads % kv_heads:
        raise bad(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if raw.get("head_dim") is None and hidden % heads:
        raise bad(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is missing")
    head_dim = number("head_dim", hidden // heads)
    if head_dim % 2:
        raise bad(f"head_dim is {head_dim}; RoPE turns pairs, so it must be even")
    window = None
    if names[0] == "MistralForCausalLM" and raw.get("sliding_window", 4096) is not None:
        window = number("sliding_window", 4096)
    return Config(
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=number("max_position_embeddings", 2048),
        rms_norm_eps=number("rms_norm_eps", 1e-6, float),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=flag("tie_word_embeddings"),
        attention_bias=flag("attention_bias"),
        mlp_bias=flag("mlp_bias"),
        sliding_window=window,
    )


# ------------------------------------------------------------------------------------------------ transformer


def rope_frequencies(config, device=None):
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


def rotate(x, cos, sin):
    """Turn each pair (i, i + D/2) of x [B, T, H, D] by its angle; cos, sin [T, D/2] in float32."""
    x1, x2 = x.float().chunk(2, dim=-1)  # [B, T, H, D/2] each
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D/2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean and the root in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x)


class _GatherKeys(torch.autograd.Function):
    """x[keys] for the keys of all segments. A prompt's row stands twice among them; its gradient is the sum of two
    rows, taken by two gathers and an add, which is exact and the same on every run (index_add is neither in bf16)."""

    @staticmethod
    def forward(ctx, x, keys, first, shared, second):
        ctx.save_for_backward(first, shared, second)
        return x[keys]  # [N, K, D] -> [M, K, D]

    @staticmethod
    def backward(ctx, grad):
        first, shared, second = ctx.saved_tensors
        total = grad[first]  # [N, K, D]
        total[shared] = total[shared] + grad[second]
        return total, None, None, None, None


def causal_mask(queries, keys, window, device=None):
    """True where a query sees a key, [queries, keys]: causal, aligned at the bottom right, as the queries are the
    last of the keys; with a window the last `window` keys only."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


def packed_attention(q, k, v, pack, window=None):
    """Attention of a packed row: q [N, H, D], k and v [N, K, D] -> [N, H, D].

    Each pair has two segments: prompt and chosen over themselves, rejected over prompt and rejected. On CUDA in half
    precision one variable-length kernel does all segments, elsewhere a loop does one after another."""
    k, v = (_GatherKeys.apply(x, pack.keys, pack.first, pack.shared, pack.second) for x in (k, v))  # [M, K, D]
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        gqa = {}
        if "enable_gqa" in signature(varlen.varlen_attn).parameters:  # torch 2.12 on
            gqa = {"enable_gqa": q.shape[1] != k.shape[1]}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # [M, H, D]
        sees = (-1 if window is None else window - 1, 0)
        return varlen.varlen_attn(q, k, v, pack.cu_q, pack.cu_k, pack.max_q, pack.max_k, window_size=sees, **gqa)
    lengths_q, lengths_k = pack.cu_q.diff().tolist(), pack.cu_k.diff().tolist()
    out = []
    for q, k, v in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
        out.append(attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), window)[0].transpose(0, 1))
    return torch.cat(out)  # [N, H, D]


def attention(q, k, v, window=None):
    """Causal attention: q [B, H, n, D], k and v [B, K, m, D] with n <= m -> [B, H, n, D]. The queries are the last
    n of the m positions."""
    n, m = q.shape[2], k.shape[2]
    if n == m and (window is None or window >= m):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = causal_mask(n, m, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config):
        super().__init__()
        C, H, K, D = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.heads, self.kv_heads, self.window = H, K, config.sliding_window
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)

    def forward(self, x, cos, sin, pack):
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.heads, -1), cos, sin)  # [B, T, H, D]
        k = rotate(self.k_proj(x).view(B, T, self.kv_heads, -1), cos, sin)  # [B, T, K, D]
        v = self.v_proj(x).view(B, T, self.kv_heads, -1)  # [B, T, K, D]
        if pack is None:
            q, k, v = (h.transpose(1, 2) for h in (q, k, v))  # [B, H or K, T, D]
            y = attention(q, k, v, self.window).transpose(1, 2)  # [B, T, H, D]
        else:
            y = packed_attention(q[0], k[0], v[0], pack, self.window)  # [N, H, D], B = 1
        return self.o_proj(y.reshape(B, T, -1))  # [B, T, C]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, C, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). With `recompute` its activations are not kept but
    computed again in the backward pass."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.recompute = False

    def forward(self, x, cos, sin, pack):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.layer, x, cos, sin, pack, use_reentrant=False)
        return self.layer(x, cos, sin, pack)

    def layer(self, x, cos, sin, pack):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, pack)
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, T, C]


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: the part of the checkpoint whose names begin with `model.`."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A Llama or a Mistral with its head. `config` is a Config; parameters are made on the current device."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.compiled = False  # whether the log-probs' passes over the logits are compiled
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        """The head's weight [V, C]: the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens, pack=None, last=None):
        """tokens [B, T] right-padded ids -> logits [B, T, V]; with `last` [B] -> logits [B, V] of that position of
        each row. With a pack (data.Pack), tokens is its row [N] -> log p [R] of the response tokens, float32."""
        positions = torch.arange(tokens.shape[-1], device=tokens.device) if pack is None else pack.positions
        angles = positions[:, None].float() * rope_frequencies(self.config, tokens.device)  # [T, D/2]
        cos, sin = angles.cos(), angles.sin()
        x = self.model.embed_tokens(tokens if pack is None else tokens[None])  # [B, T, C]
        for layer in self.model.layers:
            x = layer(x, cos, sin, pack)
        x = self.model.norm(x)
        if pack is not None:
            hidden = x[0].index_select(0, pack.predictors)  # [R, C]
            return token_log_probs(hidden, self.head, pack.targets, self.compiled)  # [R]
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last]  # [B, C]
        return F.linear(x, self.head)


def random_model(config, seed=0, std=0.02):
    """A CausalLM with weights drawn from N(0, std²), norms at 1 and biases at 0: a start for pretraining and tests."""
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


def chunk_rows(vocab_size, device_type):
    """How many rows of float32 logits are alive at once: those that fit the budget, 1 GiB on CUDA and 32 MiB on CPU."""
    budget = (1 << 30) if device_type == "cuda" else (32 << 20)
    return max(16, budget // (4 * vocab_size))


def token_log_probs_plain(hidden, weight, targets):
    """log softmax(hidden · weightᵀ)[target], the obvious way: hidden [R, C], weight [V, C], targets [R] -> [R].
    It holds all logits [R, V]; the tests compare token_log_probs with it."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def token_log_probs(hidden, weight, targets, compiled=False):
    """log softmax(hidden · weightᵀ)[target]: hidden [R, C], weight [V, C], targets [R] -> [R] in float32 (float64 for
    float64 input). Logits are float32 and live for one chunk of rows; the backward pass computes them again, but for
    the last chunk's, which are kept for it. Any R, 0 among them: the result is connected to hidden and weight, so that
    every rank runs the same collectives. compiled: torch.compile makes one kernel of each pass over the logits."""
    return _TokenLogProbs.apply(hidden, weight, targets, chunk_rows(weight.shape[0], weight.device.type), compiled)


def _wide_matmul(a, b):
    """a @ b in float32, whatever their type. CUDA's matrix product writes float32 itself; elsewhere it is cast."""
    if a.is_cuda and a.dtype != torch.float32 and a.dtype != torch.float64:
        return torch.mm(a, b, out_dtype=torch.float32)
    product = a @ b
    return product if product.dtype == torch.float64 else product.float()


def _add_product(total, a, b):
    """total += a @ b where total is of a wide type, without the product as a tensor of its own."""
    if a.is_cuda and a.dtype != total.dtype:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _log_normaliser(logits):
    return logits.logsumexp(-1)


def _in_parts(function, logits):
    """function(logits) in sixteenths of the rows, as what it makes on the way is as large as what it is given."""
    return torch.cat([function(part) for part in logits.split(-(-len(logits) // 16))])


def _scaled_softmax(logits, norm, scale, dtype):
    return ((logits - norm[:, None]).exp() * scale[:, None]).to(dtype)


@cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


class _TokenLogProbs(torch.autograd.Function):
    """With p = softmax(logits) and g the gradient of log p[target]: d/dlogits = g · (one-hot(target) − p)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, compiled=False):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp = torch.empty(len(targets), dtype=wide, device=hidden.device)
        norm = torch.empty_like(logp)  # log of the softmax's denominator
        ctx.slices, ctx.compiled, logits = _equal_slices(len(targets), rows), compiled, None
        for rows in ctx.slices:
            logits = _wide_matmul(hidden[rows], weight.t())  # [r, V]
            norm[rows] = _compiled(_log_normaliser)(logits) if compiled else _in_parts(_log_normaliser, logits)
            logp[rows] = logits.gather(1, targets[rows, None])[:, 0] - norm[rows]
        ctx.last = logits  # the backward pass begins with it, and would need the memory for it anyway
        ctx.save_for_backward(hidden, weight, targets, norm, logp)
        return logp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, norm, logp = ctx.saved_tensors
        at_target = grad * -torch.expm1(logp)  # g · (1 − p[target])
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None  # float32 [V, C]
        for rows in reversed(ctx.slices):
            logits, ctx.last = ctx.last, None
            if logits is None:
                logits = _wide_matmul(hidden[rows], weight.t())
            if ctx.compiled:
                logits = _compiled(_scaled_softmax)(logits, norm[rows], -grad[rows], hidden.dtype)  # −g · p
            else:
                logits = logits.sub_(norm[rows, None]).exp_().mul_(-grad[rows, None]).to(hidden.dtype)
            logits.scatter_(1, targets[rows, None], at_target[rows, None].to(hidden.dtype))
            grad_hidden[rows] = logits @ weight
            if ctx.needs_input_grad[1]:
                grad_weight = (
                    _wide_matmul(logits.t(), hidden[rows])
                    if grad_weight is None
                    else _add_product(grad_weight, logits.t(), hidden[rows])
                )
            logits = None  # let go before the next is made
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _equal_slices(count, most):
    """Slices of near-equal length, none longer than `most`, that cover range(count)."""
    pieces = math.ceil(count / most)
    edges = [count * i // pieces for i in range(pieces + 1)] if pieces else []
    return [slice(a, b) for a, b in zip(edges, edges[1:])]


# ------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(model, prompts, max_new, stop, temperature=0.0, generator=None, pad=0):
    """Continue each prompt: a list of id lists -> a list of lists of new ids, ended by an id of `stop` (included) or
    after max_new. Temperature 0 takes the likeliest token. No cache: every step runs the whole row again."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.full((len(prompts), int(lengths.max()) + max_new), pad, device=device)  # [B, T]
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.as_tensor(prompt, device=device)
    rows, stops = torch.arange(len(prompts), device=device), torch.tensor(sorted(stop), device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    new = lengths.clone()  # the next position
    for _ in range(max_new):
        logits = model(tokens[:, : int(new.max())], last=new - 1).float()  # [B, V]
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        tokens[rows[~ended], new[~ended]] = chosen[~ended]
        new = new + (~ended).long()
        ended = ended | torch.isin(chosen, stops)
        if bool(ended.all()):
            break
    return [tokens[row, a:b].tolist() for row, (a, b) in enumerate(zip(lengths.tolist(), new.tolist()))]


# ------------------------------------------------------------------------------------ checkpoints, in and out

FLOATS = {"F64", "F32", "F16", "BF16"}


def load_model(directory, dtype=torch.float32, device="cpu"):
    """A CausalLM with the weights of `directory` in the given type on the device. Raises BadInput."""
    with torch.device("meta"):
        model = CausalLM(read_config(directory)).to(dtype)
    model.to_empty(device=device)
    load_weights(model, directory)
    return model


def load_weights(model, directory, local=lambda parameter: (parameter.data, 0)):
    """Fill every parameter from the checkpoint's safetensors, one tensor at a time, and check that all are finite.

    `local` gives the tensor that holds this process's rows of a parameter, and the number of its first row; only
    those rows are read. Strict both ways: raises BadInput for a tensor missing, extra, of another shape or type."""
    files = tensor_files(directory)
    parameters = dict(model.named_parameters())
    check_names(model, files, directory)
    for name, parameter in parameters.items():
        with open_tensors(files[name]) as file:
            stored = file.get_slice(name)
            _check_slice(files[name], name, stored, parameter.shape)
            target, start = local(parameter)
            rows = stored[start : start + len(target)]  # pages of the file, not yet in memory
            for piece, goal in zip(rows.flatten().split(PIECE), target.view(-1).split(PIECE)):
                if not bool(piece.isfinite().all()):
                    raise BadInput(
                        f"{files[name]}: {name} holds values that are not finite; the file is "
                        "damaged or the training that wrote it diverged"
                    )
                with torch.no_grad():
                    goal.copy_(piece)
    if "lm_head.weight" in files and model.lm_head is None:
        _check_tied(files, "lm_head.weight", *local(model.model.embed_tokens.weight))


def check(directory):
    """Check a checkpoint by its configuration and its files' headers, reading no weights: the names, types and shapes
    of its tensors. Returns the directory. Raises BadInput."""
    with torch.device("meta"):
        model = CausalLM(read_config(directory))
    files = tensor_files(directory)
    check_names(model, files, directory)
    parameters = dict(model.named_parameters())
    for path in sorted(set(files.values())):
        with open_tensors(path) as file:
            for name in file.keys():
                if name in parameters:
                    _check_slice(path, name, file.get_slice(name), parameters[name].shape)
    return directory


def _check_slice(path, name, stored, shape):
    kind, there = stored.get_dtype(), list(stored.get_shape())
    if kind not in FLOATS:
        raise BadInput(f"{path}: {name} is of type {kind}; supported are {', '.join(sorted(FLOATS))}")
    if there != list(shape):
        raise BadInput(f"{path}: {name} has shape {there}, but config.json makes it {list(shape)}")


def check_names(model, files, directory):
    """Compare the tensors that the model wants with those that the checkpoint has. A tied head may be stored as
    well, and the frequency tables that early Llama checkpoints carry are known and not needed."""
    wanted = {name for name, _ in model.named_parameters()}
    known = {name for name in files if name.endswith(".rotary_emb.inv_freq")}
    if model.lm_head is None:
        known.add("lm_head.weight")
    missing, extra = sorted(wanted - files.keys()), sorted(files.keys() - wanted - known)
    if missing:
        hint = ", though config.json does not tie the head to the embedding" if missing == ["lm_head.weight"] else ""
        raise BadInput(f"{directory}: the tensor {missing[0]} is missing{hint}{_and_more(missing)}")
    if extra:
        raise BadInput(f"{directory}: the tensor {extra[0]} has no place in the model of config.json{_and_more(extra)}")


def _check_tied(files, head, embedding, start):
    """A stored head must be the embedding, whose rows from `start` on are given."""
    with open_tensors(files[head]) as file:
        rows = file.get_slice(head)[start : start + len(embedding)]
        same = rows.shape == embedding.shape and all(
            torch.equal(a.to(b.dtype), b.cpu())
            for a, b in zip(rows.flatten().split(PIECE), embedding.view(-1).split(PIECE))
        )
    if not same:
        raise BadInput(f"{files[head]}: {head} differs from model.embed_tokens.weight, though config.json ties them")


def _and_more(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
