"""Checkpoints: exact for any number of ranks, whole or not at all, refused by name when anything is amiss."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_loop import fork, kill_loop, on_ranks, same, tensors_of, wait
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from files.errors import BadInput
from runtime import checkpoint, disk
from runtime.failures import RunFailed

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]


@pytest.fixture(autouse=True)
def several_files(monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 30_000)


def save(directory, step, seed=None, keep=9, **state):
    checkpoint.save(directory, step, tensors_of(step if seed is None else seed), state, keep)
    return Path(directory) / f"step-{step}"


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def full(tensors):
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


# One process, there and back.


def test_comes_back_bit_for_bit_with_its_state(tmp_path):
    saved = tensors_of(1) | {"half": torch.randn(4, 3).bfloat16(), "count": torch.tensor(7)}
    saved["odd"] = torch.tensor([float("nan"), -0.0, 1e-45, float("inf")])
    checkpoint.save(tmp_path, 12, saved, {"schedule": {"step": 12}, "position": [0, 3.5e-7]}, keep=1)
    path = checkpoint.newest(tmp_path)
    assert path == tmp_path / "step-12" and len(list(path.glob("*.safetensors"))) > 1
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    state = checkpoint.load(path, loaded)
    for name, tensor in saved.items():
        assert (
            loaded[name].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()
            if tensor.dtype != torch.bfloat16
            else torch.equal(loaded[name], tensor)
        )
    assert state["schedule"] == {"step": 12} and state["position"] == [0, 3.5e-7]
    assert (state["step"], state["world_size"], state["threads"]) == (12, 1, torch.get_num_threads())


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(), random.random()

    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    draw()
    path = save(tmp_path, 1)
    expected = draw()
    torch.manual_seed(6), np.random.seed(6), random.seed(6)
    checkpoint.set_random_state(checkpoint.read_state(path)["random"][0])
    assert draw() == expected


def test_saving_and_loading_draw_no_random_number(tmp_path):
    before = checkpoint.random_state()
    checkpoint.load(save(tmp_path, 1), tensors_of(0))
    assert checkpoint.random_state() == before


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle was read")

    path = save(tmp_path, 1)
    (path / ".metadata").write_bytes(pickle.dumps("what the default storage would read"))
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    tensors = tensors_of(0)
    checkpoint.load(checkpoint.newest(tmp_path), tensors)
    assert same(tensors, tensors_of(1))


# Ranks.


class Net(nn.Module):
    """Fewer rows than ranks, rows that do not divide, blocks within a root."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(5, 7)
        self.head = nn.Linear(7, 1)


def states_of(net):
    """What train.py saves: the parameters, and moments made of them."""
    parameters = dict(net.named_parameters())
    return {f"model.{name}": tensor for name, tensor in parameters.items()} | {
        f"exp_avg.{name}": tensor.detach() * 2 for name, tensor in parameters.items()
    }


