"""This project: train.py's own functions on a benchmark's pairs, without a tokenizer, checkpoints or a report."""

import contextlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime import allocator

allocator.prepare()  # as train.py does when it is started

import torch

import model
import train as trainer
from runtime import options as option_table
from runtime import process_group
from runtime.run import Run, lay_out

LR = 1e-4


def train(policy_dir, guide_dir, pairs, batch, after_step, *, device="cpu", **options):
    """Trains on `pairs`, `batch` of them a step; after_step(loss) after each step. options: train.py's.

    after_step(None) comes once before the first step, when the guidance stands and the policy is loaded: what
    precedes it is what a cold cache costs.
    """
    with a_run(policy_dir, pairs, device, **options) as run:
        ref = trainer.cached_log_probs(run, "ref", policy_dir, pairs)
        tgdpo = run.options.loss == "tgdpo"
        guide = trainer.cached_log_probs(run, "guide", guide_dir, pairs) if tgdpo else None
        stage = trainer.Stage(run.options.loss, pairs, [], ref, guide)
        net, optimiser = policy(run, policy_dir)
        after_step(None)
        for start in range(0, len(pairs), batch):
            step = range(start, min(start + batch, len(pairs)))
            after_step(trainer.optimiser_step(run, net, optimiser, stage, step)["loss"])


def policy(run, directory):
    """The sharded policy and its optimiser, as train.py makes them."""
    net = trainer.sharded(directory, run)
    return net, torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, fused=True)


@contextlib.contextmanager
def a_run(directory, pairs, device="cpu", **options):
    """A Run of the model in `directory` on a process group of its own, whose files vanish with it."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += {True: ["--" + flag], False: ["--no-" + flag]}.get(value, ["--" + flag, str(value)])
    options = option_table.resolve(["--model", str(directory), "--lr", str(LR), *words])
    ranks = process_group.start(options.timeout_minutes, device)
    try:
        dtype = torch.bfloat16 if device == "cuda" and options.dtype != "float32" else torch.float32
        longest = max(pair.packed for pair in pairs)
        plan, mesh = lay_out(options, ranks, model.read_config(directory), dtype, longest)
        with tempfile.TemporaryDirectory() as out:
            yield Run(
                options,
                out,
                ranks.rank,
                ranks.world,
                ranks.device,
                mesh,
                dtype,
                plan,
                ranks.signals,
                None,
                None,
                {},
                (),
                None,
            )
    finally:
        process_group.stop()
