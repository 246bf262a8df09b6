"""Eight gloo ranks, HSDP of two by four, and two torchruns on the loopback as two nodes, against one rank.

`python -m pytest -q -n 0 tests/long/ranks.py`: some minutes on two cores; nothing here is timed.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent.parent)]

import launcher
import pytest
from test_distributed import arguments, assert_same_run, world  # noqa: F401

TRAIN = Path(__file__).resolve().parent.parent.parent / "train.py"


@pytest.fixture
def alone(world, tmp_path):  # noqa: F811
    statuses, printed = launcher.run(1, arguments(world, tmp_path / "one"), tmp_path / "log")
    assert statuses == [0], printed
    return tmp_path / "one"


@pytest.mark.parametrize("more", [[], ["--hsdp", 4]], ids=("8", "2 x 4"))
def test_eight_ranks(world, alone, more, tmp_path):  # noqa: F811
    statuses, printed = launcher.run(8, arguments(world, tmp_path / "eight", "tied", *more), tmp_path / "log")
    assert statuses == [0] * 8, printed
    assert_same_run(alone, tmp_path / "eight")


def test_two_torchruns_are_two_nodes(world, alone, tmp_path):  # noqa: F811
    port, out = launcher.free_port(), tmp_path / "nodes"
    given = [str(word) for word in arguments(world, out, "tied", "--hsdp", 2)]
    words = ["--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    words += ["--rdzv_endpoint", f"127.0.0.1:{port}", str(TRAIN), *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    nodes = [
        subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words], env=environment) for _ in range(2)
    ]
    assert [node.wait(600) for node in nodes] == [0, 0]
    assert_same_run(alone, out)
