"""Room on the disk, and files that stand there whole or not at all."""

import errno
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException


class NoSpace(OSError):
    """The disk is too small for what is about to be written."""


def need_space(path, size, what):
    """Raises NoSpace unless the disk of `path`, which need not exist yet, has `size` bytes for `what`."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    if free < size:
        raise NoSpace(
            f"the disk that holds {path} has {free / 1e9:.2f} GB free; {what} needs "
            f"{size / 1e9:.2f} GB; free some, or give another --out"
        )


def digests(paths):
    """{file name: {"size": bytes, "sha256": hex}} of the files at `paths`, read by a few threads."""

    def digest(path):
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return {"size": file.tell(), "sha256": sha256}

    paths = [Path(path) for path in paths]
    with ThreadPoolExecutor(4) as threads:
        return dict(zip([path.name for path in paths], threads.map(digest, paths)))


def fsync(path):
    """Wait until the file or directory at `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def line(failure):
    """What happened, in one line; a full disk in those words."""
    if isinstance(failure, CheckpointException):
        failure = next(iter(failure.failures.values()))[0]
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {failure.strerror}"
    return " ".join(str(failure).split()) or type(failure).__name__
