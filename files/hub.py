"""Names on the command line -> files on this machine: what is here as it is, the rest from the Hub.

Only data and weights are ever fetched: no pickle, no program. Downloads land in huggingface_hub's own cache,
so a second call needs no network. Rank 0 goes first (inputs.py); on other
machines several ranks may ask at once, for which huggingface_hub locks its files.
"""

import collections
import fnmatch
import os
import re

import huggingface_hub
from huggingface_hub import errors

from files.errors import BadInput

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "README.md"]
# Folders hold copies in other formats, consolidated.safetensors is Mistral's second copy of the same weights.
MODEL_SKIPPED = ["*/*", "consolidated*"]
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MODEL_ID = re.compile(rf"({PART}/{PART})(?:@([^:\s]+))?")
DATA_ID = re.compile(rf"({PART}/{PART})(?:@([^:\s]+))?(?::([\w.-]+))?")


def model_directory(name):
    """A directory, or a Hub id `org/name` or `org/name@revision` -> absolute path of a model's directory.

    Of a Hub model only safetensors, json and tokenizer files are fetched.
    Raises BadInput: no such directory or model, no permission, no network.
    """
    if os.path.isdir(name):
        return os.path.abspath(name)
    if os.path.exists(name):
        raise BadInput(f"{name}: is a file; give the directory of a model in Hugging Face layout")
    match = MODEL_ID.fullmatch(name)
    if not match:
        raise BadInput(f"{name}: there is no such directory, and it is no Hub id (org/name or org/name@revision)")
    repo, revision = match.groups()
    with _Explained(name, "model"):
        directory = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=MODEL_FILES, ignore_patterns=MODEL_SKIPPED
        )
    if not any(file.endswith(".safetensors") for file in os.listdir(directory)):
        raise BadInput(f"{name}: the Hub model has no .safetensors weights; only those are read, never pickles")
    return directory


def data_files(name):
    """A file, or a Hub dataset `org/name`, `org/name:split` or `org/name@revision:split` -> [path].

    The split is train where none is given.
    Of a Hub dataset only the split's files are fetched: those its README.md names, else those that carry the
    split in their path; a lone data file is the train split. Raises BadInput as model_directory does, and
    where the split is not there.
    """
    if os.path.exists(name):
        return [os.path.abspath(name)]
    match = DATA_ID.fullmatch(name)
    if not match or name.endswith(DATA_SUFFIXES):
        raise BadInput(f"{name}: there is no such file; give one, or a Hub dataset (org/name or org/name:split)")
    repo, revision, split = match.groups()
    with _Explained(name, "dataset"):
        # Names the commit that all further requests mean; without network, finds what an earlier run fetched.
        folder = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=["README.md", ".gitattributes"]
        )
        commit = os.path.basename(folder)
        try:
            paths = huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=commit)
        except errors.HfHubHTTPError:
            raise
        except Exception:  # no network: its class depends on the HTTP library behind huggingface_hub
            paths = [
                os.path.relpath(os.path.join(within, file), folder)
                for within, _, files in os.walk(folder)
                for file in files
            ]
        readme = ""
        if "README.md" in paths:
            with open(os.path.join(folder, "README.md"), encoding="utf-8", errors="replace") as file:
                readme = file.read()
        return [
            huggingface_hub.hf_hub_download(repo, path, repo_type="dataset", revision=commit)
            for path in _split_files(name, sorted(paths), readme, split or "train")
        ]


