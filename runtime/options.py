"""The options of train.py: one table from which flags, TOML keys, checks, --help and config.toml are made.

Each field of `Options` is one option. Its flag is the name with dashes (`max_length` is `--max-length`), its
key in a TOML file is the name itself. What is given on the command line wins over the --config file, which
wins over the defaults; where no model is named, the bundled one's own recipe stands between the defaults and
the --config file.

Nothing here needs torch: `python train.py --help` answers at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import glob
import hashlib
import json
import math
import operator
import os
import pathlib
import re
import sys
import textwrap
import tomllib
import typing

from files.config import ARCHITECTURES
from files.errors import BadInput, brief
from runtime import parts
from runtime.losses import LOSSES

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny"
SAVED = "# Resolved options of a run, written by train.py. `python train.py --config FILE` repeats the run.\n"
LARGEST = 2**31 - 1
GROUPS = {
    "Model": "Three models share one tokenizer: the reference (--model), the policy that starts as its copy, "
    "and a guide. Each is a Hugging Face directory or a Hub id, of "
    + "; ".join(known.models for known in ARCHITECTURES.values()),
    "Data": "Preference pairs: a prompt, a chosen and a rejected answer. README.md shows a row of each form.",
    "Loss": "tgdpo weighs each token's reward by what the guide says of it; dpo and simpo are baselines.",
    "Optimiser": "AdamW (0.9, 0.999, 1e-8), linear warm-up, then the schedule.",
    "Output": "What a run leaves, and where.",
    "Checkpoints": "Also written at the end, and on a signal: SIGTERM, SIGINT and SIGHUP then end the run, "
    "a second one at once; after SIGUSR1 it goes on.",
    "Machine": "These change speed and memory, not the method. The defaults look at the device.",
}
# These belong to one start of the program, not to the run it repeats: config.toml leaves them out.
NOT_SAVED = ("out", "resume", "overwrite", "dry_run")
# Of each pair one may be given; a flag's wins over a file's.
RIVALS = {"eval_data": "eval_fraction", "eval_fraction": "eval_data", "resume": "overwrite", "overwrite": "resume"}
# What each takes from the other options where it is not given. config.toml leaves it out then, so that it still does.
FOLLOWS = {
    "guide_beta": lambda chosen: chosen["beta"],
    "name": lambda chosen: chosen["loss"],
    "max_prompt_length": lambda chosen: max(1, min(1800, chosen["max_length"] * 1800 // 2048)),
}
EXAMPLES = """\
examples:
  python train.py                                   the bundled tiny example, under a minute on two cores
  python train.py --data pairs.jsonl --dry-run      look at your pairs and at the plan, train nothing
  python train.py --model meta-llama/Llama-3.2-1B-Instruct --data pairs.jsonl --eval-fraction 0.02
  torchrun --nproc_per_node 8 train.py --config recipes/my.toml --out runs/first
  torchrun --nproc_per_node 8 train.py --config recipes/my.toml --out runs/first --resume
  python train.py --config runs/first/config.toml   the same run again, in a directory of its own

A TOML file holds the same names with underscores: max_length = 1024, data = ["a.jsonl", "b.jsonl"].
"""
BETAS = ", ".join(f"{entry.beta:g} with {name}" for name, entry in LOSSES.items())
COLUMNS = ("prompt", "chosen", "rejected", "system", "history", "weight")
# What TRL and LLaMA-Factory call them.
ELSEWHERE = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "output_dir": "out",
    "model_name_or_path": "model",
    "dataset_name": "data",
    "save_steps": "save_every",
    "pref_beta": "beta",
    "cutoff_len": "max_length",
    "max_samples": "limit",
    "val_size": "eval_fraction",
    "lora_r": "lora_rank",
    "report_to": "log_to",
    "lr_scheduler_type": "schedule",
}
# What --help shows for a value; words for a value of the wrong type; the limits, and when a value is within.
METAVARS = {int: "N", float: "X", bool: None}
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
TYPES |= {tuple: "a string or a list of strings"}
LIMITS = {"above": ("greater than", operator.gt), "least": ("at least", operator.ge)}
LIMITS |= {"below": ("less than", operator.lt), "most": ("at most", operator.le)}


def _option(group, default, help, metavar=None, **limits):
    """A field with its place in --help and its limits: above, least, below, most, choices.

    help: ends in [the default in words] where it is decided later, else --help shows the value.
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "metavar": metavar} | limits)


