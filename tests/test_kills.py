"""Whole runs, killed with SIGKILL where it hurts most, and cut from power: short forms of kill_train.py and of
long/power_cut.py."""

import pathlib
import sys

import pytest
from kill_train import kill_loop

sys.path.append(str(pathlib.Path(__file__).parent / "long"))
from power_cut import cuts_of, differ, resumed

HARD = [
    "os.rename checkpoints/step-1.tmp",
    "os.rename guide.tmp",
    "os.rename checkpoints/step-5",
    "os.rename cache/guide-.*",
    "os.rename policy.tmp",
]


def test_a_run_killed_and_resumed_is_the_run_never_stopped(tmp_path):
    """In a save, in the guide's export, in the removal of its checkpoints, in the writing of the cache, in the
    policy's export: each right before what was written gets its name, or what is removed loses it."""
    completed, touches = kill_loop(tmp_path, len(HARD), plan=[{"touch": touch} for touch in HARD])
    assert completed == 1 and len(touches) == len(HARD)


CUTS = {  # where, and which of those there; each lost something once
    "names, at fsync out/run.json.tmp": 1,  # that notes the guide's digest
    "names, at os.rmdir out/checkpoints/step-3.tmp": 0,  # stage 1 has lost its last
    "names, at os.rename out/.report": 0,
    "strict, at fsync out/checkpoints": 3,
}


@pytest.mark.linux("/proc")
def test_a_power_cut_loses_nothing_that_was_saved(tmp_path):
    """The short form of long/power_cut.py."""
    given, whole, cuts = cuts_of(tmp_path)
    assert len(cuts) > 60
    for where, which in CUTS.items():
        what, left = [cut for cut in cuts if cut[0].startswith(where)][which]
        assert differ(whole, resumed(tmp_path, given, left)) == [], what