def sharded(net, mesh):
    fully_shard(net.block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return states_of(net)


def net_of(seed):
    torch.manual_seed(seed)
    return Net()


@pytest.mark.linux("forks a process group")
def test_two_ranks_then_one_then_four_are_exact(tmp_path):
    directory = tmp_path / "checkpoints"

    def two(rank):
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(100 + rank)
        generators = checkpoint.random_state()
        local = {
            name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() else tensor
            for name, tensor in tensors_of(1).items()
        }
        net = sharded(net_of(1), mesh)
        torch.manual_seed(100 + rank)
        checkpoint.save(directory, 1, local | net, {}, keep=9)
        return generators

    def four(rank):
        """Loads what one rank wrote; writes it from a mesh of replicas; loads that with plain shards."""
        flat = init_device_mesh("cpu", (4,))
        replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        seen = []
        for step, mesh, placements in (
            (2, flat, [Shard(0)]),
            (2, replicas, [Replicate(), Shard(0)]),
            (3, flat, [Shard(0)]),
        ):
            local = {
                name: distribute_tensor(tensor, mesh, placements) if tensor.dim() else tensor
                for name, tensor in tensors_of(0).items()
            }
            net = sharded(net_of(0), mesh)
            state = checkpoint.load(directory / f"step-{step}", local | net)
            seen.append((full(local), {name: tensor.detach() for name, tensor in full(net).items()}))
            if mesh is replicas:
                checkpoint.save(directory, 3, local | net, {}, keep=9)
        return seen, state["world_size"]

    generators = on_ranks(2, two, tmp_path)
    tensors, net = tensors_of(0), states_of(net_of(0))
    state = checkpoint.load(directory / "step-1", tensors | net)
    assert same(tensors, tensors_of(1)) and same(net, states_of(net_of(1)))
    assert state["world_size"] == 2 and state["random"] == generators and generators[0] != generators[1]

    checkpoint.save(directory, 2, tensors | net, {}, keep=9)
    for seen, world_size in on_ranks(4, four, tmp_path):
        assert world_size == 4
        assert all(same(left, tensors_of(1)) and same(right, states_of(net_of(1))) for left, right in seen)
    assert len(list((directory / "step-1").glob("shard-00002-*"))) > 0


@pytest.mark.linux("forks a process group")
def test_a_failure_on_one_rank_reaches_all_and_the_earlier_checkpoint_stands(tmp_path):
    directory = tmp_path / "checkpoints"

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def body(rank):
        mesh = init_device_mesh("cpu", (2,))
        tensors = {
            name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() else tensor
            for name, tensor in tensors_of(1).items()
        }
        checkpoint.save(directory, 1, tensors, {}, keep=1)
        lines = []
        # in turn: as its shards are written, as they are digested, as the tmp is renamed
        for failing, module, name in ((1, os, "fsync"), (1, checkpoint, "digests"), (0, os, "rename")):
            kept = getattr(module, name)
            if rank == failing:
                setattr(module, name, full_disk)
            try:
                checkpoint.save(directory, 2, tensors, {}, keep=1)
            except RunFailed as failure:
                lines.append(str(failure))
            setattr(module, name, kept)
        if rank == 1:
            tensors["model.more"] = torch.zeros(3)
        try:
            checkpoint.load(directory / "step-1", tensors)
        except BadInput as failure:
            lines.append(str(failure))
        return lines

    first, second = on_ranks(2, body, tmp_path)
    assert first == second and len(first) == 4
    assert all("the disk is full" in line and "\n" not in line for line in first[:3])
    assert "model.more" in first[3]
    assert names(directory) == ["step-1"]
    tensors = tensors_of(0)
    checkpoint.load(directory / "step-1", tensors)
    assert same(tensors, tensors_of(1))


# Written whole or not at all.


def killed_at(point, work):
    """Run work() in a child that dies at the point-th of its calls that change the disk; the calls it made.

    Two points a call: before it and after it. Dies by SIGKILL, so no handler and no finally runs.
    """
    reading, writing = os.pipe()

    def body():
        count = 0

        def counted(call):
            def at(*arguments, **options):
                nonlocal count
                for outcome in (lambda: None, lambda: call(*arguments, **options)):
                    result = outcome()
                    os.write(writing, b".")
                    if count == point:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1
                return result

            return at

        for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        work()

    status = wait([fork(body)])
    os.close(writing)
    made = len(os.read(reading, 10_000))
    os.close(reading)
    assert status == [-signal.SIGKILL if made == point + 1 else 0]
    return made


@pytest.mark.parametrize("step", [2, 3], ids=["the step that stands", "a new step"])
def test_killed_at_every_point_of_a_save(tmp_path, step):
    """First steps 1 and 2 stand; then a save of `step` with other tensors, keeping one, is killed."""
    save(tmp_path / "start", 1)
    save(tmp_path / "start", 2)
    points = killed_at(-1, lambda: save(shutil.copytree(tmp_path / "start", tmp_path / "whole"), step, 7, 1))
    assert points > 40
    found = []
    for point in range(points):
        directory = shutil.copytree(tmp_path / "start", tmp_path / str(point))
        killed_at(point, lambda: save(directory, step, 7, keep=1))
        path, tensors = checkpoint.newest(directory), tensors_of(0)
        checkpoint.load(path, tensors)
        assert same(tensors, tensors_of(2)) or same(tensors, tensors_of(7)), f"a mix at point {point}"
        found.append(same(tensors, tensors_of(7)))
        if point % 3 == 0:  # whatever was left, the next save stands and leaves nothing else
            save(directory, 4, keep=1)
            assert names(directory) == ["step-4"]
    assert found == sorted(found) and found.count(False) > 12 and found.count(True) > 12


def test_killed_within_a_file(tmp_path):
    save(tmp_path, 1)

    def body():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # then the kernel kills at the first byte beyond
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save(tmp_path, 2)

    assert wait([fork(body)]) == [-signal.SIGXFSZ]
    assert max(file.stat().st_size for file in (tmp_path / "step-2.tmp").iterdir()) == 20_000
    assert checkpoint.newest(tmp_path) == tmp_path / "step-1"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.linux("forks a process group"))])
