"""Checkpoints that stand whole or not at all, checked byte by byte before they are used.

    DIRECTORY/step-12/shard-00001-model-00001-of-00002.safetensors    rank 0's shards
                      shard-00002-model-00001-of-00002.safetensors    rank 1's, ...
                      state.json     the step and all else that is no tensor, and the digest of every file
    DIRECTORY/step-12.tmp            being written: never read, removed by the next save
    DIRECTORY/step-12.old            what step-12.tmp is about to replace

The tensors go through torch.distributed.checkpoint and its safetensors storage. It overwrites in place,
hence the renames here, and its default storage reads a pickle, hence the safetensors. Nothing in a checkpoint
is ever unpickled. `save` and `load` are collective where a process group runs, and DIRECTORY must be storage
that all ranks see.
"""

import base64
import errno
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from files.errors import BadInput
from runtime import disk
from runtime.disk import digests, discard, entries, fsync, line, put_in_place, warn_once
from runtime.failures import RunFailed
from runtime.process_group import on_all_ranks, on_rank_0, rank_and_world

FILE_BYTES = 2**28  # what a rank writes to one file, about: a file is put together in memory first


def save(directory, step, tensors, state, keep):
    """Writes `directory`/step-`step`, then deletes all but the newest `keep` checkpoints. Collective.

    tensors: name -> tensor, the same names on all ranks. A DTensor is written by its shards; a plain tensor
        is taken to be the same on all ranks and is written once.
    state: a dict that JSON can hold; rank 0's is kept. The random state of every rank is added to it as
        `random` (a list), and `step`, `world_size` and `threads`.
    Raises RunFailed on every rank when it fails on any, a full disk included.
    """
    final = Path(directory) / f"step-{step}"
    tmp, (rank, world) = final.with_suffix(".tmp"), rank_and_world()
    try:
        on_rank_0(lambda: _make_room(tmp, tensors, world))
        on_all_ranks(lambda: _see(tmp))
        storage = dcp.HuggingFaceStorageWriter(str(tmp), _file_of(tensors, world), save_distributed=True)
        dcp.save(tensors, storage_writer=storage)
        written, random_states = zip(*on_all_ranks(lambda: (_sync(_share(tmp)), random_state())))
        added = {"step": step, "world_size": world, "threads": torch.get_num_threads(), "random": random_states}
        content = {
            "state": state | added,
            "tensors": {name: _signature(tensor) for name, tensor in tensors.items()},
            "files": {name: digest for share in written for name, digest in share.items()},
        }
        on_rank_0(lambda: _complete(tmp, final, content))
        tidy(final, keep)
    except (OSError, RuntimeError, CheckpointException) as failure:
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)  # gives a full disk its room back
        raise RunFailed(f"{final} is not saved, those before it stand: {line(_cause(failure))}") from failure


def tidy(path, keep):
    """Keeps the checkpoint at `path` and the newest others, `keep` together (0 is as 1); deletes the rest, and what
    killed saves left. Collective."""

    def delete_others():
        try:
            _delete_others(Path(path), keep)
        except RunFailed as failure:  # `path` stands all the same
            warn_once(f"older checkpoints stay: {failure}")

    on_rank_0(delete_others)


def newest(directory, say=lambda line: None):
    """The path of the newest complete checkpoint in `directory`, or None.

    Complete: state.json is whole, and every file it lists is there with its size (`load` checks digests).
    A run killed between its two renames leaves step-N.old alone: then that is the checkpoint of step N.
    Changes nothing, so it may run beside a save. `say` is called with a line for each one passed over.
    """
    return next((path for path in _standing(directory) if _is_whole(path, say)), None)


def read_state(path, expected=None):
    """The state that `save` was given, with what it added: `step`, `world_size`, `threads` and `random`.

    Not collective, reads no tensor. Raises BadInput where state.json is not what was written, and where
    state["identity"] is not `expected`: dicts such as {"data": ..., "loss": "dpo"}, whose keys are the names used in
    the message.
    """
    state = _content(path)["state"]
    if expected is not None:
        same_run(path, state.get("identity", {}), expected)
    return state


