"""Models and datasets named by Hub id, fetched from a server on this machine that plays the Hub."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

import train
from files import hub
from files.errors import BadInput

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny" / "model"
MODEL = {
    "config.json": b"config",
    "model.safetensors": b"weights",
    "tokenizer.json": b"pieces",
    "chat_template.jinja": b"turns",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"program",
    "original/consolidated.safetensors": b"twice",
    "consolidated.safetensors": b"twice",
}
SHARDS = {
    "data/train-00000-of-00002.parquet": b"t0",
    "data/train-00001-of-00002.parquet": b"t1",
    "data/test-00000-of-00001.parquet": b"e0",
    "dataset_infos.json": b"{}",
    ".gitattributes": b"",
}
README = b"""---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_prefs
    path: data/train_prefs-*
  - split: test_prefs
    path:
    - "one.jsonl"
    - two.jsonl
---
# pairs
"""


class Hub(http.server.ThreadingHTTPServer):
    """repos: {(kind, id): {revision: {path: bytes}}}; asked: every path that was requested; listings: the
    status of each listing of files that is asked for, the last one's for all further ones."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.asked, self.gated, self.listings = {}, [], set(), [200, 200]
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self):
        """Names of the files whose content was sent."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for verb, path in self.asked
            if verb == "GET" and "/resolve/" in path
        }


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if parts[0] in ("datasets", "models") else parts
        if len(parts) < 4:
            return self.send(404, {})
        repo, what, revision, rest = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        revisions = self.server.repos.get((kind, repo))
        if repo in self.server.gated:
            return self.send(403, {"X-Error-Code": "GatedRepo"})
        if revisions is None:
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        commits = {commit_of(repo, name): name for name in revisions}
        name = commits.get(revision, revision)
        if name not in revisions:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        files, commit = revisions[name], commit_of(repo, name)
        if api and what == "revision":
            return self.send(
                200,
                {},
                json.dumps({"id": repo, "sha": commit, "siblings": [{"rfilename": file} for file in files]}).encode(),
            )
        if api and what == "tree":
            status = self.server.listings[0]
            del self.server.listings[: len(self.server.listings) > 1]
            if status != 200:
                return self.send(status, {})
            return self.send(
                200,
                {},
                json.dumps(
                    [
                        {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                        for file, body in files.items()
                    ]
                ).encode(),
            )
        if rest not in files:
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        body = files[rest]
        self.send(200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}, body)

    def send(self, status, headers, body=b""):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def commit_of(repo, revision):
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


def forget_session():
    """huggingface_hub before 1.0 keeps its session, and in it whether it is offline."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


@pytest.fixture
def server(monkeypatch, tmp_path):
    with Hub() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        # Both are made of HF_ENDPOINT when huggingface_hub is imported; its first versions keep the second twice.
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield made
        forget_session()
        made.shutdown()
        thread.join()


def contents(paths):
    return [pathlib.Path(path).read_bytes() for path in paths]


def test_model_comes_without_pickles_programs_and_second_copies(server):
    server.repos["models", "org/tiny"] = {"main": MODEL}
    directory = hub.model_directory("org/tiny")
    assert set(os.listdir(directory)) == {"chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"}
    assert contents([directory + "/model.safetensors"]) == [b"weights"]
    assert server.fetched() == set(os.listdir(directory))


