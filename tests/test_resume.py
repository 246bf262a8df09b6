"""A run that is stopped and resumed is, bit for bit, the run that was never stopped; and what may not be resumed."""

import builtins
import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import launcher
import pytest
import torch
from safetensors.torch import load_file
from tiny_world import TEMPLATE, make_checkpoint, make_pairs

import train
from runtime import checkpoint, options, outdir, process_group

SETTINGS = [
    "--beta",
    "0.3",
    "--lr",
    "2e-3",
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--max-length",
    "128",
    "--samples",
    "0",
    "--eval-every",
    "2",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A start, 10 pairs (the last batch of an epoch has 2) and the run that is never stopped."""
    directory = tmp_path_factory.mktemp("world")
    make_checkpoint(directory / "start", "tied")
    make_pairs(directory / "pairs.jsonl", 10)
    make_pairs(directory / "held_out.jsonl", 3, seed=1)
    assert train.main(arguments(directory, directory / "whole")) == 0
    return directory


def arguments(world, out, *more):
    return [
        "--model",
        str(world / "start"),
        "--data",
        str(world / "pairs.jsonl"),
        "--eval-data",
        str(world / "held_out.jsonl"),
        "--out",
        str(out),
        *SETTINGS,
        *map(str, more),
    ]


def rows(out):
    """metrics.jsonl without what the clock and the machine say."""
    timing = {"seconds", "pairs_per_second", "tokens_per_second", "peak_memory"}
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in open(f"{out}/metrics.jsonl")]


def assert_bit_equal(out, whole):
    assert rows(out) == rows(whole)
    for name in ("guide", "policy"):
        a, b = (load_file(f"{o}/{name}/model.safetensors") for o in (out, whole))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


def run_and_stop(world, out, stage, step, number=signal.SIGTERM, *more):
    """Run until `step` of `stage` is computed; then the signal comes."""
    plain, stages = train.optimiser_step, []

    def stopping(run, net, optimiser, where, batch):
        stages.append(where.loss)
        row = plain(run, net, optimiser, where, batch)
        if where.loss == stage and stages.count(stage) == step:
            os.kill(os.getpid(), number)
            time.sleep(0.3)
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "optimiser_step", stopping)
        return train.main(arguments(world, out, *more))


@pytest.mark.parametrize("stage, step", [("dpo", 1), ("dpo", 3), ("dpo", 6), ("tgdpo", 2), ("tgdpo", 5)])
def test_stopped_and_resumed_is_bit_for_bit_the_same(world, stage, step, tmp_path):
    """In each stage, at the first step, in the ragged last batch of an epoch (3), across it (5), at the end (6)."""
    out = tmp_path / "out"
    assert run_and_stop(world, out, stage, step) == 143
    assert rows(out)[-1]["stage"] == stage and rows(out)[-1]["step"] == step
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [f"step-{step}"]
    assert train.main(arguments(world, out, "--resume")) == 0
    assert_bit_equal(out, world / "whole")


def test_stopped_after_every_step(world, tmp_path):
    out = tmp_path / "out"
    assert run_and_stop(world, out, "dpo", 1) == 143
    for _ in range(4):
        assert run_and_stop(world, out, "dpo", 1, signal.SIGINT, "--resume") == 130  # one more step each time
    assert run_and_stop(world, out, "tgdpo", 1, signal.SIGTERM, "--resume") == 143
    assert train.main(arguments(world, out, "--resume")) == 0
    assert_bit_equal(out, world / "whole")


def test_fully_shard_changes_nothing_for_one_rank(world, tmp_path, monkeypatch):
    """A rank alone in float32 does without it: the same bits, and a checkpoint of either goes on in the other."""
    out, alone, sharded, calls = tmp_path / "out", train.begin, train.fully_shard, []

    def together(*given):
        run = alone(*given)
        assert run.plan.alone and not calls
        return run._replace(plan=run.plan._replace(alone=False))

    monkeypatch.setattr(train, "begin", together)
    monkeypatch.setattr(train, "fully_shard", lambda module, **how: (calls.append(module), sharded(module, **how)))
    assert run_and_stop(world, out, "dpo", 3) == 143 and calls
    monkeypatch.setattr(train, "begin", alone)
    calls.clear()
    assert run_and_stop(world, out, "tgdpo", 2, signal.SIGTERM, "--resume") == 143 and not calls
    monkeypatch.setattr(train, "begin", together)
    assert train.main(arguments(world, out, "--resume")) == 0 and calls
    assert_bit_equal(out, world / "whole")


def test_sigusr1_saves_and_goes_on(world, tmp_path):
    out = tmp_path / "out"
    assert run_and_stop(world, out, "tgdpo", 2, signal.SIGUSR1, "--save-every", 0) == 0
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-2", "step-6"]
    assert_bit_equal(out, world / "whole")


def test_a_signal_in_an_evaluation_saves_first(world, tmp_path, monkeypatch, capfd):
    """The steps since the last checkpoint are not lost."""
    out, plain = tmp_path / "out", train.log_probs

    def signalled(run, net, pairs, title, *save, **named):
        if title == "evaluation":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        return plain(run, net, pairs, title, *save, **named)

    monkeypatch.setattr(train, "log_probs", signalled)
    assert train.main(arguments(world, out, "--save-every", 0)) == 143
    assert "SIGTERM: stopped; dpo step 2 of 6 is saved" in capfd.readouterr().err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.undo()
    assert train.main(arguments(world, out, "--resume")) == 0
    assert_bit_equal(out, world / "whole")


def test_a_resumed_run_keeps_no_more_checkpoints_than_asked(world, tmp_path):
    """Killed between the last save and the removal of the checkpoints before: nothing is saved again."""
    out = tmp_path / "out"
    shutil.copytree(world / "whole", out)
    for name in ("step-4", "step-5", "step-3.tmp"):
        shutil.copytree(out / "checkpoints/step-6", out / "checkpoints" / name)
    assert train.main(arguments(world, out, "--resume", "--keep", 2)) == 0
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-5", "step-6"]
    os.rename(out / "checkpoints/step-6", out / "checkpoints/step-6.old")  # killed between a save's renames
    assert train.main(arguments(world, out, "--resume", "--keep", 1)) == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-6.old"]


@pytest.mark.parametrize("name", ["checkpoints", "guide", "policy"])
def test_an_overwrite_that_was_killed_resumes_as_from_the_start(world, tmp_path, monkeypatch, name):
    """In the middle of a directory: no half of an old result is taken for a whole one."""
    out = tmp_path / "out"
    shutil.copytree(world / "whole", out)
    plain = shutil.rmtree

    def half(path, *more, **given):
        if os.path.basename(path).startswith(name) and os.path.exists(path):
            os.remove(next(file for file in sorted(Path(path).rglob("*")) if file.is_file()))
            raise KeyboardInterrupt
        plain(path, *more, **given)

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(world, out, "--overwrite"))
    monkeypatch.undo()
    process_group.stop()
    assert train.main(arguments(world, out, "--resume")) == 0
    assert_bit_equal(out, world / "whole")
    assert not list(out.glob("*.tmp"))


def interrupt(monkeypatch, name, words):
    """os.NAME raises before it touches a path with these words: as if the run were killed there."""
    plain = getattr(os, name)

    def interrupted(*given):
        if words in str(given[0]):
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(os, name, interrupted)


def test_what_stood_stands_until_the_new_is_whole(world, tmp_path, monkeypatch):
    """A resumed run that is killed while it writes the settings or the policy again loses neither."""
    out = tmp_path / "out"
    shutil.copytree(world / "whole", out)
    for words, kept in (("config.toml.tmp", "config.toml"), ("policy.tmp", "policy.old")):
        interrupt(monkeypatch, "rename", words)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments(world, out, "--resume"))
        monkeypatch.undo()
        process_group.stop()
        one, other = out / kept, world / "whole" / kept.removesuffix(".old")
        if kept == "config.toml":
            assert one.read_text() == other.read_text()
        else:
            assert sorted(os.listdir(one)) == sorted(os.listdir(other))
            assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert train.main(arguments(world, out, "--resume")) == 0
    assert_bit_equal(out, world / "whole")
    assert not list(out.glob("*.tmp")) and not list(out.glob("*.old"))


def test_nothing_to_resume_starts_from_the_beginning_and_says_so(world, tmp_path, capfd):
    assert train.main(arguments(world, tmp_path / "out", "--resume")) == 0
    assert "nothing complete to resume from: starting from the beginning" in capfd.readouterr().out
    assert_bit_equal(tmp_path / "out", world / "whole")


def test_a_finished_run_resumed_is_itself_and_uses_the_cache(world, tmp_path, capfd):
    shutil.copytree(world / "whole", tmp_path / "out")
    assert train.main(arguments(world, tmp_path / "out", "--resume")) == 0
    printed = capfd.readouterr().out
    assert "log-probs of the ref are in the cache" in printed and "log-probs of the guide are in the cache" in printed
    assert_bit_equal(tmp_path / "out", world / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(world / "whole"))


def test_a_signal_at_the_very_end_lets_the_run_end_well(world, tmp_path, capfd, monkeypatch):
    out, plain = tmp_path / "out", train.results.finish

    def signalled(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        plain(*given)

    shutil.copytree(world / "whole", out)
    monkeypatch.setattr(train.results, "finish", signalled)
    assert train.main(arguments(world, out, "--resume")) == 0 and (out / "report.html").exists()
    assert "SIGTERM: nothing left to stop: finishing the page" in capfd.readouterr().err


def test_another_number_of_ranks_resumes_within_rounding(world, tmp_path):
    out = tmp_path / "out"
    stop = lambda count, step, *more: launcher.run(
        count, arguments(world, out, *more), tmp_path / "log", {2: stop_at_2, 1: stop_at_1}[step]
    )
    assert stop(2, 2)[0] == [143, 143]
    assert stop(1, 1, "--resume")[0] == [143]
    statuses, printed = launcher.run(4, arguments(world, out, "--resume"), tmp_path / "log")
    assert statuses == [0] * 4, printed
    for a, b in zip(rows(world / "whole"), rows(out), strict=True):
        assert (a["stage"], a["step"]) == (b["stage"], b["step"]) and b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    a, b = (load_file(o / "policy/model.safetensors") for o in (world / "whole", out))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=1e-5)


def stop_after(steps):
    plain, calls = train.optimiser_step, []

    def stopping(*given):
        row = plain(*given)
        calls.append(1)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        return row

    train.optimiser_step = stopping


def stop_at_2(rank):
    stop_after(2)


def stop_at_1(rank):
    stop_after(1)


def refused(capfd, status, words, given):
    assert train.main(given) == status
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("train.py: error:")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    for word in words:
        assert word in lines[0]


def test_another_run_is_refused_by_the_name_of_what_differs(world, tmp_path, capfd):
    out = tmp_path / "out"
    assert run_and_stop(world, out, "tgdpo", 2) == 143
    before = sorted((str(p), p.stat().st_size) for p in out.rglob("*"))
    make_checkpoint(tmp_path / "other", "tied", seed=1)
    make_pairs(tmp_path / "other.jsonl", 10, seed=7)
    (tmp_path / "template.jinja").write_text(TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}A chat. "))
    base = arguments(world, out, "--resume")
    for flag, value, words in (
        ("--data", tmp_path / "other.jsonl", ["data ("]),
        ("--model", tmp_path / "other", ["model ("]),
        ("--loss", "dpo", ["loss (tgdpo there, dpo here)"]),
        ("--beta", 0.5, ["beta (0.3 there, 0.5 here)"]),
        ("--chat-template", tmp_path / "template.jinja", ["chat template ("]),
    ):
        capfd.readouterr()
        refused(capfd, 2, ["another run", *words], base + [flag, str(value)])
    assert before == sorted((str(p), p.stat().st_size) for p in out.rglob("*"))
    assert train.main(base) == 0


def test_a_flipped_byte_is_refused_by_its_digest(world, tmp_path, capfd):
    out = tmp_path / "out"
    assert run_and_stop(world, out, "dpo", 2) == 143
    file = next((out / "checkpoints/step-2").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    capfd.readouterr()
    refused(capfd, 2, [file.name, "damaged", "digest"], arguments(world, out, "--resume"))


def test_a_directory_with_results_is_not_written_to_unasked(world, tmp_path, capfd):
    shutil.copytree(world / "whole", tmp_path / "out")
    refused(capfd, 2, ["holds another run's results", "--resume, --overwrite"], arguments(world, tmp_path / "out"))
    shutil.copytree(tmp_path / "out/checkpoints/step-6", tmp_path / "out/checkpoints/step-99")
    assert train.main(arguments(world, tmp_path / "out", "--overwrite")) == 0
    assert "in the cache" in capfd.readouterr().out and not (tmp_path / "out/checkpoints/step-99").exists()
    assert_bit_equal(tmp_path / "out", world / "whole")


@pytest.mark.parametrize("change", ["cut", "other key"])
def test_a_cache_that_does_not_fit_is_never_used(world, change, tmp_path, capfd):
    shutil.copytree(world / "whole/cache", tmp_path / "out/cache")
    for file in (tmp_path / "out/cache").glob("ref-*"):
        if change == "cut":
            file.write_bytes(file.read_bytes()[:-7])
        else:
            os.rename(file, file.with_name("ref-" + "0" * 32 + ".safetensors"))
    assert train.main(arguments(world, tmp_path / "out")) == 0
    printed = capfd.readouterr().out
    assert (
        "log-probs of the ref are in the cache" not in printed and "log-probs of the guide are in the cache" in printed
    )
    assert ("is not used" in printed) == (change == "cut")
    assert_bit_equal(tmp_path / "out", world / "whole")


@pytest.mark.parametrize("change", [["--max-length", "50"], ["--dtype", "bfloat16"], ["--max-prompt-length", "30"]])
def test_the_cache_of_another_truncation_or_type_is_not_used(world, change, tmp_path, capfd):
    shutil.copytree(world / "whole/cache", tmp_path / "out/cache")
    assert train.main(arguments(world, tmp_path / "out", "--loss", "dpo", *change)) == 0
    assert "in the cache" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda guide: flip(guide / "model.safetensors"), "holds other weights than stage 1 exported"),
        (lambda guide: (guide / "config.json").unlink(), "the guide is damaged: "),
        (lambda guide: (guide / "model.safetensors").unlink(), "the guide is damaged: "),
        (shutil.rmtree, "is gone, by which the policy is trained"),
    ],
)
def test_a_guide_that_is_not_what_stage_1_exported_is_refused(world, damage, words, tmp_path, capfd):
    out = tmp_path / "out"
    assert run_and_stop(world, out, "tgdpo", 2) == 143
    damage(out / "guide")
    capfd.readouterr()
    assert train.main(arguments(world, out, "--resume")) == 2
    err = capfd.readouterr().err
    assert words in err and err.count("\n") == 1 and "put back what stage 1 exported" in err, err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]


def test_a_damaged_guide_is_exported_again_from_its_checkpoint(world, tmp_path, monkeypatch):
    """As a power cut may leave it: without its files' content, other than written, or gone."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.checkpoint, "drop_stage", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(world, tmp_path / "out"))
    monkeypatch.undo()
    process_group.stop()
    damages = {
        "empty": lambda guide: (guide / "config.json").write_bytes(b""),
        "flipped": lambda guide: flip(guide / "model.safetensors"),
        "gone": shutil.rmtree,
    }
    for name, damage in damages.items():
        shutil.copytree(tmp_path / "out", tmp_path / name)
        damage(tmp_path / name / "guide")
        assert train.main(arguments(world, tmp_path / name, "--resume")) == 0
        assert_bit_equal(tmp_path / name, world / "whole")


def flip(path):
    """Turns one bit in the middle of a file's numbers."""
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def test_other_evaluation_data_are_refused_by_name(world, tmp_path, capfd):
    out = tmp_path / "out"
    assert run_and_stop(world, out, "tgdpo", 2) == 143
    capfd.readouterr()
    assert train.main(arguments(world, out, "--resume", "--eval-data", world / "pairs.jsonl")) == 2
    assert "these differ: evaluation data (" in capfd.readouterr().err


def test_damaged_metrics_lose_no_other_row(world, tmp_path, capfd):
    out = tmp_path / "out"
    assert run_and_stop(world, out, "tgdpo", 2) == 143
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join([*lines[:2], '{"stage": "dpo", "step": "x"}\n', "[\n", *lines[2:]]))
    assert train.main(arguments(world, out, "--resume")) == 0
    assert "2 damaged lines are left out" in capfd.readouterr().out
    assert_bit_equal(out, world / "whole")


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(world, tmp_path, capfd):
    out = tmp_path / "out"
    more = (
        "--loss",
        "dpo",
        "--lr",
        "1e38",
        "--weight-decay",
        "10",
        "--epochs",
        "1",
        "--batch-size",
        "64",
        "--schedule",
        "constant",
    )
    assert train.main(arguments(world, out, *more)) == 1
    err = capfd.readouterr().err
    assert "the weights are no longer finite; the last checkpoint is none" in err and err.count("\n") == 1, err
    assert not (out / "policy").exists() and not any((out / "checkpoints").glob("step-*"))


