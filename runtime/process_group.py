"""The processes of a run: their start and end, what rank 0 does for all, what all do together."""

import contextlib
import datetime
import os
import pickle
import re
import socket
import threading
import time
import typing

import torch
import torch.distributed as dist

from files.errors import BadInput
from runtime.signals import Signals, to_stderr

PATIENCE = datetime.timedelta(days=7)  # the others wait while rank 0 reads data or fetches a model for hours
GRACE = 10.0  # seconds beyond its own time that torch gets to notice it
held = contextlib.ExitStack()  # signal handlers and locks of this process, until stop()
_patient = []  # the group of all ranks in which they wait for one another that long


class Ranks(typing.NamedTuple):
    """This process among the others."""

    rank: int
    world: int
    device: torch.device
    signals: Signals


def start(timeout_minutes, device=None):
    """Joins the process group of torchrun, or makes one of this process alone. -> Ranks

    device: "cpu" or "cuda"; None takes CUDA where there is any. On CUDA the process gets the GPU of its
    LOCAL_RANK. timeout_minutes bounds the wait for the other ranks, here and in every collective.
    Raises BadInput: an incomplete environment, a port in use, a missing GPU, or nobody else comes.
    """
    for stream in (0, 1, 2):  # where one is closed, the next file opened would get its number and its text
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world, local = (
        _from_environment(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    alone = "RANK" not in os.environ
    if alone and world > 1:
        raise BadInput(f"WORLD_SIZE is {world} but RANK is not set: start with torchrun, or unset WORLD_SIZE")
    if not 0 <= rank < world:
        raise BadInput(f"RANK is {rank} but WORLD_SIZE is {world}: start with torchrun, or unset RANK")
    where = torch.device(kind)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise BadInput(
                f"rank {rank} has no GPU: LOCAL_RANK is {local}, this machine shows "
                f"{torch.cuda.device_count()}; lower --nproc_per_node"
            )
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    group = {
        "backend": "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        "rank": rank,
        "world_size": world,
        "timeout": datetime.timedelta(minutes=timeout_minutes),
    }
    if alone:
        dist.init_process_group(store=dist.HashStore(), **group)
    else:
        _join(group, timeout_minutes)
    if world > 1:  # made while all are there: who is missing later would be waited for as patiently
        _patient.append(dist.new_group(backend="gloo", timeout=PATIENCE))
    signals = Signals()
    held.callback(signals.restore)
    return Ranks(rank, world, where, signals)


def _join(group, timeout_minutes):
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise BadInput(f"RANK is set but {missing[0]} is not: start with torchrun, or unset RANK to run alone")
    host, port = os.environ["MASTER_ADDR"], _from_environment("MASTER_PORT", 0)
    nobody = BadInput(
        f"rank {group['rank']} of {group['world_size']} found no complete group at {host}:{port} within "
        f"{timeout_minutes:g} minutes: start all ranks with torchrun, or unset RANK to run alone"
    )
    # torch waits for ever where something else answers at this port, and prints its stack where nothing does.
    deadline = threading.Timer(60 * timeout_minutes + GRACE, _give_up, [nobody])
    deadline.daemon = True
    deadline.start()
    try:
        if group["rank"] and not _answers(host, port, 60 * timeout_minutes):
            raise nobody
        dist.init_process_group(init_method="env://", **group)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise BadInput(f"port {port} of {host} is in use: set another MASTER_PORT") from None
        raise nobody from None
    finally:
        deadline.cancel()


def _give_up(error):
    to_stderr(f"train.py: error: {error}")
    os._exit(2)


def _answers(host, port, seconds):
    """Whether something listens at host:port, asked for so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
            return True
        time.sleep(0.2)
    return False


def _from_environment(name, default):
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text):
        raise BadInput(f"{name} is {text!r}: must be a whole number; start with torchrun, or unset it")
    return int(text)


def stop():
    """Leaves the process group, gives the output directory free and the signals back. Works at any time."""
    held.close()
    _patient.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def on_rank_0(work, meanwhile=lambda: None):
    """Rank 0 does `work()`, the others `meanwhile()`: the other end of work's collectives. -> work's result

    Where `work` fails half way, rank 0 goes on with `meanwhile()`, so that nobody waits for it; then all ranks raise
    its error, with `rank` 0 as an attribute: the rank that can tell most of it. The result is pickled on its way from
    rank 0 to the others: processes of one run trust each other.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    result, error = None, None
    if dist.get_rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
            meanwhile()
    else:
        meanwhile()
    outcome = [(result, _portable(error))]
    dist.broadcast_object_list(outcome, src=0, group=_patient[0])
    return _agreed([(result, error) if error else outcome[0]])[0]


def on_all_ranks(work, patient=False):
    """Every rank does `work()`. -> [rank 0's result, rank 1's, ...]

    Where it fails on any rank, all ranks raise the error of the first that failed, with `rank`, its number.
    patient: the ranks wait for each other as long as it takes, not only as long as a collective may.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [work()]
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, _portable(error)), group=_patient[0] if patient else None)
    if error:
        outcomes[dist.get_rank()] = (None, error)  # with its traceback
    return _agreed(outcomes)


def _agreed(outcomes):
    """The results of [(result, error) of rank 0, ...]; the first error is raised, with its rank."""
    for rank, (_, error) in enumerate(outcomes):
        if error is not None:
            error.rank = rank
            raise error
    return [result for result, _ in outcomes]


def _portable(error):
    """The error itself, if it survives pickling; else its words."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
