"""Train a policy with TGDPO, DPO or SimPO.

    python train.py                                                        the bundled tiny example, on a laptop
    python train.py --model DIR --data pairs.jsonl --dry-run               look at the pairs and the plan, train nothing
    python train.py --model meta-llama/Llama-3.2-1B-Instruct --data pairs.jsonl                 one GPU
    torchrun --nproc_per_node 8 train.py --model meta-llama/Meta-Llama-3-8B-Instruct --data pairs.jsonl   eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --hsdp 8 …  two nodes
    python train.py --config OUT/config.toml --resume                      go on after a stop

`--help` lists the options. A run of tgdpo has two stages: a guide is trained with DPO (or given with --guide), then
the policy with the guide's token-level reward. Reference and guide are read once, for the log-probs of the response
tokens, and are not in memory while the policy trains.
"""

import sys

from runtime import options as option_table

if __name__ == "__main__":
    option_table.answer_early(sys.argv[1:])  # --help and a mistyped option need no torch

import errno
import gc
import os
import time
import traceback
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

import data
import model
import tgdpo
from files import hub, weights
from files.errors import BadInput
from files.tokenizer import load_tokenizer, same_vocabulary
from report import report
from runtime import cache, checkpoint, disk, flops, memory, outdir, preview, process_group, results, shards, signals
from runtime.failures import RunFailed, Stopped
from runtime.losses import LOSSES
from runtime.process_group import on_all_ranks, on_rank_0
from runtime.progress import Metrics, Progress, say, tell
from runtime.tally import Tally

FILLER = data.Pair(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), "")  # for a rank without pairs
DEALT = 4096  # pairs of a pass without gradients that are dealt to ranks and packs together
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
SHOWN = ("loss", "margin", "accuracy", "tokens_per_second", "mfu")  # beside the progress bar


class Run(NamedTuple):
    """What every part of a run shares."""

    options: option_table.Options
    out: str
    rank: int
    world: int
    device: torch.device
    mesh: dist.DeviceMesh
    dtype: torch.dtype  # of the computation; master weights, gradients' sums and log-probs are float32
    plan: memory.Plan  # micro_tokens, activation checkpointing, compile
    signals: signals.Signals
    metrics: Metrics
    identity: dict  # what a checkpoint must agree with: data, model, loss, template, settings


class Stage(NamedTuple):
    """One training: the policy starts from the reference and learns from `pairs` by one loss."""

    loss: str  # its name in runtime/losses.py
    pairs: list  # of data.Pair
    eval_pairs: list
    ref: list | None  # per pair of pairs + eval_pairs: log-probs [C + R], chosen then rejected
    guide: list | None


# ------------------------------------------------------------------------------------------------- the models


