"""train.py as its users start it: what they may get wrong, and the surroundings it must put up with."""

import collections
import errno
import io
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time

import launcher
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import make_checkpoint, make_pairs

import data
import model
import train
from files.errors import BadInput
from runtime import inputs, metrics, options, results, sampling
from runtime import run as start

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = ["--loss", "dpo", "--lr", "2e-3", "--batch-size", "4", "--max-length", "128", "--samples", "0"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def arguments(world, out, *more):
    """The command line; `more` may name other data, where options would add up."""
    data = [] if "--data" in more else ["--data", str(world / "pairs.jsonl")]
    return ["--model", str(world / "start"), *data, "--out", str(out), *SETTINGS, *map(str, more)]


def refused(capfd, argv, *words, out=None):
    """Status 2, one line on standard error with these words and no other; and no directory `out`."""
    capfd.readouterr()
    assert train.main([str(a) for a in argv]) == 2
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].isprintable(), captured.err
    assert lines[0].startswith("train.py: error: ")
    for word in words:
        assert word in lines[0], lines[0]
    assert out is None or not out.exists()
    return lines[0]


def rows(out):
    return [json.loads(line) for line in open(f"{out}/metrics.jsonl")]


# ---------------------------------------------------------------------------------------------------- options


def test_every_number_out_of_range_or_no_number(world, capfd, tmp_path, out):
    for name, field in options.FIELDS.items():
        flag, limits = "--" + name.replace("_", "-"), field.metadata
        wrong = ["nan", "inf", "high", "-1", "1e400"] if options.KINDS[name] in (int, float) else []
        if options.KINDS[name] is int or "most" in limits or "below" in limits:
            wrong += ["99999999999999999999"]
        wrong += [str(limits[edge]) for edge in ("above", "below") if edge in limits]
        wrong += [str(limits["least"] - 1)] if "least" in limits else []
        wrong += ["other"] if "choices" in limits else []
        for value in wrong:
            refused(capfd, arguments(world, out, f"{flag}={value}"), flag, value, "must be", out=out)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--bta", "1"], ["unknown option --bta; the nearest is --beta"]),
        (["--max-prompt-length", "128"], ["--max-prompt-length 128: must be less than --max-length"]),
        (["--guide", "."], ["--loss dpo has no use for it; leave it out"]),
        (["--resume", "--overwrite"], ["give one"]),
        (["--hsdp", "3"], ["--hsdp 3: 1 ranks do not divide into groups of 3"]),
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl: there is no such file"]),
        (["--chat-template", "nowhere.jinja"], ["nowhere.jinja: no such file"]),
        (["--model", "nowhere at all"], ["nowhere at all: there is no such directory"]),
        (["--eval-fraction", "0.5", "--data", "ONE"], ["--eval-fraction 0.5: there is only one pair"]),
    ],
)
def test_contradictions_and_what_is_not_there(world, capfd, tmp_path, more, words, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    one = make_pairs(tmp_path / "one.jsonl", 1)
    more = [one if word == "ONE" else word for word in more]
    refused(capfd, arguments(world, out, *more), *words, out=out)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_modules_are_imported_leaves_no_traceback(number, status):
    """At the first import that may take long: what is before it takes Python itself."""
    program = (
        "import os, sys\nquick = {'runtime', 'runtime.supported'}\n"
        f"watch = lambda event, given: event == 'import' and given[0] not in quick and os.kill(os.getpid(), {number})\n"
        f"file = {str(ROOT / 'train.py')!r}\ncode = compile(open(file).read(), file, 'exec')\nsys.addaudithook(watch)\n"
        "exec(code, {'__name__': '__main__', '__file__': file})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_second_signal_while_modules_are_torn_down_changes_no_status():
    """What waits then is as long as torch's own end."""
    program = (
        "import os, signal, sys, atexit; from runtime import supported; supported.end_at_once_when_told();"
        "atexit.register(lambda: [os.kill(os.getpid(), n) for n in (2, 15, 1)]); supported.end(7)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 7


@pytest.mark.parametrize("more", [["-P"], ["-I"]])
def test_a_python_that_does_not_look_beside_the_script(more):
    done = subprocess.run([sys.executable, *more, ROOT / "train.py", "--epochs", "0"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "train.py: error: --epochs 0: must be at least 1\n")


@pytest.mark.linux("ulimit -v")
def test_too_little_address_space_for_torch_is_one_line():
    command = f"ulimit -v 600000; {sys.executable} {ROOT}/train.py"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    line = "train.py: error: memory is limited to 585 MiB of addresses (ulimit -v); it takes 2048 at least\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_a_bad_option_ends_the_program_before_torch_is_imported(tmp_path):
    began = time.process_time()
    for end in ({}, {"stdout": None}, {"LOCAL_RANK": "1"}):
        program = [sys.executable, ROOT / "train.py", "--epochs", "0"]
        shell = ["sh", "-c", '"$@" >&-', "sh"] if "stdout" in end else []
        done = subprocess.run(
            shell + program,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {name: text for name, text in end.items() if text},
        )
        expected = "" if "LOCAL_RANK" in end else "train.py: error: --epochs 0: must be at least 1\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    assert os.listdir(tmp_path) == [] and time.process_time() - began < 3


# ------------------------------------------------------------------------------------------------- the output


def test_output_paths_that_cannot_be(world, capfd, tmp_path, monkeypatch, out):
    """Known before any data is read."""
    monkeypatch.setattr(data, "load_pairs", None)
    (tmp_path / "file").touch()
    refused(capfd, arguments(world, tmp_path / "file"), f"{tmp_path}/file is a file; give a directory")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    refused(
        capfd,
        ["--model", world / "start", "--data", world / "pairs.jsonl", *SETTINGS],
        f"--out {tmp_path}/runs/dpo: {tmp_path}/runs is a file; give a directory",
    )
    refused(capfd, arguments(world, tmp_path / "file/out"), "cannot be written: Not a directory; give another")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_text("{}\n")
    refused(
        capfd,
        arguments(world, tmp_path / "other"),
        "holds another run's results (metrics.jsonl)",
        "--resume, --overwrite or another directory",
    )
    assert (tmp_path / "other/metrics.jsonl").read_text() == "{}\n"


@pytest.mark.linux("/proc, where no directory can be made")
def test_an_output_path_where_nothing_can_be_made(world, capfd, monkeypatch):
    monkeypatch.setattr(data, "load_pairs", None)
    refused(capfd, arguments(world, "/proc/tgdpo"), "--out /proc/tgdpo: cannot be written: No such file")


def test_too_little_disk_is_foreseen(world, capfd, tmp_path, monkeypatch, out):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 50_000))
    monkeypatch.setattr(train, "sharded", None)  # no model is loaded before
    line = refused(
        capfd,
        arguments(world, out, "--save-every", 1),
        "its disk has 0.000 GB free, and the run needs 0.000 GB",
        "3 checkpoints",
        "lower --keep or give another",
        out=out,
    )
    assert line.startswith(f"train.py: error: --out {out}: ")
    given = arguments(world, out, "--save-every", 1, "--keep", 0)  # the new one before the old one goes
    refused(capfd, given, "2 checkpoints", out=out)


@pytest.mark.parametrize("more", [(), ("--lora-rank", 2, "--centre-guidance")])
def test_the_space_a_run_needs_by_hand(world, tmp_path, monkeypatch, out, more):
    """What is foreseen is what is written, but for the files' headers and the report."""
    needed, usage = [10**9], collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(results.shutil, "disk_usage", lambda path: usage(0, 0, needed[-1]))
    given = arguments(world, out, "--loss", "tgdpo", "--save-every", 1, "--keep", 3, "--epochs", 2, *more)
    assert train.main(given) == 0
    checkpoints, *others = (
        sum(tensor.nbytes for path in out.glob(f"{part}/*.safetensors") for tensor in load_file(path).values())
        for part in ("checkpoints/*", "guide", "policy", "adapter", "cache")
    )
    need = checkpoints * 4 // 3 + sum(others)  # one more while the new one is written
    monkeypatch.setattr(train, "cached_log_probs", None)  # a fault, so status 1, once there is room
    for free, status in ((need, 1), (need - 100, 2)):  # a lock of some bytes is there already
        shutil.rmtree(out)
        needed.append(free)
        assert train.main(given) == status


def test_a_failed_overwrite_keeps_what_stood(world, capfd, tmp_path, out):
    assert train.main(arguments(world, out)) == 0
    before = sorted(str(path) for path in out.rglob("*"))
    make_pairs(tmp_path / "empty.jsonl", 0)
    refused(capfd, arguments(world, out, "--overwrite", "--data", tmp_path / "empty.jsonl"), "is empty")
    shutil.copytree(world / "start", tmp_path / "bad")
    weights = load_file(tmp_path / "bad/model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "bad/model.safetensors", {"format": "pt"})
    refused(capfd, arguments(world, out, "--overwrite", "--model", tmp_path / "bad"), "values that are not finite")
    assert sorted(str(path) for path in out.rglob("*")) == before


@pytest.mark.parametrize("again", [False, True])
def test_a_directory_that_is_taken_away_ends_the_run_with_one_line(world, capfd, tmp_path, monkeypatch, out, again):
    """And nothing is written into the one that has its name by now."""
    plain = train.optimiser_step

    def step(*given):
        if out.exists() and not (tmp_path / "moved").exists():
            out.rename(tmp_path / "moved")
            if again:
                out.mkdir()
                (out / ".lock").touch()
        return plain(*given)

    monkeypatch.setattr(train, "optimiser_step", step)
    assert train.main(arguments(world, out)) == 1
    words = "was replaced under this run by another one's" if again else "was removed or renamed under this run"
    err = capfd.readouterr().err
    assert words in err and err.count("\n") == 1, err
    assert os.listdir(out) == [".lock"] if again else not out.exists()


def test_two_runs_in_one_directory(world, capfd, tmp_path, out):
    (first,) = launcher.start(1, arguments(world, out, "--epochs", 100_000, "--save-every", 0), tmp_path / "log")
    try:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and first.is_alive()
            time.sleep(0.1)
        for flag in ("--resume", "--overwrite", "--seed=0"):
            refused(capfd, arguments(world, out, flag), f"another run is at work in it (process {first.pid} ")
        assert (out / "metrics.jsonl").exists()
    finally:
        first.kill()
        first.join()


def test_runs_are_numbered_and_resumed_from_any_directory(world, capfd, tmp_path, monkeypatch, out):
    """Relative paths, no --out; then the saved config resumes from elsewhere."""
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    start, pairs = (os.path.relpath(world / name) for name in ("start", "pairs.jsonl"))
    for _ in range(2):
        assert train.main(["--model", start, "--data", pairs, *SETTINGS]) == 0
    assert sorted(os.listdir("runs")) == ["dpo", "dpo-2"]
    weights = tmp_path / "here/runs/dpo/policy/model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree("runs/dpo/policy")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.main(["--config", "../here/runs/dpo/config.toml", "--resume"]) == 0
    assert weights.read_bytes() == before and os.listdir(".") == []
    os.rmdir(tmp_path / "elsewhere")
    refused(capfd, arguments(world, out), "the working directory is no longer there; change to another")
    monkeypatch.chdir(tmp_path)


def test_a_damaged_run_json_is_not_resumed_blindly(world, capfd, tmp_path, out):
    (out).mkdir()
    for text in ("", "{", "[]", "{}", '{"identity": 3}', "[" * 100_000):
        (out / "run.json").write_text(text)
        refused(capfd, arguments(world, out, "--resume"), f"{out}/run.json is damaged", "--overwrite")
        assert (out / "run.json").read_text() == text


# --------------------------------------------------------------------------------- models, guides, tokenizers


def test_a_vocabulary_smaller_than_the_tokenizers_ids(world, capfd, tmp_path, out):
    small = make_checkpoint(tmp_path / "small", vocab_size=259, eos_token_id=258)
    words = "small: the tokenizer has ids up to 259, but the model only 259 embeddings"
    refused(capfd, arguments(world, out, "--model", small), words, out=out)
    refused(capfd, arguments(world, out, "--loss", "tgdpo", "--guide", small), words, out=out)


def test_a_guide_with_another_tokenizer_of_the_same_size(world, capfd, tmp_path, out):
    guide = pathlib.Path(make_checkpoint(tmp_path / "guide"))
    text = (guide / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (guide / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(
        capfd,
        arguments(world, out, "--loss", "tgdpo", "--guide", guide),
        f"{guide}: its tokenizer is not that of",
        "2 ids mean other pieces",
        "'b' against 'a'",
        out=out,
    )


def test_a_guide_of_another_architecture(world, tmp_path, out):
    """Allowed where the tokenizer is the same; the policy keeps its own. Nothing is written to either."""
    guide = pathlib.Path(
        make_checkpoint(
            tmp_path / "guide", "mistral window", seed=1, hidden_size=24, num_hidden_layers=1, vocab_size=300
        )
    )
    inputs = [guide, *guide.iterdir(), world / "start", *(world / "start").iterdir()]
    modes = [os.stat(path).st_mode for path in inputs]
    for path in inputs:
        os.chmod(path, 0o500 if os.path.isdir(path) else 0o400)
    before = [(path, os.stat(path).st_mtime_ns) for path in inputs]
    try:
        assert train.main(arguments(world, out, "--loss", "tgdpo", "--guide", guide)) == 0
        assert before == [(path, os.stat(path).st_mtime_ns) for path in inputs]
    finally:
        for path, mode in zip(inputs, modes):
            os.chmod(path, mode)
    assert model.read_config(out / "policy").hidden_size == 16 and not (out / "guide").exists()
    assert rows(out)[0]["r_hat_std"] > 0
    assert os.stat(out / "policy/tokenizer.json").st_mode & 0o200  # copies are not read-only


def test_weights_that_are_not_finite_leave_nothing_behind(world, capfd, tmp_path, out):
    """Seen only when they are read; the mended model then trains under the same command."""
    bad = shutil.copytree(world / "start", tmp_path / "bad")
    good = load_file(bad / "model.safetensors")
    save_file(
        good | {"model.norm.weight": torch.full_like(good["model.norm.weight"], float("nan"))},
        bad / "model.safetensors",
        {"format": "pt"},
    )
    for loss in ("dpo", "simpo"):
        given = arguments(world, out, "--loss", loss, "--model", bad)
        capfd.readouterr()
        assert train.main(given) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "model.norm.weight holds values that are not finite" in err
        assert not (out).exists()
    save_file(good, bad / "model.safetensors", {"format": "pt"})
    assert train.main(given) == 0


def test_a_context_shorter_than_max_length_is_warned_of(world, capfd, tmp_path, out):
    assert train.main(arguments(world, out, "--dry-run", "--max-length", 300)) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "beyond" in line]
    assert len(lines) == 1
    assert re.fullmatch(
        r"warning: --max-length 300 is beyond the 256 tokens that \S+start was made for; "
        r"the longest pair has \d+",
        lines[0],
    )
    assert train.main(arguments(world, out, "--dry-run", "--max-length", 256)) == 0
    assert "beyond" not in capfd.readouterr().out


# ------------------------------------------------------------------------------------------------------- data


def test_a_guide_that_pulls_against_the_labels_and_a_chosen_that_falls(world, capfd, tmp_path):
    """The guide of the right labels, beside the same pairs with their labels swapped."""
    loss = ["--loss", "tgdpo", "--epochs", 6, "--report-pairs", 10]
    assert train.main(arguments(world, tmp_path / "right", *loss)) == 0
    told = {"right": capfd.readouterr().out}
    swapped = ["--columns", "chosen=rejected", "rejected=chosen", "--guide", tmp_path / "right/guide"]
    assert train.main(arguments(world, tmp_path / "swapped", *loss, *swapped)) == 0
    told["swapped"] = capfd.readouterr().out
    assert "worse than chance" not in told["right"]
    assert "warning: the guide prefers the chosen response on 0.0% of the training pairs, worse" in told["swapped"]
    fell = set()
    for name, text in told.items():
        table = json.load(open(tmp_path / name / "run.json"))["table"]
        falls = [row["model"] for row in table if row["logratio_chosen"] < 0]
        assert (f"note: {' and '.join(falls)} find the chosen" in text) == bool(falls) == ("note: " in text)
        fell.add(bool(falls))
    assert fell == {True, False}


def test_pairs_that_are_trained_and_evaluated_on_are_counted(world, capfd, tmp_path, out):
    """By what they say, not by the names of their files."""
    both = tmp_path / "both.jsonl"
    rows = (world / "pairs.jsonl").read_text().splitlines()[:4]
    both.write_text("\n".join([*rows, '{"prompt": "new", "chosen": "a", "rejected": "b"}']))
    for evaluated, words in (
        (both, "4 of the 5 evaluation pairs are training pairs too, and tell nothing of what was not trained on\n"),
        (world / "pairs.jsonl", "10 of the 10 evaluation pairs are training pairs too"),
    ):
        assert train.main(arguments(world, out, "--eval-data", evaluated, "--dry-run")) == 0
        told = capfd.readouterr().out
        assert f"warning: {words}" in told
    assert f"; {world / 'pairs.jsonl'} is given as --data and as --eval-data" in told
    both.write_text(rows[0])
    assert train.main(arguments(world, out, "--data", both, "--eval-fraction", 0.3, "--dry-run")) == 2
    assert train.main(arguments(world, out, "--eval-fraction", 0.3, "--dry-run")) == 0
    assert "training pairs too" not in capfd.readouterr().out


def bad_rows(path, bad, good=2):
    lines = [json.dumps({"prompt": "p", "chosen": None, "rejected": "r"})] * bad
    lines += [json.dumps({"prompt": "p", "chosen": f"c{i}", "rejected": "r"}) for i in range(good)]
    path.write_text("\n".join(lines))
    return path


def test_bad_rows_are_listed(world, capfd, tmp_path, out):
    """A line for each reason, and where there are several one before them. --skip-bad-rows drops them."""
    refused(
        capfd,
        arguments(world, out, "--data", bad_rows(tmp_path / "one.jsonl", 1)),
        f"{tmp_path}/one.jsonl:1: missing field: `chosen`",
        "--skip-bad-rows",
        out=out,
    )
    many = bad_rows(tmp_path / "many.jsonl", 13)
    said = f"{many}:1: missing field: `chosen`; the row has: prompt, chosen, rejected (and 12 more of 15 rows); mend"
    refused(capfd, arguments(world, out, "--data", many), said, out=out)
    nope = arguments(world, out, "--columns", "weight=nope")
    refused(capfd, nope, "jsonl: --columns weight=nope: in none of 10 rows; the row has: prompt,", out=out)
    assert train.main(arguments(world, out, "--data", many, "--skip-bad-rows", "--dry-run")) == 0
    assert "  dropped 13: missing field" in capfd.readouterr().out.splitlines()


def test_what_strangers_wrote_is_shown_not_sent(world, capfd, tmp_path, out):
    path = tmp_path / "\x1b[31mred.jsonl"
    path.write_text('{"prompt": "p", "chosen": [{"role": "\\u001b\\u202e", "content": ""}], "rejected": ""}\n')
    refused(capfd, arguments(world, out, "--data", path), "\\x1b[31mred.jsonl:1: unknown role")


@pytest.mark.parametrize("fraction, kept, held", [(0.001, 9, 1), (0.999, 1, 9), (0.3, 7, 3)])
def test_fractions_held_back(world, capfd, tmp_path, fraction, kept, held, out):
    assert train.main(arguments(world, out, "--dry-run", "--eval-fraction", fraction)) == 0
    assert f"{kept} pairs to train on, {held} to evaluate on" in capfd.readouterr().out


def test_columns_limit_and_max_steps_reach_the_plan(world, capfd, tmp_path, out):
    """The weight is asked of no evaluation row, and --limit takes no evaluation pair away."""
    train_rows = [{"q": "Hi", "a": f"yes {i}", "b": "no", "w": 2} for i in range(9)]
    files = [tmp_path / "train.jsonl", tmp_path / "eval.jsonl"]
    for path, name in zip(files, ("", "w")):
        lines = [json.dumps({key: value for key, value in row.items() if key != name}) for row in train_rows]
        path.write_text("\n".join(lines))
    columns = ["--columns", "prompt=q", "chosen=a", "rejected=b", "weight=w"]
    given = ["--data", files[0], "--eval-data", files[1], *columns, "--limit", 5, "--max-steps", 1, "--dry-run"]
    assert train.main(arguments(world, out, *given)) == 0
    told = capfd.readouterr().out
    assert "5 pairs to train on, 9 to evaluate on; 1 steps of 4 pairs" in told


def test_fewer_pairs_than_a_batch_and_than_ranks(world, capfd, tmp_path, out):
    pairs = make_pairs(tmp_path / "pairs.jsonl", 3)
    held_out = make_pairs(tmp_path / "held_out.jsonl", 1, seed=1)
    few = ["--data", pairs, "--eval-data", held_out, "--batch-size", 128, "--epochs", 2]
    assert train.main(arguments(world, tmp_path / "alone", *few)) == 0
    assert "warning: 3 pairs are fewer than --batch-size 128: each step takes all" in capfd.readouterr().out
    statuses, printed = launcher.run(4, arguments(world, out, *few), tmp_path / "log")
    assert statuses == [0] * 4, printed
    for a, b in zip(rows(tmp_path / "alone"), rows(out), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["step"] == a["step"]


def test_samples_are_answered_within_the_memory_plan(world, tmp_path, monkeypatch, out):
    """As many prompts at a time as micro-batches have tokens."""
    calls, plain = [], sampling.generate
    monkeypatch.setattr(
        sampling,
        "generate",
        lambda net, prompts, new, *rest, **more: (
            calls.append((len(prompts), max(map(len, prompts)) + new)),
            plain(net, prompts, new, *rest, **more),
        )[1],
    )
    given = ["--samples", 1000, "--sample-tokens", 4, "--micro-tokens", 200]
    assert train.main(arguments(world, out, *given)) == 0
    assert len(json.load(open(out / "samples.json"))) == 10
    policy = calls[: len(calls) // 2]  # then the reference
    assert sum(count for count, _ in policy) == 10 and len(policy) > 1
    assert all(count * width <= 200 for count, width in calls) and max(count for count, _ in calls) > 1


def test_a_table_compares_the_same_pairs(world, tmp_path):
    for shown in (0, 4):
        given = "--report-pairs", shown, "--loss", "tgdpo"
        assert train.main(arguments(world, tmp_path / str(shown), *given)) == 0
    table = {row["model"]: row for row in json.load(open(tmp_path / "4/run.json"))["table"]}
    pairs = [json.loads(line) for line in open(tmp_path / "4/tokens.jsonl")]
    assert len(pairs) == 4 and json.load(open(tmp_path / "0/run.json"))["table"] == []
    for name in ("guide", "policy"):
        ratios = [sum(pair["chosen"][name]) - sum(pair["chosen"]["ref"]) for pair in pairs]
        assert table[name]["logratio_chosen"] == pytest.approx(sum(ratios) / 4, abs=1e-4)


def test_simpos_table_has_its_own_margin(world, tmp_path):
    """It has no reference: mean log-probs make its margin, the same that the evaluation has."""
    held_out = make_pairs(tmp_path / "held_out.jsonl", 5, seed=3)
    assert train.main(arguments(world, tmp_path / "out", "--loss", "simpo", "--eval-data", held_out)) == 0
    (row,) = json.load(open(tmp_path / "out/run.json"))["table"]
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval"] and row["margin"] == pytest.approx(last["margin"], abs=1e-6)
    assert (
        row["accuracy"] == pytest.approx(last["accuracy"]) and row["logp_chosen"] < 0 and "logratio_chosen" not in row
    )


# ----------------------------------------------------------------------------------------------- surroundings


@pytest.mark.linux("an ASCII locale")
def test_a_closed_pipe_and_a_locale_without_letters(world, tmp_path, out):
    """LC_ALL=C, paths and texts beyond ASCII, standard output a pipe that nobody reads."""
    here = tmp_path / "ünï çode 漢"
    here.mkdir()
    pairs = (world / "pairs.jsonl").read_text()
    (here / "pääre.jsonl").write_text(pairs.replace('"prompt": "', '"prompt": "Grüße, 漢字 '))
    reader, writer = os.pipe()
    os.close(reader)
    words = arguments(world, "öut", "--samples", 1, "--sample-tokens", 2, "--data", "pääre.jsonl")
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONUTF8"} | {"LC_ALL": "C"}
    program = [sys.executable, ROOT / "train.py"]
    done = subprocess.run(program + words, cwd=here, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    saved = options.resolve(["--config", str(here / "öut/config.toml")])
    assert saved.data == (str(here / "pääre.jsonl"),)
    assert "Grüße, 漢字" in json.load(open(here / "öut/samples.json"))[0]["prompt"]
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (words, arguments(world, "out")):  # the working directory's name counts too
        done = subprocess.run(program + words, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "must be UTF-8 text; this Python reads ascii: set PYTHONUTF8=1" in done.stderr


def test_nothing_open_at_all(world, tmp_path, out):
    """No standard input, output and error: what the run opens must not end up under their numbers."""
    words = [sys.executable, str(ROOT / "train.py"), *arguments(world, out)]
    assert subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *words]).returncode == 0
    assert [row["step"] for row in rows(out)] == [1, 2, 3] and (out / "policy/model.safetensors").exists()


@pytest.mark.linux("/dev/full")
def test_a_full_standard_error_changes_no_status(world, tmp_path, monkeypatch, out):
    monkeypatch.setattr(sys, "stderr", os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(sys.stderr, write_through=True))
    assert train.main(arguments(world, out, "--data", "nowhere.jsonl")) == 2


@pytest.mark.parametrize("columns", [120, 0])
def test_a_terminal_gets_a_bar(world, tmp_path, monkeypatch, capsys, columns, out):
    """One that does not know its width as well."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (columns and 24, columns))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert train.main(arguments(world, out)) == 0
        shown = os.read(master, 100_000).decode()
    os.close(master)
    assert re.search(r"\rdpo 3/3 \|█+\| 00:00 left, loss 0\.\d{4}  margin", shown)
    assert not re.search(r"^dpo \d/3", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "rank, world_size, words",
    [
        (0, 2, "rank 0 of 2 found no complete group"),
        (1, 2, "rank 1 of 2 found no complete group"),
        (0, 1, "is in use: set another MASTER_PORT"),
        (3, 2, "RANK is 3 but WORLD_SIZE is 2"),
    ],
)
def test_a_rank_started_by_hand(world, tmp_path, rank, world_size, words, out):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = launcher.start(
            world_size,
            arguments(world, out, "--timeout-minutes", 0.01),
            tmp_path / "log",
            only=[rank],
            port=taken.getsockname()[1] if "in use" in words else None,
        )
        assert launcher.finish(process) == [2]
    printed = open(f"{tmp_path}/log.{rank}").read()
    assert printed.startswith("train.py: error: ") and words in printed and printed.count("\n") == 1
    assert not (out).exists()


# --------------------------------------------------------------------------------------------- how a run ends


def test_the_policy_is_safe_when_the_page_fails(world, capfd, tmp_path, monkeypatch, out):
    """A fault that nobody foresaw shows its traceback, status 1; resumed, only the end is done again."""
    monkeypatch.setattr(train.report, "write", lambda out: {}["no such key"])
    assert train.main(arguments(world, out)) == 1
    captured = capfd.readouterr()
    assert captured.err.startswith("Traceback") and captured.err.endswith("KeyError: 'no such key'\n")
    assert f"exported: {out}/policy\n" in captured.out and not (out / "report.html").exists()
    weights = load_file(out / "policy/model.safetensors")
    monkeypatch.undo()
    assert train.main(arguments(world, out, "--resume")) == 0
    printed = capfd.readouterr().out
    assert "resumed from" in printed and not re.search(r"^dpo [12]/3", printed, re.MULTILINE)
    again = load_file(out / "policy/model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights) and (out / "report.html").exists()
    assert printed.splitlines()[-2:] == [f"the policy: {out}/policy", f"the page:   {out}/report.html"]
    assert f"{out}/checkpoints: 0.000 GB that the models do not need; --resume makes the answers" in printed


@pytest.mark.parametrize(
    "error, status, words",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "[Errno 28] No space left on device: the disk is full; free",
        ),
        (
            OSError(errno.EDQUOT, "No quota left", "m.jsonl"),
            1,
            f"[Errno {errno.EDQUOT}] No quota left: 'm.jsonl': the disk is full",
        ),
        (torch.OutOfMemoryError("CUDA out of\nmemory."), 1, "out of memory on rank 0: CUDA out of memory.; try"),
        (BadInput("a.jsonl:3: wrong"), 2, "a.jsonl:3: wrong"),
    ],
)
def test_what_is_foreseen_is_said_in_one_line(world, capfd, tmp_path, monkeypatch, error, status, words, out):
    def fail(*given):
        raise error

    monkeypatch.setattr(train, "optimiser_step", fail)
    assert train.main(arguments(world, out)) == status
    err = capfd.readouterr().err
    assert err.startswith(f"train.py: error: {words}") and err.count("\n") == 1


def not_finite_on_rank_1(rank):
    """Rank 1's own rows of the weights are not finite; rank 0 reads none of them."""
    plain = model.load_weights

    def load(net, directory, local):
        if rank == 1:
            raise BadInput("model.safetensors: model.norm.weight holds values that are not finite")
        return plain(net, directory, local)

    model.load_weights = load


def no_model_on_the_machine_of_rank_1(rank):
    plain = inputs.hub.model_directory
    inputs.hub.model_directory = lambda name, *more: plain("/no/such/model" if rank == 1 else name, *more)


def no_tokenizer_on_the_machine_of_rank_1(rank):
    plain = inputs.load_tokenizer
    inputs.load_tokenizer = lambda source, template: plain("/no/such/model" if rank == 1 else source, template)


def fault_of_rank_1(rank):
    plain = train.optimiser_step

    def step(*given):
        return plain(*given) if rank == 0 else undefined(given)  # noqa: F821

    train.optimiser_step = step


def fault_of_rank_1_in_what_all_do(rank):
    def load(net, directory, local):
        if rank == 1:
            undefined(directory)  # noqa: F821

    model.load_weights = load


def fault_of_rank_0_for_all(rank):
    start.describe = lambda *given: {}["no such key"]


def full_disk_on_rank_0(rank):
    def write(self, row):
        if rank == 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    metrics.Metrics.write = write


@pytest.mark.parametrize(
    "fault, more, statuses, count, words",
    [
        (None, ["--data", "BAD"], [2, 2], 1, "and 12 more of 15 rows"),
        (None, ["--hsdp", 4], [2, 2], 1, "--hsdp 4: 2 ranks do not divide"),
        (None, ["--bta", 4], [2, 2], 1, "unknown option --bta"),
        (None, ["--out", "/proc/tgdpo"], [2, 2], 1, "--out /proc/tgdpo: cannot be written"),
        (not_finite_on_rank_1, [], [2, 2], 1, "model.norm.weight holds values that are not finite"),
        (no_model_on_the_machine_of_rank_1, [], [2, 2], 1, "/no/such/model: there is no such directory"),
        (no_tokenizer_on_the_machine_of_rank_1, [], [2, 2], 1, "/no/such/model/tokenizer.json: no such file"),
        (full_disk_on_rank_0, [], [1, 1], 2, "No space left on device"),
    ],
)
def test_several_ranks_end_alike_with_one_line(world, tmp_path, fault, more, statuses, count, words, out):
    more = [bad_rows(tmp_path / "bad.jsonl", 13) if word == "BAD" else word for word in more]
    ended, printed = launcher.run(2, arguments(world, out, *more), tmp_path / "log", fault)
    errors = printed[printed.index("train.py: error: ") :].splitlines()
    assert ended == statuses and words in printed and "Traceback" not in printed, printed
    assert len(errors) == count or fault is not None and printed.count("train.py: error: ") == count, printed
    if ended == [2, 2]:
        assert not (out).exists()


@pytest.mark.parametrize(
    "fault, last, lost",
    [
        (fault_of_rank_1, "NameError: name 'undefined' is not defined", 1),
        (fault_of_rank_1_in_what_all_do, "NameError: name 'undefined' is not defined", 0),
        (fault_of_rank_0_for_all, "KeyError: 'no such key'", 0),
    ],
)
def test_a_fault_of_one_rank_ends_all_and_shows_its_traceback(world, tmp_path, fault, last, lost, out):
    began = time.monotonic()
    ended, printed = launcher.run(2, arguments(world, out), tmp_path / "log", fault)
    assert ended == [1, 1] and time.monotonic() - began < 60
    assert printed.count("Traceback (most recent call last)") == 1 and last in printed.splitlines(), printed
    assert __file__ in printed  # where it happened, not only where it was passed on
    assert printed.count("has lost the others") == lost
