"""Checkpoint files: what is read is a safetensors file and stays in its directory.

Which tensors a model has is handed in, as names and shapes; here stands what any checkpoint in Hugging Face layout
has in common.
"""

import json
import os
import stat
from collections.abc import Sequence

import torch
from safetensors import SafetensorError, safe_open

from files.errors import BadInput, brief

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100 << 20  # bytes; safetensors' own limit
JSON_LIMIT = 64 << 20  # bytes of config.json or of an index
FLOATS = ("BF16", "F16", "F32", "F64")
HEAD = "lm_head.weight"
PIECE = 1 << 20  # numbers that are read, checked or written at once


def tensor_files(directory: str | os.PathLike) -> dict[str, str]:
    """Tensor name -> path of the safetensors file that holds it, every file checked to be one. Raises BadInput."""
    index = os.path.join(directory, INDEX)
    if os.path.exists(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise BadInput(f"{index}: weight_map is no object of file names")
        names = sorted(set(weight_map.values()))
    elif os.path.exists(os.path.join(directory, SINGLE)):
        names = [SINGLE]
    else:
        pickles = [f for f in sorted(os.listdir(directory)) if f.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
        what = (
            f"only {pickles[0]}, a pickle, which can run code; convert it to safetensors"
            if pickles
            else f"neither {SINGLE} nor {INDEX}"
        )
        raise BadInput(f"{directory}: no safetensors weights: {what}")
    files = {}
    for name in names:
        if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise BadInput(f"{index}: the file name {name!r:.80} leaves the directory; only files in it are read")
        path = os.path.join(directory, name)
        with open_tensors(path) as file:
            files.update(dict.fromkeys(file.keys(), path))
    if os.path.exists(index):
        for tensor, name in weight_map.items():
            if files.get(tensor) != os.path.join(directory, name):
                raise BadInput(f"{index}: {tensor!r:.120} is not in {name}, where the index puts it")
    return files


def checked_files(directory: str | os.PathLike, shapes: dict[str, Sequence[int]], tied: bool) -> dict[str, str]:
    """tensor_files of a checkpoint whose headers fit: every tensor of `shapes` (name -> shape) is there, of that shape
    and of a float type, and no other. Reads no weights. Raises BadInput.

    tied: the head is the embedding, and not in `shapes`; the checkpoint may hold it as well. So may it the frequency
    tables of early Llamas, which are not needed."""
    files = tensor_files(directory)
    known = {name for name in files if name.endswith(".rotary_emb.inv_freq") or tied and name == HEAD}
    missing, extra = sorted(shapes.keys() - files.keys()), sorted(files.keys() - shapes.keys() - known)
    if missing:
        hint = ", though config.json does not tie the head to the embedding" if missing == [HEAD] else ""
        raise BadInput(f"{directory}: the tensor {missing[0]} is missing{hint}{_and_more(missing)}")
    if extra:
        raise BadInput(f"{directory}: the tensor {extra[0]} has no place in the model of config.json{_and_more(extra)}")
    for path in sorted(set(files.values())):
        with open_tensors(path) as file:
            for name in shapes.keys() & file.keys():
                stored = file.get_slice(name)
                kind, there, due = stored.get_dtype(), list(stored.get_shape()), list(shapes[name])
                if kind not in FLOATS:
                    raise BadInput(f"{path}: {name} is of type {kind}; supported are {', '.join(FLOATS)}")
                if there != due:
                    raise BadInput(f"{path}: {name} has shape {there}, but config.json makes it {due}")
    return files


def copy_tensor(path: str, name: str, target: torch.Tensor, start: int) -> None:
    """Fill `target`, a part of the tensor `name` that begins at `start` of its first dimension. No more than a piece
    of the file is in memory. Raises BadInput for values that are not finite."""
    with open_tensors(path) as file, torch.no_grad():
        stored = file.get_slice(name)[start : start + len(target)]  # pages of the file, not yet in memory
        for piece, goal in zip(finite_pieces(path, name, stored), target.view(-1).split(PIECE)):
            goal.copy_(piece)


def check_finite(directory: str | os.PathLike) -> None:
    """Raises BadInput where a weight of a checkpoint is not finite. Reads them all."""
    for name, path in tensor_files(directory).items():
        with open_tensors(path) as file:
            for _ in finite_pieces(path, name, file.get_tensor(name)):
                pass


def finite_pieces(path, name, stored):
    """The pieces of a tensor, flat. Raises BadInput for values that are not finite."""
    for piece in stored.flatten().split(PIECE):
        if not bool(piece.isfinite().all()):
            raise BadInput(
                f"{path}: {name} holds values that are not finite; the file is "
                "damaged or the training that wrote it diverged"
            )
        yield piece


def check_tied(path: str, embedding: torch.Tensor, start: int) -> None:
    """A head that is stored beside the embedding must be equal to it. embedding: its part from `start` on, as it was
    read. Raises BadInput."""
    with open_tensors(path) as file:
        stored = file.get_slice(HEAD)[start : start + len(embedding)]
        same = stored.shape == embedding.shape and all(
            torch.equal(a.to(b.dtype), b.cpu())
            for a, b in zip(stored.flatten().split(PIECE), embedding.view(-1).split(PIECE))
        )
    if not same:
        raise BadInput(f"{path}: {HEAD} differs from model.embed_tokens.weight, though config.json ties them")


def open_tensors(path: str):
    """safe_open of a safetensors file, or BadInput that says what else it is. safe_open maps the file; opened anew for
    each tensor, no more of it stays in memory than that tensor."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; the checkpoint is incomplete") from None
    if not stat.S_ISREG(info.st_mode):
        raise BadInput(f"{path}: no regular file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path}: {_what_else(path, error)}") from None


def _what_else(path, error):
    """What a file is that safetensors does not open, by its first bytes."""
    try:
        with open(path, "rb") as file:
            head, length = file.read(512), os.fstat(file.fileno()).st_size
    except OSError as unread:
        return f"cannot be read: {unread.strerror}"
    size, begins = int.from_bytes(head[:8], "little"), head[8:9] == b"{"  # as the header of a safetensors file does
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run `git lfs pull`"
    if not begins or size >= 1 << 40:  # a shorter header's size may look like what follows
        if head.lstrip()[:1] == b"<":
            return "a page of HTML or XML, not safetensors; download it again"
        if head[:2] == b"PK" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            return "a pickle under a safetensors name; pickles can run code and are never read"
    if begins and size > HEADER_LIMIT:
        return f"its header says {size} bytes, more than safetensors allows ({HEADER_LIMIT})"
    if begins and 8 + size > length:
        return f"truncated in its header ({length} bytes); download it again"
    return f"no safetensors file, or a truncated one ({brief(error)})"


def _and_more(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def read_json(path: str) -> dict:
    """The object in a JSON file. Raises BadInput."""
    try:
        if not stat.S_ISREG((status := os.stat(path)).st_mode):
            raise BadInput(f"{path}: no regular file")
        if status.st_size > JSON_LIMIT:
            raise BadInput(f"{path}: has {status.st_size / 1e6:.0f} MB, more than such a file ever has")
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; a checkpoint directory needs it") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({brief(error)})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: no JSON object")
    return value
