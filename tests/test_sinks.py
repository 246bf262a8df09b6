"""--log-to and --sample-every: what metrics.jsonl and samples.jsonl hold is in TensorBoard and wandb too, whole and
once after a resume; and looking changes nothing."""

import importlib.util
import json
import os
import signal
import struct

import pytest
from safetensors.torch import load_file

import train
from runtime import sinks

SETTINGS = "--beta 0.3 --lr 2e-3 --batch-size 4 --epochs 2 --max-length 128 --samples 2 --sample-tokens 4".split()


def arguments(world, out, *more):
    given = ["--model", world / "start", "--data", world / "pairs.jsonl", "--eval-fraction", 0.3, "--eval-every", 2]
    return [*map(str, given), "--out", str(out), *SETTINGS, *map(str, more)]


def lines(path):
    return [json.loads(line) for line in open(path)]


def test_samples_come_every_so_many_steps_and_change_nothing(world, tmp_path, monkeypatch):
    """Two stages of four steps; the same after a kill, a stop and their resumes."""
    plain, out, stopped = tmp_path / "plain", tmp_path / "out", tmp_path / "stopped"
    assert train.main(arguments(world, plain)) == 0
    given = ["--sample-every", 3]
    assert train.main(arguments(world, out, *given)) == 0
    rows = lines(out / "samples.jsonl")
    places = [(row["stage"], row["step"], row["sample"]) for row in rows]
    assert places == [(s, k, n) for s, k in (("dpo", 3), ("dpo", 4), ("tgdpo", 3), ("tgdpo", 4)) for n in (1, 2)]
    final = json.loads((out / "samples.json").read_text())
    assert [row["answer"] for row in rows[-2:]] == [sample["policy"] for sample in final]
    assert [row["answer"] for row in rows[2:4]] == [sample["guide"] for sample in final]
    assert len(lines(plain / "samples.jsonl")) == 2
    ours, theirs = (load_file(directory / "policy/model.safetensors") for directory in (out, plain))
    assert all(ours[name].equal(theirs[name]) for name in theirs)

    def killed(run, stage, training):
        if (stage.loss, training.step) == ("tgdpo", 3):
            raise RuntimeError("killed")  # behind the checkpoint and the samples of step 3
        return plain_step(run, stage, training)

    def signalled(run, stage, training):
        os.kill(os.getpid(), signal.SIGTERM)
        plain_sample(run, stage, training)

    plain_step, plain_sample, given = train.next_step, train.sample, [*given, "--save-every", 3]
    monkeypatch.setattr(train, "next_step", killed)
    assert train.main(arguments(world, stopped, *given)) == 1
    monkeypatch.setattr(train, "sample", signalled)
    assert train.main(arguments(world, stopped, *given, "--resume")) == 143
    monkeypatch.undo()
    assert train.main(arguments(world, stopped, *given, "--resume")) == 0
    assert lines(stopped / "samples.jsonl") == rows


def expected(out, stage):
    """{(name, step): value} of a stage, as both files have it."""
    rows = [row for name in ("metrics", "samples") for row in lines(out / f"{name}.jsonl") if row["stage"] == stage]
    return {(name, row["step"]): value for row in rows for name, value in sinks.named(row).items()}


