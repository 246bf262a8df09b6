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

import os
import sys

if __name__ == "__main__" and (here := os.path.dirname(os.path.abspath(__file__))) not in sys.path:
    sys.path.insert(0, here)  # which python -P and -I leave out

from runtime import supported

if __name__ == "__main__":
    supported.end_at_once_when_told()  # first of all
    supported.check()  # before anything is imported that another system lacks
    from runtime import allocator

    allocator.prepare()  # before torch takes memory

from runtime import options as option_table

if __name__ == "__main__":
    option_table.answer_early(sys.argv[1:])  # --help and a mistyped option need no torch

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

import data
import model
import tgdpo
from files.errors import BadInput, some
from kernels.log_probs import token_divergences
from runtime import cache, checkpoint, flops, lora, outdir, preview, process_group, results, sinks
from runtime.answers import answer, write_samples
from runtime.failures import RunFailed, Stopped, complain
from runtime.inputs import Inputs, read_inputs
from runtime.losses import LOSSES
from runtime.options import Options
from runtime.parts import PARTS, read
from runtime.process_group import on_all_ranks, on_rank_0
from runtime.progress import Progress, say, shown, words
from runtime.run import Run, begin, export
from runtime.shards import let_go, local_rows
from runtime.tally import Tally, refuse_not_finite
from runtime.training import Training, checkpoints_of, due, heed, not_taken, resume, save, stop_if_told

try:
    from neighbours import parts as neighbours
except ImportError:
    neighbours = None  # only --with needs it
try:
    from report import report
except ImportError:
    report = None  # the page is not needed to train


class Stage(NamedTuple):
    """One training: the policy starts from the reference and learns from `pairs` by one loss."""

    loss: str  # its name in runtime/losses.py
    pairs: list[data.Pair]
    eval_pairs: list[data.Pair]
    ref: list[Tensor] | None  # per pair of pairs + eval_pairs: log-probs [C + R], chosen then rejected
    guide: list[Tensor] | None


# ------------------------------------------------------------------------------------------------- the models


def sharded(directory: str, run: Run, frozen: bool = False) -> model.CausalLM:
    """The model of `directory`, sharded over the ranks: meta device, fully_shard of each block and of the root, then
    each rank reads its own rows. Float32 master shards where it trains, the compute type where it is frozen; with
    --lora-rank only adapters train."""
    rank, alpha = (0, 0) if frozen else (run.options.lora_rank, run.options.lora_alpha)
    with torch.device("meta"):
        net = model.CausalLM(model.read_config(directory))
    if frozen or rank:
        net.to(run.dtype).requires_grad_(False)
    if rank:
        lora.add(net, rank, alpha)
    for number, layer in enumerate(net.model.layers):
        layer.recompute = not frozen and run.plan.recomputes(number)
        if run.plan.compile:
            torch._dynamo.config.recompile_limit = 64  # where sizes are not told apart at once
            layer.compile()
    net.compiled = run.plan.compile
    offload = CPUOffloadPolicy() if run.options.cpu_offload and run.device.type == "cuda" else OffloadPolicy()
    types = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    reshard = False if run.plan.cast_once and not frozen else None  # None: of each block, not of the root
    for module in (*net.model.layers, net) if not run.plan.alone else ():
        fully_shard(module, mesh=run.mesh, offload_policy=offload, mp_policy=types, reshard_after_forward=reshard)
    net.to_empty(device="cpu" if isinstance(offload, CPUOffloadPolicy) else run.device)
    with lora.aside(net):
        on_all_ranks(lambda: model.load_weights(net, directory, local_rows))
    lora.start(net, run.options.seed)
    return net


