"""The transformer of Llama, Mistral, Qwen and Gemma: configuration, blocks, loading.

    model = load_model("path/to/checkpoint")            # config.json and *.safetensors
    logits = model(tokens)                              # [B, T] right-padded ids -> [B, T, V]
    logp = model(pack.tokens, pack)                     # packed pairs -> log p [R] of their response tokens

Parameter names are the checkpoint's names, so loading is a copy. The model knows nothing of pairs, losses or
process groups: sharding is applied from outside, and a pack is any named tuple with the fields of data.Pack.
Attention and the log-probs of chunks are written out in kernels/, sampling with a cache in runtime/sampling.py.

Letters: B sequences, T tokens of a sequence, N tokens of a pack (B = 1), R response tokens, C model size, H heads,
K key-value heads, D head size, V vocabulary.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import config as config_file
from files import weights
from kernels.attention import Segments, attention, packed_attention, soft_cap
from kernels.log_probs import token_log_probs

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
            k, v, positions = (k, v, None) if cache is None else cache.remember(k, v)
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

    def forward(self, tokens: Tensor, pack=None, cache=None, states: bool = False) -> Tensor:
        """tokens [B, T] right-padded ids -> logits [B, T, V]. With a pack (data.Pack), tokens is its [N] -> log p [R]
        of the response tokens, float32; with `states` too, what these are made of: hidden [R, C], the head [V, C] and
        the logits' cap. With a cache (sampling.Cache), tokens [B, T] are the prompts, and then [B, 1] the next token of
        each -> logits [B, V] after the last token of each."""
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


def _checked_files(model: nn.Module, directory: str | os.PathLike) -> dict:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return weights.checked_files(directory, shapes, tied=model.lm_head is None)
