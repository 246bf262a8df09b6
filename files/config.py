"""config.json: its fields read and checked, and what the program does not compute refused by name."""

import math

from files.errors import BadInput

ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_fields(raw: dict, path: str, architectures: dict[str, dict]) -> dict:
    """A config.json's object -> what a model is made of: field name -> value, under the Hugging Face names.

    architectures: name -> the fields that it fixes, whatever config.json says of them. Both spellings of RoPE are
    read, `rope_theta` + `rope_scaling` and transformers 5's `rope_parameters`; they come as `rope_theta` and
    `rope_scaling` {"rope_type": …, and its numbers}. `path` names the file in errors. Raises BadInput."""

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
    if not (isinstance(names, list) and names and isinstance(names[0], str) and names[0] in architectures):
        raise bad(f"the architecture {names!r:.80} is not supported; supported are {' and '.join(architectures)}")
    fixed = architectures[names[0]]
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
    if "sliding_window" not in fixed and raw.get("sliding_window", 4096) is not None:
        window = number("sliding_window", 4096)
    return {
        "vocab_size": number("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": number("intermediate_size"),
        "num_hidden_layers": number("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": number("max_position_embeddings", 2048),
        "rms_norm_eps": number("rms_norm_eps", 1e-6, float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": flag("tie_word_embeddings"),
        "attention_bias": flag("attention_bias"),
        "mlp_bias": flag("mlp_bias"),
        "sliding_window": window,
    } | fixed