def release(run: Run) -> None:
    """Give the memory of dropped models back. The caller lets go of its last reference first."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------- log-probs and the guidance


@torch.no_grad()
def log_probs(
    run: Run,
    net: model.CausalLM,
    pairs: list[data.Pair],
    title: str,
    heed: Callable[[Run], None] = stop_if_told,
    side_job: bool = False,
    guide: model.CausalLM | None = None,
) -> list[Tensor]:
    """Per-token log-probs of every pair's responses, [C + R] each, on the CPU; with a guide, KL(net || guide) at each
    token's state instead. The pairs are shared out among the ranks in large packs. No random number is drawn.
    heed: called with the run after each pack, to follow signals."""
    mine = {}
    bar = Progress(len(pairs), title, run.rank, side_job=side_job)
    for indices in data.shares([pair.packed for pair in pairs], run.rank, run.world, run.plan.micro_tokens_forward):
        pack = data.collate([pairs[i] for i in indices]).to(run.device)
        if guide is None:
            logp = net(pack.tokens, pack).cpu()  # [R]
        else:
            both = (*net(pack.tokens, pack, states=True), *guide(pack.tokens, pack, states=True))
            logp = token_divergences(*both).cpu()  # [R]
            del both
        if indices:
            mine |= zip(indices, (part.clone() for part in logp.split([pairs[i].scored for i in indices])))
        bar.advance(len(indices) * run.world)
        heed(run)
    bar.close()
    for model_read in filter(None, (net, guide)):
        let_go(model_read)  # without a backward pass the root would stay gathered
    found = {index: logp for share in on_all_ranks(lambda: mine) for index, logp in share.items()}
    return [found[index] for index in range(len(pairs))]


def cached_log_probs(
    run: Run, kind: str, directory: str, pairs: list[data.Pair], digest: str | None = None, guide: str | None = None
) -> list[Tensor]:
    """log_probs of a frozen model, from OUT/cache where its key matches: weights, data, tokenisation, dtype. digest: of
    its weights, where it is known. guide: the directory of the model against which KL is asked for, `kind` "centre";
    both models are in memory then, in the compute type: less than one model in training, more than one with adapters.
    """
    title = "divergences of the reference from the guide" if guide else f"log-probs of the {kind}"

    def find():
        net, second = sharded(directory, run, frozen=True), guide and sharded(guide, run, frozen=True)
        found = log_probs(run, net, pairs, title, guide=second)
        del net, second
        release(run)
        wrong = [pair.source for pair, logp in zip(pairs, found) if not logp.isfinite().all()]
        if wrong:
            raise RunFailed(f"the {kind}'s log-probs are not finite on {some(wrong)}; try --dtype float32")
        return torch.cat(found)

    def parts():
        weights = digest or cache.weights_digest(directory)
        known = {"weights": weights, "pairs": data.fingerprint(pairs), "dtype": str(run.dtype)}
        return known | ({"guide": run.identity["guide"]} if guide else {})

    lengths = [pair.scored for pair in pairs]
    return list(cache.kept(run, kind, parts, sum(lengths), find, title).split(lengths))


# -------------------------------------------------------------------------------------------------- the losses


def loss_of(name: str, options: Options, tensors: dict[str, tuple]) -> tgdpo.Loss:
    """The tgdpo.Loss of a loss of the table. tensors: {policy, ref, guide, lengths}, (chosen, rejected) each. Parts of
    --with belong to the last stage: a guide is trained without."""
    entry = LOSSES[name]
    settings = {option: getattr(options, option) for option in entry.options}
    if options.with_ and name == options.loss:
        parts = [
            neighbours.Chosen(PARTS[part].kind, getattr(neighbours, PARTS[part].function), PARTS[part].takes, number)
            for part, number in read(options.with_).items()
        ]
        models = (tensors["policy"], tensors["ref"], tensors["guide"] if "guide" in entry.tensors else None)
        return neighbours.composed(parts, *models, tensors["lengths"], **settings)
    return getattr(tgdpo, entry.function)(*(tensors[tensor] for tensor in entry.tensors), **settings)


def pack_loss(
    stage: Stage, options: Options, logp: Tensor, pack: data.Pack, indices: list[int], tally: Tally
) -> tgdpo.Loss:
    """The loss of each pair of a pack, in training times its weight: logp [R], indices of its pairs -> tgdpo.Loss of
    [B]; figures go to the tally."""
    tensors = {"policy": pack.sides(logp), "lengths": (pack.chosen_lengths, pack.rejected_lengths)}
    for name, frozen in (("ref", stage.ref), ("guide", stage.guide)):
        if frozen is not None:
            tensors[name] = pack.sides(data.moved(torch.cat([frozen[i] for i in indices]), logp.device))  # [B, T] each
    result = loss_of(stage.loss, options, tensors)
    weights = [stage.pairs[i].weight if i < len(stage.pairs) else 1.0 for i in indices]  # evaluation knows none
    result = result._replace(losses=data.moved(torch.tensor(weights), logp.device) * result.losses)
    tally.add(result, tensors["lengths"])
    return result


@torch.no_grad()
def figures(run: Run, stage: Stage, logps: list[Tensor]) -> dict[str, float]:
    """The row of metrics of the evaluation pairs' log-probs `logps` under the stage's loss. Collective."""
    tally, mine = Tally(run.device, stage.ref is not None), range(run.rank, len(logps), run.world)
    for indices in (mine[k : k + 64] for k in range(0, len(mine), 64)):
        pack, logp = data.collate([stage.eval_pairs[i] for i in indices]), torch.cat([logps[i] for i in indices])
        pack_loss(stage, run.options, logp.to(run.device), pack, [len(stage.pairs) + i for i in indices], tally)
    return tally.row()


def judged(options: Options, pairs: list[data.Pair], models: dict[str, list | None]) -> Iterator[tuple[dict, dict]]:
    """tgdpo's numbers of each pair, in float64, for the final table and tokens.jsonl. models: {ref, guide, policy ->
    log-probs [C + R] of each pair, or None; centre -> KL(ref || guide) alike}. Yields, pair by pair, {model: the Loss
    with that model as the policy} and {ref, guide, policy, moved, reward, f, where there are such: (chosen [1, C],
    rejected [1, R])}."""
    for i, pair in enumerate(pairs):
        lengths = torch.tensor([[len(pair.chosen)], [len(pair.rejected)]])
        known = {name: logps[i].double()[None] for name, logps in models.items() if logps}
        tokens = {name: logp.split(lengths.flatten().tolist(), 1) for name, logp in known.items()}
        given = tokens | {"lengths": lengths}
        if centre := tokens.pop("centre", None):
            given["guide"] = tuple(map(tgdpo.centred_guide, tokens["guide"], centre))
        losses = {name: loss_of(options.loss, options, given | {"policy": net}) for name, net in tokens.items()}
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


def learning_rate(options: Options, step: int, total: int) -> float:
    """The rate of step `step` (from 0) of `total`: W warm-up steps rise linearly, step k of the N after them falls."""
    warmup = int(np.ceil(options.warmup_ratio * total))
    if step < warmup:
        return options.lr * (step + 1) / (warmup + 1)
    k, N = step - warmup, total - warmup
    shape = {"cosine": 0.5 * (1 + np.cos(np.pi * k / N)), "linear": 1 - k / N, "constant": 1.0}[options.schedule]
    return options.lr * float(shape)


def optimiser_step(
    run: Run, net: model.CausalLM, optimiser: torch.optim.Optimizer, stage: Stage, batch: Sequence[int]
) -> dict[str, float]:
    """One step on the pairs `batch` (indices): every pair weighs 1/len(batch) (times its own weight), whatever
    rank or micro-batch it is in. Returns the row of metrics. Raises RunFailed before the optimiser takes a loss or a
    gradient that is not finite."""
    tally, losses = Tally(run.device, stage.ref is not None), []
    dealt = data.deal([stage.pairs[i].packed for i in batch], run.world, run.plan.micro_tokens)[run.rank]
    for number, part in enumerate(dealt, 1):
        if run.plan.cast_once:
            net.set_reshard_after_backward(number == len(dealt))
        indices = [int(batch[k]) for k in part]
        pack = data.collate([stage.pairs[i] for i in indices]).to(run.device)
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
    refuse_not_finite(row, losses, [pair.source for pair in stage.pairs], batch)
    optimiser.step()
    optimiser.zero_grad()
    return row


def train(run: Run, stage: Stage, directory: str) -> tuple[model.CausalLM, list[Tensor] | None]:
    """Train the model of `directory` by the stage's loss, from the newest checkpoint where one stands. Returns the
    model and the evaluation pairs' log-probs at the end (None without evaluation pairs)."""
    options, net = run.options, sharded(directory, run)
    optimiser = torch.optim.AdamW(
        net.parameters(), lr=options.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=options.weight_decay, fused=True
    )
    training = Training(stage.loss, net, optimiser, *preview.steps(options, len(stage.pairs)))
    say(preview.stages(options, len(stage.pairs))[-1 if stage.loss == options.loss else 0], run.rank)
    resume(run, training)
    stop_if_told(run, state="nothing to save yet")  # from here on a signal waits for the end of a step
    bar, final = Progress(training.total, stage.loss, run.rank, start=training.step), None
    while True:
        if stage.eval_pairs and due(training, options.eval_every):
            final = evaluate(run, stage, training)
        over = training.step == training.total
        if options.sample_every and due(training, options.sample_every) and not (over and stage.loss == options.loss):
            sample(run, stage, training)  # the policy's last answers come after its export
        if over:
            break
        row = next_step(run, stage, training)
        bar.advance(1, **shown(row))
        if due(training, options.save_every):
            save(run, training)
        heed(run, training)
    bar.close()
    on_rank_0(run.metrics.sync)  # the last evaluation too is on the disk before a model that nobody evaluates again
    return net, final


