"""What the README shows is run: its commands, its rows, its links. The two commands at its head are what .ci/run and
whoever clones the project run; here train.py's are started with a small model and small data instead."""

import ast
import importlib
import json
import pathlib
import re
import shlex

import pytest
from tiny_world import make_checkpoint

import train
from files.config import ARCHITECTURES
from runtime import options

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
ROWS = re.search(r"```json\n(.*?)```", README, re.DOTALL).group(1).splitlines()


def commands(text):
    """The arguments of every train.py that the text starts, under torchrun or not."""
    lines = text.replace("\\\n", " ").splitlines()
    starts = re.compile(r"^\s*(?:.*&& )?(?:python|torchrun .*?) ?train\.py(?P<rest>.*)$")
    found = [match.group("rest") for match in map(starts.match, lines) if match]
    return [shlex.split(re.sub(r"  .*|…", "", rest)) for rest in found]


COMMANDS = [arguments for block in BLOCKS for arguments in commands(block)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    make_checkpoint(directory / "model")
    (directory / "pairs.jsonl").write_text("\n".join(ROWS) + "\n")
    return directory


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    """Where the README's commands are given, wherever pytest is."""
    monkeypatch.chdir(ROOT)


def test_there_are_commands_to_run():
    assert [] in COMMANDS and len(COMMANDS) >= 5
    assert len(commands(train.__doc__)) >= 5
    assert "python -m pytest -q tests" in README and (ROOT / ".ci" / "run").exists()


@pytest.mark.parametrize("arguments", COMMANDS + commands(train.__doc__), ids=" ".join)
def test_a_command_of_train_is_understood_and_shows_its_plan(world, tmp_path, arguments, capfd):
    stands_in = {"--model": str(world / "model"), "--data": str(world / "pairs.jsonl")}
    if "--config" in arguments and "recipes" not in " ".join(arguments):  # the config.toml of a run
        arguments = [word for word in arguments if word not in ("--config", "OUT/config.toml", "--resume")]
    options.resolve(arguments)
    arguments = [stands_in.get(before, word) for before, word in zip(["", *arguments], arguments)]
    if "--config" in arguments:  # a recipe's settings, without its eval_data, which lies on the Hub
        recipe = options.read_toml(ROOT / arguments[arguments.index("--config") + 1])
        own = tmp_path / "recipe.toml"
        own.write_text(
            "".join(
                f"{name} = {json.dumps(value)}\n"
                for name, value in recipe.items()
                if name not in ("model", "data", "eval_data")
            )
        )
        arguments[arguments.index("--config") + 1] = str(own)
        arguments += ["--model", stands_in["--model"], "--data", stands_in["--data"]]
    if "--hsdp" in arguments:  # groups of 8 ranks are refused to a lone one
        arguments[arguments.index("--hsdp") + 1] = "1"
    assert train.main([*arguments, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    told = capfd.readouterr().out
    assert "the first pair" in told and "pairs to train on" in told


def test_several_nodes_meet_in_a_c10d_store():
    """torchrun's own default, static, makes each node the first of its own."""
    for text in (README, train.__doc__):
        for line in text.splitlines():
            assert "--rdzv_endpoint" not in line or "--rdzv_backend c10d" in line, line


def test_every_row_of_the_readme_is_a_pair(world, tmp_path, capfd):
    assert len(ROWS) >= 5
    assert train.main(["--model", str(world / "model"), "--data", str(world / "pairs.jsonl"), "--dry-run"]) == 0
    assert f"{len(ROWS)} rows read, {len(ROWS)} pairs kept" in capfd.readouterr().out


def test_links_and_files_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for name in re.findall(r"python (\S+\.py)", README):
        assert (ROOT / name).exists(), name
    for recipe in (ROOT / "recipes").glob("*.toml"):
        assert recipe.relative_to(ROOT).as_posix() in README, recipe


def test_readme_and_help_name_every_architecture(capsys):
    rows = re.findall(r"^\| `(\w+ForCausalLM)` \| (.*) \|$", README, re.MULTILINE)
    assert rows == [(name, known.models) for name, known in ARCHITECTURES.items()]
    with pytest.raises(SystemExit):
        options.resolve(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(known.models in told for known in ARCHITECTURES.values())


def test_every_option_that_the_readme_names_exists():
    known = {options.flag_of(name) for name in options.FIELDS} | {"--help", "--config"}
    of_others = {"--nproc", "--nnodes", "--rdzv", "--shutdown-timeout", "--index-url", "--repo-type", "--local-dir"}
    for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+", README):
        assert name in known or name in of_others, name


MAY_IMPORT = {  # what CONTRIBUTING.md's map says: folder or file -> what of the house it stands on
    "kernels": {"kernels"},
    "files": {"files"},
    "runtime": {"runtime", "files", "kernels"},
    "report": {"report"},
    "tgdpo.py": set(),
    "model.py": {"files", "kernels"},
    "data.py": {"files"},
    "neighbours": {"neighbours", "tgdpo"},
}


def test_no_import_runs_up():
    house = {name.removesuffix(".py") for name in MAY_IMPORT} | {"train", "examples", "benchmarks", "tests"}
    for name, may in MAY_IMPORT.items():
        for path in [ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    modules = [node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                    upward = ({module.partition(".")[0] for module in modules if module} & house) - may
                    assert not upward, f"{path.relative_to(ROOT)}:{node.lineno} imports {', '.join(upward)}"


def test_what_the_map_names_exists():
    """CONTRIBUTING.md: files and folders, and names in modules; tests/README.md: its files."""
    words = re.findall(r"`([\w./]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(words) > 30
    for word in words:
        module, _, name = word.rpartition(".")
        if (ROOT / (module.replace(".", "/") + ".py")).exists() and name != "py":
            assert hasattr(importlib.import_module(module), name), word
        elif "/" in word or name == "py":
            assert (ROOT / word).exists(), word
    for name in re.findall(
        r"(?:tests/)?((?:long/)?\w+\.py)", (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    ):
        assert (ROOT / "tests" / name).exists(), name
