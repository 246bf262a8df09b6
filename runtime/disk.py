"""Room on the disk, and files that stand there whole or not at all."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from files.errors import naming
from files.export import fsync
from runtime.failures import RunFailed
from runtime.progress import say

_warned = set()  # of clean-ups that failed


def need_space(path, size, what):
    """Raises RunFailed unless the disk of `path`, which need not exist yet, has `size` bytes for `what`."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    if free < size:
        raise RunFailed(
            f"the disk that holds {path} has {free / 1e9:.2f} GB free; {what} needs "
            f"{size / 1e9:.2f} GB; free some, or give another --out"
        )


@contextlib.contextmanager
def whole(path):
    """Gives PATH.tmp, where the block writes a file or a directory; at its end that is on the disk and has the name
    `path`. Where the block fails or is killed, what stood at `path` before still stands (a directory, if the kill
    falls between two renames, as PATH.old)."""
    tmp = f"{path}.tmp"
    remove(tmp)
    try:
        with naming(path):
            yield tmp
        for written in (*Path(tmp).rglob("*"), tmp):
            fsync(written)
        put_in_place(tmp, path)
    except BaseException:
        discard(tmp)
        raise


def put_in_place(tmp, path):
    """Renames `tmp`, which is on the disk, to `path`; a directory that stands there is PATH.old until that is done."""
    old = f"{path}.old" if os.path.isdir(path) else None
    if old:
        remove(old)
        os.rename(path, old)
    os.rename(tmp, path)
    fsync(os.path.dirname(os.path.abspath(path)))
    if old:
        discard(old)


def remove(path):
    """Removes a file, a link or a directory with all in it, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        try:
            shutil.rmtree(path)
        except OSError as failure:
            failure.filename = str(path)  # which said a name within it alone
            raise
    elif os.path.lexists(path):
        os.remove(path)


def discard(path):
    """Removes what is no longer needed. Where that fails nothing is lost: it is told once, and the run goes on."""
    try:
        remove(path)
    except OSError as failure:
        warn_once(f"{path} stays: it cannot be removed: {failure.strerror}")


def warn_once(text):
    """Tells of a clean-up that failed, once in a run."""
    if text not in _warned:
        _warned.add(text)
        say(f"warning: {text}")


def entries(path):
    """The names in the directory `path`, [] where there is none."""
    return sorted(unless_absent(path, os.listdir) or [])


def stands(path):
    """Whether there is anything of that name."""
    return unless_absent(path, os.lstat) is not None


def content(path):
    """The bytes of the file at `path`, None where there is none."""

    def read(path):
        if stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be read for ever
            with open(path, "rb") as file:
                return file.read()

    return unless_absent(path, read)


def unless_absent(path, ask):
    """ask(path), or None where `path` is not there, or not the file or directory that it should be. Raises RunFailed
    where it cannot be read for another reason: it may well be whole."""
    try:
        return ask(path)
    except OSError as failure:
        if failure.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
            return None
        raise unreadable(path, failure) from failure


def unreadable(path, failure):
    """The RunFailed for what is there and cannot be read."""
    return RunFailed(
        f"{path} cannot be read: {failure.strerror or failure}; all is left as it is: mend that, then --resume"
    )


def digests(paths):
    """{file name: {"size": bytes, "sha256": hex}} of the files at `paths`, read by a few threads."""

    def digest(path):
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return {"size": file.tell(), "sha256": sha256}

    with ThreadPoolExecutor(4) as threads:
        return dict(zip([os.path.basename(path) for path in paths], threads.map(digest, paths)))


def line(failure):
    """What happened, in one line; a full disk in those words."""
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {failure.strerror}"
    return " ".join(str(failure).split()) or type(failure).__name__
