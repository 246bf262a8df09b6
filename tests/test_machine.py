"""What the machine offers: the allocators' settings, a compiler, a GPU's types, shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from files.errors import BadInput
from runtime import failures, gpu

ROOT = Path(__file__).resolve().parent.parent
# 40 MB, ten times: the page faults tell whether freed memory is kept (up to 32 MB glibc does so by itself).
FAULTS = """
import resource, sys
from runtime import allocator
allocator.prepare()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(10):
    b"0" * (40 << 20)
print(faults() - before)
import os
print(os.environ.get("PYTORCH_ALLOC_CONF"))
"""


def prepared(**settings):
    known = {k: v for k, v in os.environ.items() if "ALLOC" not in k}
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, env=known | settings, capture_output=True, text=True)
    faults, choice = run.stdout.split()
    return int(faults), choice


@pytest.mark.linux("glibc's mallopt")
def test_freed_memory_is_kept_unless_it_is_told_otherwise():
    assert prepared()[0] < 2 * 10240 < 9 * 10240 < prepared(TGDPO_ALLOCATOR="0")[0]
    assert prepared()[1] == "expandable_segments:True" and prepared(TGDPO_ALLOCATOR="0")[1] == "None"


def test_the_users_allocator_settings_stay():
    assert prepared(PYTORCH_ALLOC_CONF="backend:native")[1] == "backend:native"
    assert prepared(PYTORCH_CUDA_ALLOC_CONF="backend:native")[1] == "None"


def test_without_a_compiler_or_headers_nothing_is_compiled(monkeypatch):
    from runtime import options, process_group
    from runtime.run import lay_out

    assert gpu.why_no_compile("cpu") is None
    with monkeypatch.context() as patch:
        patch.setattr(gpu.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
        assert "headers" in gpu.why_no_compile("cpu")
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu.why_no_compile("cuda") == "there is no C compiler (such as gcc)"
    ranks = process_group.Ranks(0, 1, torch.device("cpu"), None, 1)
    with pytest.raises(BadInput, match=r"--compile: there is no C\+\+ compiler"):
        lay_out(options.resolve(["--compile"]), ranks, None, torch.float32, 100)


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_cards_before_ampere_compute_in_float32(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gpu.compute_type(torch.device("cuda")) is dtype
    assert gpu.compute_type(torch.device("cpu")) is torch.float32
    assert gpu.compute_type(torch.device("cpu"), "bfloat16") is torch.bfloat16
    if dtype is torch.float32:
        with pytest.raises(BadInput, match="--dtype bfloat16"):
            gpu.compute_type(torch.device("cuda"), "bfloat16")


def test_too_little_shared_memory_is_told_as_that(capsys):
    error = dist.DistBackendError(
        "NCCL error: Error while creating shared memory segment /dev/shm/nccl-1 (size 9637888)"
    )
    assert failures.complain(error, 0) == 1
    assert "--shm-size=1g" in capsys.readouterr().err
    assert failures.complain(dist.DistBackendError("NCCL error: remote process exited"), 0) == 1
    assert "has lost the others" in capsys.readouterr().err