def next_step(run: Run, stage: Stage, training: Training) -> dict[str, float]:
    """The next optimiser step, with its pairs and its learning rate. Returns the row of metrics, written down."""
    options, began = run.options, time.perf_counter()
    epoch, position = divmod(training.step, training.per_epoch)
    order = data.epoch_order(len(stage.pairs), options.seed, epoch)
    batch = order[position * options.batch_size : (position + 1) * options.batch_size]
    rate = learning_rate(options, training.step, training.total)
    for parameters in training.optimiser.param_groups:
        parameters["lr"] = rate
    try:
        row = optimiser_step(run, training.net, training.optimiser, stage, batch)
    except RunFailed as failure:
        raise not_taken(run, training, failure) from None
    training.step += 1
    taken = [stage.pairs[i] for i in batch]
    config = training.net.config
    row |= {"lr": rate, **flops.speed(run.device, run.world, taken, began, config, options.lora_rank)}
    run.metrics.write({"stage": stage.loss, "step": training.step, "epoch": epoch + 1} | row)
    return row


def sample(run: Run, stage: Stage, training: Training) -> None:
    """Write down what the model on its way answers."""
    answers = answer(run, training.net, stage, lambda run: heed(run, training))
    write_samples(run, stage.loss, training.step, answers)


def evaluate(run: Run, stage: Stage, training: Training) -> list[Tensor]:
    """Write the figures of the stage's evaluation pairs down. Returns their log-probs, as log_probs gives them."""
    began = time.perf_counter()
    found = log_probs(run, training.net, stage.eval_pairs, "evaluation", lambda run: heed(run, training), side_job=True)
    row = figures(run, stage, found) | flops.speed(run.device, run.world, stage.eval_pairs, began)
    run.metrics.write({"stage": stage.loss, "step": training.step, "eval": True} | row)
    say(f"{stage.loss} {training.step}/{training.total} held out  {words(shown(row))}", run.rank)
    return found


