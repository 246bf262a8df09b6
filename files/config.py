"""config.json: its fields read and checked, and what the program does not compute refused by name."""

import math
from collections.abc import Callable
from typing import NamedTuple

from files.errors import BadInput


class Architecture(NamedTuple):
    """What an architecture's name says of a model; everything else is read from config.json."""

    model_type: str  # its name where config.json has no list of architectures
    models: str  # those that people know it by
    fixed: dict  # fields, whatever config.json says of them; PLAIN where they are not here
    defaults: dict = {}  # what a missing field means, where it means something of its own
    slides: Callable[[int, int], bool] = lambda layer, first: True  # the layers that a sliding_window is for


PLAIN = {"hidden_act": "silu", "use_qk_norm": False, "norm_offset": 0, "post_norms": False, "scale_embedding": False}
QWEN2 = {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}
QWEN3 = {"use_qk_norm": True, "mlp_bias": False}
QWEN_SAYS = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
GEMMA2 = {"hidden_act": "gelu_pytorch_tanh", "norm_offset": 1, "post_norms": True, "scale_embedding": True}
GEMMA2_SAYS = {"sliding_window": 4096, "tie_word_embeddings": True, "head_dim": 256}
GEMMA2_SAYS |= {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def late(layer, first):  # first: max_window_layers
    return layer >= first


def even(layer, first):
    return layer % 2 == 0


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", "Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM2", {"sliding_window": None}),
    "MistralForCausalLM": Architecture("mistral", "Mistral v0.1 to v0.3, Nemo", {}, {"sliding_window": 4096}),
    "Qwen2ForCausalLM": Architecture("qwen2", "Qwen2, Qwen2.5", QWEN2, QWEN_SAYS, late),
    "Qwen3ForCausalLM": Architecture("qwen3", "Qwen3 (dense)", QWEN3, QWEN_SAYS | {"head_dim": 128}, late),
    "Gemma2ForCausalLM": Architecture("gemma2", "Gemma 2", GEMMA2 | {"mlp_bias": False}, GEMMA2_SAYS, even),
}
LAYER_TYPES = ("full_attention", "sliding_attention")

ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def architecture(raw: dict, path: str = "config.json") -> str:
    """The architecture's name in a config.json's object. Raises BadInput where it is none of ARCHITECTURES."""
    names = raw.get("architectures")
    if names is None:
        kind = raw.get("model_type")
        names = [name for name, known in ARCHITECTURES.items() if known.model_type == kind] or kind
    if not (isinstance(names, list) and names and isinstance(names[0], str) and names[0] in ARCHITECTURES):
        raise BadInput(
            f"{path}: the architecture {names!r:.80} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return names[0]


def read_fields(raw: dict, path: str) -> dict:
    """A config.json's object -> what a model is made of: field name -> value, under the Hugging Face names.

    Both spellings of RoPE are read, `rope_theta` + `rope_scaling` and transformers 5's `rope_parameters`; they come as
    `rope_theta` and `rope_scaling` {"rope_type": …, and its numbers}. `path` names the file in errors. Raises
    BadInput."""
    known = ARCHITECTURES[architecture(raw, path)]
    fixed, defaults = PLAIN | known.fixed, known.defaults

    def bad(what):
        return BadInput(f"{path}: {what}")

    def number(name, default=None, kind=int, source=raw):
        value, default = source.get(name), defaults.get(name, default)
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
        return defaults.get(name, False) if value is None else bool(value)

    def optional(name, kind=int):
        """A number of which null says that there is none; so it is where the architecture knows no such field."""
        return number(name, kind=kind) if raw.get(name, defaults.get(name)) is not None and name in defaults else None

    if raw.get("quantization_config") is not None:
        raise bad("the checkpoint is quantised, which is not supported; use the original float weights")
    for name in ("hidden_act", "hidden_activation"):
        if raw.get(name, fixed["hidden_act"]) not in (None, fixed["hidden_act"]):
            raise bad(f"{name} is {raw[name]!r:.60}; only {fixed['hidden_act']} is supported")
    if flag("use_bidirectional_attention"):
        raise bad("use_bidirectional_attention is true; only causal attention is supported")

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

    heads, hidden, layers = number("num_attention_heads"), number("hidden_size"), number("num_hidden_layers")
    if layers > 1000:
        raise bad(f"num_hidden_layers is {raw['num_hidden_layers']}, more than any model has")
    kv_heads = number("num_key_value_heads", heads)
    if heads % kv_heads:
        raise bad(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if raw.get("head_dim", defaults.get("head_dim")) is None and hidden % heads:
        raise bad(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is missing")
    head_dim = number("head_dim", hidden // heads)
    if head_dim % 2:
        raise bad(f"head_dim is {head_dim}; RoPE turns pairs, so it must be even")
    windowed = flag("use_sliding_window") if "use_sliding_window" in defaults else True
    window = optional("sliding_window") if windowed else None
    first = raw.get("max_window_layers", defaults.get("max_window_layers", 0))  # the first layer that has a window
    if not isinstance(first, int) or first < 0:
        raise bad(f"max_window_layers is {first!r:.60}, where a number of layers is expected")
    types = raw.get("layer_types")
    if types is None:
        types = [LAYER_TYPES[window is not None and known.slides(layer, first)] for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not all(kind in LAYER_TYPES for kind in types):
        raise bad(
            f"layer_types is {types!r:.60}; for each of {layers} layers it may be one of {', '.join(LAYER_TYPES)}"
        )
    return {
        "vocab_size": number("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": number("intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": number("max_position_embeddings", 2048),
        "rms_norm_eps": number("rms_norm_eps", 1e-6, float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": flag("tie_word_embeddings"),
        "attention_bias": flag("attention_bias"),
        "attention_out_bias": flag("attention_bias"),
        "mlp_bias": flag("mlp_bias"),
        "sliding_window": window,
        "layer_types": tuple(types),
        "query_pre_attn_scalar": optional("query_pre_attn_scalar", float) or head_dim,
        "attn_logit_softcapping": optional("attn_logit_softcapping", float),
        "final_logit_softcapping": optional("final_logit_softcapping", float),
    } | fixed
