"""Systems that the program does not run on: one line before any import that they lack."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import supported

ROOT = Path(__file__).resolve().parent.parent
GLIBC, NONE = ("glibc", "2.36"), ("", "")


@pytest.mark.parametrize(
    "system, libc, machine, words",
    [
        ("linux", GLIBC, "x86_64", None),
        ("linux", GLIBC, "aarch64", None),
        ("darwin", NONE, "arm64", None),
        ("win32", NONE, "AMD64", "Windows is not supported: run it under WSL"),
        ("linux", NONE, "x86_64", "Linux without glibc"),
        ("linux", ("musl", "1.2"), "aarch64", "Linux without glibc"),
        ("darwin", NONE, "x86_64", "Macs with Intel processors"),
    ],
)
def test_where_it_runs_and_what_is_said_elsewhere(monkeypatch, capsys, system, libc, machine, words):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if words is None:
        return supported.check()
    with pytest.raises(SystemExit) as ended:
        supported.check()
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith(f"train.py: error: {words}")


def test_it_is_said_before_anything_else_is_imported(tmp_path):
    """On a pretended Windows that has none of the modules it lacks, nor torch."""
    lacking = ("fcntl", "resource", "torch", "numpy")
    program = (
        f"import runpy, sys; sys.platform = 'win32'; sys.modules |= dict.fromkeys({lacking}); "
        f"sys.argv = ['train.py', '--help']; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    expected = "train.py: error: Windows is not supported: run it under WSL\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
