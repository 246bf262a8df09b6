"""The options of train.py: one table from which flags, TOML keys, checks, --help and config.toml are made.

Each field of `Options` is one option. Its flag is the name with dashes (`max_length` is `--max-length`), its
key in a TOML file is the name itself. What is given on the command line wins over the --config file, which
wins over the defaults; where no model is named, the bundled one's own recipe stands between the defaults and
the --config file.

Nothing here needs torch: `python train.py --help` answers at once.
"""

import argparse
import dataclasses
import difflib
import math
import os
import pathlib
import re
import signal
import sys
import textwrap
import tomllib
import types
import typing

from files.errors import BadInput

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny"
SAVED = "# Resolved options of a run, written by train.py. `python train.py --config FILE` repeats the run.\n"
LARGEST = 2**31 - 1
GROUPS = {
    "Model": "Three models share one tokenizer: the reference (--model), the policy that starts as its copy, "
    "and a guide. Each is a Hugging Face directory or a Hub id.",
    "Data": "Preference pairs: a prompt, a chosen and a rejected answer. README.md shows a row of each form.",
    "Loss": "tgdpo weighs each token's reward by what the guide says of it; dpo and simpo are baselines.",
    "Optimiser": "AdamW (0.9, 0.999, 1e-8), linear warm-up, then the schedule.",
    "Output": "What a run leaves, and where.",
    "Checkpoints": "Also written at the end, and on a signal: SIGTERM and SIGINT then end the run, a second "
    "one at once; after SIGUSR1 it goes on.",
    "Machine": "These change speed and memory, not the method. The defaults look at the device.",
}
# What a loss does not read. Given all the same, it is an error: the user expects an effect that never comes.
IGNORED = {
    "tgdpo": ("gamma",),
    "dpo": ("guide", "alpha", "gamma", "guide_beta"),
    "simpo": ("guide", "alpha", "guide_beta"),
}
# These belong to one start of the program, not to the run it repeats: config.toml leaves them out.
NOT_SAVED = ("out", "resume", "overwrite", "dry_run")
FOLLOWS = {"guide_beta": "beta", "name": "loss"}  # the option whose value each takes where it is not given
EXAMPLES = """\
examples:
  python train.py                                   the bundled tiny example, about two minutes on a laptop
  python train.py --data pairs.jsonl --dry-run      look at your pairs and at the plan, train nothing
  python train.py --model meta-llama/Llama-3.2-1B-Instruct --data pairs.jsonl --eval-fraction 0.02
  torchrun --nproc_per_node 8 train.py --config recipes/my.toml --out runs/first
  torchrun --nproc_per_node 8 train.py --config recipes/my.toml --out runs/first --resume
  python train.py --config runs/first/config.toml   the same run again, in a directory of its own

A TOML file holds the same names with underscores: max_length = 1024, data = ["a.jsonl", "b.jsonl"].
"""