@dataclasses.dataclass(frozen=True)
class Options:
    """Every option of train.py, its type and default. None: not set, left to the device, or not read by the loss."""

    model: str | None = _option(
        "Model",
        None,
        "the reference; the policy starts from it. A directory, org/name or org/name@revision [the bundled tiny model]",
        "DIR|ID",
    )
    guide: str | None = _option(
        "Model",
        None,
        "a guide that is already trained. Without one, a first stage trains it with DPO and keeps it "
        "as OUT/guide [none]",
        "DIR|ID",
    )
    chat_template: str | None = _option(
        "Model", None, "a jinja chat template, for tokenizers that have none [the tokenizer's own]", "FILE"
    )

    data: tuple[str, ...] = _option(
        "Data",
        (),
        "pairs to train on: .jsonl, .json, .parquet, or a Hub dataset, org/name or org/name:split; .gz of the first "
        "two, a directory or a quoted glob too [the bundled pairs]",
        "FILE|ID",
    )
    eval_data: tuple[str, ...] = _option(
        "Data",
        (),
        "pairs to evaluate on, never trained on [the bundled held-out pairs with the bundled pairs, else none]",
        "FILE|ID",
    )
    eval_fraction: float = _option(
        "Data", 0.0, "without --eval-data, hold this share of the pairs back", least=0, below=1
    )
    columns: tuple[str, ...] = _option(
        "Data",
        (),
        "which columns hold the parts of a pair; NAME is one of prompt, chosen, rejected, system, history, weight. "
        "The weight, above 0, multiplies a pair's loss in training [the names that README.md shows]",
        "NAME=COLUMN",
    )
    limit: int = _option("Data", 0, "use the first N pairs kept of --data; 0: all", least=0)
    max_length: int = _option("Data", 2048, "longest prompt and answer together, in tokens", least=2)
    max_prompt_length: int | None = _option(
        "Data",
        None,
        "longest prompt, in tokens; a pair with a longer one is dropped "
        "[1800, or in proportion where --max-length is below 2048]",
        least=1,
    )
    skip_bad_rows: bool = _option("Data", False, "drop and count rows that cannot be read, instead of stopping")

    loss: str = _option("Loss", "tgdpo", "what is minimised", choices=LOSSES)
    with_: tuple[str, ...] = _option(
        "Loss",
        (),
        f"parts of neighbouring losses, composed; neighbours/neighbours.md tells each: {', '.join(parts.PARTS)} [none]",
        "PART[=NUMBER]",
    )
    beta: float | None = _option(
        "Loss", None, f"strength of the pull to the reference; SimPO's scale [{BETAS}]", above=0
    )
    alpha: float | None = _option("Loss", 0.5, "how much the guide shapes the reward of a token; 0 is DPO", least=0)
    gamma: float | None = _option("Loss", 1.375, "SimPO's margin itself, not its ratio to beta", least=0)
    guide_beta: float | None = _option("Loss", None, "scale of the guide's token reward [the value of --beta]", above=0)
    centre_guidance: bool | None = _option(
        "Loss", False, "take its mean under the reference at each state from the guide's token reward; one more pass"
    )

    lr: float = _option("Optimiser", 7e-7, "highest learning rate", above=0)
    epochs: int = _option("Optimiser", 1, "times over the pairs", least=1)
    max_steps: int = _option(
        "Optimiser", 0, "end each stage after so many steps at most; the schedule counts with it; 0: no end", least=0
    )
    lora_rank: int = _option(
        "Optimiser",
        0,
        "train adapters of this rank on all linear layers of the blocks, the model itself frozen; they want about ten "
        "times the --lr of full training; 0: train all",
        least=0,
    )
    lora_alpha: float = _option("Optimiser", 32.0, "the adapters' scale times --lora-rank", above=0)
    batch_size: int = _option("Optimiser", 128, "pairs an optimiser step, over all ranks", least=1)
    warmup_ratio: float = _option(
        "Optimiser", 0.1, "share of the steps in which the learning rate rises", least=0, most=1
    )
    schedule: str = _option(
        "Optimiser", "cosine", "the learning rate after the warm-up", choices=("cosine", "linear", "constant")
    )
    weight_decay: float = _option("Optimiser", 0.0, "AdamW's weight decay", least=0)
    max_grad_norm: float = _option("Optimiser", 1.0, "longer gradients are scaled down to this norm", above=0)
    seed: int = _option(
        "Optimiser", 0, "orders the pairs, draws the adapters; two runs with one seed are the same", least=0
    )

    out: str | None = _option(
        "Output", None, "everything the run writes [runs/NAME, numbered so that it is new]", "DIR"
    )
    name: str | None = _option("Output", None, "names the run where --out does not [the loss]", "NAME")
    eval_every: int = _option("Output", 0, "steps between evaluations; 0: only at the end of a stage", least=0)
    samples: int = _option("Output", 3, "prompts that the models answer at the end", least=0)
    sample_tokens: int = _option("Output", 64, "longest such answer, in tokens", least=1)
    sample_every: int = _option(
        "Output", 0, "steps between such answers of the model in training, into samples.jsonl; 0: at the end", least=0
    )
    log_to: tuple[str, ...] = _option(
        "Output",
        (),
        "what metrics.jsonl holds, the configuration and the samples go there too; to be installed by you [none]",
        choices=("tensorboard", "wandb"),
    )
    report_pairs: int = _option("Output", 200, "pairs shown token by token in report.html", least=0)
    dry_run: bool = _option("Output", False, "load, check, show a pair, the steps and the memory plan; train nothing")

    save_every: int = _option(
        "Checkpoints", 100, "steps between checkpoints; 0: only at the end and on a signal", least=0
    )
    keep: int = _option(
        "Checkpoints",
        2,
        "how many of the newest complete checkpoints stay; 0: one while the run goes on, none once it has ended well",
        least=0,
    )
    resume: bool = _option(
        "Checkpoints", False, "go on from the newest complete checkpoint of --out, or start where there is none"
    )
    overwrite: bool = _option("Checkpoints", False, "remove what an earlier run left in --out, then start")

    dtype: str = _option(
        "Machine",
        "auto",
        "type the models compute in; weights, log-probs and the loss stay float32. auto: "
        "bfloat16 on CUDA, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    micro_tokens: int = _option(
        "Machine", 0, "tokens a rank puts through the model at once; 0: as many as memory allows", least=0
    )
    activation_checkpointing: str = _option(
        "Machine",
        "auto",
        "recompute activations in the backward pass to save memory",
        choices=("auto", "none", "selective", "full"),
    )
    compile: bool | None = _option(
        "Machine", None, "compile the transformer's blocks with torch.compile [where it pays]"
    )
    cpu_offload: bool = _option("Machine", False, "keep weights and optimiser in the machine's own memory between uses")
    hsdp: int = _option(
        "Machine", 0, "ranks in a shard group, copies of which run side by side; 0: one group of all ranks", least=0
    )
    timeout_minutes: float = _option(
        "Machine", 5.0, "how long a rank waits for the others before the run fails", above=0, most=1440
    )


