"""The figures of one optimiser step or one evaluation: summed over micro-batches and ranks, then one row of metrics."""

import torch
import torch.distributed as dist

SUMS = (
    "pairs",
    "loss",
    "margin",
    "accuracy",
    "dpo_margin",
    "dpo_accuracy",
    "logratio_chosen",
    "logratio_rejected",
    "tokens",
    "r_hat",
    "r_hat_square",
    "f",
    "f_square",
    "f_nonpositive",
)
PEAKS = ("r_hat", "-r_hat", "f", "-f")  # the greatest value; the least, negated, under "-name"


class Tally:
    """Adds figures up on the device, without waiting for it, until `row` asks for them."""

    def __init__(self, device, reference):
        """reference: whether the losses know one; without, a row has no DPO margin and no log-ratios."""
        self.figures = SUMS[1:8] if reference else SUMS[1:4]
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.peaks = torch.full((len(PEAKS),), -torch.inf, dtype=torch.float64, device=device)

    def add_losses(self, result):
        """result: a tgdpo.Loss of B pairs."""
        figures = [torch.ones_like(result.losses), result.losses, result.phi, result.phi > 0]
        if result.dpo_margin is not None:
            figures += [result.dpo_margin, result.dpo_margin > 0, result.logratio_w, result.logratio_l]
        self.sums[: len(figures)] += torch.stack([figure.detach().double().sum() for figure in figures])

    def add_guidance(self, r_hat, f):
        """r_hat, f: flat tensors over the same response tokens."""
        r_hat, f = r_hat.double(), f.double()
        figures = [torch.ones_like(f), r_hat, r_hat.square(), f, f.square(), f <= 0]
        self.sums[-len(figures) :] += torch.stack([figure.double().sum() for figure in figures])
        self.peaks = torch.maximum(self.peaks, torch.stack([r_hat.max(), -r_hat.min(), f.max(), -f.min()]))

    def row(self):
        """Means over the pairs, and over the tokens of r_hat and f, of all ranks; a dict of floats. Collective."""
        dist.all_reduce(self.sums)
        dist.all_reduce(self.peaks, op=dist.ReduceOp.MAX)
        sums, peaks = dict(zip(SUMS, self.sums.tolist())), dict(zip(PEAKS, self.peaks.tolist()))
        row = {name: sums[name] / sums["pairs"] for name in self.figures}
        if sums["tokens"]:
            for name in ("r_hat", "f"):
                mean = sums[name] / sums["tokens"]
                spread = max(0.0, sums[name + "_square"] / sums["tokens"] - mean**2) ** 0.5
                row |= {
                    f"{name}_mean": mean,
                    f"{name}_std": spread,
                    f"{name}_min": -peaks["-" + name],
                    f"{name}_max": peaks[name],
                }
            row["f_nonpositive"] = sums["f_nonpositive"] / sums["tokens"]
        return row