def sharded(directory, run, frozen=False):
    """The model of `directory`, sharded over the ranks: meta device, fully_shard of each block and of the root, then
    each rank reads its own rows. Float32 master shards where it trains, the compute type where it is frozen."""
    with torch.device("meta"):
        net = model.CausalLM(model.read_config(directory))
    if frozen:
        net.to(run.dtype).requires_grad_(False)
    offload = CPUOffloadPolicy() if run.options.cpu_offload and run.device.type == "cuda" else OffloadPolicy()
    settings = {
        "mesh": run.mesh,
        "offload_policy": offload,
        "mp_policy": MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for number, layer in enumerate(net.model.layers):
        layer.recompute = not frozen and run.plan.recomputes(number)
        if run.plan.compile:
            layer.compile()
        fully_shard(layer, **settings)
    fully_shard(net, **settings)
    net.compiled = run.plan.compile
    net.to_empty(device="cpu" if isinstance(offload, CPUOffloadPolicy) else run.device)
    on_all_ranks(lambda: model.load_weights(net, directory, shards.local_rows))
    return net


def release(run):
    """Give the memory of dropped models back. The caller lets go of its last reference first."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def export(run, net, directory, source):
    """Write the policy in Hugging Face layout, gathered and written tensor by tensor."""
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    stream = ((name, shards.whole(parameter, run.dtype, run.rank == 0)) for name, parameter in net.named_parameters())
    width = 4 if run.dtype == torch.float32 else 2

    def write():
        disk.need_space(run.out, width * sum(np.prod(shape) for shape in shapes.values()), directory)
        copies = [(os.path.join(source, name), name) for name in TOKENIZER_FILES]
        if run.options.chat_template:
            copies.append((run.options.chat_template, "chat_template.jinja"))
        weights.save_model(directory, source, shapes, stream, run.dtype, [c for c in copies if os.path.exists(c[0])])

    def drain():
        for _ in stream:
            pass

    on_rank_0(write, meanwhile=drain)  # the others gather along, even where rank 0 fails half way
    say(f"exported: {directory}", run.rank)


# ----------------------------------------------------------------------------------- log-probs and the guidance


def rows(flat, pack):
    """log p [R] of a pack's response tokens -> (chosen, rejected), each [B, T], 0 where there is no token."""
    parts = flat.split([n for lengths in zip(pack.chosen_lengths, pack.rejected_lengths) for n in lengths])
    return pad_sequence(parts[0::2], batch_first=True), pad_sequence(parts[1::2], batch_first=True)


def to_device(pack, device):
    """The pack with its tensors on the device."""
    if device.type == "cpu":
        return pack
    return pack._make(x.pin_memory().to(device, non_blocking=True) if torch.is_tensor(x) else x for x in pack)


def size(pair):
    """A pair's tokens in a pack, its prompt once."""
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def packs_of(run, pairs):
    """This rank's packs for a pass over the pairs: lists of indices, as many on every rank. Dealt some thousands at a
    time, as the deal of n pairs to n packs takes n² log n."""
    for start in range(0, len(pairs), DEALT):
        lengths = [size(pair) for pair in pairs[start : start + DEALT]]
        for pack in data.deal(lengths, run.world, run.plan.micro_tokens_forward)[run.rank]:
            yield [start + i for i in pack]


@torch.no_grad()
def log_probs(run, net, pairs, title, save=lambda: "what was saved before stands", side_job=False):
    """Per-token log-probs of every pair's responses, [C + R] each, on the CPU. The pairs are shared out among the
    ranks in large packs. No random number is drawn. save: see stop_if_told; side_job: see Progress."""
    mine = {}
    bar = Progress(len(pairs), title, run.rank, side_job=side_job)
    for indices in packs_of(run, pairs):
        pack = to_device(data.collate([pairs[i] for i in indices] or [FILLER]), run.device)
        logp = net(pack.tokens, pack).cpu()
        lengths = [len(pairs[i].chosen) + len(pairs[i].rejected) for i in indices]
        if indices:
            mine |= zip(indices, (part.clone() for part in logp.split(lengths)))
        bar.advance(len(indices) * run.world)
        stop_if_told(run, save)
    bar.close()
    net.reshard()  # without a backward pass the root would stay gathered
    shares = [None] * run.world
    dist.all_gather_object(shares, mine)
    together = {index: logp for share in shares for index, logp in share.items()}
    return [together[index] for index in range(len(pairs))]


def cached_log_probs(run, kind, directory, pairs, digest=None):
    """log_probs of a frozen model, from OUT/cache where its key matches: weights, data, tokenisation, dtype. digest: of
    its weights, where it is known."""
    key = on_rank_0(
        lambda: cache.key(
            {
                "weights": digest or cache.weights_digest(directory),
                "pairs": data.fingerprint(pairs),
                "dtype": str(run.dtype),
            }
        )
    )
    where, lengths = os.path.join(run.out, "cache"), [len(pair.chosen) + len(pair.rejected) for pair in pairs]
    found = on_rank_0(lambda: cache.read(where, kind, key, sum(lengths), say))
    if found is not None:
        say(f"log-probs of the {kind} are in the cache: {kind}-{key}", run.rank)
        return list(found.split(lengths))
    net = sharded(directory, run, frozen=True)
    found = log_probs(run, net, pairs, f"log-probs of the {kind}")
    del net
    release(run)
    wrong = [pair.source for pair, logp in zip(pairs, found) if not logp.isfinite().all()]
    if wrong:
        raise RunFailed(f"the {kind}'s log-probs are not finite on {some(wrong)}; try --dtype float32")
    on_rank_0(lambda: cache.write(where, kind, key, torch.cat(found)))
    return found


# -------------------------------------------------------------------------------------------------- the losses


def loss_of(name, options, tensors):
    """The tgdpo.Loss of a loss of the table. tensors: {policy, ref, guide, lengths}, (chosen, rejected) each."""
    entry = LOSSES[name]
    settings = {option: getattr(options, option) for option in entry.options}
    return getattr(tgdpo, entry.function)(*(tensors[tensor] for tensor in entry.tensors), **settings)


def pack_loss(stage, options, logp, pack, indices, tally):
    """The loss of each pair of a pack: logp [R], indices of its pairs -> tgdpo.Loss of [B]; figures go to the tally."""
    tensors = {"policy": rows(logp, pack), "lengths": (pack.chosen_lengths, pack.rejected_lengths)}
    for name, frozen in (("ref", stage.ref), ("guide", stage.guide)):
        if frozen is not None:
            tensors[name] = rows(torch.cat([frozen[i] for i in indices]).to(logp.device), pack)  # [B, T] each
    result = loss_of(stage.loss, options, tensors)
    tally.add(result, tensors["lengths"])
    return result


@torch.no_grad()
def evaluate(run, net, stage, save):
    """The stage's figures on its evaluation pairs, and their per-token log-probs as log_probs gives them."""
    found = log_probs(run, net, stage.eval_pairs, "evaluation", save, side_job=True)
    return figures(run, stage, found), found


def figures(run, stage, logps):
    """The row of metrics of the evaluation pairs' log-probs `logps` under the stage's loss. Collective."""
    tally, mine = Tally(run.device, stage.ref is not None), range(run.rank, len(logps), run.world)
    for indices in (mine[k : k + 64] for k in range(0, len(mine), 64)):
        pack, logp = data.collate([stage.eval_pairs[i] for i in indices]), torch.cat([logps[i] for i in indices])
        pack_loss(stage, run.options, logp.to(run.device), pack, [len(stage.pairs) + i for i in indices], tally)
    return tally.row()


def judged(options, pairs, models):
    """tgdpo's numbers of each pair, in float64, for the final table and tokens.jsonl. models: {ref, guide, policy ->
    log-probs [C + R] of each pair, or None}. Yields, pair by pair, {model: the Loss with that model as the policy} and
    {ref, guide, policy, moved, reward, f, where there are such: (chosen [1, C], rejected [1, R])}."""
    for i, pair in enumerate(pairs):
        lengths = torch.tensor([[len(pair.chosen)], [len(pair.rejected)]])
        known = {name: logps[i].double()[None] for name, logps in models.items() if logps}
        tokens = {name: logp.split(lengths.flatten().tolist(), 1) for name, logp in known.items()}
        losses = {
            name: loss_of(options.loss, options, tokens | {"policy": model, "lengths": lengths})
            for name, model in tokens.items()
        }
        policy, ref, loss = tokens["policy"], tokens.get("ref"), losses["policy"]
        if ref:
            tokens["moved"] = tuple(map(tgdpo.token_log_ratios, policy, ref))
        if loss.r_hat:  # what the guide gives; without one, what the policy itself has come to give
            tokens |= {"reward": loss.r_hat, "f": loss.f}
        elif ref:
            tokens["reward"] = tuple(tgdpo.token_reward(p, r, options.beta) for p, r in zip(policy, ref))
        else:
            tokens["reward"] = tuple(tgdpo.mean_reward(p, n, options.beta) for p, n in zip(policy, lengths))
        yield losses, tokens


# ------------------------------------------------------------------------------------------------- one training


def learning_rate(options, step, total):
    """The rate of step `step` (from 0) of `total`: W warm-up steps rise linearly, step k of the N after them falls."""
    warmup = int(np.ceil(options.warmup_ratio * total))
    if step < warmup:
        return options.lr * (step + 1) / (warmup + 1)
    k, N = step - warmup, total - warmup
    shape = {"cosine": 0.5 * (1 + np.cos(np.pi * k / N)), "linear": 1 - k / N, "constant": 1.0}[options.schedule]
    return options.lr * float(shape)


def optimiser_step(run, net, optimiser, stage, batch):
    """One step on the pairs `batch` (indices): every pair weighs 1/len(batch), whatever rank or micro-batch it is in.
    Returns the row of metrics. Raises RunFailed before the optimiser takes a loss or a gradient that is not finite."""
    tally, losses = Tally(run.device, stage.ref is not None), []
    dealt = data.deal([size(stage.pairs[i]) for i in batch], run.world, run.plan.micro_tokens)[run.rank]
    for part in dealt:
        indices = [int(batch[k]) for k in part]
        pack = to_device(data.collate([stage.pairs[i] for i in indices] or [FILLER]), run.device)
        logp = net(pack.tokens, pack)  # [R]
        if indices:
            result = pack_loss(stage, run.options, logp, pack, indices, tally)
            losses.append((indices, result.losses.detach()))
            loss = result.losses.sum() * (run.world / len(batch))  # fully_shard averages over the ranks
        else:
            loss = logp.sum() * 0.0
        loss.backward()
    row = tally.row()
    grad_norm = clip_grad_norm_(net.parameters(), run.options.max_grad_norm)
    row["grad_norm"] = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
    refuse_not_finite(row, stage, batch, losses)
    optimiser.step()
    optimiser.zero_grad()
    return row


def refuse_not_finite(row, stage, batch, losses):
    """All ranks raise alike, since the row's figures are everyone's."""
    if np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]):
        return
    wrong = [
        stage.pairs[i].source
        for indices, values in losses
        for i, value in zip(indices, values.tolist())
        if not np.isfinite(value)
    ]
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, wrong)
    wrong = [source for share in shares for source in share]
    if wrong:
        raise RunFailed(f"the loss is not finite on {some(wrong)}")
    raise RunFailed(f"the gradient is not finite; the step's pairs are {some([stage.pairs[i].source for i in batch])}")