FIELDS = {field.name: field for field in dataclasses.fields(Options)}
DEFAULTS = {name: field.default for name, field in FIELDS.items()}
# The type of each option's value: bool, int, float, str or tuple (of strings).
KINDS = {
    name: tuple if typing.get_origin(hint) is tuple else (typing.get_args(hint) or (hint,))[0]
    for name, hint in typing.get_type_hints(Options).items()
}


def flag_of(name):
    """The flag of an option: `with_` is --with, as `with` is a word of Python."""
    return "--" + name.strip("_").replace("_", "-")


def readers(name):
    """The losses that read an option, where it is one that not every loss reads; else none."""
    found = [loss for loss, entry in LOSSES.items() if entry.reads(name)]
    return found if len(found) < len(LOSSES) else []


def ignored(loss):
    """What a loss does not read. Given all the same, it is an error: the user expects an effect that never comes."""
    return [name for name in FIELDS if readers(name) and loss not in readers(name)]


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
    try:
        settings = read_toml(config, "--config ") if config else {}
    except FileNotFoundError:
        raise BadInput(f"--config {_shown(config, most=1000)}: there is no such file") from None
    loss = given.get("loss", settings.get("loss", DEFAULTS["loss"]))
    chosen = {}
    if "model" not in given and "model" not in settings:
        with contextlib.suppress(FileNotFoundError):
            chosen |= _carry(read_toml(TINY / "recipe.toml"), loss, settings | given)
    chosen |= _carry(settings, loss, given) | given
    _refuse_contradictions(chosen, loss, {name: _shown(config, most=1000) for name in settings.keys() - given.keys()})

    if "eval_data" not in chosen and "data" not in chosen and not chosen.get("eval_fraction"):
        chosen["eval_data"] = (str(TINY / "held_out.jsonl"),)
    bundled = {"data": (str(TINY / "train.jsonl"),), "model": str(TINY / "model")}
    chosen = DEFAULTS | bundled | {"loss": loss, "beta": LOSSES[loss].beta} | chosen
    chosen |= {name: follow(chosen) for name, follow in FOLLOWS.items() if chosen[name] is None}
    chosen |= dict.fromkeys(ignored(loss))
    returns = chosen["resume"] or chosen["overwrite"]
    if config and returns and chosen["out"] is None and pathlib.Path(config).read_text("utf-8").startswith(SAVED):
        chosen["out"] = os.path.dirname(os.path.abspath(config))

    for name in ("model", "guide"):
        chosen[name] = _absolute_if_there(chosen[name])
    for name in ("data", "eval_data"):
        chosen[name] = tuple(map(_absolute_if_there, chosen[name]))
    for name in ("chat_template", "out"):
        chosen[name] = _absolute_if_there(chosen[name], there=True)
    for path in (chosen["model"], *chosen["data"], *chosen["eval_data"], chosen["out"] or here):
        _check_text(path, _shown(path))  # again, as the working directory is part of it by now
    return Options(**chosen)


