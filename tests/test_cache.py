"""The guidance cache: what matches is used, what is cut short, foreign or not finite never is."""

import errno
import os
import resource
import signal

import pytest
import torch
from kill_loop import fork, wait
from safetensors.torch import save_file

from runtime import cache, disk
from runtime.failures import RunFailed

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
LOGP = -torch.rand(1000, generator=torch.Generator().manual_seed(0))
PARTS = {"weights": "ab12", "data": "77f0", "tokens": [2048, 1800], "dtype": "bfloat16"}
KEY = cache.key(PARTS)


def reason(directory, key=KEY, count=1000):
    """Why the cached reference is not used, in one line; None where nothing is cached."""
    said = []
    assert cache.read(directory, "ref", key, count, said.append) is None
    assert len(said) < 2 and "\n" not in "".join(said)
    return said[0] if said else None


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "made" / "cache"
    assert reason(path) is None
    cache.write(path, "ref", KEY, LOGP)
    cache.write(path, "guide", KEY, LOGP[:10] * 2)
    assert torch.equal(cache.read(path, "ref", KEY, 1000), LOGP)
    assert torch.equal(cache.read(path, "guide", KEY, 10), LOGP[:10] * 2)
    assert {file.name for file in path.iterdir()} == {f"guide-{KEY}.safetensors", f"ref-{KEY}.safetensors"}


@pytest.mark.parametrize(
    "other", [{"weights": "ab13"}, {"data": "77f1"}, {"tokens": [1024, 1800]}, {"dtype": "float32"}, {"more": 1}]
)
def test_another_model_data_truncation_or_dtype_has_another_key(tmp_path, other):
    assert cache.key(PARTS | other) != KEY == cache.key(dict(reversed(PARTS.items())))
    cache.write(tmp_path, "ref", KEY, LOGP)
    assert reason(tmp_path, key=cache.key(PARTS | other)) is None


def test_a_file_cut_short_anywhere_is_not_used(tmp_path):
    cache.write(tmp_path, "ref", KEY, LOGP)
    path = tmp_path / f"ref-{KEY}.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 8, 60, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"{path} is not used" in reason(tmp_path)
    path.write_bytes(b"<!DOCTYPE html>" + whole)
    assert f"{path} is not used" in reason(tmp_path)
    path.write_bytes(whole)
    assert cache.read(tmp_path, "ref", KEY, 1000) is not None


def test_a_file_under_a_foreign_name_is_not_used(tmp_path):
    other = cache.key(PARTS | {"weights": "ffff"})
    cache.write(tmp_path, "ref", other, LOGP)
    os.rename(tmp_path / f"ref-{other}.safetensors", tmp_path / f"ref-{KEY}.safetensors")
    assert f"its key is {other}" in reason(tmp_path)
    save_file({"logp": LOGP}, tmp_path / f"ref-{KEY}.safetensors")
    assert "its key is None" in reason(tmp_path)
    save_file({"logits": LOGP}, tmp_path / f"ref-{KEY}.safetensors", {"key": KEY})
    assert "logp" in reason(tmp_path)


def test_another_number_of_tokens_or_another_type_is_not_used(tmp_path):
    cache.write(tmp_path, "ref", KEY, LOGP)
    assert "[1000], not float32 [999]" in reason(tmp_path, count=999)
    cache.write(tmp_path, "ref", KEY, LOGP.bfloat16())
    assert "bfloat16 [1000], not float32 [1000]" in reason(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_used(tmp_path, value):
    logp = LOGP.clone()
    logp[7] = value
    cache.write(tmp_path, "ref", KEY, logp)
    assert "not all of its log-probs are finite" in reason(tmp_path)


def test_a_flipped_byte_is_not_used(tmp_path):
    cache.write(tmp_path, "ref", KEY, LOGP)
    path = tmp_path / f"ref-{KEY}.safetensors"
    whole = path.read_bytes()
    for position in (20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert reason(tmp_path)


@pytest.mark.parametrize("call", ["save", "fsync", "os.rename"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_it_is_written(tmp_path, call, when):
    """The name is there with all of it, or not at all; a cache that stood before stands."""

    def body():
        module, name = {"save": (cache, "save"), "fsync": (disk, "fsync"), "os.rename": (os, "rename")}[call]
        work = getattr(module, name)

        def last(*arguments, **options):
            if when == "after":
                work(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, last)
        cache.write(tmp_path, "ref", KEY, LOGP)

    written = (call, when) == ("os.rename", "after")
    assert wait([fork(body)]) == [-signal.SIGKILL]
    found = cache.read(tmp_path, "ref", KEY, 1000)
    assert torch.equal(found, LOGP) if written else found is None
    cache.write(tmp_path, "ref", KEY, LOGP - 1)
    assert wait([fork(body)]) == [-signal.SIGKILL]
    assert torch.equal(cache.read(tmp_path, "ref", KEY, 1000), LOGP if written else LOGP - 1)


def test_a_file_that_cannot_grow_is_one_line_and_leaves_the_one_before(tmp_path, monkeypatch):
    cache.write(tmp_path, "ref", KEY, LOGP)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def body():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(RunFailed, match=f"ref-{KEY}.safetensors is not written: .*File too large"):
            cache.write(tmp_path, "ref", KEY, LOGP - 1)

    assert wait([fork(body)]) == [0]
    monkeypatch.setattr(disk, "fsync", full)
    with pytest.raises(RunFailed, match=f"ref-{KEY}.safetensors is not written: the disk is full"):
        cache.write(tmp_path, "ref", KEY, LOGP - 1)
    assert len(list(tmp_path.iterdir())) == 1 and torch.equal(cache.read(tmp_path, "ref", KEY, 1000), LOGP)


def test_a_models_digest_is_of_weights_names_and_config(tmp_path):
    def digest(changes, directory="model"):
        here = tmp_path / directory
        here.mkdir(exist_ok=True)
        for file in here.iterdir():
            file.unlink()
        files = {
            "config.json": b"{}",
            "model-1.safetensors": b"one",
            "model-2.safetensors": b"two",
            "README.md": b"read",
        }
        for name, content in (files | changes).items():
            if content is not None:
                (here / name).write_bytes(content)
        return cache.weights_digest(here)

    first = digest({})
    assert first == digest({}, "elsewhere") == digest({"README.md": b"other", "tokenizer.json": b"{}"})
    changed = [
        digest({"config.json": b"{ }"}),
        digest({"model-1.safetensors": b"One"}),
        digest({"model-2.safetensors": None}),
        digest({"model-3.safetensors": b""}),
        digest({"model-1.safetensors": b"two", "model-2.safetensors": b"one"}),
        digest({"model-1.safetensors": None, "model-0.safetensors": b"one"}),
    ]
    assert len({first, *changed}) == 7
