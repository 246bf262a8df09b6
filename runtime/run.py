"""A run before it trains: what it is, what it may hold, what is written down of it; and the models that it exports."""

import dataclasses
import os
import shlex
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from files.card import model_card
from files.errors import BadInput
from files.export import as_used, save_model, tokenizer_files
from files.tokenizer import ChatTokenizer
from files.weights import check_finite
from runtime import cache, disk, gpu, lora, memory, outdir, preview, process_group, results, signals
from runtime import options as option_table
from runtime import sinks as sink_files
from runtime.metrics import Metrics
from runtime.parts import read
from runtime.process_group import on_rank_0
from runtime.progress import say

SETTINGS = (
    "loss beta alpha gamma guide_beta lr epochs batch_size warmup_ratio schedule weight_decay max_grad_norm seed"
).split()


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
    samples: Metrics
    identity: dict  # what a checkpoint must agree with: data, model, loss, template, settings
    beside: tuple  # what as_used gives for an exported model: config.json, and the texts that change beside it
    tokenizer: ChatTokenizer


def describe(options, inputs, dtype, fingerprint):
    """What makes a run this run and no other: a checkpoint of another is refused, naming what differs. fingerprint:
    data.fingerprint."""
    return {name: getattr(options, name) for name in SETTINGS} | {
        "with": read(options.with_) or None,
        "centred guidance": options.centre_guidance or None,
        "max steps": options.max_steps or None,
        "lora rank": options.lora_rank or None,
        "lora alpha": options.lora_alpha if options.lora_rank else None,
        "data": fingerprint(inputs.pairs),
        "evaluation data": fingerprint(inputs.eval_pairs),
        "chat template": inputs.tokenizer.digest,
        "dtype": str(dtype),
        "model": cache.weights_digest(inputs.source),
        "guide": inputs.guide and cache.weights_digest(inputs.guide),
    }


def begin(options, ranks, out, inputs, read_config, fingerprint):
    """The run, laid out and written down in `out`. None where nothing is to be done: with --dry-run it is shown, and
    what --resume finds ended well with --keep 0 is said to be. read_config: model's; fingerprint: data's."""
    dtype = gpu.compute_type(ranks.device, options.dtype)
    config, (source, guide, _, pairs, eval_pairs, counts) = read_config(inputs.source), inputs
    plan, mesh = lay_out(options, ranks, config, dtype, max(pair.packed for pair in pairs + eval_pairs))
    contexts = {name: read_config(name).max_position_embeddings for name in (source, guide) if name}
    beside = on_rank_0(lambda: as_used(inputs.source, inputs.tokenizer))
    ahead = [] if options.dry_run or options.resume else preview.stages(options, len(pairs))
    for line in ahead + preview.warnings(options, contexts, pairs, eval_pairs) + memory.warnings(plan, ranks.here):
        say(line, ranks.rank)
    if options.dry_run:
        on_rank_0(lambda: preview.show(options, inputs.tokenizer, pairs, eval_pairs, counts, plan, ranks.world, config))
        return None

    sinks = sink_files.Sinks(out, options.log_to)
    process_group.held.callback(sinks.close)

    def write_down():
        identity = describe(options, inputs, dtype, fingerprint)
        if options.resume and results.is_over(out, identity):
            return None
        results.foresee_space(out, options, config, dtype.itemsize, pairs, eval_pairs)
        if options.overwrite and outdir.results_in(out):
            for directory in filter(None, (source, guide)):
                check_finite(directory)  # before what stands there is removed for it
            sinks.open(dataclasses.asdict(options))  # and so does what one of them may refuse
            outdir.clear(out, options)
        results.begin(out, options, identity, counts, plan, ranks)
        return identity

    identity = on_rank_0(write_down)
    if identity is None:
        return None
    on_rank_0(lambda: sinks.open(dataclasses.asdict(options)))
    logs = [Metrics(os.path.join(out, name), ranks.rank, sinks) for name in ("metrics.jsonl", "samples.jsonl")]
    return Run(options, out, *ranks[:3], mesh, dtype, plan, ranks.signals, *logs, identity, beside, inputs.tokenizer)


def lay_out(options, ranks, config, dtype, longest):
    """-> the memory plan and the mesh of ranks: one shard group, or with --hsdp N copies of groups of N."""
    group, kind = options.hsdp or ranks.world, ranks.device.type
    if ranks.world % group:
        raise BadInput(f"--hsdp {group}: {ranks.world} ranks do not divide into groups of {group}")
    room = torch.cuda.get_device_properties(ranks.device).total_memory if kind == "cuda" else 0
    compiled, why_not = options.compile, gpu.why_no_compile(kind) if options.compile or kind == "cuda" else None
    if compiled and why_not:
        raise BadInput(f"--compile: {why_not}; install it, or leave --compile out")
    if kind == "cuda" and compiled is None and why_not:
        say(f"not compiled, which would be faster: {why_not}", ranks.rank)
    alone, can_compile = ranks.world == 1 and kind == "cpu" and dtype == torch.float32, kind == "cuda" and not why_not
    plan = memory.make(config, options, group, kind, dtype.itemsize, longest, room, can_compile, alone)
    if options.hsdp:
        return plan, dist.init_device_mesh(kind, (ranks.world // group, group), mesh_dim_names=("copies", "shards"))
    return plan, dist.init_device_mesh(kind, (ranks.world,), mesh_dim_names=("shards",))


def told(options, loss):
    """What a model's card says of the options by which `loss` trained it: a guide is plain DPO, without parts."""
    last = loss == options.loss
    parts = [name if number is None else f"{name}={number:g}" for name, number in read(options.with_).items() if last]
    settings = [f"the parts {' '.join(parts)}"] if parts else []
    settings += ["centred guidance"] if last and options.centre_guidance else []
    rank, alpha = options.lora_rank, options.lora_alpha
    return settings + ([f"merged adapters (LoRA) of rank {rank} and alpha {alpha:g}"] if rank else [])


def export(run, net, directory, source, loss):
    """Write a model that `loss` trained in Hugging Face layout, gathered and written tensor by tensor."""
    shapes, adapters = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}, lora.names(net)
    shapes = {name: shape for name, shape in shapes.items() if name not in adapters}
    stream = lora.merged(net, run.dtype, run.rank == 0)
    width = 4 if run.dtype == torch.float32 else 2

    def write():
        outdir.check(run.out)
        disk.need_space(run.out, width * sum(np.prod(shape) for shape in shapes.values()), directory)
        (config, texts), command = run.beside, shlex.join(["python", *sys.argv])
        card = model_card(loss, run.options.model, run.options.data, source, command, told(run.options, loss))
        copies = tokenizer_files(source)
        save_model(directory, config, shapes, stream, run.dtype, copies, texts | {"README.md": card})

    def drain():
        for _ in stream:
            pass

    on_rank_0(write, meanwhile=drain)  # the others gather along, even where rank 0 fails half way
    say(f"exported: {directory}", run.rank)