def test_overwrite_removes_only_what_a_run_left(world, tmp_path, capfd):
    out = tmp_path / "mine"
    (out / "policy").mkdir(parents=True)
    (out / "policy" / "thesis.txt").write_text("mine")
    assert train.main(arguments(world, out, "--overwrite")) == 2
    assert "nothing that tells of a run" in capfd.readouterr().err and (out / "policy" / "thesis.txt").exists()


@pytest.mark.parametrize("more", ["--overwrite", "--resume"])
def test_a_strangers_folder_is_left_as_it_is(world, tmp_path, capfd, more):
    """After a refused run too: its lock is no mark of a run. Nor is a config.toml of another program."""
    out = tmp_path / "mine"
    shutil.copytree(world / "start", out / "policy")
    (out / "config.toml").write_text("title = 'mine'\n")
    before = sorted(out.rglob("*"))
    for given in ((), (more,), (more,)):
        assert train.main(arguments(world, out, *given)) == 2
        assert capfd.readouterr().err.count("\n") == 1 and sorted(out.rglob("*")) == before


def test_a_config_written_by_hand_is_kept_beside(world, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(world / "whole", out)
    edited = (out / "config.toml").read_text().replace("beta = 0.3", "beta = 0.4  # as of Monday")
    for more, text, kept in (("--resume", edited, ".before"), ("--overwrite", "# mine\n", ".before-2")):
        (out / "config.toml").write_text(text)
        assert train.main(arguments(world, out, more)) == 0
        assert (out / f"config.toml{kept}").read_text() == text
    assert (out / "config.toml.before").read_text() == edited and options.is_as_saved(
        (out / "config.toml").read_bytes()
    )
    assert_bit_equal(out, world / "whole")


def test_what_cannot_be_read_is_not_taken_for_damaged(world, tmp_path, capfd, monkeypatch):
    """EIO, EMFILE, EACCES: the run stops, and all checkpoints and metrics stay."""
    out = tmp_path / "out"
    assert run_and_stop(world, out, "tgdpo", 2) == 143
    before = {path: path.stat().st_size for path in (*(out / "checkpoints").rglob("*"), out / "metrics.jsonl")}

    def fails(plain, what):
        def read(path, *more, **given):
            if os.path.basename(str(path)).startswith(what) and str(path).startswith(str(out)):
                raise OSError(errno.EIO, "Input/output error")
            return plain(path, *more, **given)

        return read

    for what in ("state.json", "checkpoints", "guide", "run.json", "metrics.jsonl", "ref-"):
        for module, name in ((builtins, "open"), (os, "listdir"), (os, "stat"), (os, "lstat")):
            monkeypatch.setattr(module, name, fails(getattr(module, name), what))
        capfd.readouterr()
        assert train.main(arguments(world, out, "--resume")) == 1
        err = capfd.readouterr().err
        assert "cannot be read: Input/output error; all is left as it is" in err and err.count("\n") == 1, err
        monkeypatch.undo()
        assert before == {path: path.stat().st_size for path in before}
    assert train.main(arguments(world, out, "--resume")) == 0
    assert_bit_equal(out, world / "whole")


def test_the_run_that_was_started_last_goes_on(tmp_path, monkeypatch):
    """Not the one of the highest number: an earlier number may have come free."""
    monkeypatch.chdir(tmp_path)
    for second, name in enumerate(("tgdpo", "tgdpo-3", "tgdpo-2", "tgdpo-other")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
        os.utime(tmp_path / "runs" / name / "config.toml", (second, second))
    assert outdir._numbered(str(tmp_path / "runs" / "tgdpo"), True) == str(tmp_path / "runs" / "tgdpo-2")


def test_keep_0_leaves_no_checkpoint_of_a_finished_run(world, tmp_path, capfd, monkeypatch):
    """One while it goes on, so that it can be stopped and resumed."""
    out, seen, plain = tmp_path / "out", [], checkpoint.save
    given = arguments(world, out, "--save-every", 2, "--keep", 0)

    def watched(directory, *more):
        plain(directory, *more)
        seen.append(len(os.listdir(directory)))

    monkeypatch.setattr(checkpoint, "save", watched)
    monkeypatch.setattr(train, "answer", None)  # a fault behind the last save
    assert train.main(given) == 1 and seen == [1] * 6
    monkeypatch.undo()
    assert train.main([*given, "--resume"]) == 0
    assert os.listdir(out / "checkpoints") == ["finished"]
    assert_bit_equal(out, world / "whole")
    monkeypatch.setattr(train, "sharded", None)  # no model is read
    capfd.readouterr()
    assert train.main([*given, "--resume"]) == 0
    assert "is finished, and --keep 0 left no checkpoint: nothing to resume" in (told := capfd.readouterr().out)
    assert "training the policy" not in told
    assert train.main([*given, "--resume", "--lr", "1e-3"]) == 2
    assert f"{out} is of another run, these differ: lr" in capfd.readouterr().err