def test_killed_at_random_moments(tmp_path, ranks):
    assert len(kill_loop(tmp_path, 5, ranks)) == 5


@pytest.mark.linux("reads /proc/self/fd")
def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A kill cannot show this, only a power cut: the order of fsync, renames and deletions."""
    save(tmp_path, 1)
    save(tmp_path, 2, seed=8)
    events = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: (
            events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)),
            fsync(descriptor),
        ),
    )
    monkeypatch.setattr(
        os, "rename", lambda *paths: (events.append(("rename", *(Path(path).name for path in paths))), rename(*paths))
    )
    monkeypatch.setattr(
        os, "unlink", lambda *path, **at: (events.append(("unlink", Path(path[0]).name)), unlink(*path, **at))
    )
    path = save(tmp_path, 2, keep=1)
    aside, stands = events.index(("rename", "step-2", "step-2.old")), events.index(("rename", "step-2.tmp", "step-2"))
    on_disk = {name for event, name in events[:aside] if event == "fsync"}
    assert on_disk >= {file.name for file in path.iterdir()} | {"step-2.tmp"}
    assert stands == aside + 1 and events[stands + 1] == ("fsync", tmp_path.name)
    first_deletion = min(i for i, event in enumerate(events) if event[0] == "unlink")
    assert first_deletion > stands + 1


def test_the_last_few_are_kept(tmp_path):
    for step in (1, 2, 9, 10, 11):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-10", "step-11", "step-9"]
    (tmp_path / "step-11/state.json").unlink()  # not whole: it does not count
    (tmp_path / "step-12.tmp").mkdir()
    save(tmp_path, 13, keep=2)
    assert names(tmp_path) == ["step-10", "step-13"]


def test_a_clean_up_that_fails_is_told_once_and_loses_nothing(tmp_path, monkeypatch, capfd):
    (tmp_path / "step-9").write_text("a plain file")
    save(tmp_path, 10, keep=1)
    assert names(tmp_path) == ["step-10"]
    plain = os.rename

    def busy(path, *more):
        if "step-10" in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy")
        plain(path, *more)

    monkeypatch.setattr(os, "rename", busy)
    for step in (11, 12):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-10", "step-12"]
    printed = capfd.readouterr()
    assert (printed.out + printed.err).count("step-10 stays: it cannot be removed: Device or resource busy") == 1
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "rmtree", lambda path, *_, **__: busy("step-10"))
    save(tmp_path, 12, keep=9)  # over itself
    assert names(tmp_path) == ["step-10", "step-12", "step-12.tmp"]
    assert "step-12.old stays: it cannot be removed: Device or resource busy" in capfd.readouterr().out
    with pytest.raises(OSError, match=f"{tmp_path}/step-12'"):
        disk.remove(tmp_path / "step-12")


WRONG = [{"step": step} for step in (-1, 1.5, "3", True, None, 7)] + [
    {"random": value} for value in ([], [{}], None, [{"python": "x"}], "garbage", [1], 7)
]
WRONG += [{"identity": None}, {"world_size": 2}, {"steps": "x"}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_state_of_the_right_digest_and_wrong_content_is_passed_over(tmp_path, wrong):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = checkpoint._content(path)
    content["state"] |= {"steps": 6} | wrong
    (path / "state.json").write_bytes(checkpoint._seal(content))
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-1" and "not what a save writes" in said[0]
    for other in ({"files": []}, {"tensors": None}, {"more": 1}):
        (path / "state.json").write_bytes(checkpoint._seal(content | {"state": {"step": 2}} | other))
        assert checkpoint.newest(tmp_path) == tmp_path / "step-1"
    (path / "state.json").write_bytes(b"[]")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-1"
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-1"


def test_a_random_state_cut_short_is_passed_over(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    for name in ("torch", "python", "numpy"):
        content = checkpoint._content(path)
        whole, state = (path / "state.json").read_bytes(), content["state"]["random"][0]
        state[name] = "AAAA" if name == "torch" else [state[name][0], "AAAA", *state[name][2:]]
        (path / "state.json").write_bytes(checkpoint._seal(content))
        assert checkpoint.newest(tmp_path) == tmp_path / "step-1"
        (path / "state.json").write_bytes(whole)
    shard = next(path.glob("*.safetensors"))
    shard.rename(tmp_path / "gone")
    shard.symlink_to(tmp_path / "nothing")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-1"


def test_a_stage_that_is_over_is_dropped_and_no_other(tmp_path):
    for step, stage in enumerate(("dpo", "tgdpo", "dpo")):
        save(tmp_path, step, identity={"stage": stage})
    save(tmp_path, 3)
    checkpoint.drop_stage(tmp_path, "dpo")
    assert names(tmp_path) == ["step-1", "step-3"]


def test_newest_passes_over_what_is_not_whole(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "nothing") is None
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "step-5").rename(tmp_path / "step-5.tmp")
    next((tmp_path / "step-4").glob("*.safetensors")).unlink()
    cut = next((tmp_path / "step-3").glob("*.safetensors"))
    os.truncate(cut, cut.stat().st_size - 1)
    shutil.copy(cut, tmp_path / "step-2/shard-00009-model-00001-of-00001.safetensors")
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-1"
    assert [line.split(" is not whole")[0][-6:] for line in said] == ["step-4", "step-3", "step-2"]
    assert cut.name in said[1] and all("\n" not in line for line in said)
    with pytest.raises(BadInput, match="shard-00009"):
        checkpoint.load(tmp_path / "step-2", tensors_of(0))


def test_the_old_one_is_used_where_a_kill_fell_between_the_renames(tmp_path, monkeypatch):
    save(tmp_path, 3).rename(tmp_path / "step-3.old")
    save(tmp_path, 2)
    path, tensors = checkpoint.newest(tmp_path), tensors_of(0)
    assert path == tmp_path / "step-3.old" and checkpoint.load(path, tensors)["step"] == 3
    assert same(tensors, tensors_of(3))
    # a damaged step-3 beside it: step-3.old must stand until the new step-3 does
    shutil.copytree(path, tmp_path / "step-3")
    (tmp_path / "step-3/state.json").unlink()
    assert checkpoint.newest(tmp_path) == path

    def stop(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", stop)
        with pytest.raises(RunFailed, match="step-3 is not saved.*Input/output error"):
            save(tmp_path, 3, seed=7, keep=1)
    assert checkpoint.load(checkpoint.newest(tmp_path), tensors)["step"] == 3 and same(tensors, tensors_of(3))
    save(tmp_path, 3, seed=7, keep=1)
    assert names(tmp_path) == ["step-3"]


# Refused, by name.


@pytest.mark.parametrize("kind", ["*.safetensors", "state.json"])
def test_a_flipped_byte_is_refused_by_its_digest(tmp_path, kind):
    path = save(tmp_path, 1)
    for file in path.glob(kind):
        size = file.stat().st_size
        for position in {0, 8, size - 1, *random.Random(0).sample(range(size), 25)}:
            flip(file, position)
            with pytest.raises(BadInput, match=f"{file.name} is damaged"):
                checkpoint.load(path, tensors_of(0))
            flip(file, position)
    checkpoint.load(path, tensors_of(0))


def test_a_state_json_of_another_making_is_refused(tmp_path):
    path = save(tmp_path, 1) / "state.json"
    written = path.read_bytes()
    for other in (
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        written[:-1],
        written + b" ",
        b"[" * 100_000,
        json.dumps(json.loads(written) | {"sha256": "0" * 64}).encode(),
    ):
        path.write_bytes(other)
        with pytest.raises(BadInput, match="state.json is damaged"):
            checkpoint.load(path.parent, tensors_of(0))
        assert checkpoint.newest(tmp_path) is None


def test_another_run_is_refused_by_what_differs(tmp_path):
    mine = {"data": "3f9a", "model": "77b0", "loss": "tgdpo", "chat template": None}
    path = save(tmp_path, 1, identity=mine)
    assert checkpoint.read_state(path, mine)["identity"] == mine
    for name, other in (("data", "0000"), ("model", "1111"), ("loss", "dpo"), ("chat template", "{{ x }}")):
        tensors = tensors_of(0)
        with pytest.raises(BadInput) as refusal:
            checkpoint.load(path, tensors, mine | {name: other})
        line = str(refusal.value)
        assert f"{name} ({mine[name]} there, {other} here)" in line and "\n" not in line
        assert not any(f"{same_one} (" in line for same_one in mine.keys() - {name})
        assert same(tensors, tensors_of(0))
    checkpoint.same_run(path, {"betas": [0.9, 0.999]}, {"betas": (0.9, 0.999)})
    with pytest.raises(BadInput, match=r"data \(.*loss \("):
        checkpoint.read_state(path, mine | {"data": "0", "loss": "dpo"})
    assert issubclass(BadInput, ValueError)


@pytest.mark.parametrize(
    "wanted, line",
    [
        ({"model.extra": torch.zeros(2)}, "step-1 does not hold the tensor model.extra"),
        ({"model.odd": torch.zeros(8, 3)}, "step-1 holds model.odd as float32 [7, 3], not float32 [8, 3]"),
        ({"model.odd": torch.zeros(7, 3).half()}, "step-1 holds model.odd as float32 [7, 3], not float16 [7, 3]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, wanted, line):
    path = save(tmp_path, 1)
    with pytest.raises(BadInput) as refusal:
        checkpoint.load(path, tensors_of(0) | wanted)
    assert str(refusal.value).endswith(line)


def test_a_part_of_the_tensors_may_be_asked_for(tmp_path):
    path, part = save(tmp_path, 1), {"model.odd": torch.zeros(7, 3)}
    checkpoint.load(path, part)
    assert torch.equal(part["model.odd"], tensors_of(1)["model.odd"])


# The disk is full.


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    with pytest.raises(RunFailed) as refusal:
        save(tmp_path, 2)
    line = str(refusal.value)
    assert "the disk is full" in line and "free space" in line and str(tmp_path) in line and "\n" not in line
    assert names(tmp_path) == ["step-1"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    save(tmp_path, 2)


def test_a_file_that_cannot_grow_is_one_line(tmp_path):
    save(tmp_path, 1)

    def body():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # Python ignores the signal: EFBIG
        with pytest.raises(RunFailed, match="step-2 is not saved.*File too large"):
            save(tmp_path, 2)

    assert wait([fork(body)]) == [0]
    assert names(tmp_path) == ["step-1"]


@pytest.mark.linux("mounts a tmpfs")
def test_a_small_disk_foreseen_and_not(tmp_path, monkeypatch):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.strip()}")
    try:
        save(tmp_path, 1)
        with pytest.raises(RunFailed, match="the disk is full.*free space"):
            for step in range(2, 30):
                save(tmp_path, step, keep=99)
        standing = names(tmp_path)
        assert 1 < len(standing) < 9
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
        with pytest.raises(RunFailed, match="the disk is full: No space left on device"):
            for step in range(2, 30):
                save(tmp_path, 30 + step, keep=99)
        for path in tmp_path.iterdir():
            tensors = tensors_of(0)
            assert same(tensors, tensors_of(checkpoint.load(path, tensors)["step"]))
        assert set(standing) < set(names(tmp_path))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