# ----------------------------------------------------------------------------------------------------- the run


def whole_run(options: Options, ranks: process_group.Ranks, out: str) -> None:
    """Guide, guidance, policy: from the options to exported models and the page, all in the directory `out`."""
    if options.with_ and not neighbours:
        raise BadInput("--with: the folder neighbours/ is not here; copy it from the repository, or leave --with out")
    on_rank_0(lambda: sinks.check(options.log_to))
    inputs = read_inputs(options, model.check, data.load_pairs, data.held_back)
    run = begin(options, ranks, out, inputs, model.read_config, data.fingerprint)
    if run is None:  # it was shown, or it is over
        return
    pairs, eval_pairs, needs = inputs.pairs, inputs.eval_pairs, LOSSES[options.loss].tensors
    ref = guide = centred = centre = guide_source = None
    if "ref" in needs:
        ref = cached_log_probs(run, "ref", inputs.source, pairs + eval_pairs, run.identity["model"])
    if "guide" in needs:
        guide_source = inputs.guide or train_guide(run, inputs, ref)
        centred = guide = cached_log_probs(run, "guide", guide_source, pairs + eval_pairs, run.identity["guide"])
        if options.centre_guidance:
            models = {"digest": run.identity["model"], "guide": guide_source}
            centre = cached_log_probs(run, "centre", inputs.source, pairs + eval_pairs, **models)
            centred = list(map(tgdpo.centred_guide, guide, centre))
        say_guide(run, pairs, ref, guide)
        if options.alpha is not None and "clip" not in read(options.with_):
            say_alpha(run, pairs, ref, centred)
    policy, answers = train_policy(run, inputs, Stage(options.loss, pairs, eval_pairs, ref, centred))
    release(run)
    tell_results(run, inputs, {"ref": ref, "guide": guide, "centre": centre, "policy": policy}, answers, guide_source)


def train_guide(run: Run, inputs: Inputs, ref: list[Tensor]) -> str:
    """Stage 1: a guide trained from the reference with DPO, kept as OUT/guide. Returns its directory."""
    directory = os.path.join(run.out, "guide")
    if new := not on_rank_0(lambda: results.has_guide(run.out, model.check)):
        guide, _ = train(run, Stage("dpo", inputs.pairs, inputs.eval_pairs, ref, None), inputs.source)
        export(run, guide, directory, inputs.source, "dpo")
        del guide
        release(run)
    run.identity["guide"] = on_rank_0(lambda: results.same_guide(run.out, directory, new, model.check))
    on_rank_0(lambda: checkpoint.drop_stage(checkpoints_of(run), "dpo"))
    return directory


