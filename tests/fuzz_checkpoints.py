"""Mutate config.json and safetensors headers by the thousand: each loads or is refused in one line, and fast.

python tests/fuzz_checkpoints.py [ROUNDS] [SEED]
"""

import json
import pathlib
import random
import shutil
import struct
import sys
import tempfile
import time

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent)]

import torch

import model
from files import weights
from files.errors import BadInput
from files.export import save_model

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    1 << 30,
    1 << 40,
    -1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "x",
    "silu",
    [],
    [[]],
    {},
    {"a": 1},
    ["LlamaForCausalLM"],
    ["MistralForCausalLM"],
    ["Qwen3ForCausalLM"],
    ["Gemma2ForCausalLM"],
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "llama3"},
    "\ud800",
    "../x",
    "a" * 1000,
]


def mutated_json(raw, rng):
    """An object with some fields replaced, dropped or added."""
    raw = json.loads(json.dumps(raw))
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(
            [
                *raw,
                "head_dim",
                "sliding_window",
                "use_sliding_window",
                "max_window_layers",
                "layer_types",
                "hidden_activation",
                "attn_logit_softcapping",
                "query_pre_attn_scalar",
                "rope_scaling",
                "rope_parameters",
                "quantization_config",
                "partial_rotary_factor",
            ]
        )
        if rng.random() < 0.2:
            raw.pop(name, None)
        else:
            raw[name] = rng.choice(VALUES)
    return raw


def mutated_bytes(content, rng):
    """Bytes with some flipped, inserted or cut."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(max(1, min(len(content), 2000)))
        kind = rng.randrange(4)
        if kind == 0 and content:
            content[at] = rng.randrange(256)
        elif kind == 1:
            content[at:at] = bytes([rng.randrange(256)]) * rng.randint(1, 9)
        elif kind == 2:
            del content[at : at + rng.randint(1, 40)]
        else:
            content[:8] = struct.pack("<Q", rng.choice([0, 1, 7, 500, 1 << 20, 1 << 40, (1 << 64) - 1]))
    return bytes(content)


def fuzz(good, seed, rounds):
    """Returns the number of rounds that ended in a loaded model or one line; anything else raises."""
    rng, ended = random.Random(seed), 0
    config = (good / "config.json").read_bytes()
    content = (good / weights.SINGLE).read_bytes()
    for _ in range(rounds):
        began = time.monotonic()
        if rng.random() < 0.5:
            (good / "config.json").write_text(json.dumps(mutated_json(json.loads(config), rng)))
        else:
            (good / weights.SINGLE).write_bytes(mutated_bytes(content, rng))
        try:
            model.check(str(good))
            model.load_model(str(good))
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, error
        assert time.monotonic() - began < 5
        ended += 1
        (good / "config.json").write_bytes(config)
        (good / weights.SINGLE).write_bytes(content)
    return ended


if __name__ == "__main__":
    from test_bad_checkpoints import CONFIG

    rounds, seed = (int(x) for x in (sys.argv[1:] + ["5000", "0"][len(sys.argv) - 1 :]))
    directory = pathlib.Path(tempfile.mkdtemp()) / "m"
    net = model.random_model(model.parse_config(CONFIG))
    save_model(
        str(directory),
        CONFIG,
        {n: tuple(p.shape) for n, p in net.named_parameters()},
        iter(net.named_parameters()),
        torch.float32,
    )
    print(f"{fuzz(directory, seed, rounds)} of {rounds} ended in a model or in one line")
    shutil.rmtree(directory.parent)
