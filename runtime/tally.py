"""The figures of one optimiser step or one evaluation: summed over micro-batches and ranks, then one row of metrics."""

import math

import torch
import torch.distributed as dist

from files.errors import some
from runtime.failures import RunFailed
from runtime.process_group import on_all_ranks

OF_PAIRS = ("loss", "margin", "accuracy")
OF_REFERENCE = ("dpo_margin", "dpo_accuracy", "logratio_chosen", "logratio_rejected")  # of pairs too
OF_TOKENS = ("r_hat", "r_hat_square", "f", "f_square", "f_nonpositive")
PEAKS = ("r_hat", "-r_hat", "f", "-f")  # the greatest value; the least, negated, under "-name"


class Tally:
    """Adds figures up on the device, without waiting for it, until `row` asks for them."""

    def __init__(self, device, reference):
        """reference: whether the loss knows one; without, a row has no DPO margin and no log-ratios."""
        number = lambda value: torch.full((), value, dtype=torch.float64, device=device)
        self.means = OF_PAIRS + (OF_REFERENCE if reference else ())
        self.sums = {
            name: number(0.0) for name in ("pairs", *OF_PAIRS, *OF_REFERENCE, "tokens", *OF_TOKENS, "weighted", "u")
        }
        self.peaks = {name: number(-torch.inf) for name in PEAKS}

    def add(self, loss, lengths):
        """loss: a tgdpo.Loss of B pairs; lengths: (chosen, rejected), each B numbers of response tokens."""
        figures = {
            "pairs": torch.ones_like(loss.phi),
            "loss": loss.losses,
            "margin": loss.phi,
            "accuracy": loss.phi > 0,
        }
        if loss.dpo_margin is not None:
            figures |= {"dpo_margin": loss.dpo_margin, "dpo_accuracy": loss.dpo_margin > 0}
            figures |= {"logratio_chosen": loss.logratio_w, "logratio_rejected": loss.logratio_l}
        if loss.r_hat is not None:
            r_hat, f = (_real(sides, lengths).double() for sides in (loss.r_hat, loss.f))
            figures |= {"tokens": torch.ones_like(f), "r_hat": r_hat, "r_hat_square": r_hat.square()}
            figures |= {"f": f, "f_square": f.square(), "f_nonpositive": f <= 0}
            for name, values in zip(PEAKS, (r_hat, -r_hat, f, -f)):
                self.peaks[name] = torch.maximum(self.peaks[name], values.max())
        if getattr(loss, "u", None) is not None:  # parts that are token weights (neighbours/)
            u = _real(loss.u, lengths).double()
            figures |= {"weighted": torch.ones_like(u), "u": u}
        for name, values in figures.items():
            self.sums[name] += values.detach().double().sum()

    def row(self):
        """Means over the pairs, and over the tokens of r_hat and f, of all ranks; a dict of floats. Collective."""
        sums, peaks = _of_all_ranks(self.sums, dist.ReduceOp.SUM), _of_all_ranks(self.peaks, dist.ReduceOp.MAX)
        row = {name: sums[name] / sums["pairs"] for name in self.means}
        if sums["tokens"]:
            for name in ("r_hat", "f"):
                mean = sums[name] / sums["tokens"]
                row[f"{name}_mean"] = mean
                row[f"{name}_std"] = max(0.0, sums[f"{name}_square"] / sums["tokens"] - mean**2) ** 0.5
                row[f"{name}_min"] = -peaks[f"-{name}"]
                row[f"{name}_max"] = peaks[name]
            row["f_nonpositive"] = sums["f_nonpositive"] / sums["tokens"]
        if sums["weighted"]:
            row["u_mean"] = sums["u"] / sums["weighted"]
        return row


def refuse_not_finite(row, losses, sources, batch):
    """Raises RunFailed, alike on all ranks, where a step's loss or gradient is not finite. row: of its metrics; losses:
    this rank's [(indices of pairs, their losses)]; sources: of all pairs, to name them; batch: the step's indices."""
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        return
    own = [sources[i] for part, values in losses for i, x in zip(part, values.tolist()) if not math.isfinite(x)]
    if wrong := sum(on_all_ranks(lambda: own), []):
        raise RunFailed(f"the loss is not finite on {some(wrong)}")
    raise RunFailed(f"the gradient is not finite; the step's pairs are {some([sources[i] for i in batch])}")


def _real(sides, lengths):
    """(chosen, rejected), [B, T] each -> [R], without the padding. Their lengths are on the CPU: nothing waits."""
    return torch.cat([row[:n] for side, counts in zip(sides, lengths) for row, n in zip(side, counts)])


def _of_all_ranks(figures, op):
    """{name: number on the device} -> {name: float}, over all ranks. Collective."""
    values = torch.stack(list(figures.values()))
    dist.all_reduce(values, op=op)
    return dict(zip(figures, values.tolist()))