def same_run(path, there, here):
    """Raises BadInput, naming what differs, unless the identity `there`, at `path`, is `here`."""
    here = json.loads(json.dumps(here))  # as `there` was read: a tuple is a list by now
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differ := [f"{name} ({there.get(name)} there, {here.get(name)} here)" for name in names]:
        raise BadInput(
            f"{path} is of another run, these differ: {', '.join(differ)}; "
            "resume with what it was made with, or start anew with --overwrite"
        )


def drop_stage(directory, stage):
    """Deletes the checkpoints in `directory` of the training whose identity says `stage`: it is over, its model is
    exported."""
    for path in _standing(directory):
        if _is_whole(path) and read_state(path).get("identity", {}).get("stage") == stage:
            _delete(path)


def load(path, tensors, expected=None):
    """Fills `tensors` in place from the checkpoint at `path`. -> its state (see read_state). Collective.

    The number of ranks may be another than the checkpoint's. Tensors that are not asked for are left alone.
    Every byte is checked by its digest first, each rank reading a share of the files. Raises BadInput on every rank
    when anything is amiss on any.
    """
    path = Path(path)

    def check():
        read_state(path, expected)
        _check_files(path, content := _content(path))
        for name, tensor in tensors.items():
            stored, wanted = content["tensors"].get(name), _signature(tensor)
            if stored is None:
                raise BadInput(f"{path} does not hold the tensor {name}")
            if stored != wanted:
                raise BadInput(f"{path} holds {name} as {stored}, not {wanted}")
        for name, digest in digests(_share(path)).items():
            if digest != content["files"][name]:
                mend = "delete this checkpoint to go on from the one before"
                raise BadInput(f"{path / name} is damaged, its digest is not state.json's; {mend}")
        return str(path)

    if len(places := set(on_all_ranks(check))) > 1:
        raise BadInput(f"the ranks were given different checkpoints: {', '.join(sorted(places))}")
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except CheckpointException as failure:
        raise BadInput(f"{path} cannot be loaded: {line(_cause(failure))}") from failure
    return read_state(path)


def random_state():
    """The state of this process's random generators (torch on CPU and CUDA, numpy, Python), for JSON."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": _text(torch.get_rng_state().numpy()),
        "numpy": [name, _text(keys), *rest],
        "python": [version, _text(np.array(words, np.uint32)), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy())
    return state


def set_random_state(state):
    """Puts the generators back to what `random_state` returned."""
    python, numpy, generator = _generators(state)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(generator)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], np.uint8)))


def _generators(state):
    """The states of Python's, numpy's and torch's generators, as each takes its own."""
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    python = (version, tuple(_array(words, np.uint32).tolist()), gauss)
    return python, (name, _array(keys, np.uint32), *rest), torch.from_numpy(_array(state["torch"], np.uint8))


def _text(array):
    return base64.b64encode(array.tobytes()).decode()


def _array(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype).copy()


# What save does, in order.


def _make_room(tmp, tensors, world):
    """Rank 0: clears what killed saves left, sees that the disk has room, makes `tmp`."""
    directory = tmp.parent
    directory.mkdir(parents=True, exist_ok=True)
    fsync(directory.parent)
    _delete_unfinished(directory)
    need = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    # The margin: a file's header takes less than 512 bytes for a shard, and the disk has its own bookkeeping.
    need += 512 * len(tensors) * world + need // 100 + 2**20
    free = shutil.disk_usage(directory).free
    if free < need:
        room = f"it takes {need / 1e9:.3f} GB and the free space in {directory} is {free / 1e9:.3f} GB"
        raise OSError(errno.ENOSPC, room)
    tmp.mkdir()


def _see(tmp):
    if not tmp.is_dir():
        raise OSError(errno.ENOENT, f"{tmp} is not there: the output must be on storage that all nodes share")


def _file_of(tensors, world):
    """name -> number of the file, from 1, that each rank writes its shard of the tensor to."""
    number, file, taken = {}, 1, 0
    for name, tensor in tensors.items():
        share = tensor.numel() * tensor.itemsize // world
        if taken and taken + share > FILE_BYTES:
            file, taken = file + 1, 0
        number[name] = file
        taken += share
    return number


