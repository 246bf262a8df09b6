"""The paper's claims on the tiny example, whose gold token reward is known.   python -m examples.tiny.study [--quick]

Trains DPO, SimPO and TGDPO with guides of several kinds through train.py's own step, over several seeds, far past the
point where the loss has converged, and measures as it goes: the gold reward of samples, how often they beat the
reference's, the KL divergence from the reference. Each finished training is a line of study.jsonl in the --work
folder, so a study that is stopped goes on where it was. Writes STUDY.md and its plots beside this file.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import multiprocessing
import pathlib
import signal
import sys
import tempfile
import types

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import torch

import data
import model
import train
from examples.tiny import language
from files.tokenizer import load_tokenizer
from runtime import options as option_table
from runtime import process_group
from runtime.failures import RunFailed

LR, BATCH, BETA, ALPHA = 5e-4, 32, 0.1, 1.0
FULL = {
    "seeds": 5,
    "points": (8, 16, 32, 64, 96, 128, 192, 256, 320),
    "guide_steps": 48,
    "pairs": 512,
    "sizes": (256, 2048),
    "prompts": 192,
    "alphas": (0.25, 0.5, 1.0, 2.0, 4.0),
}
QUICK = {
    "seeds": 1,
    "points": (1, 2),
    "guide_steps": 1,
    "pairs": 32,
    "sizes": (48,),
    "prompts": 2,
    "alphas": (0.5, 2.0),
}
SIMPO = {"beta": 2.5, "gamma": 1.375}
OTHER_BETA = 0.3
METHODS = (
    "DPO",
    "SimPO",
    "TGDPO",
    "TGDPO, SimPO guide",
    "TGDPO, gold guide",
    "TGDPO, shuffled guide",
    "TGDPO, half-data guide",
    "TGDPO, other-beta guide",
    "TGDPO, cross-fitted guide",
    "TGDPO, f = 1 on shared tokens",
)
LONGEST = 48  # tokens of a sampled reply


# ------------------------------------------------------------------------------------------------ one training


class Lab:
    """What every training of the study shares: the reference, the pairs, the prompts to sample for."""

    def __init__(self, prompts):
        torch.set_num_threads(1)
        self.start = str(HERE / "model")
        self.tokenizer = load_tokenizer(self.start)
        self.pairs, self.held_out = (
            data.load_pairs([str(HERE / name)], self.tokenizer, 256, 128)[0]
            for name in ("train.jsonl", "held_out.jsonl")
        )
        self.prompts = [pair.prompt.tolist() for pair in self.held_out[:prompts]]
        self.ref = model.load_model(self.start)
        self.held_out_ref = logps(self.ref, self.held_out)
        self.held_out_gold = torch.tensor([x for pair in self.held_out for x in self.token_gold(pair)])
        self.ref_gold = self.gold(self.samples(self.ref))

    def samples(self, net):
        """Two replies to each prompt, the same random numbers for every model."""
        generator = torch.Generator().manual_seed(0)
        return model.generate(
            net, [p for p in self.prompts for _ in range(2)], LONGEST, set(self.tokenizer.end_ids), 1.0, generator
        )

    def pieces(self, ids):
        """The text of each token, '' for the end of the turn."""
        return ["" if i in self.tokenizer.end_ids else piece for i, piece in zip(ids, self.tokenizer.pieces(ids))]

    def gold(self, replies):
        return np.array([language.gold_reward("".join(self.pieces(ids))) for ids in replies])

    def token_gold(self, pair):
        """The gold reward of each response token, chosen then rejected."""
        return language.gold_rewards(self.pieces(pair.chosen)) + language.gold_rewards(self.pieces(pair.rejected))

    def measure(self, net):
        """Gold reward of samples, share that beats the reference's (a tie is half), KL from the reference per reply."""
        replies = self.samples(net)
        gold = self.gold(replies)
        arrays = [np.array(ids, np.int32) for ids in replies]
        pairs = [data.Pair(np.array(p, np.int32), *arrays[2 * i : 2 * i + 2], "") for i, p in enumerate(self.prompts)]
        kl = torch.cat(logps(net, pairs)).sum() - torch.cat(logps(self.ref, pairs)).sum()
        wins = (gold > self.ref_gold).mean() + (gold == self.ref_gold).mean() / 2
        return {"gold": float(gold.mean()), "win": float(wins), "kl": float(kl) / len(replies)}


@torch.no_grad()
def logps(net, pairs):
    """Per pair the log-probs [C + R] of its response tokens, chosen then rejected."""
    found = []
    for start in range(0, len(pairs), 64):
        some = pairs[start : start + 64]
        pack = data.collate(some)
        found += net(pack.tokens, pack).split([len(p.chosen) + len(p.rejected) for p in some])
    return found


