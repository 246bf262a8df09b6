"""The options table: flags, TOML, checks, help and the saved config come from it and agree."""

import builtins
import dataclasses
import errno
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from torch.distributed.run import get_args_parser

from files.errors import BadInput
from runtime import options
from runtime.losses import LOSSES
from runtime.options import resolve

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_recipe(monkeypatch, tmp_path):
    """The bundled model's own recipe changes with the example; the tests that need one write it."""
    monkeypatch.setattr(options, "TINY", tmp_path / "tiny")
    (tmp_path / "tiny").mkdir()


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def test_defaults_are_the_papers():
    got = resolve([])
    assert (got.loss, got.beta, got.alpha, got.guide_beta, got.gamma) == ("tgdpo", 0.1, 0.5, 0.1, None)
    assert (got.lr, got.epochs, got.batch_size) == (7e-7, 1, 128)
    assert (got.warmup_ratio, got.schedule) == (0.1, "cosine")
    assert (got.weight_decay, got.max_grad_norm, got.max_length, got.max_prompt_length) == (0, 1, 2048, 1800)
    assert (got.seed, got.eval_fraction, got.name, got.out, got.guide) == (0, 0, "tgdpo", None, None)
    assert got.model == str(options.TINY / "model") and got.data == (str(options.TINY / "train.jsonl"),)
    assert got.eval_data == (str(options.TINY / "held_out.jsonl"),)


def test_values_that_follow_from_others():
    simpo = resolve(["--loss", "simpo"])
    assert (simpo.beta, simpo.gamma, simpo.name) == (2.5, 1.375, "simpo")
    assert (simpo.alpha, simpo.guide_beta) == (None, None)
    assert resolve(["--loss", "dpo"]).beta == 0.1
    assert resolve(["--beta", "0.3"]).guide_beta == 0.3
    assert resolve(["--beta", "0.3", "--guide-beta", "0.2"]).guide_beta == 0.2
    assert resolve(["--data", "a/b"]).eval_data == () and resolve(["--eval-fraction", "0.1"]).eval_data == ()
    assert resolve(["--eval-data", "a/b"]).data == (str(options.TINY / "train.jsonl"),)
    assert resolve(["--max-length", "512"]).max_prompt_length == 450
    assert resolve(["--max-length", "4096"]).max_prompt_length == 1800


def test_flags_win_over_config_over_recipe_over_defaults(config):
    (options.TINY / "recipe.toml").write_text("lr = 1e-3\nepochs = 3\nbatch_size = 16\n")
    given = config("epochs = 4\nbatch-size = 32\n")
    assert resolve([]).epochs == 3
    got = resolve(given + ["--batch-size", "64"])
    assert (got.lr, got.epochs, got.batch_size, got.seed) == (1e-3, 4, 64, 0)
    # The recipe is the bundled model's: with another model it has no say.
    assert resolve(["--model", "org/other"]).lr == 7e-7
    assert resolve(config("model = 'org/other'")).lr == 7e-7


def test_the_recipes_and_configs_loss_settings_stay_with_their_loss(config):
    (options.TINY / "recipe.toml").write_text("alpha = 2.0\nbeta = 0.2\nlr = 1e-3\n")
    assert resolve([]).alpha == 2.0
    got = resolve(["--loss", "simpo"])
    assert (got.beta, got.alpha, got.lr) == (2.5, None, 1e-3)
    assert resolve(["--loss", "dpo"]).beta == 0.2
    given = config("beta = 0.4\nalpha = 1\nguide = 'org/guide'\n")
    got = resolve(given + ["--loss", "dpo"])
    assert (got.beta, got.alpha, got.guide) == (0.4, None, None)
    with pytest.raises(BadInput, match="my.toml: alpha = 1.0: loss dpo has no use for it"):
        resolve(config("loss = 'dpo'\nalpha = 1\n"))


def test_lists(config):
    assert resolve(["--data", "a/b", "c/d", "--data", "e/f"]).data == ("a/b", "c/d", "e/f")
    assert resolve(config("data = 'a/b'")).data == ("a/b",)
    assert resolve(config("data = ['a/b', 'c/d:test']")).data == ("a/b", "c/d:test")
    assert resolve(config("data = ['a/b']") + ["--data", "c/d"]).data == ("c/d",)


