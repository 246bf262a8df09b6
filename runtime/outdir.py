"""The output directory of a run: found or made, locked, cleared of what an earlier run left."""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket

from files.errors import BadInput, brief
from runtime import checkpoint
from runtime.disk import content, discard, entries, fsync, remove, stands, unless_absent
from runtime.failures import RunFailed
from runtime.options import SAVED, is_as_saved
from runtime.process_group import held, on_rank_0
from runtime.signals import to_stderr

RECORD = ("dropped.jsonl", "run.json", "config.toml")  # written before there is any result
# In this order they are removed: a run that is resumed from what a kill left of them goes on as it should.
MODELS = ("checkpoints", "guide", "policy", "adapter")
PAGES = ("metrics.jsonl", "samples.jsonl", "tensorboard", "wandb", "tokens.jsonl", "samples.json", "report.html")
RESULTS = (*MODELS, *PAGES, "guide.old", "policy.old", "adapter.old", *RECORD)
_claimed = {}  # directory -> "absent", "empty" or "used": what it was before
_locks = {}  # directory -> the descriptor of its .lock


def claim(options):
    """The run's output directory: made, checked, locked. Collective. -> path

    Without --out it is runs/NAME, runs/NAME-2, … : the first that is new, or with --resume or --overwrite the
    last that is there. The lock lasts until stop() or the end of the process, whichever way it ends.
    Raises BadInput where it cannot be written, holds another run's results, or another run is at work in it.
    """
    return on_rank_0(lambda: _claim(options))


def check(out):
    """Raises RunFailed where the directory that this process has locked is no longer there, or is another."""
    if out not in _locks:
        return
    there = unless_absent(os.path.join(out, ".lock"), os.stat)
    if there is None:
        raise RunFailed(
            f"{out} was removed or renamed under this run, which stops: put it back and go on with --resume, or begin "
            "anew"
        )
    if not os.path.samestat(there, os.fstat(_locks[out])):
        raise RunFailed(f"{out} was replaced under this run by another one's, in which nothing is written: it stops")


def withdraw(out):
    """Rank 0 removes what the start of a run left in the directory it claimed, unless there are results."""
    before = _claimed.get(out, "used")  # rank 0 alone knows
    if before == "used" or set(results_in(out)) - {*RECORD, "wandb"}:
        return
    with contextlib.suppress(OSError):
        for name in RECORD:
            remove(os.path.join(out, name))
        if before == "absent":
            os.remove(os.path.join(out, ".lock"))
            os.rmdir(out)  # stays where there is anything else in it


def _claim(options):
    out = options.out
    try:
        there = out is not None and os.path.isdir(out)
        if out is None:
            out = os.path.abspath(os.path.join("runs", options.name))  # the name that a failure is told with
            out = _numbered(out, existing=options.resume or options.overwrite)
        new = [os.path.dirname(os.path.abspath(out))]
        while not os.path.isdir(new[-1]):
            new.append(os.path.dirname(new[-1]))
        os.makedirs(out, exist_ok=True)
        os.listdir(out)  # may it be read at all
        for above in new:  # where a name is that may be new
            with contextlib.suppress(OSError):  # not readable
                fsync(above)
        if not stands(os.path.join(out, ".lock")):
            _refuse(out, options)  # before anything is written there
        _lock(out)
        _refuse(out, options)
    except FileExistsError as error:
        raise BadInput(f"--out {out}: {error.filename} is a file; give a directory") from None
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}; give another directory") from None
    if marked(out):
        for name in entries(out):  # what a kill left half written, the page under its process's number
            if name.endswith(".tmp") and name[:-4] in RESULTS or re.fullmatch(r"\.report\.html\.\d+\.tmp", name):
                discard(os.path.join(out, name))
    _claimed[out] = "used" if results_in(out) else "empty" if there else "absent"
    return out


