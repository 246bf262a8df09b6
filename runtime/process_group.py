"""The processes of a run: how they find each other, what rank 0 does for all, what all do and learn of each other."""

import contextlib
import datetime
import os
import pickle
import re
import socket
import sys
import threading
import time
import typing

import torch
import torch.distributed as dist

from files.errors import BadInput
from runtime.signals import Signals, to_stderr

PATIENCE = datetime.timedelta(days=7)
GRACE = 10.0  # seconds beyond its own time that torch gets to notice it
held = contextlib.ExitStack()  # signal handlers and locks of this process, until stop()
# The same ranks as a second group. A wait in torch's own group may last --timeout-minutes, a wait in this one PATIENCE:
# rank 0 may read data or fetch a model for hours. None where start() made no group of several.
_patient = None


class Ranks(typing.NamedTuple):
    """This process among the others."""

    rank: int
    world: int
    device: torch.device
    signals: Signals
    here: int  # ranks on this machine, where torchrun tells it; else 1


def start(timeout_minutes, device=None):
    """Joins the process group of torchrun, or makes one of this process alone. -> Ranks

    device: "cpu" or "cuda"; None takes CUDA where there is any. On CUDA the process gets the GPU of its
    LOCAL_RANK. timeout_minutes bounds the wait for the other ranks, here and in every collective.
    Raises BadInput: an incomplete environment, a port in use, a missing GPU, or nobody else comes.
    """
    global _patient
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:  # stdin, stdout or stderr is closed, and the next file
        pass  # opened would get its number and its text
    os.close(opened)
    alone = "RANK" not in os.environ
    rank, world, local = _number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    if alone and world > 1:
        raise BadInput(f"WORLD_SIZE is {world} but RANK is not set: start with torchrun, or unset WORLD_SIZE")
    if rank >= world:
        raise BadInput(f"RANK is {rank} but WORLD_SIZE is {world}: start with torchrun, or unset RANK")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda":
        if local >= torch.cuda.device_count():
            shown = f"LOCAL_RANK is {local}, this machine shows {torch.cuda.device_count()}"
            raise BadInput(f"rank {rank} has no GPU: {shown}; lower --nproc_per_node")
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it comes first, and builds a plan for every new shape
    if world == 1:  # else gloo looks up this machine's name, which may take half a minute where nobody knows it
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    backend, timeout = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo", timeout_minutes * 60
    group = {"backend": backend, "rank": rank, "world_size": world, "timeout": datetime.timedelta(seconds=timeout)}
    if alone:
        dist.init_process_group(store=dist.HashStore(), **group)
    else:
        _join(group, timeout)
    if world > 1:  # made while all are there: who is missing later would be waited for as patiently
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    signals = Signals()
    held.callback(signals.restore)
    return Ranks(rank, world, where, signals, _number("LOCAL_WORLD_SIZE", 1))


def _join(group, timeout):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise BadInput(f"RANK is set but {name} is not: start with torchrun, or unset RANK to run alone")
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    nobody = BadInput(
        f"rank {group['rank']} of {group['world_size']} found no complete group at {host}:{port} within "
        f"{timeout / 60:g} minutes: start all ranks with torchrun, or unset RANK to run alone"
    )

    def give_up():
        to_stderr(f"train.py: error: {nobody}")
        os._exit(2)

    # torch waits for ever where something else answers at this port, and prints its stack where nothing does.
    deadline = threading.Timer(timeout + GRACE, give_up)
    deadline.daemon = True
    deadline.start()
    try:
        if group["rank"] and not _answers(host, port, timeout):
            raise nobody
        dist.init_process_group(init_method="env://", **group)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise BadInput(f"port {port} of {host} is in use: set another MASTER_PORT") from None
        raise nobody from None
    finally:
        deadline.cancel()


def _answers(host, port, seconds):
    """Whether something listens at host:port, asked for so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
            return True
        time.sleep(0.2)
    return False


def _number(name, default):
    """The whole number in the environment variable `name`."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text):
        raise BadInput(f"{name} is {text!r}: must be a whole number; start with torchrun, or unset it")
    return int(text)


def stop():
    """Leaves the process group, gives the output directory free and the signals back. Works at any time."""
    global _patient
    held.close()
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world():
    """(this process's rank, the number of ranks); (0, 1) where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_rank_0(work, meanwhile=lambda: None):
    """Rank 0 does `work()`, the others do `meanwhile()`. -> work's result, on every rank

    meanwhile: the others' part of the collectives in `work`. Where `work` fails half way, rank 0 does `meanwhile()`
    too, so that nobody waits for it, and then all ranks raise its error, whose attribute `rank` is 0. The result
    travels as a pickle: processes of one run trust each other.
    """
    rank, world = rank_and_world()
    if world == 1:
        return work()
    result, error = (None, None) if rank else _outcome(work)
    if rank or error:
        meanwhile()
    sent = [(result, _portable(error))]
    dist.broadcast_object_list(sent, src=0, group=_patient)
    return _agreed(sent if rank else [(result, error)])[0]


def on_all_ranks(work, patient=False):
    """Every rank does `work()`. -> [rank 0's result, rank 1's, ...]

    Where it fails on any rank, all ranks raise the error of the first that failed, whose attribute `rank` tells which.
    patient: the ranks wait for each other as long as it takes, not only as long as a collective may.
    """
    rank, world = rank_and_world()
    if world == 1:
        return [work()]
    result, error = _outcome(work)
    outcomes = [None] * world
    dist.all_gather_object(outcomes, (result, _portable(error)), group=_patient if patient else None)
    outcomes[rank] = (result, error)  # with its traceback
    return _agreed(outcomes)


def _outcome(work):
    try:
        return work(), None
    except Exception as error:
        return None, error


def _portable(error):
    """The error itself, if it survives pickling; else its words."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _agreed(outcomes):
    """The results of [(result, error) of rank 0, ...]; the first error is raised, with its rank."""
    for rank, (_, error) in enumerate(outcomes):
        if error is not None:
            error.rank = rank
            raise error
    return [result for result, _ in outcomes]