def test_switches(config):
    assert (resolve([]).compile, resolve(["--compile"]).compile, resolve(["--no-compile"]).compile) == (
        None,
        True,
        False,
    )
    given = config("skip_bad_rows = true")
    assert resolve(given).skip_bad_rows and not resolve(given + ["--no-skip-bad-rows"]).skip_bad_rows


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--beta 0", "--beta 0: must be greater than 0"),
        ("--beta -1", "--beta -1: must be greater than 0"),
        ("--beta nan", "--beta nan: must be a finite number"),
        ("--beta inf", "--beta inf: must be a finite number"),
        ("--beta=-inf", "--beta -inf: must be a finite number"),
        ("--beta high", "--beta high: must be a number"),
        ("--beta", "--beta: expected one argument"),
        ("--alpha -0.1", "--alpha -0.1: must be at least 0"),
        ("--lr 0", "--lr 0: must be greater than 0"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--epochs 1.5", "--epochs 1.5: must be a whole number"),
        ("--batch-size 99999999999", "--batch-size 99999999999: must be at most 2147483647"),
        ("--eval-fraction 1", "--eval-fraction 1: must be less than 1"),
        ("--warmup-ratio 1.1", "--warmup-ratio 1.1: must be at most 1"),
        ("--timeout-minutes 0", "--timeout-minutes 0: must be greater than 0"),
        ("--loss tdpo", "--loss tdpo: must be one of tgdpo, dpo, simpo; the nearest is tgdpo"),
        ("--schedule cosin", "--schedule cosin: must be one of cosine, linear, constant; the nearest is cosine"),
        ("--guid-beta 1", "unknown option --guid-beta; the nearest is --guide-beta"),
        ("--max_length 9", "unknown option --max_length; the nearest is --max-length"),
        ("--batch 9", "unknown option --batch; the nearest is --batch-size"),
        ("pairs.jsonl", "pairs.jsonl belongs to no option"),
        ("--model=", '--model "": must not be empty'),
        ("--name ../up", "--name ../up: must be a plain name"),
        ("--max-length 100 --max-prompt-length 100", "--max-prompt-length 100: must be less than --max-length"),
        ("--max-prompt-length 2048", "--max-prompt-length 2048: must be less than --max-length, which is 2048"),
        ("--loss dpo --guide org/guide", "--guide org/guide: --loss dpo has no use for it"),
        ("--loss simpo --guide-beta 1", "--guide-beta 1.0: --loss simpo has no use for it"),
        ("--gamma 1", "--gamma 1.0: --loss tgdpo has no use for it"),
        ("--resume --overwrite", "--resume and --overwrite: .* give one"),
        ("--eval-data a/b --eval-fraction 0.1", "--eval-data and --eval-fraction: .* give one"),
        ("--loss dpo --centre-guidance", "--centre-guidance: --loss dpo has no use for it"),
        ("--log-to wandb wandb", "--log-to wandb wandb: gives wandb twice; keep one"),
        ("--lora-alpha 8", "--lora-alpha 8.0: has no effect without --lora-rank"),
        ("--config nowhere.toml", "--config nowhere.toml: there is no such file"),
        ("--config /", "--config /: is no file"),
        ("--config /dev/zero", "--config /dev/zero: is no file"),
    ],
)
def test_bad_flags_get_one_line(flags, message):
    with pytest.raises(BadInput, match=message) as caught:
        resolve(flags.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("bta = 1", "my.toml: unknown key bta; the nearest is beta"),
        ("[train]\nbeta = 1", "unknown key train"),
        ("wth = 'ld'", "unknown key wth; the nearest is with$"),
        ("with = 'dlp'", "my.toml: with = dlp: there is no part 'dlp'"),
        ("beta = 'high'", "my.toml: beta = high: must be a number"),
        ("beta = true", "beta = true: must be a number"),
        ("beta = nan", "beta = nan: must be a finite number"),
        ("beta = 0", "beta = 0: must be greater than 0"),
        ("epochs = 1.0", "epochs = 1.0: must be a whole number"),
        ("epochs = true", "epochs = true: must be a whole number"),
        ("resume = 'yes'", "resume = yes: must be true or false"),
        ("model = 3", "model = 3: must be a string"),
        ("data = [1]", "data = .1.: must be a string or a list of strings"),
        ("data = []", "data = ..: must be a string or a list of strings"),
        ('model = "a\\u0000b"', r'model = "a\\u0000b": must not hold a NUL character'),
        ("max-length = 9\nmax_length = 9", "max_length is given twice"),
        ("seed = 1\nbeta = ?", "is not TOML: .*line 2"),
        ("beta = 1" + "0" * 5000, "is not TOML|must be a finite number"),
        ("beta = " + "[" * 100_000, "nested too deep|not TOML"),
        ("#" * 2**20 + "##", "is larger than 1 MB"),
    ],
)
def test_bad_config_gets_one_line(config, text, message):
    with pytest.raises(BadInput, match=message) as caught:
        resolve(config(text))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_bad_config_bytes(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"model = '\xff'")
    with pytest.raises(BadInput, match="is not UTF-8"):
        resolve(["--config", str(tmp_path / "a.toml")])
    (tmp_path / "b.toml").write_bytes(b"\xef\xbb\xbfseed = 5\r\n")
    assert resolve(["--config", str(tmp_path / "b.toml")]).seed == 5


