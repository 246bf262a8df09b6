"""FLOPs of a pair by hand and by counting matrix products, and whose peak belongs to whom."""

import types

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

import data
import model
from runtime import flops, lora

CONFIG = types.SimpleNamespace(
    hidden_size=6,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    num_hidden_layers=3,
    intermediate_size=10,
    vocab_size=50,
)


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_the_peak_is_in_bytes_on_macos_too(monkeypatch, platform, unit):
    usage = types.SimpleNamespace(ru_maxrss=3_000_000)
    monkeypatch.setattr(flops.sys, "platform", platform)
    monkeypatch.setattr(flops.resource, "getrusage", lambda who: usage)
    row = flops.speed(types.SimpleNamespace(type="cpu"), 1, [], 0.0)
    assert row["peak_memory"] == 3_000_000 * unit


def test_a_pair_by_hand():
    """A layer has 6 · 8 numbers in q, 6 · 4 in k and in v, 8 · 6 in o, 3 · 6 · 10 in the MLP: 324; three have 972. The
    head has 300. Prompt 5, chosen 3, rejected 2: 3 · (2 · 972 · 10 + 2 · 300 · 5) = 67,320, and attention
    6 · 3 · 8 · (8² + 7² − 5²) = 12,672."""
    assert flops.pair_flops(CONFIG, 5, 3, 2) == 67320 + 12672


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"]
)
def test_the_products_are_those_that_a_step_makes(architecture):
    """All but attention's own, which Gemma's caps make batched products."""
    config = model.parse_config(
        {
            "architectures": [architecture],
            "head_dim": 4,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 90,
        }
    )
    net, ids = model.random_model(config), lambda n: np.arange(n, dtype=np.int32)
    pack = data.collate([data.Pair(ids(7), ids(5), ids(4), "a:1")])
    with FlopCounterMode(display=False) as counter:
        net(pack.tokens, pack).sum().backward()
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    squares = 6 * 2 * 16 * (12**2 + 11**2 - 7**2)
    body = 2 * (16 * (2 * 16 + 2 * 8) + 3 * 16 * 24)  # weights of the two blocks' products
    left_out = 3 * 2 * body * 2  # each response's last token: the formula counts it, a pack has it not
    assert counted == flops.pair_flops(config, 7, 5, 4) - squares - left_out

    net.requires_grad_(False)
    lora.add(net, 3, 1.0)
    with FlopCounterMode(display=False) as counter:
        net(pack.tokens, pack).sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    unasked = (
        2 * 16 * (16 * (16 + 2 * 8) + 3 * 3 * 16)
    )  # gradients of the first block's input: nothing before it trains
    assert counted == flops.pair_flops(config, 7, 5, 4, lora_rank=3) - squares - unasked


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA T4", None),
        ("NVIDIA B2000", None),
    ],
)
def test_the_peak_belongs_to_the_whole_word(name, peak):
    assert flops.peak_flops(name) == peak