def answer_early(argv):
    """For the first lines of a script, before its slow imports: --help and bad options end it here."""
    try:
        resolve(argv)
    except BadInput as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one of each machine, as their files may differ
            print(f"train.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def to_toml(options):
    """Options -> the text of config.toml, which read_toml takes back. What is not set is left out."""
    lines, group = [], None
    for name, field in FIELDS.items():
        value = getattr(options, name)
        if value is None or value == () or name in NOT_SAVED:
            continue
        if name in FOLLOWS and value == FOLLOWS[name](vars(options)):
            continue
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines.append(f"\n# {group}\n")
        lines.append(f"{name.strip('_')} = {_toml_value(value)}\n")
    return _signed("".join(lines))


def is_as_saved(text):
    """Whether a file's bytes are as to_toml gave them, and no person has edited them since."""
    first, _, rest = text.decode(errors="replace").partition("\n")
    return first + "\n" == SAVED and _signed(rest.partition("\n")[2]).encode() == text


def _signed(body):
    """The text of a config.toml: what it is, a digest that shows whether it is as it was written, and the options."""
    return f"{SAVED}# {hashlib.sha256(body.encode()).hexdigest()[:16]} as long as nothing below is edited\n{body}"


def read_toml(path, flag=""):
    """A TOML file -> {option: value}, checked. Keys may be written with dashes as well. flag: what named the file.
    Raises BadInput; FileNotFoundError where there is no such file."""
    settings, file = {}, _shown(str(path), most=1000)
    for key, value in _load_toml(path, flag + file).items():
        name = "with_" if key == "with" else key.replace("-", "_")
        if name not in FIELDS:
            raise BadInput(
                f"{file}: unknown key {_shown(key)}; {_ours(name) or f'the nearest is {_nearest(name, FIELDS)}'}"
            )
        if name in settings:
            raise BadInput(f"{file}: {name} is given twice, with dashes and with underscores; keep one")
        settings[name] = _checked(name, value, f"{file}: {name.strip('_')} = {_shown(value)}")
    return settings


def _load_toml(path, where):
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{where}: is no file; give a .toml file")
    try:
        with open(path, "rb") as file:
            text = file.read(2**20 + 1)
        if len(text) > 2**20:
            raise BadInput(f"{where}: is larger than 1 MB; give a .toml file with options")
        return tomllib.loads(text.decode("utf-8-sig").replace("\r\n", "\n"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadInput(f"{where}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{where}: is not UTF-8 text; save it as UTF-8") from None
    except RecursionError:
        raise BadInput(f"{where}: is nested too deep; options are plain `name = value` lines") from None
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise BadInput(f"{where}: is not TOML: {brief(error)}") from None


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
    config = "read options from this file; flags override it"
    made.add_argument("--config", metavar="FILE.toml", action="append", help=config)
    groups = {title: made.add_argument_group(title, textwrap.fill(text, 76)) for title, text in GROUPS.items()}
    for name, field in FIELDS.items():
        kind, said = KINDS[name], field.metadata
        only = f" ({', '.join(readers(name))} only)" if readers(name) else ""
        default = "" if said["help"].endswith("]") else f" [{'no' if field.default is False else field.default}]"
        details = {"help": said["help"] + default + only}
        if kind is bool:
            details["action"] = argparse.BooleanOptionalAction
        else:
            # Choices are shown, not enforced, by argparse: `_checked` words the error for flags and TOML alike.
            details["metavar"] = said["metavar"] or METAVARS.get(kind) or "|".join(said["choices"])
        if kind is tuple:
            details |= {"nargs": "+", "action": "extend"}
        groups[said["group"]].add_argument(flag_of(name), dest=name, **details)
    return made


def _read_flags(argv):
    """-> ({option: checked value} of the flags given, path of --config or None)"""
    made = parser()
    known, unknown = made.parse_known_args(argv)
    for word in unknown:
        if word.startswith("-"):
            flags = [flag for action in made._actions for flag in action.option_strings]
            flag = word.split("=")[0]
            name = flag.lstrip("-").replace("-", "_")
            near = _ours(name, "--") or f"the nearest is {_nearest(flag, flags)}"
            raise BadInput(f"unknown option {_shown(flag)}; {near} (--help lists all)")
    if unknown:
        raise BadInput(f"{_shown(unknown[0])} belongs to no option; options begin with -- (--help lists all)")
    given = vars(known)
    config, *more = given.pop("config", [None])
    if more:
        raise BadInput(f"--config is given {1 + len(more)} times; give one file, and flags for what differs")
    for name, value in given.items():
        where = flag_of(name)
        if KINDS[name] is not bool:
            where += " " + _shown(" ".join(value) if KINDS[name] is tuple else value)
        if KINDS[name] in (int, float):
            with contextlib.suppress(ValueError):  # then it stays text, which is no number
                value = KINDS[name](value)
        given[name] = _checked(name, value, where)
    if config is not None:
        config = os.path.expanduser(_check_text(config, f"--config {_shown(config)}"))
    return given, config


def _checked(name, value, where):
    """A value as TOML has it, as one of the option's type and within its limits. A whole number serves as a float, a
    string as a list. Raises BadInput."""
    limits, kind = FIELDS[name].metadata, KINDS[name]
    if kind is tuple:
        value = tuple(value) if isinstance(value, list) else (value,)
        fits = value and all(isinstance(one, str) for one in value)
    elif kind is float and type(value) is int:
        fits = abs(value) < sys.float_info.max
        value = float(value) if fits else value
    else:
        fits = type(value) is kind
    if not fits:
        raise BadInput(f"{where}: must be {TYPES[kind]}")
    if kind is float and not math.isfinite(value):
        raise BadInput(f"{where}: must be a finite number")
    if kind is int and value > LARGEST:
        raise BadInput(f"{where}: must be at most {LARGEST}")
    for limit, (words, holds) in LIMITS.items():
        if limit in limits and not holds(value, limits[limit]):
            raise BadInput(f"{where}: must be {words} {limits[limit]}")
    for text in {str: (value,), tuple: value}.get(kind, ()):
        _check_text(text, where)
    if name == "columns":
        _columns_checked(value, where)
    if name == "log_to" and (twice := [one for one in value if value.count(one) > 1]):
        raise BadInput(f"{where}: gives {twice[0]} twice; keep one")
    for one in value if kind is tuple else (value,):
        if "choices" in limits and one not in limits["choices"]:
            near = _nearest(one, limits["choices"])
            raise BadInput(f"{where}: must be one of {', '.join(limits['choices'])}; the nearest is {near}")
    if name == "with_":
        parts.read(value, where)
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


def _refuse_contradictions(chosen, loss, files):
    """files: {option: the file that set it}, where no flag did."""
    called = {name: f"{files[name]}: {name.strip('_')}" if name in files else flag_of(name) for name in FIELDS}

    def said(name):
        value = " ".join(chosen[name]) if KINDS[name] is tuple else chosen[name]
        if KINDS[name] is bool:
            return f"{called[name]} = {str(value).lower()}" if name in files else called[name]
        return f"{called[name]} {'= ' if name in files else ''}{value}"

    for name in ignored(loss):
        if name in chosen:
            by = "loss" if "loss" in files else "--loss"
            raise BadInput(f"{said(name)}: {by} {loss} has no use for it; leave it out")
    parts.refuse_without_guide(chosen.get("with_"), loss, called["with_"])
    if "lora_alpha" in chosen and "lora_rank" not in chosen:
        raise BadInput(f"{said('lora_alpha')}: has no effect without --lora-rank, which is 0; give both")
    longest = chosen.get("max_length", DEFAULTS["max_length"])
    prompt = chosen.get("max_prompt_length", 0)
    if prompt >= longest:
        where = said("max_prompt_length")
        raise BadInput(f"{where}: must be less than {called['max_length']}, which is {longest}")
    if chosen.get("resume") and chosen.get("overwrite"):
        raise BadInput(
            f"{called['resume']} and {called['overwrite']}: one goes on with a run, the other removes it; give one"
        )
    if chosen.get("eval_data") and chosen.get("eval_fraction"):
        raise BadInput(
            f"{called['eval_data']} and {called['eval_fraction']}: the fraction is for runs without it; give one"
        )


def _carry(settings, loss, over):
    """What of a file's settings still holds where flags or another file, `over`, set another loss or contradict it."""
    own, dropped = settings.get("loss", DEFAULTS["loss"]), [name for name, rival in RIVALS.items() if over.get(rival)]
    if over.get("max_length", LARGEST) <= settings.get("max_prompt_length", 0):
        dropped.append("max_prompt_length")
    if own != loss:
        dropped += ignored(loss)
    if LOSSES[own].beta != LOSSES[loss].beta:
        dropped.append("beta")  # which is on another scale
    kept = {name: value for name, value in settings.items() if name not in dropped}
    if "with_" in kept and own != loss and "guide" not in LOSSES[loss].tensors:
        kept["with_"] = tuple(w for w in kept["with_"] if not parts.PARTS[w.partition("=")[0]].tgdpo_only)
    return kept


def _absolute_if_there(name, there=False):
    """A path where there is one; else the name as it is, which may be a Hub id. there: it is a path in any case."""
    path = os.path.expanduser(name) if name else None
    return os.path.abspath(path) if path and (there or os.path.exists(path) or glob.glob(path)) else name


def _ours(name, dashes=""):
    """What answers an option that TRL or LLaMA-Factory calls `name`; "" where it is none of theirs, or
    we have none."""
    ours = ELSEWHERE.get(name)
    if ours not in FIELDS:
        return ""
    each = ", which counts the pairs of a step over all ranks" if ours == "batch_size" else ""
    return f"here it is {dashes}{ours.replace('_', '-') if dashes else ours}{each}"


def _columns_checked(value, where):
    names = []
    for entry in value:
        name, sign, column = entry.partition("=")
        if not (name and sign and column):
            raise BadInput(f"{where}: must be NAME=COLUMN, such as prompt=question")
        if name not in COLUMNS:
            raise BadInput(f"{where}: must name one of {', '.join(COLUMNS)}; the nearest is {_nearest(name, COLUMNS)}")
        if name in names:
            raise BadInput(f"{where}: gives {name} twice; keep one")
        names.append(name)


def _nearest(word, known):
    return difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.0)[0].strip("_")  # with_ is with


def _shown(value, most=80):
    """A value as an error line shows it: short, and with control characters written out."""
    text = value if isinstance(value, str) else repr(value)
    text = text.lower() if isinstance(value, bool) else text
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.strip() and text.isprintable() else _toml_value(text)


def _toml_value(value):
    """A value in TOML, which is JSON for them, but DEL may not stand as it is. Neither does what no terminal shows."""
    written = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in written)
