"""A run's processes: their start and end, what rank 0 does for all, signals, the output directory.

Under torchrun, Ctrl-C and SIGTERM reach only the agent, which passes them on to every worker and kills those
that still run 30 seconds later: `torchrun --shutdown-timeout 600 …` (TORCH_ELASTIC_SHUTDOWN_TIMEOUT before
torch 2.13) gives a large checkpoint its time. SIGUSR1 kills the agent and leaves the workers behind, unless
the shell was told `trap '' USR1` before: then `pkill -USR1 -f train.py` reaches the workers alone. With
SIGUSR1 among its `--signals-to-handle` the agent passes it on, and ends the run 30 seconds later as it does
for SIGTERM.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import pickle
import re
import shutil
import signal
import socket
import threading
import time
import typing

import torch
import torch.distributed as dist

from harness.options import BadOption

PATIENCE = datetime.timedelta(days=7)   # the others wait while rank 0 reads data or fetches a model for hours
REPEAT = 1.0                            # seconds in which one Ctrl-C may arrive twice, by terminal and agent
GRACE = 10.0                            # seconds beyond its own time that torch gets to notice it
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RECORD = ("dropped.jsonl", "run.json", "config.toml")       # written before there is any result
# In this order they are removed: a run that is resumed from what a kill left of them goes on as it should.
RESULTS = ("checkpoints", "guide", "policy", "metrics.jsonl", "tokens.jsonl", "samples.json", "report.html",
           "guide.old", "policy.old", *RECORD)
_held = contextlib.ExitStack()          # signal handlers and locks of this process, until stop()
_patient = []                           # the group of all ranks in which they wait for one another that long
_claimed = {}                           # directory -> "absent", "empty" or "used": what it was before


class Stopped(Exception):
    """The run ends early because it was told to. status: the exit status, 128 + the signal's number."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class NoSpace(OSError):
    """The disk is too small for what is about to be written."""


class Ranks(typing.NamedTuple):
    """This process among the others."""
    rank: int
    world: int
    device: torch.device
    signals: "Signals"