def fit(lab, loss, pairs, ref, guide, seed, points, **changes):
    """Train from the reference to the last of the steps `points`. Yields (step, epoch's mean loss, model) at each."""
    options = option_table.resolve(
        [
            "--loss",
            loss,
            "--lr",
            str(LR),
            "--schedule",
            "constant",
            "--warmup-ratio",
            "0.03",
            "--batch-size",
            str(BATCH),
        ]
    )
    options = dataclasses.replace(options, **{"beta": BETA, **changes})
    net = model.load_model(lab.start)
    optimiser = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    run = types.SimpleNamespace(
        options=options, rank=0, world=1, device=torch.device("cpu"), plan=types.SimpleNamespace(micro_tokens=8192)
    )
    stage = train.Stage(loss, pairs, [], ref, guide)
    steps, recent, per_epoch = points[-1], [], -(-len(pairs) // BATCH)
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        batch = data.epoch_order(len(pairs), seed, epoch)[position * BATCH : (position + 1) * BATCH]
        for group in optimiser.param_groups:
            group["lr"] = train.learning_rate(options, step, steps)
        recent.append(train.optimiser_step(run, net, optimiser, stage, batch)["loss"])
        if step + 1 in points:
            yield step + 1, float(np.mean(recent[-per_epoch:])), net


def trained(lab, pairs, seed, steps, loss="dpo", **changes):
    """A guide: the model after `steps` steps on the pairs."""
    ref = logps(lab.ref, pairs) if loss == "dpo" else None
    return next(fit(lab, loss, pairs, ref, None, seed, [steps], **changes))[2]


def guide_of(lab, kind, pairs, ref, seed, plan):
    """The guide's log-probs on `pairs`, and the model whose r_hat they hold, where it is one. Every other guide's
    log-ratios are scaled to the spread of the DPO guide's: what is compared is where they point, not how far."""
    half, steps = len(pairs) // 2, plan["guide_steps"]
    net = trained(lab, pairs, seed, steps, beta=BETA)
    own = [g - r for g, r in zip(logps(net, pairs), ref)]
    if kind == "TGDPO":
        return [r + o for r, o in zip(ref, own)], net
    if kind == "TGDPO, f = 1 on shared tokens":  # the DPO guide, silent where both responses agree
        return [r + o * ~shared(pair) for r, o, pair in zip(ref, own, pairs)], None
    net = None
    if kind == "TGDPO, gold guide":
        other = [torch.tensor(lab.token_gold(pair)) for pair in pairs]
    elif kind == "TGDPO, shuffled guide":  # the DPO guide's, dealt to the tokens at random
        mixed = torch.randperm(sum(map(len, own)), generator=torch.Generator().manual_seed(seed))
        other = torch.cat(own)[mixed].split([len(o) for o in own])
    elif kind == "TGDPO, cross-fitted guide":  # each half is judged by a guide that learned from the other
        guide = logps(trained(lab, pairs[half:], seed, steps, beta=BETA), pairs[:half]) + logps(
            trained(lab, pairs[:half], seed, steps, beta=BETA), pairs[half:]
        )
        other = [g - r for g, r in zip(guide, ref)]
    else:
        if kind == "TGDPO, SimPO guide":
            net = trained(lab, pairs, seed, steps, "simpo", **SIMPO)
        elif kind == "TGDPO, half-data guide":
            net = trained(lab, pairs[:half], seed, steps, beta=BETA)
        else:
            net = trained(lab, pairs, seed, steps, beta=OTHER_BETA)
        other = [g - r for g, r in zip(logps(net, pairs), ref)]
    scale = torch.cat(own).std() / torch.cat(other).std()
    return [r + scale * o for r, o in zip(ref, other)], net


def shared(pair):
    """For each response token of a pair whether the other response has it too, in the same order: [C + R] bool."""
    sides = pair.chosen.tolist(), pair.rejected.tolist()
    found = torch.zeros(sum(map(len, sides)), dtype=torch.bool)
    for a, b, size in difflib.SequenceMatcher(None, *sides, autojunk=False).get_matching_blocks():
        found[a : a + size] = found[len(sides[0]) + b : len(sides[0]) + b + size] = True
    return found


def correlation(lab, net):
    """Pearson's correlation of r_hat and the gold reward over the held-out pairs' tokens."""
    ratios = torch.cat([g - r for g, r in zip(logps(net, lab.held_out), lab.held_out_ref)])
    return float(torch.corrcoef(torch.stack([ratios.double(), lab.held_out_gold.double()]))[0, 1])


def training(job):
    """One training of the study, in a worker process: job = (method, pairs, alpha, seed, plan) -> its line."""
    method, count, alpha, seed, plan = job
    lab = training.lab
    chosen = np.random.default_rng(seed).permutation(len(lab.pairs))[:count]
    pairs = [lab.pairs[i] for i in chosen]
    ref = logps(lab.ref, pairs)
    line = {"method": method, "pairs": count, "alpha": alpha, "seed": seed, "curve": []}
    if method.startswith("TGDPO"):
        guide, net = guide_of(lab, method, pairs, ref, seed, plan)
        r_hat = torch.cat([BETA * (g - r) for g, r in zip(guide, ref)])
        sides = torch.cat([torch.cat([torch.ones(len(p.chosen)), -torch.ones(len(p.rejected))]) for p in pairs])
        line["f_nonpositive"] = float((1 + alpha * sides * r_hat <= 0).double().mean())
        if net is not None:
            line["correlation"] = correlation(lab, net)
        run = fit(lab, "tgdpo", pairs, ref, guide, seed, plan["points"], alpha=alpha, guide_beta=BETA)
    elif method == "SimPO":
        run = fit(lab, "simpo", pairs, None, None, seed, plan["points"], **SIMPO)
    else:
        run = fit(lab, "dpo", pairs, ref, None, seed, plan["points"])
    try:
        for step, loss, net in run:
            line["curve"].append({"step": step, "loss": loss} | lab.measure(net))
    except RunFailed as failure:
        line["failed"] = str(failure)
    return line


def worker(prompts):
    """Each worker process has a group and a lab of its own, and ends at once when the pool's owner says so."""
    with contextlib.redirect_stdout(None):
        process_group.start(5, "cpu")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    training.lab = Lab(prompts)


# -------------------------------------------------------------------------------------------------- the study


def jobs(plan):
    """Every training, the most telling first: seed by seed."""
    for seed in range(plan["seeds"]):
        for method in METHODS:
            yield (method, plan["pairs"], ALPHA, seed, plan)
        for alpha in plan["alphas"]:
            if alpha != ALPHA:
                yield ("TGDPO", plan["pairs"], alpha, seed, plan)
        for size in plan["sizes"]:
            for method in ("DPO", "SimPO", "TGDPO"):
                yield (method, size, ALPHA, seed, plan)


def main(argv=None):
    """Run what is missing, then write the page. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--work", help="where study.jsonl and the plots go [study, with --quick a temporary folder]")
    parser.add_argument("--page", help="[STUDY.md beside the folder]")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread; 0: in this one [2]")
    given = parser.parse_args(argv)
    plan = QUICK if given.quick else FULL
    work = pathlib.Path(given.work or (pathlib.Path(tempfile.mkdtemp()) if given.quick else HERE) / "study")
    page = pathlib.Path(given.page or work.parent / "STUDY.md")
    work.mkdir(parents=True, exist_ok=True)
    path = work / "study.jsonl"
    lines = [json.loads(line) for line in open(path)] if path.exists() else []
    done = {(r["method"], r["pairs"], r["alpha"], r["seed"]) for r in lines}
    missing = [job for job in jobs(plan) if job[:4] not in done]
    settings = json.loads(json.dumps(plan | {"lr": LR, "batch": BATCH, "beta": BETA, "simpo": SIMPO}))
    if not (work / "start.json").exists():
        lab = Lab(plan["prompts"])
        both = torch.cat([shared(pair) for pair in lab.held_out]).double().mean()
        known = {"gold": float(lab.ref_gold.mean()), "shared": float(both)}
        (work / "start.json").write_text(json.dumps(settings | known))
    start = json.loads((work / "start.json").read_text())
    if other := [name for name, value in settings.items() if start.get(name) != value]:
        parser.error(f"{work} holds a study with another {', '.join(other)}; give another --work")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "a"))
        if given.workers:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(given.workers, worker, (plan["prompts"],)))
            finished = pool.imap_unordered(training, missing)
        else:
            stack.callback(process_group.stop)
            worker(plan["prompts"])
            finished = map(training, missing)
        for number, line in enumerate(finished, len(done) + 1):
            file.write(json.dumps(line) + "\n")
            file.flush()
            lines.append(line)
            last = line["curve"][-1] if line["curve"] else {"gold": math.nan, "kl": math.nan}
            print(
                f"{number}/{len(done) + len(missing)} {line['method']}, {line['pairs']} pairs, alpha {line['alpha']}, "
                f"seed {line['seed']}: gold {last['gold']:.2f}, KL {last['kl']:.1f}",
                flush=True,
            )
    from examples.tiny import study_page

    study_page.write(page, work, lines, start)
    print(f"written: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