@pytest.mark.parametrize("barred", ["recipe.toml", "examples"])
def test_files_of_the_checkout_that_cannot_be_read_get_one_line(tmp_path, monkeypatch, barred):
    """The bundled recipe has mode 000, or stands where another user may not look. Root may: hence pretended."""
    recipe = options.TINY / "recipe.toml"
    recipe.write_text("seed = 3")
    real = {"open": builtins.open, "stat": os.stat}

    def refuse(name):
        def call(path, *more, **options_of_it):
            if isinstance(path, (str, os.PathLike)) and os.fspath(path) == str(recipe):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real[name](path, *more, **options_of_it)

        return call

    assert resolve([]).seed == 3
    monkeypatch.setattr(builtins, "open", refuse("open"))
    if barred == "examples":
        monkeypatch.setattr(os, "stat", refuse("stat"))
    with pytest.raises(BadInput) as caught:
        resolve([])
    assert str(caught.value) == f"{recipe}: cannot be read: Permission denied"
    assert resolve(["--model", "org/other"]).seed == 0  # which needs no recipe


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(1, 0x100))),
        "\u2028\u2029\u200b\ufeff\u202e\ufffe\ud7ff\ue000",  # separators, invisible, bidi, the edges of surrogates
        "\U0001f600 \U000e0001 \U0010ffff",  # beyond 16 bits
        "\\ \\u0041 \"quoted\" 'single' /",
    ],
)
def test_strings_in_toml(config, text):
    """TOML's basic strings are not JSON's: no raw DEL, and no pairs of surrogates."""
    written = options._toml_value(text)
    assert written.isprintable() and tomllib.loads(f"a = {written}") == {"a": text}
    saved = options.to_toml(dataclasses.replace(resolve([]), chat_template=text, data=(text, "b")))
    read = options.read_toml(config(saved)[1])
    assert (read["chat_template"], read["data"]) == (text, (text, "b"))


@pytest.mark.parametrize(
    "argv",
    [
        ["--loss", "a\nb"],
        ["--lo\nss", "x"],
        ["a\x1b[31mb"],
        ["--config", "a\nb"],
        ["--out", "a\udcff"],
        ["--beta", "9" * 1000 + "x"],
    ],
)
def test_what_strangers_type_is_shown_not_sent(argv):
    with pytest.raises(BadInput) as caught:
        resolve(argv)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 250


def test_saved_config_gives_the_same_options_from_another_directory(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('päirs "x".jsonl', "tab\t\u202e\x7f\\.jsonl", "template", "model"):
        (tmp_path / name).touch()
    got = resolve(
        [
            "--data",
            'päirs "x".jsonl',
            "tab\t\u202e\x7f\\.jsonl",
            "org/name:test",
            "--model",
            "model",
            "--lr",
            "1.25e-05",
            "--no-compile",
            "--chat-template",
            "template",
            "--guide",
            "org/guide",
        ]
    )
    assert got.data == (str(tmp_path / 'päirs "x".jsonl'), str(tmp_path / "tab\t\u202e\x7f\\.jsonl"), "org/name:test")
    assert (got.model, got.guide, got.chat_template) == (
        str(tmp_path / "model"),
        "org/guide",
        str(tmp_path / "template"),
    )
    text = options.to_toml(got)
    assert "\u202e" not in text and "\x7f" not in text
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert resolve(config(text)) == got


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--loss", "dpo"],
        ["--loss", "simpo"],
        ["--eval-fraction", "0.1"],
        ["--data", "a/b"],
        ["--compile", "--hsdp", "4", "--skip-bad-rows"],
    ],
)
def test_saved_config_gives_the_same_options(config, flags):
    assert resolve(config(options.to_toml(resolve(flags)))) == resolve(flags)


