"""The guidance cache: per-token log-probs of the reference and the guide, computed once.

    DIRECTORY/ref-<key>.safetensors, guide-<key>.safetensors
        logp float32 [R], R response tokens: pair by pair, chosen then rejected
    DIRECTORY/centre-<key>.safetensors
        the same, but KL(ref || guide) at the state of each token, for --centre-guidance
        metadata: the key, and a digest of the log-probs

The key is made of all that the log-probs depend on (weights, data, tokenisation, dtype), so a file of another
run has another name, and its metadata must say the same. alpha and beta are no part of it.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from runtime import outdir
from runtime.disk import digests, line, unless_absent, whole
from runtime.failures import RunFailed
from runtime.process_group import on_rank_0
from runtime.progress import say


def key(parts):
    """Hex digest of `parts`, a dict of all that the log-probs depend on; JSON must be able to hold it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def weights_digest(directory):
    """Hex digest of the model in `directory`: of the names and contents of *.safetensors and config.json."""
    return key(digests([*sorted(Path(directory).glob("*.safetensors")), Path(directory) / "config.json"]))


def kept(run, kind, parts, count, find, title):
    """The numbers of `kind` from OUT/cache where they stand, else those of find(), which are kept there: [count].
    parts() -> what they depend on, see `key`; title: what they are, in words. Collective."""
    where = Path(run.out) / "cache"
    name = on_rank_0(lambda: key(parts()))
    logp = on_rank_0(lambda: read(where, kind, name, count, say))
    if logp is not None:
        say(f"{title} are in the cache: {kind}-{name}", run.rank)
        return logp
    logp = find()

    def keep():
        outdir.check(run.out)
        write(where, kind, name, logp)

    on_rank_0(keep)
    return logp


def write(directory, kind, key, logp):
    """Writes `logp`, float32 [R], as the cache of `kind` ("ref" or "guide"). Raises RunFailed where it cannot."""
    path = _path(directory, kind, key)
    logp = logp.detach().cpu().contiguous()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            Path(unfinished).write_bytes(save({"logp": logp}, {"key": key, "sha256": _digest(logp)}))
    except OSError as failure:
        raise RunFailed(f"the guidance cache {path} is not written: {line(failure)}") from failure


def read(directory, kind, key, count, say=lambda line: None):
    """The cached log-probs, float32 [count], or None where there are none that can be used.

    `say` is called with one line where a file stands but is not used: cut short, of another key, of another
    number of response tokens than `count`, damaged, or not finite.
    """
    path = _path(directory, kind, key)
    if not unless_absent(path, _opens):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata, logp = file.metadata() or {}, file.get_tensor("logp")
    except (SafetensorError, OSError) as failure:
        reason = line(failure)
    else:
        if metadata.get("key") != key:
            reason = f"its key is {metadata.get('key')}"
        elif logp.dtype != torch.float32 or logp.shape != (count,):
            reason = f"it holds {logp.dtype} {list(logp.shape)}, not float32 [{count}]"
        elif metadata.get("sha256") != _digest(logp):
            reason = "its log-probs are damaged, their digest is another"
        elif not logp.isfinite().all():
            reason = "not all of its log-probs are finite"
        else:
            return logp
    say(f"{path} is not used: {reason}")
    return None


def _opens(path):
    with open(path, "rb"):
        return True


def _digest(logp):
    return hashlib.sha256(logp.view(torch.uint8).numpy()).hexdigest()


def _path(directory, kind, key):
    return Path(directory) / f"{kind}-{key}.safetensors"
