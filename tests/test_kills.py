"""Whole runs, killed with SIGKILL where it hurts most: a short form of kill_train.py."""

from kill_train import kill_loop

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