def refuse_lost_weights(net, when, checkpoints):
    """All ranks raise alike where the optimiser has made a weight that is not finite: it is not saved or exported."""
    finite = on_all_ranks(
        lambda: all(bool(shards.local_rows(parameter)[0].isfinite().all()) for parameter in net.parameters())
    )
    if not all(finite):
        last = on_rank_0(lambda: checkpoint.newest(checkpoints))
        raise RunFailed(
            f"{when}: the weights are no longer finite; the last checkpoint is {last or 'none'}; try a lower --lr"
        )


def train(run, stage, directory):
    """Train the model of `directory` by the stage's loss, from the newest checkpoint where one stands. Returns the
    model and the evaluation pairs' log-probs at the end (None without evaluation pairs)."""
    options = run.options
    net = sharded(directory, run)
    optimiser = torch.optim.AdamW(
        net.parameters(), lr=options.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=options.weight_decay, fused=True
    )
    (per_epoch, total), step = preview.steps(options, len(stage.pairs)), 0
    checkpoints = os.path.join(run.out, "checkpoints")
    tensors = training_state(net, optimiser)
    newest = on_rank_0(lambda: checkpoint.newest(checkpoints, say)) if options.resume else None
    if newest:
        state = checkpoint.load(newest, tensors, run.identity | {"stage": stage.loss})
        step = state["step"]
        set_adam_step(optimiser, step)
        if state["world_size"] == run.world:
            checkpoint.set_random_state(state["random"][run.rank])
        say(f"{stage.loss}: resumed from {newest}: step {step} of {total}", run.rank)
        if step == total:
            checkpoint.tidy(newest, options.keep)  # else the next save does it
    elif options.resume:
        say(f"{stage.loss}: nothing complete to resume from: starting from the beginning", run.rank)
    run.metrics.keep_until(stage.loss, step)
    saved = step

    def save():
        nonlocal saved
        if step != saved:
            net.reshard()  # in an evaluation the root is gathered, and its parameters are not the optimiser's
            refuse_lost_weights(net, f"{stage.loss} step {step}", checkpoints)
            epoch, position = divmod(step, per_epoch)
            checkpoint.save(
                checkpoints,
                step,
                training_state(net, optimiser),
                {
                    "identity": run.identity | {"stage": stage.loss},
                    "steps": total,
                    "epoch": epoch,
                    "position": position * options.batch_size,
                },
                options.keep,
            )
            saved = step
        return f"{stage.loss} step {step} of {total} is saved"

    stop_if_told(run, lambda: "nothing to save yet")  # from here on a signal waits for the end of a step
    bar = Progress(total, stage.loss, run.rank, start=step)
    found = None
    while True:
        if stage.eval_pairs and step and (step == total or options.eval_every and step % options.eval_every == 0):
            began = time.perf_counter()
            row, found = evaluate(run, net, stage, save)
            row |= flops.speed(run.device, run.world, stage.eval_pairs, began)
            run.metrics.write({"stage": stage.loss, "step": step, "eval": True} | row)
        if step == total:
            break
        began = time.perf_counter()
        epoch, position = divmod(step, per_epoch)
        order = data.epoch_order(len(stage.pairs), options.seed, epoch)
        batch = order[position * options.batch_size : (position + 1) * options.batch_size]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(options, step, total)
        try:
            row = optimiser_step(run, net, optimiser, stage, batch)
        except RunFailed as failure:
            last = on_rank_0(lambda: checkpoint.newest(checkpoints))
            mend = "a lower --lr or --alpha" if run.dtype == torch.float32 else "a lower --lr or --dtype float32"
            raise RunFailed(
                f"{stage.loss} step {step + 1}: {failure}; the optimiser did not take it; "
                f"the last checkpoint is {last or 'none'}; try {mend}"
            ) from None
        step += 1
        taken = [stage.pairs[i] for i in batch]
        row |= {"lr": group["lr"], **flops.speed(run.device, run.world, taken, began, net.config)}
        run.metrics.write({"stage": stage.loss, "step": step, "epoch": epoch + 1} | row)
        bar.advance(1, **{name: row[name] for name in SHOWN if name in row})
        if step == total or options.save_every and step % options.save_every == 0:
            save()
        stop_if_told(run, save)
    bar.close()
    return net, found


