"""Checkpoint files: what is read is a safetensors file and stays in its directory.

model.py says which tensors a model has; here stands what any checkpoint in Hugging Face layout has in common.
"""

import json
import os
import stat

from safetensors import SafetensorError, safe_open

from files.errors import BadInput

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100 << 20  # bytes; safetensors' own limit
PIECE = 1 << 20  # numbers that are read, checked or written at once


def tensor_files(directory):
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


def open_tensors(path):
    """safe_open of a file that is what it says. safe_open maps the file; opened anew for each tensor, no more of it
    stays in memory than that tensor."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; the checkpoint is incomplete") from None
    if not stat.S_ISREG(info.st_mode):
        raise BadInput(f"{path}: no regular file")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    size = int.from_bytes(head[:8], "little")
    if head.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise BadInput(f"{path}: a page of HTML or XML, not safetensors; download it again")
    if head[:2] == b"PK" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise BadInput(f"{path}: a pickle under a safetensors name; pickles can run code and are never read")
    if len(head) > 8 and head[8:9] == b"{" and size > HEADER_LIMIT:
        raise BadInput(f"{path}: its header says {size} bytes, more than safetensors allows ({HEADER_LIMIT})")
    if len(head) > 8 and head[8:9] == b"{" and 8 + size > info.st_size:
        raise BadInput(f"{path}: truncated in its header ({info.st_size} bytes); download it again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path}: no safetensors file, or a truncated one ({_line(error)})") from None


def read_json(path):
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadInput(f"{path}: no regular file")
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; a checkpoint directory needs it") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({_line(error)})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: no JSON object")
    return value


def _line(error):
    return " ".join(str(error).split())[:160]
