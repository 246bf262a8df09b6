"""Several ranks over gloo: the same training for any number of them, and faults that end all of them alike."""

import json
import os
import signal
import subprocess
import sys
import time

import launcher
import pytest
import torch
from safetensors.torch import load_file
from tiny_world import make_checkpoint, make_pairs

SETTINGS = ["--beta", 0.3, "--lr", 2e-3, "--epochs", 2, "--batch-size", 4, "--max-length", 128, "--samples", 0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two starts, tied and not, and 11 pairs, which divide by nothing."""
    directory = tmp_path_factory.mktemp("world")
    for kind in ("tied", "llama"):
        make_checkpoint(directory / kind, kind)
    make_pairs(directory / "pairs.jsonl", 11)
    return directory


def arguments(world, out, kind="tied", *more):
    return ["--model", world / kind, "--data", world / "pairs.jsonl", "--out", out, *SETTINGS, *more]


def rows(out):
    return [json.loads(line) for line in open(f"{out}/metrics.jsonl")]


def assert_same_run(one, other, rtol=1e-5):
    first, second = rows(one), rows(other)
    assert [(r["stage"], r["step"]) for r in first] == [(r["stage"], r["step"]) for r in second]
    for a, b in zip(first, second):
        assert b["loss"] == pytest.approx(a["loss"], rel=rtol), (a["stage"], a["step"])
    for name in ("guide", "policy"):
        a, b = (load_file(f"{out}/{name}/model.safetensors") for out in (one, other))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tied", "llama"])
def test_any_number_of_ranks_trains_the_same(world, kind, tmp_path):
    """World sizes 1, 2 and 4, two stages, ragged last batches, activation checkpointing on and off."""
    for count, more in (
        (1, []),
        (2, ["--activation-checkpointing", "full"]),
        (4, []),
        (2, ["--micro-tokens", 60]),
        (4, ["--hsdp", 2]),
    ):
        out = tmp_path / f"{count}{len(more)}{more[:1]}"
        statuses, printed = launcher.run(count, arguments(world, out, kind, *more), tmp_path / "log")
        assert statuses == [0] * count, printed
        if count == 1:
            alone = out
        assert_same_run(alone, out)


def nan_loss_on_rank_1(rank):
    import train

    plain, calls = train.pack_loss, []

    def broken(stage, options, logp, pack, indices, tally):
        result = plain(stage, options, logp, pack, indices, tally)
        calls.append(indices)
        if rank == 1 and len(calls) == 3:
            tally.sums["loss"] += float("nan")
            result = result._replace(losses=result.losses * float("nan"))
        return result

    train.pack_loss = broken


def infinite_gradient_on_rank_1(rank):
    import train

    plain, calls = train.clip_grad_norm_, []

    def broken(parameters, most):
        parameters = list(parameters)
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            parameters[0].grad.to_local().view(-1)[:1].fill_(float("inf"))
        return plain(parameters, most)

    train.clip_grad_norm_ = broken


@pytest.mark.parametrize(
    "fault, words",
    [
        (nan_loss_on_rank_1, "the loss is not finite on"),
        (infinite_gradient_on_rank_1, "the gradient is not finite; the step's pairs are"),
    ],
)
def test_what_is_not_finite_stops_all_ranks(world, fault, words, tmp_path):
    out = tmp_path / "out"
    statuses, printed = launcher.run(
        2, arguments(world, out, "tied", "--loss", "dpo", "--save-every", 1), tmp_path / "log", fault
    )
    assert statuses == [1, 1], printed
    line = next(line for line in printed.splitlines() if words in line)
    assert "dpo step 3: " in line and "pairs.jsonl:" in line and "step-2" in line and line.endswith("--lr or --beta")
    assert [r["step"] for r in rows(out)] == [1, 2] and not (out / "policy").exists()
    # the checkpoint of step 2 is good: resumed, the run is the one that never failed
    assert launcher.run(2, arguments(world, out, "tied", "--loss", "dpo", "--resume"), tmp_path / "log")[0] == [0, 0]
    assert launcher.run(2, arguments(world, tmp_path / "whole", "tied", "--loss", "dpo"), tmp_path / "log")[0] == [0, 0]
    assert [r["loss"] for r in rows(out)] == [r["loss"] for r in rows(tmp_path / "whole")]
    a, b = (load_file(o / "policy/model.safetensors") for o in (out, tmp_path / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def nan_guide(rank):
    import train

    plain = train.log_probs

    def broken(run, net, pairs, title, **more):
        found = plain(run, net, pairs, title, **more)
        if "guide" in title:
            found[2][0] = float("nan")
        return found

    train.log_probs = broken


def test_a_guide_that_is_not_finite_is_named_before_training(world, tmp_path):
    statuses, printed = launcher.run(2, arguments(world, tmp_path / "out"), tmp_path / "log", nan_guide)
    assert statuses == [1, 1]
    assert "the guide's log-probs are not finite on" in printed and "pairs.jsonl:3" in printed
    assert not any(r["stage"] == "tgdpo" for r in rows(tmp_path / "out"))
    assert not list((tmp_path / "out/cache").glob("guide*"))


def rank_1_dies(rank):
    import train

    plain, calls = train.optimiser_step, []

    def broken(*arguments):
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            os._exit(9)
        return plain(*arguments)

    train.optimiser_step = broken


def rank_1_hangs(rank):
    import train

    plain, calls = train.optimiser_step, []

    def broken(*arguments):
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            time.sleep(600)
        return plain(*arguments)

    train.optimiser_step = broken


@pytest.mark.parametrize("fault", [rank_1_dies, rank_1_hangs])
def test_a_rank_that_dies_or_hangs_ends_the_job(world, fault, tmp_path):
    began = time.monotonic()
    processes = launcher.start(
        2,
        arguments(world, tmp_path / "out", "tied", "--loss", "dpo", "--timeout-minutes", 0.1),
        tmp_path / "log",
        fault,
    )
    processes[0].join(60)
    assert processes[0].exitcode == 1 and time.monotonic() - began < 50
    processes[1].kill()
    processes[1].join()
    assert "error" in open(f"{tmp_path}/log.0").read()


def test_torchrun_passes_sigterm_on_and_leaves_no_orphan(world, tmp_path):
    """Saved at the step's end, resumed, and the same as never stopped. One real torchrun, with two ranks."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(launcher.free_port()),
        os.path.join(os.path.dirname(__file__), "..", "train.py"),
    ]
    words = [str(a) for a in arguments(world, out, "tied", "--loss", "dpo", "--epochs", 400)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command + words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < 3:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert "SIGTERM: stopped; dpo step" in errors and "is saved" in errors
    assert job.returncode != 0
    newest = max((out / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    assert int(newest.name.split("-")[1]) == rows(out)[-1]["step"] >= 3
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout
    assert not left.strip()