def training_state(net, optimiser):
    """Name -> tensor of all that a checkpoint holds: parameters and AdamW's two moments, made where missing."""
    tensors = {}
    for name, parameter in net.named_parameters():
        state = optimiser.state[parameter]
        if not state:
            state |= {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        tensors |= {
            f"model.{name}": parameter.detach(),
            f"exp_avg.{name}": state["exp_avg"],
            f"exp_avg_sq.{name}": state["exp_avg_sq"],
        }
    return tensors


def set_adam_step(optimiser, step):
    """AdamW counts its steps for the bias correction, one count a parameter."""
    for state in optimiser.state.values():
        state["step"].fill_(step)


def stop_if_told(run, save):
    """Follow a signal, where one came: save() saves what there is and says so in words; SIGUSR1 lets the run go on."""
    if signal := run.signals.agreed():
        run.signals.obey(signal, save())


def some(names):
    """The first five of a list in words."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ------------------------------------------------------------------------------------------------- the inputs


def found_model(name):
    """The directory of a model's name or Hub id. Rank 0 fetches it and checks its configuration and its tensors' names
    and shapes, then the other ranks find it, or fetch it, on the machine that they are on."""
    on_rank_0(lambda: model.check(hub.model_directory(name)))
    return on_all_ranks(lambda: hub.model_directory(name), patient=True)[dist.get_rank()]


def load_data(options, source, guide_source):
    """-> tokenizer, pairs, evaluation pairs, {"train": Counts, "eval": Counts}. Rank 0 reads the pairs for all."""
    loaded = []

    def load():
        loaded.append(load_tokenizer(source, options.chat_template))

    def read():
        (tokenizer,) = loaded
        for directory in filter(None, (source, guide_source)):
            if tokenizer.vocab_size > (size := model.read_config(directory).vocab_size):
                raise BadInput(
                    f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but "
                    f"the model only {size} embeddings; take the tokenizer that belongs to it"
                )
        if guide_source:
            same_vocabulary(tokenizer, load_tokenizer(guide_source, options.chat_template))
        limits = options.max_length, options.max_prompt_length, options.skip_bad_rows
        pairs, counts = data.load_pairs(files(options.data), tokenizer, *limits)
        counts = {"train": counts}
        eval_pairs = []
        if options.eval_data:
            eval_pairs, counts["eval"] = data.load_pairs(files(options.eval_data), tokenizer, *limits)
        elif options.eval_fraction:
            if len(pairs) == 1:
                raise BadInput(
                    f"--eval-fraction {options.eval_fraction}: there is only one pair, which is needed to "
                    "train on; leave it out, or give --eval-data"
                )
            kept = min(max(1, round(len(pairs) * (1 - options.eval_fraction))), len(pairs) - 1)
            mixed = [pairs[i] for i in data.epoch_order(len(pairs), options.seed, 0)]
            pairs, eval_pairs = mixed[:kept], mixed[kept:]
        return pairs, eval_pairs, counts

    def files(names):
        return [path for name in names for path in hub.data_files(name)]

    on_all_ranks(load, patient=True)
    return *loaded, *on_rank_0(read)


def describe(options, source, guide_source, tokenizer, pairs, eval_pairs, dtype):
    """What makes a run this run and no other: a checkpoint of another is refused, naming what differs."""
    settings = (
        "loss",
        "beta",
        "alpha",
        "gamma",
        "guide_beta",
        "lr",
        "epochs",
        "batch_size",
        "warmup_ratio",
        "schedule",
        "weight_decay",
        "max_grad_norm",
        "seed",
    )
    return {name: getattr(options, name) for name in settings} | {
        "data": data.fingerprint(pairs),
        "evaluation data": data.fingerprint(eval_pairs),
        "chat template": tokenizer.digest,
        "dtype": str(dtype),
        "model": cache.weights_digest(source),
        "guide": guide_source and cache.weights_digest(guide_source),
    }


# ----------------------------------------------------------------------------------------------------- the run


def whole_run(options, ranks, out):
    """Stage after stage, from the options to the exported policy and the report, all in the directory `out`."""
    source, guide_source = (found_model(name) if name else None for name in (options.model, options.guide))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        options.dtype, torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    )
    tokenizer, pairs, eval_pairs, counts = load_data(options, source, guide_source)
    plan, mesh = lay_out(options, ranks, source, dtype, max(size(pair) for pair in pairs + eval_pairs))
    contexts = {
        directory: model.read_config(directory).max_position_embeddings
        for directory in (source, guide_source)
        if directory
    }
    for line in preview.warnings(options, contexts, pairs, eval_pairs):
        say(line, ranks.rank)
    if options.dry_run:
        on_rank_0(
            lambda: preview.show(
                options, tokenizer, pairs, eval_pairs, counts, plan, ranks.world, model.read_config(source)
            )
        )
        return

    on_rank_0(lambda: results.foresee_space(out, options, model.read_config(source), dtype.itemsize, pairs, eval_pairs))
    if options.overwrite:
        on_rank_0(lambda: outdir.clear(out, options))
    identity = on_rank_0(lambda: describe(options, source, guide_source, tokenizer, pairs, eval_pairs, dtype))
    on_rank_0(lambda: results.begin(out, options, identity, counts, plan, ranks))
    run = Run(
        options,
        out,
        ranks.rank,
        ranks.world,
        ranks.device,
        mesh,
        dtype,
        plan,
        ranks.signals,
        Metrics(os.path.join(out, "metrics.jsonl"), ranks.rank),
        identity,
    )

    ref = guide = None
    if "ref" in LOSSES[options.loss].tensors:
        ref = cached_log_probs(run, "ref", source, pairs + eval_pairs, identity["model"])
    if "guide" in LOSSES[options.loss].tensors:
        if guide_source is None:
            guide_source, identity["guide"] = train_guide(run, Stage("dpo", pairs, eval_pairs, ref, None), source)
        guide = cached_log_probs(run, "guide", guide_source, pairs + eval_pairs, identity["guide"])
        if options.alpha is not None:
            say_alpha(run, pairs, ref, guide)
    stage = Stage(options.loss, pairs, eval_pairs, ref, guide)
    policy, final = train(run, stage, source)
    export(run, policy, os.path.join(out, "policy"), source)

    shown = eval_pairs or pairs
    if final is None:
        final = log_probs(run, policy, shown[: options.report_pairs], "log-probs of the policy")
    answers = {"policy": answer(run, policy, tokenizer, shown)}
    del policy
    release(run)
    for name, directory in (("guide", guide_source), ("reference", source)):
        if directory and options.samples:
            net = sharded(directory, run, frozen=True)
            answers[name] = answer(run, net, tokenizer, shown)
            del net
            release(run)
    part = slice(len(pairs), None) if eval_pairs else slice(len(final))
    models = {"ref": ref and ref[part], "guide": guide and guide[part], "policy": final}
    scored = shown[: len(final)]
    on_rank_0(lambda: results.finish(out, options, tokenizer, scored, judged(options, scored, models), answers))
    on_rank_0(lambda: report.write(out))
    say(f"the page:   {os.path.join(out, 'report.html')}", run.rank)


def lay_out(options, ranks, source, dtype, longest):
    """-> the memory plan and the mesh of ranks: one shard group, or with --hsdp N copies of groups of N."""
    group = options.hsdp or ranks.world
    if ranks.world % group:
        raise BadInput(f"--hsdp {group}: {ranks.world} ranks do not divide into groups of {group}")
    cuda = ranks.device.type == "cuda"
    room = torch.cuda.get_device_properties(ranks.device).total_memory if cuda else 0
    plan = memory.make(model.read_config(source), options, group, ranks.device.type, dtype.itemsize, longest, room)
    if options.hsdp:
        return plan, dist.init_device_mesh(
            ranks.device.type, (ranks.world // group, group), mesh_dim_names=("copies", "shards")
        )
    return plan, dist.init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("shards",))


def train_guide(run, stage, source):
    """Stage 1: a guide trained from the reference with DPO, kept as OUT/guide. -> its directory and digest."""
    directory = os.path.join(run.out, "guide")
    if new := not on_rank_0(lambda: results.has_guide(run.out)):
        guide, _ = train(run, stage, source)
        export(run, guide, directory, source)
        del guide
        release(run)
    digest = on_rank_0(lambda: results.same_guide(run.out, directory, new, model.check))
    on_rank_0(lambda: checkpoint.drop_stage(os.path.join(run.out, "checkpoints"), stage.loss))
    return directory, digest


def say_alpha(run, pairs, ref, guide):
    """Print the largest alpha that keeps f positive (derive.md), and warn where the chosen one exceeds it."""
    lengths = [n for pair in pairs for n in (len(pair.chosen), len(pair.rejected))]
    guide, ref = (torch.cat(logps[: len(pairs)]) for logps in (guide, ref))  # [R]
    parts = tgdpo.token_reward(guide, ref, run.options.guide_beta).split(lengths)
    r_hat_w, r_hat_l = torch.cat(parts[0::2]), torch.cat(parts[1::2])
    bounds = [tgdpo.largest_alpha(r_hat_w, r_hat_l, share) for share in (1.0, 0.99, 0.95)]
    say(
        "f stays positive on all tokens below alpha {:.3g}, on 99 % below {:.3g}, on 95 % below {:.3g}".format(*bounds),
        run.rank,
    )
    alpha = run.options.alpha
    if alpha >= bounds[0]:
        f = torch.cat([tgdpo.chosen_weight(r_hat_w, alpha), tgdpo.rejected_weight(r_hat_l, alpha)])
        say(
            f"warning: with alpha {alpha} f is not positive on {(f <= 0).double().mean():.2%} of the tokens, whose "
            "gradient turns its sign (derive.md, D13)",
            run.rank,
        )


def answer(run, net, tokenizer, pairs):
    """The likeliest answers to the first --samples different prompts: [(prompt, answer)] as text."""
    prompts = list(dict.fromkeys(tuple(pair.prompt.tolist()) for pair in pairs))[: run.options.samples]
    widest = max(map(len, prompts), default=0) + run.options.sample_tokens
    several, answers = max(1, run.plan.micro_tokens_forward // widest), []  # prompts at a time
    for asked in (prompts[k : k + several] for k in range(0, len(prompts), several)):
        new = model.generate(net, asked, run.options.sample_tokens, set(tokenizer.end_ids))
        answers += [
            (tokenizer.decode(prompt), tokenizer.decode([i for i in ids if i not in tokenizer.end_ids]))
            for prompt, ids in zip(asked, new)
        ]
        stop_if_told(run, lambda: "the policy is exported, the answers are not done")
    net.reshard()
    return answers


def main(argv=None):
    """Run the program. Returns its exit status: 0, 2 for bad input, 1 for a failure, 130 or 143 after a signal."""
    try:
        options = option_table.resolve(sys.argv[1:] if argv is None else argv)
    except BadInput as error:
        return complain(error, int(os.environ.get("LOCAL_RANK", "0") != "0"))
    ranks = out = None
    try:
        ranks = process_group.start(options.timeout_minutes)
        out = None if options.dry_run else outdir.claim(options)
        whole_run(options, ranks, out)
        return 0
    except Stopped as stop:
        return stop.status
    except Exception as error:
        status = complain(error, ranks.rank if ranks else 0)
        if out and isinstance(error, BadInput):
            outdir.withdraw(out)
        return status
    finally:
        process_group.stop()


def complain(error, rank):
    """Tell on standard error why the run ends, on the rank that knows. Returns the exit status.

    What is foreseen gets one line (several bad rows a line each), anything else its traceback."""
    alike = isinstance(error, (BadInput, RunFailed))  # the same on all ranks
    text, words = None, str(error) if isinstance(error, BadInput) else " ".join(str(error).split())
    if alike or isinstance(error, OSError):
        text = words
        if getattr(error, "errno", None) == errno.ENOSPC and not alike:
            text = f"{words}: the disk is full; free some of it and go on with --resume"
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in words:
        text = f"out of memory on rank {rank}: {words}; try a smaller --micro-tokens, more ranks or --cpu-offload"
    elif isinstance(error, dist.DistError) or "gloo" in words:
        text = (
            f"rank {rank} has lost the others: one of them has ended, which tells why, or was silent for "
            f"--timeout-minutes: {words}; --resume goes on from the last checkpoint"
        )
    if rank == getattr(error, "rank", 0 if alike else rank):
        tell(f"train.py: error: {text}".replace("\n", "\n  ") if text else "".join(traceback.format_exception(error)))
    return 2 if isinstance(error, BadInput) else 1


if __name__ == "__main__":
    sys.exit(main())
