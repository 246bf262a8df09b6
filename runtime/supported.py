"""The systems that the program runs on, and how it starts there. Imports nothing that one of the others lacks."""

import _signal as signal  # of which `signal` makes enumerations for many milliseconds, in which Ctrl-C has a traceback
import os
import sys

LEAST = 2 << 30  # bytes of address space


def end_at_once_when_told():
    """Until a run has its own way with signals they end the process without a traceback, and so they do when it has
    ended its own. First of all that is done, as the imports take long."""
    for name in ("SIGHUP", "SIGINT", "SIGTERM"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, lambda number, _: os._exit(128 + number))


def end(status):
    """Ends the program. Signals are deaf by now: a second Ctrl-C changes no status while modules are torn down."""
    for name in ("SIGHUP", "SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.exit(status)


def unsupported():
    """Why it does not run here and what to do, in one line; None where it does."""
    import platform  # takes longer than all else here

    if sys.platform == "win32":
        return "Windows is not supported: run it under WSL"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return "Macs with Intel processors are not supported, nor a Python made for them: use Apple silicon, or Linux"
    if sys.platform == "linux" and platform.libc_ver()[0] != "glibc":
        return "Linux without glibc (Alpine, musl) is not supported: use an image with glibc, such as Debian's"
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < LEAST:  # torch would fail somewhere in its import
        return f"memory is limited to {limit >> 20} MiB of addresses (ulimit -v); it takes {LEAST >> 20} at least"
    return None


def check():
    """Ends the program with status 2 and one line where it cannot run."""
    if reason := unsupported():
        sys.stderr.write(f"train.py: error: {reason}\n")
        sys.exit(2)