def test_what_follows_another_option_still_does_when_a_flag_overrides_it(config):
    saved = config(options.to_toml(resolve(["--beta", "0.2"])))
    assert resolve(saved).guide_beta == 0.2 and resolve(saved).name == "tgdpo"
    assert resolve(saved + ["--beta", "0.3"]).guide_beta == 0.3
    assert resolve(saved + ["--loss", "dpo"]).name == "dpo"
    assert resolve(saved + ["--max-length", "128"]).max_prompt_length == 112
    own = config(options.to_toml(resolve(["--beta", "0.2", "--guide-beta", "0.1", "--name", "mine"])))
    assert resolve(own + ["--beta", "0.3"]).guide_beta == 0.1 and resolve(own + ["--loss", "dpo"]).name == "mine"


def test_saved_config_leaves_out_what_belongs_to_one_start(config, tmp_path):
    got = resolve(["--out", "x", "--overwrite", "--dry-run"])
    again = resolve(config(options.to_toml(got)))
    assert (again.out, again.resume, again.overwrite, again.dry_run) == (None, False, False, False)
    # A run is resumed where its saved config lies; a config that somebody wrote says nothing of where.
    assert resolve(config(options.to_toml(got)) + ["--resume"]).out == str(tmp_path)
    assert resolve(config("seed = 1") + ["--resume"]).out is None


def test_every_option_has_flag_help_and_group():
    assert {field.metadata["group"] for field in options.FIELDS.values()} == set(options.GROUPS)
    help_text = " ".join(options.parser().format_help().split())
    for name, field in options.FIELDS.items():
        assert f"{options.flag_of(name)} " in help_text.replace(",", " ")
        assert " ".join(field.metadata["help"].split()) in help_text
    assert "[7e-07]" in help_text and "[0]" in help_text and "[no]" in help_text
    for entry in LOSSES.values():
        assert set(entry.options) <= set(options.FIELDS)


def test_every_option_is_read():
    files = [ROOT / "train.py", *(ROOT / "ends").glob("*.py"), *(ROOT / "runtime").glob("*.py")]
    read = "".join(path.read_text() for path in files if path.name != "options.py")
    handed_over = {name for entry in LOSSES.values() for name in entry.options}  # to the loss, by train.loss_of
    assert [name for name in options.FIELDS.keys() - handed_over if not re.search(rf"options\.{name}\b", read)] == []


def test_no_option_is_a_strict_prefix_of_one_of_torchruns():
    torchruns = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    assert "--nproc-per-node" in torchruns
    ours = [flag for action in options.parser()._actions for flag in action.option_strings]
    ours = [flag for flag in ours if flag.startswith("--") and flag != "--help"]
    assert len(ours) > 30
    assert [(flag, other) for flag in ours for other in torchruns if other.startswith(flag)] == []


def test_a_flags_loss_leaves_out_a_files_parts_that_need_a_guide(tmp_path):
    (tmp_path / "a.toml").write_text('with = ["clip=2", "ld"]\n')
    for loss, kept in (("tgdpo", ("clip=2", "ld")), ("dpo", ("ld",)), ("simpo", None)):
        assert options.resolve(["--config", str(tmp_path / "a.toml"), "--loss", loss]).with_ == kept