def start(timeout_minutes, device=None):
    """Joins the process group of torchrun, or makes one of this process alone. -> Ranks

    device: "cpu" or "cuda"; None takes CUDA where there is any. On CUDA the process gets the GPU of its
    LOCAL_RANK. timeout_minutes bounds the wait for the other ranks, here and in every collective.
    Raises BadOption: an incomplete environment, a port in use, a missing GPU, or nobody else comes.
    """
    for stream in (0, 1, 2):    # where one is closed, the next file opened would get its number and its text
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world, local = (_from_environment(name, default) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    alone = "RANK" not in os.environ
    if alone and world > 1:
        raise BadOption(
            f"WORLD_SIZE is {world} but RANK is not set: start with torchrun, or unset WORLD_SIZE")
    if not 0 <= rank < world:
        raise BadOption(f"RANK is {rank} but WORLD_SIZE is {world}: start with torchrun, or unset RANK")
    where = torch.device(kind)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise BadOption(f"rank {rank} has no GPU: LOCAL_RANK is {local}, this machine shows "
                            f"{torch.cuda.device_count()}; lower --nproc_per_node")
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    group = {"backend": "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", "rank": rank, "world_size": world,
             "timeout": datetime.timedelta(minutes=timeout_minutes)}
    if alone:
        dist.init_process_group(store=dist.HashStore(), **group)
    else:
        _join(group, timeout_minutes)
    if world > 1:       # made while all are there: who is missing later would be waited for as patiently
        _patient.append(dist.new_group(backend="gloo", timeout=PATIENCE))
    signals = Signals()
    _held.callback(signals.restore)
    return Ranks(rank, world, where, signals)


def _join(group, timeout_minutes):
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise BadOption(
            f"RANK is set but {missing[0]} is not: start with torchrun, or unset RANK to run alone")
    host, port = os.environ["MASTER_ADDR"], _from_environment("MASTER_PORT", 0)
    nobody = BadOption(
        f"rank {group['rank']} of {group['world_size']} found no complete group at {host}:{port} within "
        f"{timeout_minutes:g} minutes: start all ranks with torchrun, or unset RANK to run alone")
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
            raise BadOption(f"port {port} of {host} is in use: set another MASTER_PORT") from None
        raise nobody from None
    finally:
        deadline.cancel()


def _give_up(error):
    _to_stderr(f"train.py: error: {error}")
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
        raise BadOption(f"{name} is {text!r}: must be a whole number; start with torchrun, or unset it")
    return int(text)


def stop():
    """Leaves the process group, gives the output directory free and the signals back. Works at any time."""
    _held.close()
    _patient.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def first(work):
    """Rank 0 does `work()`; every rank returns its result, or raises its error. The others wait for it.

    The result is pickled on its way from rank 0 to the others: processes of one run trust each other.
    """
    return together(work, lambda: None)


def together(work, otherwise):
    """Rank 0 does `work()`, the others `otherwise()`: the other end of work's collectives. -> work's result

    Where `work` fails half way, rank 0 goes on with `otherwise()`, so that nobody waits for it; then all
    ranks raise its error, with `rank` 0 as an attribute: the rank that can tell most of it.
    """
    if dist.get_world_size() == 1:
        return work()
    result, error = None, None
    if dist.get_rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
            otherwise()
    else:
        otherwise()
    outcome = [(result, _portable(error))]
    dist.broadcast_object_list(outcome, src=0, group=_patient[0])
    return _agreed([(result, error) if error else outcome[0]])[0]


def everywhere(work, patient=False):
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
        outcomes[dist.get_rank()] = (None, error)       # with its traceback
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


class Signals:
    """SIGTERM and SIGINT: the first is noted, for the run to stop where it can be resumed; the second ends
    the process at once, with status 128 + its number, wherever it is, in a collective that hangs too. SIGUSR1
    is noted for the run to save and go on.

    As long as nobody has asked by `agreed`, there is nothing to save, and the first one ends the process as
    well. What comes within a second of the first is the same Ctrl-C, sent by the terminal and by the agent.
    """

    def __init__(self):
        self._seen, self._since, self._asked = set(), 0.0, False
        # Python runs a handler only between two bytecodes: never, while a collective hangs. The byte that the
        # interpreter's C handler writes here comes through at once, and a thread reads it.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in CAUGHT}
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while byte := os.read(self._reader, 1):
            number, now = byte[0], time.monotonic()
            stopping = self._seen & {signal.SIGTERM, signal.SIGINT}
            if number not in CAUGHT or stopping and now - self._since < REPEAT:
                continue
            name = signal.Signals(number).name
            if number != signal.SIGUSR1 and (stopping or not self._asked):
                _to_stderr(f"{name}: stopped at once")
                os._exit(128 + number)
            self._since = now
            self._seen.add(number)
            if not dist.is_initialized() or dist.get_rank() == 0:
                _to_stderr(f"{name}: saving at the end of this step" if number == signal.SIGUSR1 else
                           f"{name}: stopping at the end of this step; a second one stops at once")
        os.close(self._reader)

    def agreed(self):
        """The highest signal number any rank has seen, 0 for none; the same on all ranks. Collective."""
        self._asked = True
        highest = torch.tensor(max(self._seen, default=0))
        if dist.get_world_size() > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def obey(self, number, state):
        """Says that signal `number` was followed, with `state`, what is saved. SIGUSR1 lets the run go on,
        the others end it: they raise Stopped."""
        ends = number != signal.SIGUSR1
        if dist.get_rank() == 0:
            _to_stderr(f"{signal.Signals(number).name}: {'stopped' if ends else 'going on'}; {state}")
        if ends:
            raise Stopped(number)
        self._seen.discard(number)

    def restore(self):
        """The handlers that were there before."""
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)


