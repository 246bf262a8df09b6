"""Model directories out: weights, configuration, tokenizer and model card, whole or not at all.

What a run has trained ends its turns, pads and renders its prompts as the run did, whichever program loads it:
transformers 4 or 5, vLLM, llama.cpp's converter. Where these read the same thing under different names, both are
written.
"""

import contextlib
import json
import math
import os
import shutil

import torch

from files.config import architecture
from files.errors import naming
from files.weights import INDEX, PIECE, SINGLE, read_json

DTYPE_NAMES = {torch.float32: ("F32", "float32", 4), torch.bfloat16: ("BF16", "bfloat16", 2)}
CHANGING = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
# The chat template goes to tokenizer_config.json, which every program reads. A chat_template.jinja stays behind:
# transformers prefers it, llama.cpp's converter does not, and older versions of both do not know it.
TOKENIZER_FILES = ("tokenizer.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", *CHANGING)


def as_used(source, tokenizer):
    """The directory `source` with what a run with `tokenizer` (a ChatTokenizer) used -> (the object of config.json,
    {name: text} of the other JSON files that change). Before training it finds what cannot be exported: BadInput.

    - RoPE stands in config.json in both its spellings, and the architecture where there was only a model_type.
    - eos_token_id holds what ends the assistant's turn, first where it was missing; eos_token is that token.
    - pad_token is eos_token where there is none that the vocabulary has.
    - chat_template is the one that rendered the prompts."""
    paths = {name: os.path.join(source, name) for name in ("config.json", *CHANGING)}
    came = {name: read_json(path) if os.path.exists(path) else {} for name, path in paths.items()}
    tokens, ids = tokenizer.tokens, tokenizer.vocabulary
    eos, pad = (ids.get(tokens.get(kind)) for kind in ("eos_token", "pad_token"))
    ends = sorted(tokenizer.end_ids, key=lambda i: i == eos)  # the end of turn, then eos where it is another
    pad = ends[0] if pad is None else pad

    config, generation, names, older = (dict(came[name]) for name in paths)
    generation = generation or {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    for ours in (config, generation):
        stops = ours.get("eos_token_id")
        stops = stops if isinstance(stops, list) else [stops]
        if ends[0] not in stops:
            stops = list(dict.fromkeys([*ends, *(i for i in stops if i is not None)]))
            ours["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        if not isinstance(ours.get("pad_token_id"), int) or ours["pad_token_id"] < 0:
            ours["pad_token_id"] = pad

    for kind, i in (("eos_token", ends[0]), ("pad_token", pad)):
        token = tokenizer.backend.id_to_token(i)
        for ours in (names, older) if older else (names,):
            if token != tokens.get(kind):
                ours[kind] = token
    names["chat_template"] = tokenizer.template
    config |= spelled_twice(config) | {"architectures": [architecture(config)]}
    changed = zip(CHANGING, (generation, names, older))
    return config, {name: json.dumps(ours, indent=2) for name, ours in changed if ours != came[name]}


def spelled_twice(config):
    """The fields of config.json that say its RoPE, as transformers 4 reads them and as transformers 5 does."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = next((t for t in (rope.get("rope_theta"), config.get("rope_theta")) if t is not None), 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else scaling,
        "rope_parameters": scaling | {"rope_type": kind, "rope_theta": theta},
    }


def tokenizer_files(source):
    """(path, name) of the files of the directory `source` that an export takes over as they are."""
    paths = [(os.path.join(source, name), name) for name in TOKENIZER_FILES]
    return [(path, name) for path, name in paths if os.path.isfile(path)]


def save_model(directory, source, shapes, tensors, dtype, copies=(), texts=None, shard_bytes=5 * 10**9):
    """Write a checkpoint in Hugging Face layout: config.json, model.safetensors or shards with an index, and what else
    is given.

    source: the directory whose config.json is taken over with the new dtype, or a dict that is one. shapes: name ->
    shape of every tensor. tensors: (name, tensor) in the order of `shapes`; each is written and let go before the next
    is asked for, so that no more than one is in memory. copies: (path, name) of files put beside them; texts: {name:
    text} of files written after these. All is written into DIRECTORY.tmp, synced and renamed at the end: a directory
    of that name is whole. One that stood there is DIRECTORY.old until then."""
    kind, dtype_name, width = DTYPE_NAMES[dtype]
    config = source if isinstance(source, dict) else read_json(os.path.join(source, "config.json"))
    part, old = (directory.rstrip("/") + suffix for suffix in (".tmp", ".old"))
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    for path, name in copies:
        with open(path, "rb") as came, synced(os.path.join(part, name)) as file:
            shutil.copyfileobj(came, file)

    sizes = {name: width * math.prod(shape) for name, shape in shapes.items()}
    shards = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    tensors = iter(tensors)
    for file_name, names in zip(files, shards):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 8)
        with synced(os.path.join(part, file_name)) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                given, tensor = next(tensors)
                if given != name or tuple(tensor.shape) != tuple(shapes[name]):
                    raise ValueError(f"tensor {given} {tuple(tensor.shape)} where {name} {tuple(shapes[name])} is due")
                for piece in tensor.detach().flatten().split(PIECE):
                    file.write(piece.to("cpu", dtype).view(torch.uint8).numpy().data)
                del tensor, piece  # before the next is asked for

    config = config | {"torch_dtype": dtype_name, "dtype": dtype_name}  # before and since transformers 4.56
    texts = {"config.json": json.dumps(config, indent=2)} | (texts or {})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        texts[INDEX] = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2)
    for name, text in texts.items():
        with synced(os.path.join(part, name)) as file:
            file.write(text.encode(errors="replace"))
    fsync(part)
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(directory):
        os.rename(directory, old)
    os.rename(part, directory)
    fsync(os.path.dirname(os.path.abspath(directory)))
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def synced(path):
    """A file opened to write bytes, on the disk when it closes."""
    with naming(path), open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def fsync(path):
    """Wait until the file or directory at `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