def _share(path):
    """This rank's share of the files at `path`; of a checkpoint just written, those that it wrote itself."""
    files, (rank, world) = sorted(path.glob("*.safetensors")), rank_and_world()
    return files[rank * len(files) // world : (rank + 1) * len(files) // world]


def _sync(paths):
    """Waits until the files are on the disk. -> their digests"""
    for path in paths:
        fsync(path)
    return digests(paths)


def _complete(tmp, final, content):
    """Rank 0: describes what all ranks wrote to `tmp`, and gives it its name once it is on the disk."""
    (tmp / "state.json").write_bytes(_seal(content))
    fsync(tmp / "state.json")
    fsync(tmp)
    if not _is_whole(final):
        shutil.rmtree(final, ignore_errors=True)  # else it would take the place of a step-N.old that is
    put_in_place(tmp, final)


def _cause(failure):
    """What failed on a rank, in place of the exception that torch's checkpoints wrap it in."""
    return next(iter(failure.failures.values()))[0] if isinstance(failure, CheckpointException) else failure


def _delete_others(path, keep):
    _delete_unfinished(path.parent)
    kept = {path.stem}
    for other in _standing(path.parent):
        if other.stem not in kept and len(kept) < keep and _is_whole(other):
            kept.add(other.stem)
        elif other != path:
            _delete(other)


def _delete_unfinished(directory):
    for name in entries(directory):
        if re.fullmatch(r"step-\d+\.tmp", name):
            discard(directory / name)


def _delete(path):
    """Under a name that is never read, so that half of a checkpoint never stands."""
    doomed = path.with_suffix(".tmp")
    try:
        os.rename(path, doomed)
    except OSError as failure:
        return warn_once(f"{path} stays: it cannot be removed: {failure.strerror}")
    discard(doomed)


# What stands in a directory, and whether it is whole.


def _standing(directory):
    """The paths of all that is not .tmp, the newest first, step-N before step-N.old."""
    named = [(re.fullmatch(r"step-(\d+)(\.old)?", name), Path(directory) / name) for name in entries(directory)]
    found = sorted([(int(match[1]), match[2] is None, path) for match, path in named if match], reverse=True)
    return [path for _, _, path in found]


def _is_whole(path, say=lambda line: None):
    try:
        _check_files(path, _content(path))
    except BadInput as reason:
        say(f"{reason}; passed over")
        return False
    return True


def _seal(content):
    """`content` as JSON with a digest over it; the same content always gives the same bytes."""
    content = json.loads(json.dumps(content))
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": sha256}, sort_keys=True, indent=1).encode()


def _content(path):
    written = disk.content(Path(path) / "state.json")
    if written is None:
        raise BadInput(f"{path} is not whole: it has no file state.json")
    try:
        content = json.loads(written)
        del content["sha256"]
        if _seal(content) == written and _is_plausible(**content):
            return content
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError):
        pass  # no JSON, or not what save writes
    raise BadInput(f"{path}/state.json is damaged: its digest is not the one it holds, or it is not what a save writes")


def _is_plausible(state, tensors, files):
    """Whether the parts of a state.json are what a save writes. It may raise what comes of those that are not."""
    step, world, random_states = state["step"], state["world_size"], state["random"]
    for each in random_states:
        python, numpy, generator = _generators(each)
        random.Random().setstate(python)
        np.random.RandomState().set_state(numpy)
        torch.Generator().set_state(generator)
        base64.b64decode(each.get("cuda", ""), validate=True)
    return (
        type(step) is int
        and 0 <= step <= state.get("steps", step)
        and len(random_states) == world
        and isinstance(state.get("identity", {}), dict)
        and isinstance(tensors, dict)
        and all(isinstance(digest["size"], int) for digest in files.values())
    )


def _check_files(path, content):
    there = {}
    for name in entries(path):
        if name.endswith(".safetensors"):
            status = disk.unless_absent(Path(path) / name, os.stat)
            there[name] = status and status.st_size  # a link to nothing counts as no file
    listed = {name: file["size"] for name, file in content["files"].items()}
    for name in sorted(there.keys() | listed.keys()):
        size, wanted = ("no" if size is None else size for size in (there.get(name), listed.get(name)))
        if size != wanted:
            raise BadInput(f"{path} is not whole: {name} has {size} bytes, by its state.json {wanted}")


def _signature(tensor):
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
