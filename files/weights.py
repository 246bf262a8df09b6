"""Checkpoint files: what is read is a safetensors file and stays in its directory, what is written is whole.

model.py says which tensors a model has; here stands what any checkpoint in Hugging Face layout has in common.
"""

import json
import math
import os
import shutil
import stat

import torch
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


DTYPE_NAMES = {torch.float32: ("F32", "float32", 4), torch.bfloat16: ("BF16", "bfloat16", 2)}


def save_model(directory, source, shapes, tensors, dtype, copies=(), shard_bytes=5 * 10**9):
    """Write a checkpoint in Hugging Face layout: config.json, model.safetensors or shards with an index, and copies.

    source: the directory whose config.json is taken over with the new dtype, or a dict that is one. shapes: name ->
    shape of every tensor. tensors: (name, tensor) in the order of `shapes`; each is written and let go before the
    next is asked for, so that no more than one is in memory. copies: (path, name) of files put beside them. All is
    written into DIRECTORY.tmp and renamed at the end: a directory of that name is whole. One that stood there is
    DIRECTORY.old until then."""
    kind, dtype_name, width = DTYPE_NAMES[dtype]
    config = dict(source) if isinstance(source, dict) else read_json(os.path.join(source, "config.json"))
    config |= {"torch_dtype": dtype_name, "dtype": dtype_name}  # its name before and since transformers 4.56
    part = directory.rstrip("/") + ".tmp"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    for path, name in copies:
        shutil.copyfile(path, os.path.join(part, name))
    with open(os.path.join(part, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, ensure_ascii=False)

    sizes = {name: width * math.prod(shape) for name, shape in shapes.items()}
    shards = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    tensors = iter(tensors)
    for file_name, names in zip(files, shards):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 8)
        with open(os.path.join(part, file_name), "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                given, tensor = next(tensors)
                if given != name or tuple(tensor.shape) != tuple(shapes[name]):
                    raise ValueError(f"tensor {given} {tuple(tensor.shape)} where {name} {tuple(shapes[name])} is due")
                for piece in tensor.detach().flatten().split(PIECE):
                    file.write(piece.to("cpu", dtype).view(torch.uint8).numpy().data)
                del tensor, piece  # before the next is asked for
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards) for name in names},
        }
        with open(os.path.join(part, INDEX), "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2)
    old = directory.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(directory):
        os.rename(directory, old)
    os.rename(part, directory)
    shutil.rmtree(old, ignore_errors=True)
