"""How a run ends early: because it was told to, or because it cannot go on. Bad input is files/errors.py's."""

import errno
import signal
import traceback

import torch
import torch.distributed as dist

from files.errors import BadInput
from runtime.progress import tell


class RunFailed(RuntimeError):
    """The run cannot go on: one line that says why and what to do. Exit status 1."""


class Stopped(Exception):
    """The run ends early because it was told to. status: the exit status, 128 + the signal's number."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


def complain(error, rank):
    """Tell on standard error why the run ends, on the rank that knows. Returns the exit status.

    What is foreseen gets one line (several bad rows a line each), anything else its traceback."""
    alike = isinstance(error, (BadInput, RunFailed))  # the same on all ranks
    text, words = None, str(error) if isinstance(error, BadInput) else " ".join(str(error).split())
    if alike or isinstance(error, OSError):
        text = words
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) and not alike:
            text = f"{words}: the disk is full; free some of it and go on with --resume"
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in words:
        text = f"out of memory on rank {rank}: {words}; try a smaller --micro-tokens, more ranks or --cpu-offload"
    elif isinstance(error, dist.DistError) and ("shared memory" in words or "/dev/shm" in words):
        text = (
            f"rank {rank}: NCCL found too little shared memory: {words}; give the container more, as by docker's "
            "--shm-size=1g"
        )
    elif isinstance(error, dist.DistError) or "gloo" in words:
        text = (
            f"rank {rank} has lost the others: one of them has ended, which tells why, or was silent for "
            f"--timeout-minutes: {words}; --resume goes on from the last checkpoint"
        )
    if rank == getattr(error, "rank", 0 if alike else rank):
        tell(f"train.py: error: {text}".replace("\n", "\n  ") if text else "".join(traceback.format_exception(error)))
    return 2 if isinstance(error, BadInput) else 1
