"""The systems that the program runs on. Imports nothing that one of the others lacks."""

import platform
import sys


def unsupported():
    """Why it does not run here and what to do, in one line; None where it does."""
    if sys.platform == "win32":
        return "Windows is not supported: run it under WSL"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return "Macs with Intel processors are not supported, nor a Python made for them: use Apple silicon, or Linux"
    if sys.platform == "linux" and platform.libc_ver()[0] != "glibc":
        return "Linux without glibc (Alpine, musl) is not supported: use an image with glibc, such as Debian's"
    return None


def check():
    """Ends the program with status 2 and one line where it cannot run."""
    if reason := unsupported():
        sys.stderr.write(f"train.py: error: {reason}\n")
        sys.exit(2)
