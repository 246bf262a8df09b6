"""What `--dry-run` shows: the counts, one pair with its scored tokens, the steps and the memory plan."""

import collections

from files import card
from runtime import memory
from runtime.losses import LOSSES
from runtime.progress import say


def steps(options, pairs):
    """(optimiser steps of an epoch, of a stage) on so many pairs. The one place where steps are counted."""
    per_epoch = -(-pairs // options.batch_size)
    return per_epoch, min(options.epochs * per_epoch, options.max_steps or options.epochs * per_epoch)


def trains_guide(options):
    """Whether a first stage makes the guide."""
    return LOSSES[options.loss].reads("guide") and options.guide is None


def stages(options, pairs):
    """What a run trains, a line a stage."""
    todo = [("guide", "dpo")] * trains_guide(options) + [("policy", options.loss)]
    ends = f", {steps(options, pairs)[1]} steps"
    lines = [f"training the {who} with {card.LOSSES.get(loss, loss)}{ends}" for who, loss in todo]
    return [f"stage {n} of 2: {line}" for n, line in enumerate(lines, 1)] if len(lines) > 1 else lines


def counts_lines(counts):
    """Data counts for a person. counts: {"train" or "eval": data.Counts}."""
    lines = []
    for name, count in counts.items():
        lines.append(
            f"{name}: {count.rows} rows read, {count.kept} pairs kept, {count.cut} responses cut, "
            f"{len(count.dropped)} pairs dropped, {count.boundary} responses tokenised apart from the prompt"
        )
        kinds = collections.Counter(drop["reason"].split(":")[0] for drop in count.dropped)
        lines += [f"  dropped {number}: {kind}" for kind, number in sorted(kinds.items())]
        lines += [f"  also there, not used: {', '.join(count.unused)}"] if count.unused else []
    return lines


def warnings(options, contexts, pairs, eval_pairs):
    """What a person should know before training: lines.

    contexts: {directory of a model: tokens it was made for}."""
    lines = []
    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs + eval_pairs)
    for directory, most in contexts.items():
        if options.max_length > most:
            lines.append(
                f"warning: --max-length {options.max_length} is beyond the {most} tokens that "
                f"{directory} was made for; the longest pair has {longest}"
            )
    ids = lambda pair: hash(tuple(side.tobytes() for side in pair[:3]))
    trained = set(map(ids, pairs)) if eval_pairs else ()
    if seen := sum(ids(pair) in trained for pair in eval_pairs):
        same = [f"{name} is given as --data and as --eval-data" for name in options.data if name in options.eval_data]
        lines.append(
            f"warning: {seen} of the {len(eval_pairs)} evaluation pairs are training pairs too, and tell nothing of "
            + "; ".join(["what was not trained on", *same])
        )
    if len(pairs) < options.batch_size:
        lines.append(
            f"warning: {len(pairs)} pairs are fewer than --batch-size {options.batch_size}: each step takes all"
        )
    return lines


def guide_warning(right):
    """Lines on a guide that ranks this share of the training pairs right."""
    if right >= 0.5:
        return []
    return [
        f"warning: the guide prefers the chosen response on {right:.1%} of the training pairs, worse than chance: "
        "it pulls against their labels; look whether chosen and rejected are the right way round, at --guide, or "
        "at stage 1's --lr and --epochs"
    ]


def alpha_advice(alpha, bounds, lost):
    """Lines on an alpha. bounds: the largest that keep f > 0 on all tokens, on 99 % and on 95 %; lost: the share of
    tokens on which this one does not."""
    lines = [
        "f stays positive on all tokens below alpha {:.3g}, on 99 % below {:.3g}, on 95 % below {:.3g}".format(*bounds)
    ]
    if alpha >= bounds[0]:
        lines.append(
            f"warning: with alpha {alpha} f is not positive on {lost:.2%} of the tokens, whose gradient turns its sign "
            "(derive.md, D13)"
        )
    return lines


def show(options, tokenizer, pairs, eval_pairs, counts, plan, world, config):
    """Print the preview; pairs are data.Pair, plan a memory.Plan, world the number of ranks, config the model's."""
    for line in counts_lines(counts):
        say(line)
    pair = pairs[0]
    say(f"the first pair, {pair.source}; each scored token stands between bars")
    say(f"  prompt   {tokenizer.decode(pair.prompt)!r} ({len(pair.prompt)} tokens, not scored)")
    for name in ("chosen", "rejected"):
        ids = getattr(pair, name)
        say(f"  {name:<8} |{'|'.join(repr(piece)[1:-1] for piece in tokenizer.pieces(ids))}| ({len(ids)} tokens)")
    _, total = steps(options, len(pairs))
    say(
        f"{len(pairs)} pairs to train on, {len(eval_pairs)} to evaluate on; {total} steps of {options.batch_size} pairs"
        + (", in each of two stages" if trains_guide(options) else "")
    )
    all_of_it, of_it = memory.trained(config, 0), memory.trained(config, options.lora_rank)
    say(f"{of_it:,} of {all_of_it:,} parameters are trained")
    for line in memory.lines(plan, world) + memory.table(config, options, plan):
        say(line)