def say_guide(run: Run, pairs: list[data.Pair], ref: list[Tensor], guide: list[Tensor]) -> None:
    """Warn where the guide ranks the training pairs worse than chance. Collective."""
    right = figures(run, Stage("dpo", [], pairs, ref, None), guide[: len(pairs)])["dpo_accuracy"]
    for line in preview.guide_warning(right):
        say(line, run.rank)


def say_alpha(run: Run, pairs: list[data.Pair], ref: list[Tensor], guide: list[Tensor]) -> None:
    """Print the largest alpha that keeps f positive (derive.md, D13), and warn where the chosen one exceeds it."""
    lengths, alpha = [n for pair in pairs for n in (len(pair.chosen), len(pair.rejected))], run.options.alpha
    guide, ref = (torch.cat(logps[: len(pairs)]) for logps in (guide, ref))  # [R]
    parts = tgdpo.token_reward(guide, ref, run.options.guide_beta).split(lengths)
    r_hat_w, r_hat_l = torch.cat(parts[0::2]), torch.cat(parts[1::2])
    bounds = [tgdpo.largest_alpha(r_hat_w, r_hat_l, share) for share in (1.0, 0.99, 0.95)]
    f = torch.cat([tgdpo.chosen_weight(r_hat_w, alpha), tgdpo.rejected_weight(r_hat_l, alpha)])
    for line in preview.alpha_advice(alpha, bounds, float((f <= 0).double().mean())):
        say(line, run.rank)


def train_policy(run: Run, inputs: Inputs, stage: Stage) -> tuple[list[Tensor], list]:
    """The last stage: the policy, kept as OUT/policy. Returns its log-probs of the pairs shown, and its answers."""
    policy, logps = train(run, stage, inputs.source)
    export(run, policy, os.path.join(run.out, "policy"), inputs.source, stage.loss)
    if run.options.lora_rank:
        lora.save(policy, os.path.join(run.out, "adapter"), run.options.model)
    if logps is None:
        logps = log_probs(run, policy, inputs.pairs[: run.options.report_pairs], "log-probs of the policy")
    answers = answer(run, policy, inputs)
    write_samples(run, stage.loss, preview.steps(run.options, len(stage.pairs))[1], answers)
    return logps, answers


def tell_results(run: Run, inputs: Inputs, logps: dict, answers: list, guide_source: str | None) -> None:
    """The end of a run: the other models' answers, the table, tokens.jsonl and the page.

    logps: log-probs by model: the policy's of the pairs shown, the frozen ones' of all pairs (None: there is none)."""
    answers = {"policy": answers}
    for name, directory in (("guide", guide_source), ("reference", inputs.source)):
        if directory and run.options.samples:
            net = sharded(directory, run, frozen=True)
            answers[name] = answer(run, net, inputs)
            del net
            release(run)
    part = slice(len(inputs.pairs), None) if inputs.eval_pairs else slice(len(logps["policy"]))
    logps |= {name: logps[name] and logps[name][part] for name in ("ref", "guide", "centre")}
    pairs = (inputs.eval_pairs or inputs.pairs)[: len(logps["policy"])]
    judgements = judged(run.options, pairs, logps)
    run.signals.finish()
    bundled = run.options.model == str(option_table.TINY / "model")
    gold = on_rank_0(lambda: true_rewards(run, inputs, guide_source)) if bundled else {}
    on_rank_0(lambda: results.finish(run.out, run.options, inputs.tokenizer, pairs, judgements, answers, gold))
    if report:
        on_rank_0(lambda: report.write(run.out))
        say(f"the page:   {os.path.join(run.out, 'report.html')}", run.rank)
    on_rank_0(lambda: results.end(run.out, run.options))


def true_rewards(run: Run, inputs: Inputs, guide_source: str | None) -> dict[str, dict]:
    """What the bundled example knows of its models' replies, for the table; {} without the folder examples/."""
    try:
        from examples.tiny.gold import gold_figures
    except ImportError:
        return {}
    models = {"ref": inputs.source, "guide": guide_source, "policy": os.path.join(run.out, "policy")}
    return gold_figures(inputs, models, run.options.sample_tokens)


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns its exit status: 0, 2 for bad input, 1 for a failure, 128 + N after signal N."""
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


if __name__ == "__main__":
    supported.end(main())
