"""The long forms of test_lora.py: `python -m pytest -n 0 tests/long/adapters.py`, with peft and a C++ compiler.

Whole runs of every architecture against a loop with peft, compiled blocks, groups of ranks, and the memory plan at more
sizes."""

import pytest
import test_lora
import test_memory
from test_lora import metrics, plain_training, run, same, several_ranks, tokens_of
from test_memory import VOCABULARY, WEIGHTS, measure_steps, measured, zeros
from tiny_world import KINDS, make_checkpoint, make_pairs

world, tiny = test_lora.world, test_memory.tiny


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_trains_as_peft_does(kind, tmp_path):
    make_checkpoint(tmp_path / "start", kind)
    make_pairs(tmp_path / "pairs.jsonl", 10)
    assert run(*test_lora.arguments(tmp_path, tmp_path / "out")) == 0
    pairs, peft = tokens_of(tmp_path / "start", tmp_path / "pairs.jsonl"), test_lora.by_peft(tmp_path)
    dpo, _ = plain_training(tmp_path / "start", pairs, "dpo", adapt=peft)
    same([row["loss"] for row in metrics(tmp_path / "out", "dpo")], dpo)
    tgdpo, _ = plain_training(tmp_path / "start", pairs, "tgdpo", guide=tmp_path / "out/guide", adapt=peft)
    same([row["loss"] for row in metrics(tmp_path / "out", "tgdpo")], tgdpo)
    test_lora.test_peft_loads_the_adapter_onto_the_base(tmp_path)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks_train_the_same_adapters(recompute, world, tmp_path):
    out = tmp_path / "out"
    assert run(*test_lora.arguments(world, out, "--compile", "--activation-checkpointing", recompute)) == 0
    for stage in ("dpo", "tgdpo"):
        same([row["loss"] for row in metrics(out, stage)], [row["loss"] for row in metrics(world / "out", stage)])


@pytest.mark.parametrize("more", [("--hsdp", 2), ("--hsdp", 1), ("--activation-checkpointing", "selective")])
def test_groups_of_ranks_train_the_same_adapters(more, world, tmp_path):
    several_ranks(world, 4, tmp_path / "out", *more)
    for stage in ("dpo", "tgdpo"):
        rows = [metrics(out, stage) for out in (tmp_path / "out", world / "out")]
        assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-5)


@pytest.mark.linux("reads /proc, tunes malloc")
@pytest.mark.parametrize(
    "ranks, config, pairs, recompute, rank",
    [
        (1, WEIGHTS, 1, "none", 8),
        (2, WEIGHTS, 1, "none", 64),
        (1, {}, 8, "none", 8),
        (1, {}, 8, "none", 64),
        (1, {"num_hidden_layers": 6}, 8, "full", 8),
        (2, {}, 4, "selective", 16),
        (1, VOCABULARY, 2, "none", 8),
        (2, VOCABULARY | {"tie_word_embeddings": True}, 1, "none", 32),
    ],
)
def test_adapters_use_what_the_plan_says(ranks, config, pairs, recompute, rank, tiny, tmp_path):
    zeros(tmp_path / "model", **config)
    given = ("--batch-size", 2 * pairs * ranks, "--micro-tokens", 300 * pairs, "--epochs", 9, "--loss", "simpo")
    given += ("--lora-rank", rank, "--activation-checkpointing", recompute)
    for each in measured(ranks, measure_steps, tiny, tmp_path, *given):
        assert sum(each["planned"].values()) == pytest.approx(each["used"], rel=0.1), each