def test_tensorboard_holds_what_the_files_hold(world, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out, given = tmp_path / "out", ["--log-to", "tensorboard", "--sample-every", 2, "--save-every", 2]
    plain = train.next_step

    def killed(run, stage, training):
        if (stage.loss, training.step) == ("tgdpo", 3):
            raise RuntimeError("killed")  # its row 3 is beyond the checkpoint, and comes again
        return plain(run, stage, training)

    monkeypatch.setattr(train, "next_step", killed)
    assert train.main(arguments(world, out, *given)) == 1
    monkeypatch.undo()
    assert train.main(arguments(world, out, *given, "--resume")) == 0
    for stage in ("dpo", "tgdpo"):
        found = accumulator.EventAccumulator(f"{out}/tensorboard/{stage}", {"scalars": 0, "tensors": 0}).Reload()
        there, texts = {}, {}
        for name in found.Tags()["scalars"]:
            for event in found.Scalars(name):
                assert (name, event.step) not in there
                there[name, event.step] = event.value
        for name in found.Tags()["tensors"]:
            for event in found.Tensors(name):
                texts[name.removesuffix("/text_summary"), event.step] = event.tensor_proto.string_val[0].decode()
        assert '"beta": 0.3' in texts.pop(("configuration", 0))
        wanted = expected(out, stage)
        assert (
            there.keys() | texts.keys() == wanted.keys() and ("samples/1", 2) in texts and ("eval/margin", 2) in there
        )
        assert all(there[key] == pytest.approx(wanted[key], rel=1e-6) for key in there)
        assert all(texts[key] == wanted[key] for key in texts)
    assert train.main(arguments(world, out, "--overwrite")) == 0
    assert not (out / "tensorboard").exists()


def records(content):
    """The records of an offline run's file: LevelDB's log format, blocks of 32 KiB behind seven bytes of its own."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline_holds_what_the_files_hold(world, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "out"
    assert train.main(arguments(world, out, "--log-to", "wandb")) == 0
    wandb.teardown()  # as the end of the process: the file may be written behind the run's end
    (path,) = out.glob("wandb/offline-run-*/*.wandb")
    values = lambda items: {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
    there, config = {}, {}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = values(record.history.item)
            (stage,) = {name.split("/")[0] for name in items if not name.startswith("_")}
            step = items.pop(f"{stage}/step")
            there |= {(name, step): value for name, value in items.items() if not name.startswith("_")}
        elif kind == "run":
            config = values(record.run.config.update)
    assert config["beta"] == 0.3
    wanted = {
        (f"{stage}/{name}", step): value
        for stage in ("dpo", "tgdpo")
        for (name, step), value in expected(out, stage).items()
    }
    assert there.keys() == wanted.keys()
    assert all(value == pytest.approx(wanted[key]) for key, value in there.items() if not isinstance(value, str))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_absent_is_one_line(name, world, tmp_path, monkeypatch, capfd):
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else plain(module))
    monkeypatch.setattr(train, "read_inputs", None)  # before anything is read
    assert train.main(arguments(world, tmp_path / "out", "--log-to", name)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f"--log-to {name}: the package is not installed; pip install {name}, or leave it out")
    assert not (tmp_path / "out").exists()


def test_a_sink_that_does_not_begin_costs_no_earlier_result(world, tmp_path, monkeypatch, capfd):
    """wandb without a login, say: --overwrite removes nothing before; where it begins, all but its own folder. What it
    left of a new directory is taken for no result."""
    given = arguments(world, tmp_path / "out", "--loss", "dpo", "--max-steps", 1)
    assert train.main(given) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    before.pop(tmp_path / "out/.lock")

    class Begun:
        def __init__(self, out, settings):
            os.makedirs(f"{out}/wandb", exist_ok=True)

        def write(self, row):
            pass

        close = dict

    def refused(out, settings):
        os.makedirs(f"{out}/wandb", exist_ok=True)
        raise RuntimeError("no login")

    monkeypatch.setattr(sinks, "check", lambda names: None)
    for kind, status in ((refused, 2), (Begun, 0)):
        monkeypatch.setitem(sinks.KINDS, "wandb", kind)
        assert train.main([*given, "--overwrite", "--log-to", "wandb"]) == status
        assert status == 0 or all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "out/wandb").is_dir()
    new = [str(tmp_path / "new") if word == str(tmp_path / "out") else word for word in given]
    for kind, status in ((refused, 2), (refused, 2), (Begun, 0)):
        monkeypatch.setitem(sinks.KINDS, "wandb", kind)
        assert train.main([*new, "--log-to", "wandb"]) == status
    assert capfd.readouterr().err.count("--log-to wandb: no login; mend that, or leave it out") == 3


def test_a_name_of_no_sink_is_refused(capfd):
    assert train.main(["--log-to", "tensorbord"]) == 2
    assert (
        "--log-to tensorbord: must be one of tensorboard, wandb; the nearest is tensorboard" in capfd.readouterr().err
    )