def _option(group, metavar, help, default, shown=None, **limits):
    """A field with its place in --help and its limits: above, least, below, most, choices.

    shown: the default in words, where it is decided later; it then stands in --help for the value.
    """
    return dataclasses.field(
        default=default, metadata={"group": group, "metavar": metavar, "help": help, "shown": shown, **limits}
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """Every option of train.py with its type and default. None: not set, or left to the device."""

    model: str | None = _option(
        "Model",
        "DIR|ID",
        "the reference; the policy starts from it. A directory, org/name or org/name@revision",
        None,
        "the bundled tiny model",
    )
    guide: str | None = _option(
        "Model",
        "DIR|ID",
        "a guide that is already trained. Without one, a first stage trains it with DPO and keeps it as OUT/guide",
        None,
        "none",
    )
    chat_template: str | None = _option(
        "Model", "FILE", "a jinja chat template, for tokenizers that have none", None, "the tokenizer's own"
    )

    data: tuple[str, ...] = _option(
        "Data",
        "FILE|ID",
        "pairs to train on: .jsonl, .json, .parquet, or a Hub dataset, org/name or org/name:split",
        (),
        "the bundled pairs",
    )
    eval_data: tuple[str, ...] = _option(
        "Data",
        "FILE|ID",
        "pairs to evaluate on, never trained on",
        (),
        "the bundled held-out pairs with the bundled pairs, else none",
    )
    eval_fraction: float = _option(
        "Data", "X", "without --eval-data, hold this share of the pairs back", 0.0, least=0, below=1
    )
    max_length: int = _option("Data", "N", "longest prompt and answer together, in tokens", 2048, least=2)
    max_prompt_length: int | None = _option(
        "Data",
        "N",
        "longest prompt, in tokens; a pair with a longer one is dropped",
        None,
        "1800, or in proportion where --max-length is below 2048",
        least=1,
    )
    skip_bad_rows: bool = _option("Data", None, "drop and count rows that cannot be read, instead of stopping", False)

    loss: str = _option("Loss", None, "what is minimised", "tgdpo", choices=("tgdpo", "dpo", "simpo"))
    beta: float | None = _option(
        "Loss", "X", "strength of the pull to the reference; SimPO's scale", None, "0.1, with simpo 2.5", above=0
    )
    alpha: float | None = _option(
        "Loss", "X", "how much the guide shapes the reward of a token; 0 is DPO (tgdpo only)", None, "0.5", least=0
    )
    gamma: float | None = _option(
        "Loss", "X", "SimPO's margin itself, not its ratio to beta (simpo only)", None, "1.375", least=0
    )
    guide_beta: float | None = _option(
        "Loss", "X", "scale of the guide's token reward (tgdpo only)", None, "the value of --beta", above=0
    )

    lr: float = _option("Optimiser", "X", "highest learning rate", 7e-7, above=0)
    epochs: int = _option("Optimiser", "N", "times over the pairs", 1, least=1)
    batch_size: int = _option("Optimiser", "N", "pairs an optimiser step, over all ranks", 128, least=1)
    warmup_ratio: float = _option(
        "Optimiser", "X", "share of the steps in which the learning rate rises", 0.1, least=0, most=1
    )
    schedule: str = _option(
        "Optimiser", None, "the learning rate after the warm-up", "cosine", choices=("cosine", "linear", "constant")
    )
    weight_decay: float = _option("Optimiser", "X", "AdamW's weight decay", 0.0, least=0)
    max_grad_norm: float = _option("Optimiser", "X", "longer gradients are scaled down to this norm", 1.0, above=0)
    seed: int = _option("Optimiser", "N", "orders the pairs; two runs with one seed are the same", 0, least=0)

    out: str | None = _option(
        "Output", "DIR", "everything the run writes", None, "runs/NAME, numbered so that it is new"
    )
    name: str | None = _option("Output", "NAME", "names the run where --out does not", None, "the loss")
    eval_every: int = _option("Output", "N", "steps between evaluations; 0: only at the end of a stage", 0, least=0)
    samples: int = _option("Output", "N", "prompts that the models answer at the end", 3, least=0)
    sample_tokens: int = _option("Output", "N", "longest such answer, in tokens", 64, least=1)
    report_pairs: int = _option("Output", "N", "pairs shown token by token in report.html", 200, least=0)
    dry_run: bool = _option(
        "Output", None, "load, check, show a pair, the steps and the memory plan; train nothing", False
    )

    save_every: int = _option(
        "Checkpoints", "N", "steps between checkpoints; 0: only at the end and on a signal", 100, least=0
    )
    keep: int = _option("Checkpoints", "N", "how many of the newest complete checkpoints stay", 2, least=1)
    resume: bool = _option(
        "Checkpoints", None, "go on from the newest complete checkpoint of --out, or start where there is none", False
    )
    overwrite: bool = _option("Checkpoints", None, "remove what an earlier run left in --out, then start", False)

    dtype: str = _option(
        "Machine",
        None,
        "type the models compute in; weights, log-probs and the loss stay float32. auto: "
        "bfloat16 on CUDA, float32 on CPU",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )
    micro_tokens: int = _option(
        "Machine", "N", "tokens a rank puts through the model at once; 0: as many as memory allows", 0, least=0
    )
    activation_checkpointing: str = _option(
        "Machine",
        None,
        "recompute activations in the backward pass to save memory",
        "auto",
        choices=("auto", "none", "selective", "full"),
    )
    compile: bool | None = _option(
        "Machine", None, "compile the transformer's blocks with torch.compile", None, "where it pays"
    )
    cpu_offload: bool = _option(
        "Machine", None, "keep weights and optimiser in the machine's own memory between uses", False
    )
    hsdp: int = _option(
        "Machine",
        "N",
        "ranks in a shard group, copies of which run side by side; 0: one group of all ranks",
        0,
        least=0,
    )
    timeout_minutes: float = _option(
        "Machine", "X", "how long a rank waits for the others before the run fails", 5.0, above=0, most=1440
    )


FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def _kind(name):
    """The type of an option's value: bool, int, float, str or tuple (of strings)."""
    hint = typing.get_type_hints(Options)[name]
    if isinstance(hint, types.UnionType):
        hint = hint.__args__[0]
    return typing.get_origin(hint) or hint


KINDS = {name: _kind(name) for name in FIELDS}


def resolve(argv):
    """Command-line arguments -> Options with every value that can be known before the device is seen.

    argv: list of strings, without the program's name. `--help` prints and raises SystemExit(0).
    Paths become absolute, so that the saved options work from another directory.
    Raises BadInput: an unknown name, a value out of range, a contradiction, a file that cannot be read.
    """
    given, config = _read_flags(argv)
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise BadInput("the working directory is no longer there; change to another") from None
    settings = read_toml(config) if config else {}
    loss = given.get("loss", settings.get("loss", "tgdpo"))
    chosen = {}
    if "model" not in given and "model" not in settings and (TINY / "recipe.toml").exists():
        chosen |= _carry(read_toml(TINY / "recipe.toml"), loss)
    chosen |= _carry(settings, loss) | given
    _refuse_contradictions(chosen, loss)

    if "eval_data" not in chosen and "data" not in chosen and not chosen.get("eval_fraction"):
        chosen["eval_data"] = (str(TINY / "held_out.jsonl"),)
    chosen.setdefault("data", (str(TINY / "train.jsonl"),))
    chosen.setdefault("model", str(TINY / "model"))
    chosen.setdefault("beta", 2.5 if loss == "simpo" else 0.1)
    if loss == "tgdpo":
        chosen.setdefault("alpha", 0.5)
        chosen.setdefault("guide_beta", chosen["beta"])
    if loss == "simpo":
        chosen.setdefault("gamma", 1.375)
    chosen.setdefault("name", loss)
    max_length = chosen.get("max_length", FIELDS["max_length"].default)
    chosen.setdefault("max_prompt_length", _prompt_length(max_length))
    returns = chosen.get("resume") or chosen.get("overwrite")
    if config and returns and "out" not in chosen and _is_saved(config):
        chosen["out"] = os.path.dirname(os.path.abspath(config))

    for name in ("model", "guide"):
        if chosen.get(name):
            chosen[name] = _absolute_if_there(chosen[name])
    for name in ("data", "eval_data"):
        chosen[name] = tuple(map(_absolute_if_there, chosen.get(name, ())))
    for name in ("chat_template", "out"):
        if chosen.get(name):
            chosen[name] = os.path.abspath(os.path.expanduser(chosen[name]))
    for path in (chosen["model"], *chosen["data"], *chosen["eval_data"], chosen.get("out") or here):
        _check_text(path, _shown(path))  # again, as the working directory is part of it by now
    return Options(**chosen)


def _prompt_length(max_length):
    """The longest prompt where it is not given: 1800 of 2048 tokens."""
    return max(1, min(1800, max_length * 1800 // 2048))


def answer_early(argv):
    """For the first lines of a script, before its slow imports: --help and bad options end it here, and Ctrl-C ends it
    without a traceback until the run has its own way with signals."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        resolve(argv)
    except BadInput as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one of each machine, as their files may differ
            print(f"train.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def to_toml(options):
    """Options -> the text of config.toml, which read_toml takes back. What is not set is left out."""
    lines, group = [SAVED], None
    for name, field in FIELDS.items():
        value = getattr(options, name)
        if value is None or value == () or name in NOT_SAVED:
            continue
        if name in FOLLOWS and value == getattr(options, FOLLOWS[name]):
            continue  # so that it still follows where a flag overrides the other
        if name == "max_prompt_length" and value == _prompt_length(options.max_length):
            continue
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines.append(f"\n# {group}\n")
        lines.append(f"{name} = {_toml_value(value)}\n")
    return "".join(lines)


def read_toml(path):
    """A TOML file -> {option: value}, checked. Keys may be written with dashes as well. Raises BadInput."""
    settings = {}
    for key, value in _load_toml(path).items():
        name = key.replace("-", "_")
        file = _shown(path)
        if name not in FIELDS:
            raise BadInput(f"{file}: unknown key {_shown(key)}; the nearest is {_nearest(name, FIELDS)}")
        if name in settings:
            raise BadInput(f"{file}: {name} is given twice, with dashes and with underscores; keep one")
        where = f"{file}: {name} = {_shown(value)}"
        settings[name] = _check(name, _from_toml(name, value, where), where)
    return settings


def _load_toml(path):
    where = f"--config {_shown(path)}"
    if not os.path.exists(path):
        raise BadInput(f"{where}: there is no such file")
    if not os.path.isfile(path):
        raise BadInput(f"{where}: is no file; give a .toml file")
    if os.path.getsize(path) > 2**20:
        raise BadInput(f"{where}: is larger than 1 MB; give a .toml file with options")
    try:
        with open(path, "rb") as file:
            return tomllib.loads(file.read().decode("utf-8-sig").replace("\r\n", "\n"))
    except OSError as error:
        raise BadInput(f"{where}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{where}: is not UTF-8 text; save it as UTF-8") from None
    except RecursionError:
        raise BadInput(f"{where}: is nested too deep; options are plain `name = value` lines") from None
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise BadInput(f"{where}: is not TOML: {_shown(str(error))}") from None


def _from_toml(name, value, where):
    """The value, if of the option's type; a whole number serves as a float, a string as a list."""
    kind = KINDS[name]
    if kind is tuple:
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(one, str) for one in values):
            raise BadInput(f"{where}: must be a string or a list of strings")
        return tuple(values)
    if kind is float and type(value) is int:
        return _number(float, str(value), where)
    if type(value) is not kind:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        raise BadInput(f"{where}: must be {words[kind]}")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message.removeprefix("argument "))


def parser():
    """The argparse parser made from the table. It converts nothing: `resolve` checks flags and TOML alike."""
    made = _Parser(
        prog="train.py",
        usage="python train.py [options]",
        allow_abbrev=False,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        description="Trains a language model on preference pairs with TGDPO: Direct Preference Optimization\n"
        "whose token-level reward is guided by a second model. With no options it runs the\n"
        "bundled example.",
    )
    made.add_argument("--config", metavar="FILE.toml", help="read options from this file; flags override it")
    groups = {title: made.add_argument_group(title, textwrap.fill(text, 76)) for title, text in GROUPS.items()}
    for name, field in FIELDS.items():
        default = field.metadata["shown"] or ("no" if field.default is False else field.default)
        details = {"help": f"{field.metadata['help']} [{default}]"}
        if KINDS[name] is bool:
            details["action"] = argparse.BooleanOptionalAction
        else:
            # Choices are shown, not enforced, by argparse: `_check` words the error for flags and TOML alike.
            details["metavar"] = field.metadata["metavar"] or "|".join(field.metadata["choices"])
        if KINDS[name] is tuple:
            details |= {"nargs": "+", "action": "extend"}
        groups[field.metadata["group"]].add_argument("--" + name.replace("_", "-"), dest=name, **details)
    return made


def _read_flags(argv):
    """-> ({option: checked value} of the flags given, path of --config or None)"""
    made = parser()
    known, unknown = made.parse_known_args(argv)
    for word in unknown:
        if word.startswith("-"):
            flags = [flag for action in made._actions for flag in action.option_strings]
            flag = word.split("=")[0]
            near = _nearest(flag, flags)
            raise BadInput(f"unknown option {_shown(flag)}; the nearest is {near} (--help lists all)")
    if unknown:
        raise BadInput(f"{_shown(unknown[0])} belongs to no option; options begin with -- (--help lists all)")
    given = {}
    for name, value in vars(known).items():
        if name == "config":
            continue
        where = "--" + name.replace("_", "-")
        if KINDS[name] is not bool:
            where += " " + _shown(" ".join(value) if KINDS[name] is tuple else value)
        if KINDS[name] in (int, float):
            value = _number(KINDS[name], value, where)
        given[name] = _check(name, tuple(value) if KINDS[name] is tuple else value, where)
    config = getattr(known, "config", None)
    if config is not None:
        config = os.path.expanduser(_check_text(config, f"--config {_shown(config)}"))
    return given, config


def _number(kind, text, where):
    try:
        value = kind(text)
    except (ValueError, OverflowError):
        raise BadInput(f"{where}: must be {'a whole number' if kind is int else 'a number'}") from None
    return value


def _check(name, value, where):
    """The value, if it is within its option's limits."""
    limits, kind = FIELDS[name].metadata, KINDS[name]
    if kind is float and not math.isfinite(value):
        raise BadInput(f"{where}: must be a finite number")
    if kind in (int, float):
        most = limits.get("most", LARGEST if kind is int else math.inf)
        for broken, words in (
            ("above" in limits and value <= limits["above"], f"greater than {limits.get('above')}"),
            ("least" in limits and value < limits["least"], f"at least {limits.get('least')}"),
            ("below" in limits and value >= limits["below"], f"less than {limits.get('below')}"),
            (value > most, f"at most {most}"),
        ):
            if broken:
                raise BadInput(f"{where}: must be {words}")
    if kind is str:
        _check_text(value, where)
    if kind is tuple:
        for one in value:
            _check_text(one, where)
    if "choices" in limits and value not in limits["choices"]:
        near = _nearest(value, limits["choices"])
        raise BadInput(f"{where}: must be one of {', '.join(limits['choices'])}; the nearest is {near}")
    if name == "name" and not re.fullmatch(r"[\w+-][\w.+-]*", value):
        raise BadInput(f"{where}: must be a plain name of letters, digits, '-', '_', '+' and '.'")
    return value


def _check_text(text, where):
    if not text.strip():
        raise BadInput(f"{where}: must not be empty")
    if "\0" in text:
        raise BadInput(f"{where}: must not hold a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        mend = "rename the file" if encoding == "utf-8" else f"this Python reads {encoding}: set PYTHONUTF8=1"
        raise BadInput(f"{where}: must be UTF-8 text; {mend}") from None
    return text


def _refuse_contradictions(chosen, loss):
    for name in IGNORED[loss]:
        if name in chosen:
            flag = "--" + name.replace("_", "-")
            raise BadInput(f"{flag} {chosen[name]}: --loss {loss} has no use for it; leave it out")
    longest = chosen.get("max_length", FIELDS["max_length"].default)
    prompt = chosen.get("max_prompt_length", 0)
    if prompt >= longest:
        raise BadInput(f"--max-prompt-length {prompt}: must be less than --max-length, which is {longest}")
    if chosen.get("resume") and chosen.get("overwrite"):
        raise BadInput("--resume and --overwrite: one goes on with a run, the other removes it; give one")
    if chosen.get("eval_data") and chosen.get("eval_fraction"):
        raise BadInput("--eval-data and --eval-fraction: the fraction is for runs without it; give one")


def _carry(settings, loss):
    """What of a file's settings still means the same where a flag or another file sets another loss."""
    own = settings.get("loss", "tgdpo")
    if own == loss:
        return settings
    # SimPO's beta is on another scale.
    dropped = IGNORED[loss] + (("beta",) if "simpo" in (own, loss) else ())
    return {name: value for name, value in settings.items() if name not in dropped}


def _is_saved(config):
    with open(config, encoding="utf-8") as file:
        return file.readline() == SAVED


def _absolute_if_there(name):
    """A path where there is one; else the name as it is, which may be a Hub id."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def _nearest(word, known):
    return difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.0)[0]


def _shown(value):
    """A value as an error line shows it: short, and with control characters written out."""
    text = value if isinstance(value, str) else repr(value)
    text = text.lower() if isinstance(value, bool) else text
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if text.strip() and text.isprintable() else _toml_value(text)


def _toml_value(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    quoted = []
    for char in value:
        if char in '"\\':
            quoted.append("\\" + char)
        elif char.isprintable():
            quoted.append(char)
        else:  # control, bidi and invisible characters are written out, so that a terminal shows them
            quoted.append(f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}")
    return '"' + "".join(quoted) + '"'