def test_a_dry_run_fetches_no_weights(server, tmp_path, capfd):
    """Nor does it need any of a directory; a pickle there is still refused, and so are tensors that do not fit."""
    files = {name: (TINY / name).read_bytes() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
    server.repos["models", "org/tiny"] = {"main": files | {"model.safetensors": b"weights", "README.md": b"Hi"}}
    look = ["--data", str(TINY.parent / "train.jsonl"), "--limit", "3", "--dry-run", "--model"]
    assert train.main([*look, "org/tiny"]) == 0
    told = capfd.readouterr().out
    assert "org/tiny: its weights are not fetched" in told and "memory of a rank" in told and "steps of" in told
    assert server.fetched() == {*files, "README.md"}
    for name in ("pickled", "adapters"):
        server.repos["models", f"org/{name}"] = {
            "main": files | {"pytorch_model.bin": b"pickle", "a/model.safetensors": b""}
        }
    adapters = server.repos["models", "org/adapters"]["main"]
    adapters["adapter_config.json"] = adapters.pop("config.json")
    for name, words in (("pickled", "has no .safetensors weights; only"), ("adapters", "holds adapters, not a model")):
        assert train.main([*look, f"org/{name}"]) == 2
        assert f"org/{name}: " in (said := capfd.readouterr().err) and words in said and said.count("\n") == 1
    bare = tmp_path / "bare"
    bare.mkdir()
    for name, content in files.items():
        (bare / name).write_bytes(content)
    assert train.main([*look, str(bare)]) == 0
    assert f"{bare}: has no weights; the plan needs none" in capfd.readouterr().out
    assert train.main([*look[:-2], "--model", str(bare), "--out", str(tmp_path / "out")]) == 2
    assert f"{bare}: no safetensors weights: neither" in capfd.readouterr().err
    for name, words in (("pytorch_model.bin", "only pytorch_model.bin, a pickle"), ("model.safetensors", "model.safe")):
        (bare / name).write_bytes(b"weights")
        assert train.main([*look, str(bare)]) == 2
        assert words in capfd.readouterr().err


def test_model_of_a_revision(server):
    server.repos["models", "org/tiny"] = {"main": MODEL, "v2": {**MODEL, "model.safetensors": b"newer"}}
    assert contents([hub.model_directory("org/tiny@v2") + "/model.safetensors"]) == [b"newer"]
    commit = commit_of("org/tiny", "v2")
    assert contents([hub.model_directory(f"org/tiny@{commit}") + "/model.safetensors"]) == [b"newer"]


def test_local_names_are_taken_as_they_are(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "pairs.jsonl").write_text("{}")
    assert hub.model_directory("org/tiny") == str(tmp_path / "org" / "tiny")
    assert hub.data_files("pairs.jsonl") == [str(tmp_path / "pairs.jsonl")]
    assert server.asked == []


def test_dataset_split_by_file_name(server):
    server.repos["datasets", "org/pairs"] = {"main": SHARDS, "old": {"data/train.jsonl": b"old"}}
    assert contents(hub.data_files("org/pairs")) == [b"t0", b"t1"]
    assert server.fetched() - {".gitattributes"} == {name for name in SHARDS if "train" in name}
    assert contents(hub.data_files("org/pairs:test")) == [b"e0"]
    assert contents(hub.data_files("org/pairs@old:train")) == [b"old"]


def test_dataset_split_by_readme(server):
    files = {
        "README.md": README,
        "data/train_prefs-00000-of-00001.parquet": b"p",
        "data/train_sft-00000-of-00001.parquet": b"s",
        "one.jsonl": b"1",
        "two.jsonl": b"2",
    }
    server.repos["datasets", "org/pairs"] = {"main": files}
    assert contents(hub.data_files("org/pairs:train_prefs")) == [b"p"]
    assert contents(hub.data_files("org/pairs:test_prefs")) == [b"1", b"2"]
    with pytest.raises(BadInput, match="no split 'train'; it has train_prefs, test_prefs"):
        hub.data_files("org/pairs")


@pytest.mark.parametrize(
    "files, split, expected",
    [
        (["pairs.jsonl"], "train", ["pairs.jsonl"]),
        (["pairs.jsonl", "dataset_infos.json"], "train", ["pairs.jsonl"]),
        (["train.json", "train_extra.json"], "train", ["train.json"]),
        (["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["my-train-1.jsonl", "my-test-1.jsonl", "restrained.jsonl"], "train", ["my-train-1.jsonl"]),
        (
            ["train.jsonl", "a/train-0-of-2.parquet", "a/train-1-of-2.parquet"],
            "train",
            ["a/train-0-of-2.parquet", "a/train-1-of-2.parquet"],
        ),
        (["a.jsonl", "b.jsonl"], "train", "no data file of a split 'train'; its data files are: a.jsonl, b"),
        (["pairs.jsonl"], "test", "no data file of a split 'test'"),
        (["train.csv"], "train", "its data files are: none"),
    ],
)
def test_which_files_are_a_split(files, split, expected):
    if isinstance(expected, str):
        with pytest.raises(BadInput, match=expected):
            hub.split_files("org/pairs", files, {}, split)
    else:
        assert hub.split_files("org/pairs", files, {}, split) == expected


def test_names_of_strangers_stay_on_one_line():
    for files, configs in (
        (["a\nb.jsonl", "c.jsonl"], {}),
        ([], {"a\nb": {"train": []}, "c": {"train": []}}),
        ([], {"default": {"a\nb": []}}),
        (["a\nb.csv"], {"default": {"train": ["*"]}}),
    ):
        with pytest.raises(BadInput, match="a b") as caught:
            hub.split_files("org/pairs", files, configs, "train")
        assert "\n" not in str(caught.value)


def configs_of(folder, readme):
    (folder / "README.md").write_text(readme)
    return hub.card_configs("org/pairs", folder / "README.md")


def test_readme_with_several_configurations_is_refused(tmp_path):
    readme = (
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: fr\n  data_files: fr.jsonl\n---\n"
    )
    files = ["en/a.jsonl", "fr.jsonl"]
    with pytest.raises(BadInput, match="several configurations .en, fr."):
        hub.split_files("org/pairs", files, configs_of(tmp_path, readme), "train")
    only = readme.split("- config_name: fr")[0] + "---\n"
    assert hub.split_files("org/pairs", files, configs_of(tmp_path, only), "train") == ["en/a.jsonl"]
    other = configs_of(tmp_path, only.replace("*.jsonl", "**/*.csv"))
    with pytest.raises(BadInput, match="en/a.csv is of a kind that is not read"):
        hub.split_files("org/pairs", ["en/a.csv"], other, "train")


@pytest.mark.parametrize(
    "head, expected",
    [
        ("configs: [{config_name: a, data_files: [x.json, 'y-*.json']}]", {"a": {"train": ["x.json", "y-*.json"]}}),
        (
            "configs:\n  # two\n  - data_files:\n    - {path: [a.json], split: dev}\n    config_name: 2",
            {"2": {"dev": ["a.json"]}},
        ),
        ("configs:\n- config_name: a\n  data_dir: a", {}),
        ("configs: a", {}),
        ("license: mit", {}),
        ("- a", {}),
        ("a: [", {}),
        ("[" * 3000, {}),
        ("a: !!python/object/apply:os.abort []", {}),
    ],
)
def test_readme_is_read_as_yaml(head, expected, tmp_path):
    assert configs_of(tmp_path, f"---\n{head}\n---\n# pairs\n") == expected


def test_readme_without_metadata_or_too_large(tmp_path):
    assert configs_of(tmp_path, "# pairs\n") == {}
    with pytest.raises(BadInput, match="org/pairs: its README.md has more than 1 MiB; download"):
        configs_of(tmp_path, "---\na: 1\n---\n" + "x" * 2**20)


@pytest.mark.parametrize(
    "call, name, message",
    [
        (hub.model_directory, "org/none", "the Hub shows no such model; check the name"),
        (hub.model_directory, "org/tiny@v9", "has no such revision"),
        (hub.model_directory, "org/gated", "is gated; ask for access .* HF_TOKEN"),
        (hub.model_directory, "org/pickled", "has no .safetensors weights"),
        (hub.model_directory, "no/such/path", "there is no such directory, and it is no Hub id"),
        (hub.model_directory, "org/a..b", "no Hub id"),
        (hub.model_directory, __file__, "is a file; give the directory"),
        (hub.data_files, "org/none", "the Hub shows no such dataset"),
        (hub.data_files, "org/gated", "is gated"),
        (hub.data_files, "data/none.jsonl", "there is no such file"),
    ],
)
def test_errors_are_one_line_with_the_mend(server, capfd, call, name, message):
    server.repos["models", "org/tiny"] = {"main": MODEL}
    server.repos["models", "org/pickled"] = {"main": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}
    server.gated.add("org/gated")
    with pytest.raises(BadInput, match=message) as caught:
        call(name)
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # no bars where there is no terminal


@pytest.mark.parametrize(
    "listings, message",
    [
        ([403], r"the Hub refuses access \(403\); log in with `hf auth login` or set a valid HF_TOKEN"),
        ([410], r"the Hub answered 410; try again later, or give its files"),
        pytest.param(
            [200, 403],
            r"the Hub refuses access \(403\)",
            marks=pytest.mark.skipif(huggingface_hub.__version__[0] < "2", reason="asks for one listing only"),
        ),
    ],
)
def test_a_hub_that_refuses_or_fails(server, listings, message):
    server.repos["datasets", "org/pairs"] = {"main": SHARDS}
    server.listings = listings
    with pytest.raises(BadInput, match=message):
        hub.data_files("org/pairs")


@pytest.mark.linux("/proc, where no directory can be made")
def test_a_cache_that_cannot_be_written(server, monkeypatch):
    server.repos["models", "org/tiny"] = {"main": MODEL}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/none")
    with pytest.raises(BadInput, match="be kept in the Hub cache: No such file or directory: /proc/none"):
        hub.model_directory("org/tiny")


def test_without_network_the_cache_serves(server, monkeypatch):
    server.repos["models", "org/tiny"] = {"main": MODEL}
    server.repos["datasets", "org/pairs"] = {"main": SHARDS}
    server.repos["models", "org/look"] = server.repos["models", "org/tiny"]
    model, data, look = (
        hub.model_directory("org/tiny"),
        hub.data_files("org/pairs"),
        hub.model_directory("org/look", weights=False),
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_session()
    assert hub.model_directory("org/tiny") == model
    assert hub.data_files("org/pairs") == data
    assert hub.model_directory("org/look", weights=False) == look
    for call, name in ((hub.model_directory, "org/other"), (hub.data_files, "org/other")):
        with pytest.raises(BadInput, match="the Hub cannot be reached .* HF_HUB_OFFLINE, or give"):
            call(name)


def test_endpoint_from_the_environment(server, tmp_path):
    server.repos["datasets", "org/pairs"] = {"main": {"train.jsonl": b"row"}}
    done = subprocess.run(
        [sys.executable, "-c", "from files import hub; print(open(*hub.data_files('org/pairs')).read())"],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert (done.stdout.strip(), done.returncode) == ("row", 0), done.stderr
