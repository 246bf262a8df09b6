"""Names on the command line -> files on this machine: what is here as it is, the rest from the Hub.

Only data and weights are ever fetched: no pickle, no program. Downloads land in huggingface_hub's own cache, so a
second call needs no network. Several ranks may ask at once: huggingface_hub locks its files.
"""

import collections
import contextlib
import fnmatch
import glob
import os
import re
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

from files.errors import BadInput, brief, some
from files.rows import read_object

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "README.md"]
# Folders hold copies in other formats, consolidated.safetensors is Mistral's second copy of the same weights.
MODEL_SKIPPED = ["*/*", "consolidated*"]
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
CARD_LIMIT = 1 << 20  # bytes of a README.md: YAML is read slowly
PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MODEL_ID = re.compile(rf"({PART}/{PART})(?:@([^:\s]+))?")
DATA_ID = re.compile(rf"({PART}/{PART})(?:@([^:\s]+))?(?::([\w.-]+))?")


def model_directory(name, weights=True):
    """A directory, or a Hub id `org/name` or `org/name@revision` -> absolute path of a model's directory.

    Of a Hub model only safetensors, json and tokenizer files are fetched; weights: whether the safetensors are.
    Raises BadInput: no such directory or model, no permission, no network.
    """
    if os.path.isdir(name):
        refuse_adapters(name, os.path.abspath(name))
        return os.path.abspath(name)
    if os.path.exists(name):
        raise BadInput(f"{name}: is a file; give the directory of a model in Hugging Face layout")
    match = MODEL_ID.fullmatch(name)
    if not match:
        raise BadInput(f"{name}: there is no such directory, and it is no Hub id (org/name or org/name@revision)")
    repo, revision = match.groups()
    with explained(name, "model"):
        directory = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=MODEL_FILES if weights else MODEL_FILES[1:],
            ignore_patterns=MODEL_SKIPPED,
        )
        refuse_adapters(name, directory)
        paths = os.listdir(directory) if weights else listed(repo, "model", directory)
    if paths is not None and not any(
        filter_repo_objects(paths, allow_patterns=MODEL_FILES[:1], ignore_patterns=MODEL_SKIPPED)
    ):
        raise BadInput(f"{name}: the Hub model has no .safetensors weights; only those are read, never pickles")
    return directory


def refuse_adapters(name, directory):
    """Raises BadInput where a directory holds adapters in PEFT's layout, which are no model of their own."""
    path, merged = os.path.join(directory, "adapter_config.json"), os.path.join(os.path.dirname(directory), "policy")
    if os.path.exists(path) and not os.path.exists(os.path.join(directory, "config.json")):
        base = brief(read_object(Path(path)).get("base_model_name_or_path"))
        mend = (
            f"give {merged}, which has them merged" if os.path.isdir(merged) else f"merge them into their base, {base}"
        )
        raise BadInput(f"{name}: holds adapters, not a model; {mend}")


def listed(repo, kind, folder):
    """The paths of a repository's files at the commit of its snapshot `folder`; None without network."""
    try:
        return huggingface_hub.HfApi().list_repo_files(repo, repo_type=kind, revision=os.path.basename(folder))
    except errors.HfHubHTTPError:
        raise
    except Exception:  # its class depends on the HTTP library behind huggingface_hub
        return None


def data_files(name):
    """A file, a directory, a glob, or a Hub dataset (org/name, org/name:split, org/name@revision:split) -> [path].

    The split is train where none is given. Of a Hub dataset only the split's files are fetched: those its README.md
    names, else those that carry the split in their path; a lone data file is the train split. Raises BadInput as
    model_directory does, and where the split is not there.
    """
    if os.path.isdir(name):
        found = [os.path.join(name, file) for file in sorted(os.listdir(name)) if file not in NOT_DATA]
        found = [os.path.abspath(file) for file in found if file.endswith(DATA_SUFFIXES) and os.path.isfile(file)]
        if not found:
            raise BadInput(f"{name}: the directory holds no data file; {', '.join(DATA_SUFFIXES)} are read")
        return found
    if os.path.exists(name):
        return [os.path.abspath(name)]
    if glob.has_magic(name):
        found = [os.path.abspath(file) for file in sorted(glob.glob(os.path.expanduser(name), recursive=True))]
        if not found:
            raise BadInput(f"{name}: no file has such a name")
        return found
    match = DATA_ID.fullmatch(name)
    if not match or name.endswith(DATA_SUFFIXES):
        raise BadInput(f"{name}: there is no such file; give one, or a Hub dataset (org/name or org/name:split)")
    repo, revision, split = match.groups()
    with explained(name, "dataset"):
        # Names the commit that all further requests mean; without network, finds what an earlier run fetched.
        folder = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=["README.md", ".gitattributes"]
        )
        commit, paths = os.path.basename(folder), listed(repo, "dataset", folder)
        if paths is None:
            found = (os.path.join(within, file) for within, _, files in os.walk(folder) for file in files)
            paths = [os.path.relpath(path, folder) for path in found]
        configs = card_configs(name, os.path.join(folder, "README.md")) if "README.md" in paths else {}
        return [
            huggingface_hub.hf_hub_download(repo, path, repo_type="dataset", revision=commit)
            for path in split_files(name, sorted(paths), configs, split or "train")
        ]