def test_a_contradiction_of_a_file_is_told_by_its_key(tmp_path):
    file = tmp_path / "a.toml"
    for text, flags, words in (
        ('loss = "dpo"\nalpha = 1', "", f"{file}: alpha = 1.0: loss dpo has no use for it"),
        ("alpha = 1\nbeta = 1", "--loss dpo --alpha 2", "--alpha 2.0: --loss dpo has no use for it"),
        (
            "max_length = 9\nmax_prompt_length = 9",
            "",
            f"{file}: max_prompt_length = 9: must be less than {file}: max_le",
        ),
        ('eval_data = "x"\neval_fraction = 0.2', "", f"{file}: eval_data and {file}: eval_fraction: the fraction is"),
        ("max_length = 9", "--max-prompt-length 9", f"--max-prompt-length 9: must be less than {file}: max_length"),
        ('loss = "dpo"\nwith = "clip"', "", f"{file}: with: clip: --loss dpo has no guide for it"),
    ):
        file.write_text(text)
        with pytest.raises(BadInput) as caught:
            options.resolve(["--config", str(file), *flags.split()])
        assert str(caught.value).startswith(words)
    with pytest.raises(BadInput, match="--config is given 2 times; give one file, and flags for what differs"):
        options.resolve(["--config", str(file), "--config", "b.toml"])


def test_a_flag_sets_aside_what_of_a_file_contradicts_it(config):
    (options.TINY / "recipe.toml").write_text("eval_fraction = 0.3\nmax_length = 256\n")
    resolved = lambda text, *flags: resolve([*config(text), *flags])
    got = resolved('eval_data = "a/b"\nmax_prompt_length = 200', "--eval-fraction", "0.2", "--max-length", "64")
    assert (got.eval_data, got.eval_fraction, got.max_prompt_length) == ((), 0.2, 56)
    got = resolved(
        'model = "a/b"\neval_fraction = 0.2\nmax_prompt_length = 50', "--eval-data", "a/b", "--max-length", "64"
    )
    assert (got.eval_data, got.eval_fraction, got.max_prompt_length) == (("a/b",), 0, 50)
    assert resolved('eval_data = "a/b"').eval_fraction == 0 and resolved("seed = 1").eval_fraction == 0.3
    assert resolved('eval_data = "a/b"', "--eval-fraction", "0").eval_data == ("a/b",)
    assert not resolved("overwrite = true", "--resume").overwrite


def test_help_needs_no_torch_and_bad_options_end_early():
    script = (
        "import sys; from runtime import options; options.answer_early(sys.argv[1:]);"
        "print([name for name in ('torch', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )

    def run(*argv):
        return subprocess.run(
            [sys.executable, "-c", script, *argv],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
        )

    assert run("--seed", "1").stdout == "[]\n"
    helped = run("--help")
    assert helped.returncode == 0 and helped.stdout.startswith("usage: python train.py")
    bad = run("--bta", "1")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("train.py: error: unknown option --bta")


EACH = ", which counts the pairs of a step over all ranks"
ELSEWHERE = """learning-rate lr, num-epochs epochs, num-train-epochs epochs, per-device-batch-size batch-size,
per-device-train-batch-size batch-size, output-dir out, model-name-or-path model, dataset-name data,
save-steps save-every, pref-beta beta, cutoff-len max-length, max-samples limit, val-size eval-fraction,
lora-r lora-rank, report-to log-to, lr-scheduler-type schedule"""


@pytest.mark.parametrize("names", ELSEWHERE.replace("\n", " ").split(", "))
def test_the_names_of_others_are_answered_with_ours(names, config):
    """With dashes or underscores, as flags and as TOML keys."""
    theirs, ours = names.split()
    each = EACH if ours == "batch-size" else ""
    for theirs in (theirs, theirs.replace("-", "_")):
        with pytest.raises(BadInput, match=f"unknown option --{theirs}; here it is --{ours}{each} "):
            resolve([f"--{theirs}", "1"])
        with pytest.raises(BadInput, match=f"unknown key {theirs}; here it is {ours.replace('-', '_')}{each}$"):
            resolve(config(f"{theirs} = 1"))


def test_columns_are_names_and_columns(config):
    assert resolve(["--columns", "prompt=q", "chosen=a=b"]).columns == ("prompt=q", "chosen=a=b")
    assert resolve(config('columns = ["weight=w"]')).columns == ("weight=w",)
    for bad, words in (("prompt", "must be NAME=COLUMN"), ("chosn=a", "the nearest is chosen"), ("=a", "NAME=COLUMN")):
        with pytest.raises(BadInput, match=words):
            resolve(["--columns", bad])
    with pytest.raises(BadInput, match="gives prompt twice"):
        resolve(["--columns", "prompt=a", "prompt=b"])