def _refuse(out, options):
    """Raises BadInput where `out` holds results that this run may not go on with or remove."""
    found = results_in(out)
    if found and not options.resume and not options.overwrite:
        raise BadInput(
            f"--out {out}: holds another run's results ({', '.join(found)}); "
            "give --resume, --overwrite or another directory"
        )
    if found and not marked(out):
        if "run.json" in found:
            raise BadInput(
                f"--out {out}: {out}/run.json is damaged and nothing else there tells of a run, so neither --resume "
                "nor --overwrite touches it; give another directory"
            )
        raise BadInput(
            f"--out {out}: holds {', '.join(found)}, but nothing that tells of a run, so "
            f"--{'overwrite' if options.overwrite else 'resume'} touches none of it; give another directory"
        )
    if options.resume:
        tells = _identified(out) or set(found) <= set(RECORD) or checkpoint.newest(os.path.join(out, "checkpoints"))
        if not tells:  # a policy/, say, with a config.toml that was copied beside it
            raise BadInput(
                f"--out {out}: holds {', '.join(found)}, but neither a run.json nor a whole checkpoint that tells "
                "which run made them, so --resume touches none of it; put run.json back, or give another directory"
            )
        _spare(out, options, "--resume would replace")


def marked(out):
    """Whether `out` carries the mark of a run of ours: run.json with an identity, or config.toml with our first line.
    Raises RunFailed where that cannot be read."""
    return _identified(out) or (content(os.path.join(out, "config.toml")) or b"").startswith(SAVED.encode())


def _identified(out):
    """Whether run.json tells which run made what is in `out`."""
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        return isinstance(json.loads(content(os.path.join(out, "run.json")))["identity"], dict)


def results_in(out):
    """The names of an earlier run's results in `out`, in the order of RESULTS. Alone, wandb/ is none: it holds logs of
    a start that failed."""
    found = [name for name in RESULTS if stands(os.path.join(out, name))]
    return found if found != ["wandb"] else []


def _numbered(path, existing):
    """path, path-2, path-3, …: made new; or, where an existing one is asked for, that of the run started last."""
    folder, base = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    if existing:
        names = [name for name in os.listdir(folder) if re.fullmatch(rf"{re.escape(base)}(-\d+)?", name)]
        runs = [os.path.join(folder, name) for name in names if os.path.isdir(os.path.join(folder, name))]
        return max(runs, key=_started, default=path)
    number, name = 1, path
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
    """Locks OUT/.lock, where it is no other program's, for this process, and writes into it who holds it."""
    descriptor = os.open(os.path.join(out, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    held.callback(os.close, descriptor)
    held.callback(_locks.pop, out, None)
    holder = " ".join(os.read(descriptor, 200).decode(errors="replace").strip("\0").split())
    if holder and not re.fullmatch(r"process \d+ on .*", holder):
        raise BadInput(f"--out {out}: its .lock is another program's ({brief(holder)}); give another directory")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(
            f"--out {out}: another run is at work in it ({holder}); wait for it, or give another directory"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        to_stderr(f"note: the file system of {out} has no locks: see to it that no second run writes there")
    _locks[out] = descriptor
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def clear(out, options):
    """Removes an earlier run's results, nothing else: the cache stays, its keys tell what it is good for.

    A config.toml that somebody wrote by hand stays too, and so does wandb/ where this run has begun to write there.
    Raises BadInput where this run reads one of them."""
    for result in _spare(out, options, "--overwrite would remove"):
        if os.path.basename(result) == "wandb" and "wandb" in options.log_to:
            continue
        if os.path.basename(result) == "config.toml" and not is_as_saved(content(result) or b""):
            continue
        os.rename(result, f"{result}.tmp")  # half of a result never stands under its name
        remove(f"{result}.tmp")


def _spare(out, options, harm):
    """-> the paths of the results in `out`. Raises BadInput where this run reads one of them."""
    found = [os.path.join(out, name) for name in results_in(out)]
    for path in (options.model, options.guide, options.chat_template, *options.data, *options.eval_data):
        if path and any(_within(path, result) for result in found):
            raise BadInput(f"{harm} {path}, which this run reads; give another --out")
    return found


def _within(path, result):
    """Whether `path` is `result` or lies in it. Asked of the files, as names may differ in case only."""
    if not os.path.exists(path) or not os.path.exists(result):
        return False
    place = os.path.realpath(path)
    while not os.path.samefile(place, result):
        if place == (place := os.path.dirname(place)):
            return False
    return True