def _to_stderr(line):
    """Past Python's buffers and locks, which may be held by the thread that was interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def claim(options):
    """The run's output directory: made, checked, locked. Collective. -> path

    Without --out it is runs/NAME, runs/NAME-2, … : the first that is new, or with --resume or --overwrite the
    last that is there. The lock lasts until stop() or the end of the process, whichever way it ends.
    Raises BadOption where it cannot be written, holds another run's results, or another run is at work in it.
    """
    return first(lambda: _claim(options))


def withdraw(out):
    """Rank 0 removes what the start of a run left in the directory it claimed, unless there are results."""
    before = _claimed.get(out, "used")      # rank 0 alone knows
    if before == "used" or set(_found(out)) - set(RECORD):
        return
    with contextlib.suppress(OSError):
        for name in RECORD:
            _remove(os.path.join(out, name))
        if before == "absent":
            os.remove(os.path.join(out, ".lock"))
            os.rmdir(out)       # stays where there is anything else in it


def _claim(options):
    out = options.out
    try:
        there = out is not None and os.path.isdir(out)
        if out is None:
            out = os.path.abspath(os.path.join("runs", options.name))
            out = _numbered(out, existing=options.resume or options.overwrite)
        os.makedirs(out, exist_ok=True)
        marked = any(os.path.lexists(os.path.join(out, name)) for name in (".lock", *RECORD))
        _lock(out)
    except FileExistsError as error:
        raise BadOption(f"--out {out}: {error.filename} is a file; give a directory") from None
    except OSError as error:
        raise BadOption(f"--out {out}: cannot be written: {error.strerror}; give another directory") from None
    found = _found(out)
    if found and not options.resume and not options.overwrite:
        raise BadOption(f"--out {out}: holds another run's results ({', '.join(found)}); "
                        "give --resume, --overwrite or another directory")
    if found and options.overwrite and not marked:
        raise BadOption(f"--out {out}: holds {', '.join(found)}, but nothing that tells of a run, so --overwrite "
                        "removes none of it; give another directory")
    for name in RESULTS:
        _remove(os.path.join(out, f"{name}.tmp"))       # what a kill left half written
    _claimed[out] = "used" if found else "empty" if there else "absent"
    return out


def _found(out):
    """The names of an earlier run's results in `out`, in the order of RESULTS."""
    return [name for name in RESULTS if os.path.lexists(os.path.join(out, name))]


def _numbered(path, existing):
    """path, path-2, path-3, …: made new; or, where an existing one is asked for, that of the run started last."""
    number, name = 1, path
    if existing:
        folder, base = os.path.split(path)
        runs = [os.path.join(folder, n) for n in (os.listdir(folder) if os.path.isdir(folder) else [])
                if re.fullmatch(rf"{re.escape(base)}(-\d+)?", n) and os.path.isdir(os.path.join(folder, n))]
        return max(runs, key=_started, default=path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while True:
        try:
            os.mkdir(name)
            return name
        except FileExistsError:
            number += 1
            name = f"{path}-{number}"


def _started(out):
    """When the run in `out` was started or resumed last, as it writes config.toml then; and its number."""
    place, number = os.path.join(out, "config.toml"), re.search(r"-(\d+)$", out)
    return os.stat(place).st_mtime_ns if os.path.exists(place) else 0, int(number[1]) if number else 1


def _lock(out):
    descriptor = os.open(os.path.join(out, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = " ".join(os.read(descriptor, 200).decode(errors="replace").split())
        os.close(descriptor)
        raise BadOption(f"--out {out}: another run is at work in it ({holder}); wait for it, or give another "
                        "directory") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            os.close(descriptor)
            raise
        _to_stderr(f"note: the file system of {out} has no locks: see to it that no second run writes there")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held.callback(os.close, descriptor)


def clear(out, options):
    """Removes an earlier run's results, nothing else: the cache stays, its keys tell what it is good for.

    Raises BadOption where this run reads one of them."""
    found = _found(out)
    for path in (options.model, options.guide, options.chat_template, *options.data, *options.eval_data):
        for name in found:
            result = os.path.realpath(os.path.join(out, name))
            if path and os.path.exists(path) and f"{os.path.realpath(path)}/".startswith(f"{result}/"):
                raise BadOption(f"--overwrite would remove {path}, which this run reads; give another --out")
    for name in found:
        path = os.path.join(out, name)
        os.rename(path, f"{path}.tmp")      # half of a result never stands under its name
        _remove(f"{path}.tmp")


def _remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def need_space(path, size, what):
    """Raises NoSpace unless the disk of `path`, which need not exist yet, has `size` bytes for `what`."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    if free < size:
        raise NoSpace(f"the disk that holds {path} has {free / 1e9:.2f} GB free; {what} needs "
                      f"{size / 1e9:.2f} GB; free some, or give another --out")
