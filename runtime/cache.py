"""The guidance cache: per-token log-probs of the reference and the guide, computed once.

    DIRECTORY/ref-<key>.safetensors, guide-<key>.safetensors
        logp float32 [R], R response tokens: pair by pair, chosen then rejected
        metadata: the key, and a digest of the log-probs

The key is made of all that the log-probs depend on (weights, data, tokenisation, dtype), so a file of another
run has another name, and its metadata must say the same. alpha and beta are no part of it.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from runtime.checkpoint import digests, fsync, line


def key(parts):
    """Hex digest of `parts`, a dict of all that the log-probs depend on; JSON must be able to hold it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def weights_digest(directory):
    """Hex digest of the model in `directory`: of the names and contents of *.safetensors and config.json."""
    files = sorted(Path(directory).glob("*.safetensors"))
    return key(digests([*files, Path(directory) / "config.json"]))


def write(directory, kind, key, logp):
    """Write `logp`, float32 [R], as the cache of `kind` ("ref" or "guide"): whole or not at all.

    Raises OSError, of one line, where it cannot, a full disk included; a cache that stood before stands.
    """
    path = _path(directory, kind, key)
    unfinished = path.with_suffix(".tmp")
    logp = logp.detach().cpu().contiguous()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(save({"logp": logp}, {"key": key, "sha256": _digest(logp)}))
        fsync(unfinished)
        os.replace(unfinished, path)
        fsync(path.parent)
    except OSError as failure:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"the guidance cache {path} is not written: {line(failure)}") from failure


def read(directory, kind, key, count, say=lambda line: None):
    """The cached log-probs, float32 [count], or None where there are none that can be used.

    `say` is called with one line where a file stands but is not used: cut short, of another key, of another
    number of response tokens than `count`, damaged, or not finite.
    """
    path = _path(directory, kind, key)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            logp = file.get_tensor("logp")
    except (SafetensorError, OSError) as reason:
        say(f"{path} is not used: {' '.join(str(reason).split())}")
        return None
    if metadata.get("key") != key:
        say(f"{path} is not used: its key is {metadata.get('key')}")
    elif logp.dtype != torch.float32 or logp.shape != (count,):
        say(f"{path} is not used: it holds {logp.dtype} {list(logp.shape)}, not float32 [{count}]")
    elif metadata.get("sha256") != _digest(logp):
        say(f"{path} is not used: its log-probs are damaged, their digest is another")
    elif not torch.isfinite(logp).all():
        say(f"{path} is not used: not all of its log-probs are finite")
    else:
        return logp
    return None


def _digest(logp):
    return hashlib.sha256(logp.view(torch.uint8).numpy()).hexdigest()


def _path(directory, kind, key):
    return Path(directory) / f"{kind}-{key}.safetensors"
