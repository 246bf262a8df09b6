"""A stage on its way: how far it is, its checkpoints, and the signals it follows between two steps.

`run` is train.py's: options, out, rank, world, signals, metrics, samples and identity are read of it.
"""

import dataclasses
import os

import torch

from files.errors import BadInput
from runtime import checkpoint, outdir, shards
from runtime.failures import RunFailed
from runtime.losses import LOSSES
from runtime.process_group import on_all_ranks, on_rank_0
from runtime.progress import say


@dataclasses.dataclass
class Training:
    """A stage on its way: what a checkpoint holds, and how far it is."""

    loss: str  # of the stage: tgdpo, dpo or simpo
    net: torch.nn.Module
    optimiser: torch.optim.Optimizer
    per_epoch: int  # optimiser steps
    total: int  # of all epochs
    step: int = 0  # those done
    saved: int = 0  # the step that the newest checkpoint holds

    def __str__(self):
        return f"{self.loss} step {self.step} of {self.total}"


def due(training, every):
    """Whether something is done at this step that is done every so many steps (0: never) and at the end."""
    return training.step == training.total or bool(training.step and every and training.step % every == 0)


def resume(run, training):
    """Fill model and optimiser from the newest checkpoint, where --resume asks for it and one stands."""
    options, loss = run.options, training.loss
    newest = on_rank_0(lambda: checkpoint.newest(checkpoints_of(run), say)) if options.resume else None
    tensors = training_state(training.net, training.optimiser)
    if newest:
        state = checkpoint.load(newest, tensors, run.identity | {"stage": loss})
        if state["step"] > training.total:
            raise BadInput(f"{newest} is damaged: it is of step {state['step']} of {training.total}; remove it")
        training.step = training.saved = state["step"]
        for moments in training.optimiser.state.values():
            moments["step"].fill_(training.step)  # AdamW's own count, for the bias correction
        if state["world_size"] == run.world:
            checkpoint.set_random_state(state["random"][run.rank])
        say(f"{loss}: resumed from {newest}: step {training.step} of {training.total}", run.rank)
        if training.step == training.total:
            checkpoint.tidy(newest, options.keep)  # else the next save does it
    elif options.resume:
        say(f"{loss}: nothing complete to resume from: starting from the beginning", run.rank)
    for log in (run.metrics, run.samples):
        log.keep_until(loss, training.step)


def save(run, training):
    """Write a checkpoint, unless the newest is of this step. Raises RunFailed where weights are no longer finite."""
    if training.step == training.saved:
        return
    shards.let_go(training.net)  # in an evaluation the root is gathered, and its parameters are not the optimiser's
    finite = on_all_ranks(
        lambda: all(
            bool(shards.local_rows(p)[0].isfinite().all()) for p in training.net.parameters() if p.requires_grad
        )
    )
    if not all(finite):
        raise RunFailed(
            f"{training.loss} step {training.step}: the weights are no longer finite; "
            f"the last checkpoint is {last_checkpoint(run)}; try a lower --lr"
        )
    epoch, position = divmod(training.step, training.per_epoch)
    state = {
        "identity": run.identity | {"stage": training.loss},
        "steps": training.total,
        "epoch": epoch,
        "position": position * run.options.batch_size,
    }
    tensors = training_state(training.net, training.optimiser)
    on_rank_0(lambda: outdir.check(run.out))
    for log in (run.metrics, run.samples):
        on_rank_0(log.sync)  # a resumed run's metrics are then those of the run never stopped
    checkpoint.save(checkpoints_of(run), training.step, tensors, state, run.options.keep)
    training.saved = training.step


def not_taken(run, training, failure):
    """The RunFailed of a step that failed before the optimiser took it: which, and what to try. Collective."""
    mend = "a lower --lr, --beta or --alpha" if LOSSES[training.loss].reads("alpha") else "a lower --lr or --beta"
    mend += "" if run.dtype == torch.float32 else ", or --dtype float32"
    return RunFailed(
        f"{training.loss} step {training.step + 1}: {failure}; the optimiser did not take it; "
        f"the last checkpoint is {last_checkpoint(run)}; try {mend}"
    )


def heed(run, training):
    """Follow a signal, with the step just done saved first."""
    stop_if_told(run, lambda: save(run, training), f"{training} is saved")


def stop_if_told(run, save=lambda: None, state="what was saved before stands"):
    """Follow a signal, where one came: save() saves what there is, then `state` says so. SIGUSR1 lets the run go on."""
    if signal := run.signals.agreed():
        save()
        run.signals.obey(signal, state)


def checkpoints_of(run):
    """The directory of a run's checkpoints."""
    return os.path.join(run.out, "checkpoints")


def last_checkpoint(run):
    """Its path, or "none". Collective."""
    return on_rank_0(lambda: checkpoint.newest(checkpoints_of(run))) or "none"


def training_state(net, optimiser):
    """Name -> tensor of all that a checkpoint holds: the parameters that are trained and AdamW's two moments of each,
    made where missing."""
    tensors = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
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
