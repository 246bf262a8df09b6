"""What a run leaves beside its models: config.toml, run.json and dropped.jsonl at its start; the table, the
answers, tokens.jsonl and the report page at its end."""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import platform
import shutil
import statistics
import sys

import torch

from files.card import add_figures
from files.errors import BadInput
from runtime import cache, checkpoint, memory, outdir, preview
from runtime import options as option_table
from runtime.disk import content, discard, entries, stands, unreadable, whole
from runtime.losses import GUIDES_LOSS, LOSSES
from runtime.progress import say

GOLD = """\
Read gold, the true reward of sampled replies, against KL, its price; wins: how often it is above the reference's.
Only this example knows them, and no training saw them. Accuracy counts noisy labels, one in ten wrong."""


def foresee_space(out, options, config, width, pairs, eval_pairs):
    """Raises BadInput unless the disk of `out` holds what the run will write, beside what it has already.

    config: the model's; width: bytes of a number of the exported models."""
    parameters, trained = memory.trained(config, 0), memory.trained(config, options.lora_rank)
    _, steps = preview.steps(options, len(pairs))
    saves = min(max(1, options.keep) + 1, -(-steps // options.save_every)) if options.save_every else 1
    models = 2 if preview.trains_guide(options) else 1
    passes = sum(name in LOSSES[options.loss].tensors for name in ("ref", "guide"))  # each leaves its log-probs
    passes += bool(options.centre_guidance)  # or divergences
    need = (3 * saves + bool(options.lora_rank)) * 4 * trained + width * models * parameters
    need += 4 * passes * sum(pair.scored for pair in pairs + eval_pairs)
    files = [os.path.join(place, name) for place, _, names in os.walk(out) for name in names]
    there = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    if (free := shutil.disk_usage(out).free) + there < need:
        raise BadInput(
            f"--out {out}: its disk has {free / 1e9:.3f} GB free, and the run needs {need / 1e9:.3f} GB: "
            f"{saves} checkpoints of {12 * trained / 1e9:.3f} GB, the models and the log-probs; "
            "free some, lower --keep or give another directory"
        )


def begin(out, options, identity, counts, plan, ranks):
    """Write config.toml, run.json and dropped.jsonl. A directory that is resumed must be of the same run."""
    path, guide = os.path.join(out, "run.json"), {}
    if options.resume and stands(path):
        before = read_run(path)
        checkpoint.same_run(out, before["identity"], identity)
        guide = {"guide": before["guide"]} if "guide" in before else {}
    config = os.path.join(out, "config.toml")
    if stands(config) and not option_table.is_as_saved(content(config) or b""):
        names = (f"{config}.before" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
        kept = next(name for name in names if not stands(name))
        os.rename(config, kept)
        say(f"{config}: written or edited by hand; kept as {kept}")
    write(config, option_table.to_toml(options))
    write(
        os.path.join(out, "dropped.jsonl"),
        "".join(json.dumps(drop, ensure_ascii=False) + "\n" for count in counts.values() for drop in count.dropped),
    )
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else _processor()
    write_json(
        path,
        {
            "command": " ".join(["python", *sys.argv]),
            "identity": identity,
            "machine": {"device": device, "ranks": ranks.world, "threads": torch.get_num_threads()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "data": {
                name: {"rows": c.rows, "kept": c.kept, "cut": c.cut, "boundary": c.boundary, "dropped": len(c.dropped)}
                for name, c in counts.items()
            },
            "plan": plan._asdict(),
        }
        | guide,
    )
    for line in option_table.to_toml(options).splitlines():
        if line and not line.startswith("#"):
            say("  " + line)
    for line in preview.counts_lines(counts) + memory.lines(plan, ranks.world):
        say(line)


def is_over(out, identity):
    """Whether the run in `out` has ended well with --keep 0, so that --resume has nothing to do, which is said. Raises
    BadInput where that was another run."""
    checkpoints = os.path.join(out, "checkpoints")
    if not stands(os.path.join(checkpoints, "finished")) or checkpoint.newest(checkpoints):
        return False
    checkpoint.same_run(out, read_run(os.path.join(out, "run.json"))["identity"], identity)
    say(f"the run in {out} is finished, and --keep 0 left no checkpoint: nothing to resume; --overwrite starts it anew")
    return True


def tell_checkpoints(out):
    """Say what a finished run's checkpoints are still good for."""
    checkpoints = os.path.join(out, "checkpoints")
    size = sum(file.stat().st_size for file in pathlib.Path(checkpoints).rglob("*") if file.is_file())
    say(
        f"\n{checkpoints}: {size / 1e9:.3f} GB that the models do not need; --resume makes the answers and the page "
        "anew from it (other --samples, --report-pairs); remove it, or give --keep 0"
    )


def end(out, options):
    """The run has ended well. With --keep 0 a mark takes the place of its checkpoints."""
    checkpoints = os.path.join(out, "checkpoints")
    if not options.keep:
        write(os.path.join(checkpoints, "finished"), "The run has ended well; --keep 0 left no checkpoint.\n")
        for name in entries(checkpoints):
            if name != "finished":
                discard(os.path.join(checkpoints, name))


def has_guide(out, check):
    """Whether stage 1 is over, its guide exported; that may be gone or damaged by now, though the policy's training has
    begun. As long as the stage has a checkpoint, a guide that is not whole is none: it is exported again."""
    begun = checkpoint.newest(os.path.join(out, "checkpoints"))
    run, directory = read_run(os.path.join(out, "run.json")), os.path.join(out, "guide")
    if begun and checkpoint.read_state(begun).get("identity", {}).get("stage") == GUIDES_LOSS:
        with contextlib.suppress(BadInput):
            return bool(guide_digest(directory, run, check))
        return False
    return stands(directory) or bool(begun) and "guide" in run


def same_guide(out, directory, new, check):
    """-> the digest of the guide that stage 1 left in OUT/guide, kept in run.json. Raises BadInput where
    what stands there now is another, or nothing. new: it was exported just now. check: raises BadInput where the
    checkpoint is not whole."""
    path = os.path.join(out, "run.json")
    run = read_run(path)
    try:
        digest = guide_digest(directory, {} if new else run, check)
    except BadInput as fault:
        raise BadInput(f"{fault}: put back what stage 1 exported, or start anew with --overwrite") from None
    write_json(path, run | {"guide": digest})
    return digest


def guide_digest(directory, run, check):
    """-> the digest of the guide in `directory`. Raises BadInput unless it is the one that stage 1 exported, whose
    digest is in `run` once it is known."""
    if not stands(directory):
        raise BadInput(f"{directory} is gone, by which the policy is trained")
    try:
        check(directory)
    except BadInput as error:
        if isinstance(error.__context__, OSError) and error.__context__.errno != errno.ENOENT:
            raise unreadable(directory, error.__context__) from None  # it may well be whole
        raise BadInput(f"the guide is damaged: {error}") from None
    digest = cache.weights_digest(directory)
    if run.get("guide", digest) != digest:
        raise BadInput(f"{directory} holds other weights than stage 1 exported")
    return digest


def finish(out, options, tokenizer, pairs, judged, answers, gold):
    """Write tokens.jsonl and samples.json, print the table and the answers.

    pairs: the evaluation pairs (without any, training pairs); judged: as train.judged yields it, pair by pair;
    answers: name -> [(prompt, answer)]; gold: as train.gold_figures gives it, {} where no true reward is known."""
    figures = {}  # model -> what the table averages, a dict a pair
    with whole(os.path.join(out, "tokens.jsonl")) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for i, (pair, (losses, tokens)) in enumerate(zip(pairs, judged)):
            for name, loss in losses.items():
                figures.setdefault(name, []).append(_figures(loss, tokens[name]))
            if i < options.report_pairs:
                file.write(json.dumps(_tokens_row(pair, tokenizer, losses["policy"], tokens)) + "\n")
    table = [
        {"model": "reference" if name == "ref" else name}
        | {figure: statistics.fmean(pair[figure] for pair in values) for figure in values[0]}
        | gold.get(name, {})
        for name, values in figures.items()
    ]
    figure = "log-ratio" if "ref" in figures else "log p"
    heads = ("accuracy", "margin", f"{figure} chosen", f"{figure} rejected", *("gold", "wins", "KL")[: 3 * bool(gold)])
    say(f"\n{f'{len(pairs)} pairs':<12}" + "".join(f"{head:>{max(8, len(head) + 3)}}" for head in heads))
    for model, *numbers in map(dict.values, table):
        say(f"  {model:<10}" + "".join(f"{x:>{max(8, len(head) + 3)}.3f}" for head, x in zip(heads, numbers)))
    if gold:
        say(GOLD)
    if falls := [row["model"] for row in table if row.get("logratio_chosen", 0) < 0]:
        say(
            f"  note: {' and '.join(falls)} find the chosen responses, too, less likely than the reference does: "
            "usual, and to be watched (README.md, When the chosen falls)"
        )
    samples = [
        {"prompt": prompt} | {name: given[i][1] for name, given in reversed(answers.items())}
        for i, (prompt, _) in enumerate(answers["policy"])
    ]
    for sample in samples:
        say("")
        for name, text in sample.items():
            say(f"  {name:<10}{text!r}")
    write_json(os.path.join(out, "samples.json"), samples)
    path = os.path.join(out, "run.json")
    write_json(path, read_run(path) | {"table": table, "table_pairs": len(pairs)})
    for name in ("guide", "policy"):
        add_figures(os.path.join(out, name), table)
    if options.keep:
        tell_checkpoints(out)
    say(f"\nthe policy: {os.path.join(out, 'policy')}")
    if LOSSES[options.loss].reads("guide"):
        say(f"the guide:  {options.guide or os.path.join(out, 'guide')}")


def read_run(path):
    """The object of a run.json. Raises BadInput where it is not what `begin` wrote."""
    try:
        run = json.loads(content(path) or b"")
        if isinstance(run["identity"], dict):
            return run
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise BadInput(
        f"{path} is damaged, so that nothing tells which run this is; "
        "remove it to resume all the same, or start anew with --overwrite"
    )


def write_json(path, value):
    """Write a JSON file, whole or not at all."""
    write(path, json.dumps(value, indent=1, ensure_ascii=False))


def write(path, text):
    """Write a file, whole or not at all."""
    # What the command line has that is no UTF-8 is written as it was.
    outdir.check(os.path.dirname(path))
    with whole(path) as unfinished, open(unfinished, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def _figures(loss, logps):
    """A pair's part of the table: the plain DPO reward margin and log pi/pi_ref of each side. A loss without a
    reference has its own margin instead, and log pi of each side. logps: the model's, (chosen, rejected)."""
    if loss.dpo_margin is None:
        margin, figure, sides = loss.phi, "logp", [logp.sum() for logp in logps]
    else:
        margin, figure, sides = loss.dpo_margin, "logratio", [loss.logratio_w, loss.logratio_l]
    numbers = {"margin": margin.item(), f"{figure}_chosen": sides[0].item(), f"{figure}_rejected": sides[1].item()}
    return {"accuracy": numbers["margin"] > 0} | numbers


def _tokens_row(pair, tokenizer, loss, tokens):
    """A row of tokens.jsonl. loss: the policy's; tokens: name -> (chosen, rejected), a number a token each."""
    row = {"source": pair.source, "prompt": tokenizer.decode(pair.prompt)}
    for side, (name, ids) in enumerate((("chosen", pair.chosen), ("rejected", pair.rejected))):
        numbers = {what: [round(x, 6) for x in sides[side].flatten().tolist()] for what, sides in tokens.items()}
        row[name] = {"tokens": tokenizer.pieces(ids)} | numbers
    chosen, rejected = (reward.sum().item() for reward in tokens["reward"])
    numbers = {"margin": chosen - rejected, "phi": loss.phi.item()}
    if loss.dpo_margin is not None:
        numbers["dpo_margin"] = loss.dpo_margin.item()
    return row | {name: round(number, 6) for name, number in numbers.items()}


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return f"{platform.machine()}, {os.cpu_count()} cores"
