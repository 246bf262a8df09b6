"""Kills whole runs of train.py with SIGKILL, resumes them, and compares the end with a run never stopped.

    python tests/kill_train.py [KILLS] [RANKS] [SEED] [OPTION ...]      (50 kills of 1 rank unless told otherwise;
                                                                        options of train.py, such as --lora-rank 4)

Half of the kills come at a random moment, half at a random access to the output directory: between two
renames of a save, in an export, in the writing of the cache, at the change of stages. A run that completes is
compared bit for bit, guide, policy, metrics and all, and the next begins.
"""

import collections
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import connection

import launcher
from safetensors.torch import load
from tiny_world import make_checkpoint, make_pairs

SETTINGS = [
    "--beta",
    0.3,
    "--lr",
    2e-3,
    "--epochs",
    2,
    "--batch-size",
    4,
    "--max-length",
    128,
    "--eval-every",
    2,
    "--save-every",
    1,
    "--samples",
    1,
    "--sample-tokens",
    3,
]
TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}
VOLATILE = {".lock", "run.json", "report.html", "state.json"}  # the time, the process, the ranks' dice
CLOCK = {"seconds", "pairs_per_second", "tokens_per_second", "peak_memory"}


def make_world(directory):
    """A start and 10 pairs (the last batch of an epoch has 2). -> train.py's arguments without --out"""
    start = make_checkpoint(directory / "start", "tied")
    pairs = make_pairs(directory / "pairs.jsonl", 10)
    held_out = make_pairs(directory / "held_out.jsonl", 3, seed=1)
    return ["--model", start, "--data", pairs, "--eval-data", held_out, *SETTINGS]


def results(out):
    """Everything a complete run leaves that must not depend on kills: relative path -> content."""
    found = {}
    for path in sorted(pathlib.Path(out).rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors":  # the library orders its metadata by chance
            tensors = load(path.read_bytes())
            found[name] = {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}
        elif path.is_file() and path.name not in VOLATILE:
            found[name] = path.read_bytes()
    rows = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    found["metrics.jsonl"] = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]
    return found


def die_at(out, touch, log, rank):
    """Called in a rank before it runs: kills it right before it touches `out` for the touch-th time, or in the
    way that the regular expression `touch` says, and notes in `log` what it was about to do."""
    count, writing = 0, os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def watch(event, given):
        nonlocal count
        if event not in TOUCHES or not str(given[0]).startswith(out):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & writing):
            return
        count += 1
        what = f"{event} {os.path.relpath(given[0], out)}"
        if count == touch or isinstance(touch, str) and re.fullmatch(touch, what):
            with open(log, "a") as file:
                file.write(what + "\n")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run_and_kill(arguments, out, world, log, seconds=None, touch=None):
    """One start with --resume, killed after `seconds` or by die_at. -> whether it was; a run that ends by
    itself must end well."""
    fault = touch and functools.partial(die_at, str(out), touch, f"{log}.touches")
    processes = launcher.start(world, [*arguments, "--out", out, "--resume"], log, fault)
    connection.wait([process.sentinel for process in processes], seconds)
    ended = [process.exitcode for process in processes if process.exitcode is not None]
    killed = seconds is not None and not ended or -signal.SIGKILL in ended
    if killed:
        for process in processes:
            process.kill()
    statuses = launcher.finish(processes)
    assert killed or statuses == [0] * world, "".join(open(f"{log}.{rank}").read() for rank in range(world))
    return killed


def kill_loop(directory, kills, world=1, seed=0, plan=None, more=()):
    """`kills` kills, then on until the run completes. -> (completed runs, what the kills at accesses hit)

    plan: what run_and_kill is given, kill by kill; by default random moments and accesses."""
    directory, draw = pathlib.Path(directory), random.Random(seed)
    arguments, out, log = [*make_world(directory), *more], directory / "out", directory / "log"
    launcher.run(1, ["--help"], log)  # waits for the server
    began = time.monotonic()
    statuses, printed = launcher.run(world, [*arguments, "--out", directory / "whole"], log)
    assert statuses == [0] * world, printed
    whole, whole_run = results(directory / "whole"), time.monotonic() - began
    completed, done = 0, 0
    while done < kills or out.exists():
        if done == kills:
            how = {}
        elif plan:
            how = plan[done]
        else:
            how = draw.choice([{"seconds": draw.uniform(0, whole_run)}, {"touch": draw.randint(1, 90)}])
        if run_and_kill(arguments, out, world, log, **how):
            done += 1
            continue
        found = results(out)
        assert found.keys() == whole.keys(), found.keys() ^ whole.keys()
        assert not (differ := [name for name in whole if found[name] != whole[name]]), differ
        completed += 1
        shutil.rmtree(out)
    touches = pathlib.Path(f"{log}.touches")
    return completed, touches.read_text().splitlines() if touches.exists() else []


if __name__ == "__main__":
    defaults = ["50", "1", str(time.time_ns())]
    kills, world, seed = map(int, sys.argv[1:4] + defaults[len(sys.argv) - 1 :])
    place = tempfile.mkdtemp()
    completed, touches = kill_loop(place, kills, world, seed, more=sys.argv[4:])
    shutil.rmtree(place)
    kinds = collections.Counter(re.sub(r"\d+", "N", touch) for touch in touches)
    print(
        f"{kills} kills of {world} rank(s), seed {seed}: {completed} runs completed, each bit for bit the run "
        "never stopped; kills right before:"
    )
    for kind, count in kinds.most_common():
        print(f"  {count:3} {kind}")
