"""Kills saves with SIGKILL at random moments and looks at what they leave.

    python tests/kill_loop.py [ROUNDS] [RANKS]      (50 rounds of 1 rank unless told otherwise)

Each round goes on from the newest checkpoint, saves one after the other, and is killed while it does. What
stands afterwards must be, bit for bit, the last checkpoint that a save returned for or the one being saved.
"""

import gc
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime import checkpoint
from runtime.failures import RunFailed


def tensors_of(seed):
    """Made-up weights of every awkward shape, the same for the same seed."""
    shapes = {
        "model.many": (700, 9),
        "model.odd": (7, 3),
        "model.row": (1, 5),
        "model.one": (1,),
        "exp_avg.none": (0, 4),
        "exp_avg.many": (700, 9),
        "exp_avg_sq.number": (),
    }
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def fork(body):
    """Run body() in a forked child and leave it without returning: process id of the child."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork,
        gc.freeze()  # and what the parent forgot (a process group) would wait for its threads
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def fork_ranks(count, body, directory):
    """Fork a gloo process group of `count` ranks that runs body(rank): their process ids."""
    store = tempfile.mktemp(dir=directory)

    def member(rank):
        dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
        body(rank)
        dist.barrier()
        dist.destroy_process_group()

    return [fork(lambda: member(rank)) for rank in range(count)]


def wait(processes, seconds=60):
    """The exit statuses of `processes` (minus the signal where one killed it); kills what takes too long."""
    statuses, deadline = {}, time.monotonic() + seconds
    while len(statuses) < len(processes):
        for process in set(processes) - statuses.keys():
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [statuses[process] for process in processes]


def on_ranks(count, body, directory):
    """[body(rank) for every rank], each in its own process of one gloo group."""
    answers = Path(tempfile.mkdtemp(dir=directory))
    processes = fork_ranks(count, lambda rank: (answers / str(rank)).write_bytes(pickle.dumps(body(rank))), directory)
    statuses = wait(processes)
    assert statuses == [0] * count, f"exit statuses of the ranks: {statuses}"
    return [pickle.loads((answers / str(rank)).read_bytes()) for rank in range(count)]


def save_for_ever(directory, done):
    """Go on from the newest checkpoint and save one after the other, each step twice; tell each in `done`."""
    version = 0
    if path := checkpoint.newest(directory):
        version = checkpoint.load(path, tensors_of(0))["version"]
    while True:
        version += 1
        try:
            checkpoint.save(directory, version // 2, tensors_of(version), {"version": version}, keep=2)
        except RunFailed:
            if not dist.is_initialized():
                raise
            signal.pause()  # another rank was killed a moment earlier
        os.write(done, b"%d\n" % version)


def kill_loop(directory, rounds, ranks=1, seed=0):
    """Returns the names of what each kill left standing or lying about, as a list of sets of suffixes."""
    checkpoint.FILE_BYTES = 30_000 // ranks  # several files a rank
    draw, last, left = random.Random(seed), 0, []
    for _ in range(rounds):
        reading, writing = os.pipe()
        if ranks == 1:
            processes = [fork(lambda: save_for_ever(directory, writing))]
        else:
            processes = fork_ranks(ranks, lambda rank: save_for_ever(directory, writing), directory)
        os.close(writing)
        told = os.read(reading, 100)  # the first save of this round has returned
        time.sleep(draw.uniform(0, 0.1))
        for process in draw.sample(processes, ranks):
            os.kill(process, signal.SIGKILL)
            time.sleep(draw.uniform(0, 0.02))
        assert wait(processes) == [-signal.SIGKILL] * ranks, "a save failed before it was killed"
        while more := os.read(reading, 10_000):
            told += more
        os.close(reading)
        last = max([last, *map(int, told.split())])

        left.append({path.suffix for path in Path(directory).glob("step-*")})
        path, tensors = checkpoint.newest(directory), tensors_of(0)
        version = checkpoint.load(path, tensors)["version"]
        assert version in (last, last + 1), f"{path} is version {version}, saved were {last}"
        assert same(tensors, tensors_of(version)), f"{path} is a mix"
        last = version
    return left


if __name__ == "__main__":
    rounds, ranks = (int(argument) for argument in (sys.argv[1:] + ["50", "1"][len(sys.argv) - 1 :]))
    place = tempfile.mkdtemp()
    found = kill_loop(place, rounds, ranks, seed=time.time_ns())
    shutil.rmtree(place)
    print(
        f"{rounds} kills of {ranks} rank(s), each left the old checkpoint or the new one, whole; "
        f"{sum('.tmp' in names for names in found)} hit a save before its last rename, "
        f"{sum('.old' in names for names in found)} left a step-N.old"
    )
