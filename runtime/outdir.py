"""The output directory of a run: found or made, locked, cleared of what an earlier run left."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket

from files.errors import BadInput
from runtime.process_group import held, on_rank_0
from runtime.signals import to_stderr

RECORD = ("dropped.jsonl", "run.json", "config.toml")  # written before there is any result
# In this order they are removed: a run that is resumed from what a kill left of them goes on as it should.
RESULTS = (
    "checkpoints",
    "guide",
    "policy",
    "metrics.jsonl",
    "tokens.jsonl",
    "samples.json",
    "report.html",
    "guide.old",
    "policy.old",
    *RECORD,
)
_claimed = {}  # directory -> "absent", "empty" or "used": what it was before


def claim(options):
    """The run's output directory: made, checked, locked. Collective. -> path

    Without --out it is runs/NAME, runs/NAME-2, … : the first that is new, or with --resume or --overwrite the
    last that is there. The lock lasts until stop() or the end of the process, whichever way it ends.
    Raises BadInput where it cannot be written, holds another run's results, or another run is at work in it.
    """
    return on_rank_0(lambda: _claim(options))


def withdraw(out):
    """Rank 0 removes what the start of a run left in the directory it claimed, unless there are results."""
    before = _claimed.get(out, "used")  # rank 0 alone knows
    if before == "used" or set(_found(out)) - set(RECORD):
        return
    with contextlib.suppress(OSError):
        for name in RECORD:
            _remove(os.path.join(out, name))
        if before == "absent":
            os.remove(os.path.join(out, ".lock"))
            os.rmdir(out)  # stays where there is anything else in it


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
        raise BadInput(f"--out {out}: {error.filename} is a file; give a directory") from None
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}; give another directory") from None
    found = _found(out)
    if found and not options.resume and not options.overwrite:
        raise BadInput(
            f"--out {out}: holds another run's results ({', '.join(found)}); "
            "give --resume, --overwrite or another directory"
        )
    if found and options.overwrite and not marked:
        raise BadInput(
            f"--out {out}: holds {', '.join(found)}, but nothing that tells of a run, so --overwrite "
            "removes none of it; give another directory"
        )
    for name in RESULTS:
        _remove(os.path.join(out, f"{name}.tmp"))  # what a kill left half written
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
        runs = [
            os.path.join(folder, n)
            for n in (os.listdir(folder) if os.path.isdir(folder) else [])
            if re.fullmatch(rf"{re.escape(base)}(-\d+)?", n) and os.path.isdir(os.path.join(folder, n))
        ]
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
        raise BadInput(
            f"--out {out}: another run is at work in it ({holder}); wait for it, or give another directory"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            os.close(descriptor)
            raise
        to_stderr(f"note: the file system of {out} has no locks: see to it that no second run writes there")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    held.callback(os.close, descriptor)


def clear(out, options):
    """Removes an earlier run's results, nothing else: the cache stays, its keys tell what it is good for.

    Raises BadInput where this run reads one of them."""
    found = _found(out)
    for path in (options.model, options.guide, options.chat_template, *options.data, *options.eval_data):
        for name in found:
            result = os.path.realpath(os.path.join(out, name))
            if path and os.path.exists(path) and f"{os.path.realpath(path)}/".startswith(f"{result}/"):
                raise BadInput(f"--overwrite would remove {path}, which this run reads; give another --out")
    for name in found:
        path = os.path.join(out, name)
        os.rename(path, f"{path}.tmp")  # half of a result never stands under its name
        _remove(f"{path}.tmp")


def _remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)
