"""Qwen2, Qwen3 and Gemma 2 in whole runs, at length: python -m pytest tests/long/architectures.py

Two ranks, stops, the plan of memory, real tokenizers. What is short of these stands in the suite: test_model.py,
test_train.py, test_templates.py."""

import json

import launcher
import pytest
import test_memory
import torch
from safetensors.torch import load_file
from test_distributed import assert_same_run
from test_memory import GEMMA2, QWEN2, QWEN3, VOCABULARY, measure_steps, measured, zeros
from tiny_world import make_checkpoint, make_pairs

import model
import train
from files.export import save_model

SETTINGS = ["--beta", 0.3, "--lr", 2e-3, "--epochs", 2, "--batch-size", 4, "--max-length", 128, "--samples", 0]
NEW = ["qwen2", "qwen3", "gemma2"]
tiny = test_memory.tiny  # the fixture


@pytest.mark.parametrize("kind", NEW)
def test_ranks_and_stops_change_nothing(kind, tmp_path, capsys):
    """One rank, two ranks with FSDP, two ranks that compute activations again; a run that stops after step 2 and goes
    on is the run never stopped, bit for bit."""
    start, pairs = make_checkpoint(tmp_path / "start", kind), make_pairs(tmp_path / "pairs.jsonl", 11)
    given = ["--model", start, "--data", pairs, *SETTINGS]
    for name, count, more in (("one", 1, []), ("two", 2, []), ("again", 2, ["--activation-checkpointing", "full"])):
        statuses, printed = launcher.run(count, [*given, "--out", tmp_path / name, *more], tmp_path / "log")
        assert statuses == [0] * count, printed
        assert_same_run(tmp_path / "one", tmp_path / name)
    words = list(map(str, [*given, "--save-every", 2, "--out"]))
    assert train.main([*words, str(tmp_path / "whole")]) == 0
    plain, steps = train.optimiser_step, []

    def stops(*arguments):
        steps.append(plain(*arguments))
        if len(steps) == 3:
            raise KeyboardInterrupt
        return steps[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "optimiser_step", stops)
        train.main([*words, str(tmp_path / "resumed")])
    assert train.main([*words, str(tmp_path / "resumed"), "--resume"]) == 0
    for name in ("guide", "policy"):
        files = [sorted((tmp_path / run / name).glob("*.safetensors")) for run in ("whole", "resumed")]
        assert files[0] and all(a.read_bytes() == b.read_bytes() for a, b in zip(*files))
        assert load_file(files[0][0])
    rows = [[json.loads(row)["loss"] for row in open(tmp_path / run / "metrics.jsonl")] for run in ("whole", "resumed")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kind", NEW)
def test_a_sharded_export_is_the_model(kind, tmp_path):
    """Shards of 20 kB: transformers finds every tensor, and the logits are those of the start."""
    transformers = pytest.importorskip("transformers")
    start = make_checkpoint(tmp_path / "start", kind)
    net, raw = model.load_model(start), json.loads((tmp_path / "start" / "config.json").read_text())
    tensors = dict(net.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stream = ((name, tensor.detach()) for name, tensor in tensors.items())
    save_model(str(tmp_path / "out"), raw, shapes, stream, torch.float32, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokens = torch.arange(200, 230)[None]
    assert (theirs(tokens).logits - net(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "world, config, pairs, recompute",
    [
        (1, QWEN2, 8, "none"),
        (1, QWEN3, 8, "none"),
        (1, GEMMA2 | {"num_hidden_layers": 6}, 8, "full"),
        (1, VOCABULARY | GEMMA2, 2, "none"),
        (2, GEMMA2, 4, "selective"),
    ],
)
def test_a_run_uses_what_the_plan_says(world, config, pairs, recompute, tiny, tmp_path):
    """Within 15 %; as in test_memory.py."""
    zeros(tmp_path / "model", **config)
    sizes = ["--batch-size", 2 * pairs * world, "--micro-tokens", 300 * pairs, "--epochs", 9, "--loss", "simpo"]
    words = [*sizes, "--activation-checkpointing", recompute]
    for rank in measured(world, measure_steps, tiny, tmp_path, *words):
        assert sum(rank["planned"].values()) == pytest.approx(rank["used"], rel=0.15), rank