def _split_files(name, paths, readme, split):
    """The paths of one split of a dataset."""
    data = [path for path in paths if path.endswith(DATA_SUFFIXES) and os.path.basename(path) not in NOT_DATA]
    configs = _readme_configs(readme)
    if len(configs) > 1 and "default" not in configs:
        raise BadInput(
            f"{name}: the dataset has several configurations ({_some(configs)}); download the "
            "files of one and give them"
        )
    if configs:
        splits = configs.get("default") or next(iter(configs.values()))
        if split not in splits:
            raise BadInput(f"{name}: the dataset has no split {split!r}; it has {_some(splits)}")
        found = [path for path in paths if any(_matches(path, pattern) for pattern in splits[split])]
        if found and not any(path in data for path in found):
            raise BadInput(f"{name}: {found[0]} is of a kind that is not read; {', '.join(DATA_SUFFIXES)} are")
        found = [path for path in found if path in data]
    else:
        exact = re.compile(rf"(.*/)?{re.escape(split)}(-\d+-of-\d+)?\.\w+")
        loose = re.compile(rf"(.*[/._ -])?{re.escape(split)}([/._ \d-].*)")
        found = list(filter(exact.fullmatch, data)) or list(filter(loose.fullmatch, data))
        if not found and split == "train" and len(data) == 1:
            found = data
    if not found:
        raise BadInput(f"{name}: the dataset has no data file of a split {split!r}; its data files are: {_some(data)}")
    # The same split in two formats is there twice; as on the Hub, the more frequent one counts.
    suffix = collections.Counter(os.path.splitext(path)[1] for path in found).most_common(1)[0][0]
    return [path for path in found if path.endswith(suffix)]


def _readme_configs(readme):
    """The `configs:` of a dataset's README.md -> {config: {split: [pattern]}}.

    Reads the form the Hub itself writes, line by line; it is no YAML parser. {} where that is not there.
    """
    head = re.match(r"---\s*\n(.*?)\n---", readme, re.DOTALL)
    section = re.search(r"^configs:[ \t]*\n((?:[ \t-].*(?:\n|$))*)", head[1] if head else "", re.MULTILINE)
    configs, splits, patterns = {}, None, None
    for line in section[1].splitlines() if section else ():
        key, _, value = line.strip().removeprefix("- ").partition(":")
        value = value.strip().strip("'\"")
        if key == "config_name":
            splits = configs.setdefault(value, {})
        elif splits is None:
            return {}
        elif key == "data_files" and value:
            splits["train"] = [value]
        elif key == "split":
            patterns = splits.setdefault(value, [])
        elif key == "path" and value and patterns is not None:
            patterns.append(value)
        elif line.strip().startswith("- ") and patterns is not None and ":" not in line:
            patterns.append(line.strip().removeprefix("- ").strip("'\""))
    return configs if all(configs.values()) else {}


def _matches(path, pattern):
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern.replace("**/", ""))


def _some(names):
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


class _Explained:
    """Turns what huggingface_hub raises into one line: what, and the mend."""

    def __init__(self, name, kind):
        self.name, self.kind = name, kind

    def __enter__(self):
        return self

    def __exit__(self, _, error, __):
        if not isinstance(error, Exception) or isinstance(error, BadInput):
            return
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__  # why the Hub was not asked; that the cache lacks it is clear
        status = getattr(getattr(error, "response", None), "status_code", None)
        kept = "the directory" if self.kind == "model" else "its files"
        if isinstance(error, errors.GatedRepoError):
            line = (
                f"the Hub {self.kind} is gated; ask for access on its page, then log in with "
                "`hf auth login` or set HF_TOKEN"
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            line = f"the Hub {self.kind} has no such revision; give a branch, a tag or a commit of it"
        elif isinstance(error, errors.RepositoryNotFoundError):
            line = (
                f"is not here, and the Hub shows no such {self.kind}; check the name, or for a private "
                "one log in with `hf auth login` or set HF_TOKEN"
            )
        elif status in (401, 403):
            line = f"the Hub refuses access ({status}); log in with `hf auth login` or set a valid HF_TOKEN"
        elif status is not None:
            line = f"the Hub answered {status}; try again later, or give {kept} of a local copy"
        elif isinstance(error, errors.HFValidationError):
            line = "is not here, and it is no Hub id (org/name)"
        elif isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            line = f"could not be kept in the Hub cache: {error.strerror}: {error.filename}; HF_HOME moves the cache"
        else:
            line = (
                f"is not here, and the Hub cannot be reached ({type(error).__name__}); check the "
                f"network, HF_ENDPOINT and HF_HUB_OFFLINE, or give {kept} of a local copy"
            )
        raise BadInput(f"{self.name}: {line}") from error
