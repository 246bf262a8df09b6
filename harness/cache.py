"""The guidance cache: per-token log-probs of the reference and the guide, computed once.

    DIRECTORY/ref-<key>.safetensors, guide-<key>.safetensors
        logp float32 [R], R response tokens: pair by pair, chosen then rejected; metadata: the key

The key is made of all that the log-probs depend on (weights, data, tokenisation, dtype), so a file of another
run has another name, and its metadata must say the same. alpha and beta are no part of it.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from harness.checkpoint import digests, fsync


def key(parts):
    """Hex digest of `parts`, a dict of all that the log-probs depend on; JSON must be able to hold it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def weights_digest(directory):
    """Hex digest of the model in `directory`: of the names and contents of *.safetensors and config.json."""
    files = sorted(Path(directory).glob("*.safetensors"))
    return key(digests([*files, Path(directory) / "config.json"]))


def write(directory, kind, key, logp):
    """Write `logp`, float32 [R], as the cache of `kind` ("ref" or "guide"): whole or not at all."""
    path = _path(directory, kind, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file({"logp": logp.contiguous()}, unfinished, metadata={"key": key})
    fsync(unfinished)
    os.replace(unfinished, path)
    fsync(path.parent)


def read(directory, kind, key, count, say=lambda line: None):
    """The cached log-probs, float32 [count], or None where there are none that can be used.

    `say` is called with one line where a file stands but is not used: cut short, of another key, of another
    number of response tokens than `count`, or not finite.
    """
    path = _path(directory, kind, key)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("key")
            logp = file.get_tensor("logp")
    except (SafetensorError, OSError) as reason:
        say(f"{path} is not used: {' '.join(str(reason).split())}")
        return None
    if stored != key:
        say(f"{path} is not used: its key is {stored}")
    elif logp.dtype != torch.float32 or logp.shape != (count,):
        say(f"{path} is not used: it holds {logp.dtype} {list(logp.shape)}, not float32 [{count}]")
    elif not torch.isfinite(logp).all():
        say(f"{path} is not used: not all of its log-probs are finite")
    else:
        return logp
    return None


def _path(directory, kind, key):
    return Path(directory) / f"{kind}-{key}.safetensors"
