"""The tests run from a clone, without an installation: the project's root is put on the path."""

import os
import pathlib
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers on two cores, and runs of several ranks
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a tied start and ten pairs, for whole runs."""
    from tiny_world import make_checkpoint, make_pairs

    directory = tmp_path_factory.mktemp("world")
    make_checkpoint(directory / "start", "tied")
    make_pairs(directory / "pairs.jsonl", 10)
    return directory


def pytest_runtest_setup(item):
    """Skips what is marked @pytest.mark.linux("why") on other systems."""
    mark = item.get_closest_marker("linux")
    if mark and sys.platform != "linux":
        pytest.skip(f"Linux only: {mark.args[0]}")