def card_configs(name, path):
    """The `configs:` of a dataset's README.md -> {config: {split: [pattern]}}; {} where they are not of a known form.
    Raises BadInput for a file too large to be read."""
    if os.path.getsize(path) > CARD_LIMIT:
        raise BadInput(f"{name}: its README.md has more than 1 MiB; download the files of a split and give them")
    configs = {}
    try:
        for config in (huggingface_hub.metadata_load(path) or {})["configs"]:
            given = config["data_files"]  # patterns of the train split, or an object for each split
            given = given if isinstance(given, list) else [given]
            splits = configs.setdefault(f"{config['config_name']}", {})
            for item in given:
                split, patterns = (f"{item['split']}", item["path"]) if isinstance(item, dict) else ("train", item)
                patterns = patterns if isinstance(patterns, list) else [patterns]
                splits[split] = splits.get(split, []) + [f"{pattern}" for pattern in patterns]
    except Exception:  # other YAML, or none: the paths tell the splits
        return {}
    return configs


def split_files(name, paths, configs, split):
    """The paths of one split of a dataset."""
    data = [path for path in paths if path.endswith(DATA_SUFFIXES) and os.path.basename(path) not in NOT_DATA]
    if len(configs) > 1 and "default" not in configs:
        raise BadInput(
            f"{name}: the dataset has several configurations ({some(configs)}); download the files of one and give them"
        )
    if configs:
        splits = configs.get("default") or next(iter(configs.values()))
        if split not in splits:
            raise BadInput(f"{name}: the dataset has no split {split!r}; it has {some(splits)}")
        # As on the Hub, **/ may stand for no folder at all.
        patterns = [p for pattern in splits[split] for p in (pattern, pattern.replace("**/", ""))]
        named = [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]
        found = [path for path in named if path in data]
        if named and not found:
            raise BadInput(f"{name}: {brief(named[0])} is of a kind that is not read; {', '.join(DATA_SUFFIXES)} are")
    else:
        exact = re.compile(rf"(.*/)?{re.escape(split)}(-\d+-of-\d+)?(\.\w+)+")
        loose = re.compile(rf"(.*[/._ -])?{re.escape(split)}([/._ \d-].*)")
        found = list(filter(exact.fullmatch, data)) or list(filter(loose.fullmatch, data))
        if not found and split == "train" and len(data) == 1:
            found = data
    if not found:
        raise BadInput(f"{name}: the dataset has no data file of a split {split!r}; its data files are: {some(data)}")
    # The same split in two formats is there twice; as on the Hub, the more frequent one counts.
    suffix = collections.Counter(os.path.splitext(path)[1] for path in found).most_common(1)[0][0]
    return [path for path in found if path.endswith(suffix)]


@contextlib.contextmanager
def explained(name, kind):
    """Turns what huggingface_hub raises into one line: what, and the mend. Its progress bars are for terminals."""
    if not (sys.stderr and sys.stderr.isatty()) and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{name}: {explanation(error, kind)}") from error


def explanation(error, kind):
    """What an exception of huggingface_hub means, and the mend. kind: model or dataset."""
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # why the Hub was not asked; that the cache lacks it is clear
    status = getattr(getattr(error, "response", None), "status_code", None)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    copy = f"give {'the directory' if kind == 'model' else 'its files'} of a local copy"
    if isinstance(error, errors.GatedRepoError):
        return f"the Hub {kind} is gated; ask for access on its page, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub {kind} has no such revision; give a branch, a tag or a commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"is not here, and the Hub shows no such {kind}; check the name, or for a private one {log_in}"
    if status in (401, 403):
        return f"the Hub refuses access ({status}); log in with `hf auth login` or set a valid HF_TOKEN"
    if status is not None:
        return f"the Hub answered {status}; try again later, or {copy}"
    if isinstance(error, errors.HFValidationError):
        return "is not here, and it is no Hub id (org/name)"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"could not be kept in the Hub cache: {error.strerror}: {error.filename}; HF_HOME moves the cache"
    return (
        f"is not here, and the Hub cannot be reached ({type(error).__name__}); check the network, HF_ENDPOINT and "
        f"HF_HUB_OFFLINE, or {copy}"
    )
