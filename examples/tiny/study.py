"""What TGDPO adds to DPO, on the tiny example, whose gold reward is known.   python -m examples.tiny.study [--quick]

The paper's regime: for each seed 4,096 fresh on-policy pairs, one epoch for the guide and one for the policy, a cosine
schedule with warm-up. ARMS lists what is compared: rivals of equal compute, and controls whose stage 2 has labels
drawn by a coin or turned round. Each training goes through train.py's own step, on one thread. Along it the gold
reward of samples, the KL divergence from the reference, length and log-ratios are measured.

Each finished training is a line of study.jsonl in the --work folder: a study that is stopped goes on where it was.
The order is by worth, so that what is there at any time can be read. Writes STUDY.md and its plot.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import pathlib
import random
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
import tgdpo
import train
from examples.tiny import language, make
from kernels import log_probs as log_prob_kernels
from runtime import options as option_table
from runtime import process_group, sampling
from runtime.failures import RunFailed
from runtime.parts import PARTS

# Each arm by what it changes; alpha: it has a guide. labels: of stage 2, the guide's are always true.
MAIN = {
    "DPO": {},
    "DPO, two epochs": {"epochs": 2},
    "TGDPO, α 1": {"alpha": 1},
    "TGDPO, α 4": {"alpha": 4},
    "centred, α 1": {"alpha": 1, "centred": True},
    "centred, α 4": {"alpha": 4, "centred": True},
    "DPO, random labels": {"labels": "random"},
    "TGDPO, α 1, random labels": {"alpha": 1, "labels": "random"},
    "TGDPO, α 4, random labels": {"alpha": 4, "labels": "random"},
    "centred, α 4, random labels": {"alpha": 4, "centred": True, "labels": "random"},
}
RIVALS = {
    "DPO from the guide": {"start": True},
    "ExPO": {"factors": (1.5, 2, 3, 4)},  # of the way from the reference through the guide; no training
    "DPO + KL to the guide, α 4": {"distil": 4},
    "DPO, lr 2.5e-4": {"lr": 2.5e-4},
    "DPO, lr 1e-3": {"lr": 1e-3},
    "DPO, lr 2e-3": {"lr": 2e-3},
    "DPO, reversed labels": {"labels": "reversed"},
    "TGDPO, α 4, reversed labels": {"alpha": 4, "labels": "reversed"},
    "centred, α 4, reversed labels": {"alpha": 4, "centred": True, "labels": "reversed"},
    "TGDPO, α 0.5": {"alpha": 0.5},
    "one f on both sides, α 1": {"alpha": 1, "form": "one f"},
    "one f on both sides, α 4": {"alpha": 4, "form": "one f"},
    "gold token reward as guide, α 4": {"alpha": 4, "form": "gold"},
    "advantage by rollouts as guide, α 4": {"alpha": 4, "form": "advantage"},
    "guide of 1/8 epoch, α 1": {"alpha": 1, "guide_epochs": 1 / 8},
    "guide of 1/2 epoch, α 1": {"alpha": 1, "guide_epochs": 1 / 2},
    "guide of 3 epochs, α 1": {"alpha": 1, "guide_epochs": 3},
    "guide of 3 epochs, centred, α 1": {"alpha": 1, "centred": True, "guide_epochs": 3},
    "β 0.3: DPO": {"beta": 0.3},
    "β 0.3: DPO, two epochs": {"beta": 0.3, "epochs": 2},
    "β 0.3: TGDPO, α 1": {"beta": 0.3, "alpha": 1},
    "β 0.3: TGDPO, α 4": {"beta": 0.3, "alpha": 4},
    "β 0.3: centred, α 4": {"beta": 0.3, "alpha": 4, "centred": True},
}
PART_ARMS = {  # the parts of --with, with and without the guide
    f"{'TGDPO, α 1' if alpha else 'DPO'} with {part}": {"with": part} | ({"alpha": 1} if alpha else {})
    for part, entry in PARTS.items()
    for alpha in (0, 1)
    if alpha or not entry.tgdpo_only
}
ARMS = MAIN | RIVALS | PART_ARMS
ROLLOUTS = ("advantage by rollouts as guide, α 4",)  # half an hour of rollouts a seed
CONTROLS = dict(itertools.islice(RIVALS.items(), 9))
STRONGER_BETA = [name for name in RIVALS if name.startswith("β 0.3")]
REST = [name for name in RIVALS if name not in CONTROLS and name not in ROLLOUTS]
# (arms, first seed, last seed), in the order of worth
ORDER = (
    (MAIN, 0, 3),
    (CONTROLS, 0, 0),
    (PART_ARMS, 0, 0),
    (CONTROLS, 1, 1),
    (MAIN, 4, 7),
    (REST, 0, 1),
    (REST, 2, 3),
    (CONTROLS, 2, 3),
    (STRONGER_BETA, 4, 7),
    (ROLLOUTS, 0, 0),
    (PART_ARMS, 1, 3),
    (ROLLOUTS, 1, 1),
    (CONTROLS, 4, 7),
)
FULL = {"pairs": 4096, "held_out": 256, "prompts": 256, "states": 1024, "rollouts": 16, "order": ORDER}
QUICK = {
    "pairs": 32,
    "held_out": 8,
    "prompts": 4,
    "states": 4,
    "rollouts": 2,
    "order": ((("DPO", "centred, α 4, random labels", "ExPO", "DPO + KL to the guide, α 4"), 0, 0),)
    + ((("one f on both sides, α 4", "gold token reward as guide, α 4", "TGDPO, α 1 with clip"), 0, 0),),
}
SETTINGS = {"lr": 5e-4, "batch": 32, "beta": 0.1, "points": (1 / 6, 1 / 3, 2 / 3, 1), "longest": 48, "first": 16}


# -------------------------------------------------------------------------------------------- what is measured


class Lab:
    """What every training of a process shares: the reference, the pairs of a seed, and what is measured with."""

    def __init__(self, plan, work):
        torch.set_num_threads(1)
        self.plan, self.work, self.start = plan, work, str(HERE / "model")
        self.speaker = make.Speaker(self.start)
        self.tokenizer, self.ends = self.speaker.tokenizer, set(self.speaker.tokenizer.end_ids)
        self.ref = model.load_model(self.start)
        self.held_out = self.load(HERE / "held_out.jsonl")[: plan["held_out"]]
        self.held_out_ref = logps(self.ref, self.held_out)
        self.prompts = [pair.prompt.tolist() for pair in self.held_out[: plan["prompts"]]]
        self.found = {}  # of the seed in hand: what `once` found

    def load(self, path):
        return data.load_pairs([str(path)], self.tokenizer, 256, 128)[0]

    def once(self, key, find):
        """find(), remembered under the key until another seed is asked for."""
        if key[0] != self.found.get("seed"):
            self.found = {"seed": key[0]}
        if key not in self.found:
            self.found[key] = find()
        return self.found[key]

    def pairs(self, seed):
        """The seed's own pairs, sampled from the reference for questions that no held-out pair asks."""

        def sample():
            path = self.work / f"pairs-{seed}.jsonl"
            if not path.exists():
                rng = random.Random(1000 + seed)
                held_out = {json.loads(line)["prompt"] for line in open(HERE / "held_out.jsonl", encoding="utf-8")}
                questions = [question for question, _ in language.questions() if question not in held_out]
                rng.shuffle(questions)
                asked = (questions * 2)[: self.plan["pairs"] * 5 // 4]
                rows = make.preference_pairs(self.ref, self.speaker, asked, rng)
                write(path, "".join(json.dumps(row) + "\n" for row in itertools.islice(rows, self.plan["pairs"])))
            return self.load(path)

        return self.once((seed, "pairs"), sample)

    def guide_file(self, seed, beta, epochs):
        return self.work / f"guide-{seed}-{beta:g}-{epochs:g}.pt"

    def guide(self, seed, beta, epochs):
        """The model that DPO makes of the seed's pairs: stage 1. Kept as a file of weights."""

        def find():
            path = self.guide_file(seed, beta, epochs)
            if not path.exists():
                for *_, net in fit(self, {"beta": beta, "epochs": epochs}, seed, (1,)):
                    write(path, net.state_dict())
            net = model.load_model(self.start)
            net.load_state_dict(torch.load(path))
            return net

        return self.once((seed, beta, epochs), find)

    def gold(self, ids):
        return language.gold_reward("".join(self.pieces(ids)))

    def pieces(self, ids):
        """The text of each token, '' for the end of the turn."""
        return ["" if i in self.ends else piece for i, piece in zip(ids, self.tokenizer.pieces(ids))]

    def measure(self, net, every=1):
        """The figures of one policy: over two samples for every so many-th held-out prompt (the same random numbers for
        all models), and the log-ratios of the held-out pairs. kl is per reply, exact at each state of the samples."""
        generator, asked = torch.Generator().manual_seed(0), self.prompts[::every]
        prompts = [p for p in asked for _ in range(2)]
        replies = sampling.generate(net, prompts, SETTINGS["longest"], self.ends, 1.0, generator)
        arrays = [np.array(ids, np.int32) for ids in replies]
        pairs = [data.Pair(np.array(p, np.int32), *arrays[2 * i : 2 * i + 2], "") for i, p in enumerate(asked)]
        moved = [m - r for m, r in zip(logps(net, self.held_out), self.held_out_ref)]
        sides = [m.split([len(p.chosen), len(p.rejected)]) for m, p in zip(moved, self.held_out)]
        return {
            "gold": float(np.mean([self.gold(ids) for ids in replies])),
            "gold_first": float(np.mean([self.gold(ids[: SETTINGS["first"]]) for ids in replies])),
            "kl": float(sum(map(torch.sum, divergences(net, self.ref, pairs)))) / len(replies),
            "length": float(np.mean([len(ids) for ids in replies])),
            "cut": float(np.mean([ids[-1] not in self.ends for ids in replies])),
            "chosen": float(np.mean([w.sum() for w, _ in sides])),
            "rejected": float(np.mean([l.sum() for _, l in sides])),
        }

    def sample(self, starts, generator):
        """Replies of the reference at temperature 1, as many at once as are quick."""
        some = (starts[k : k + 512] for k in range(0, len(starts), 512))
        return [
            reply
            for part in some
            for reply in sampling.generate(self.ref, part, SETTINGS["longest"], self.ends, 1.0, generator)
        ]

    def returns(self, prompts, heads, several, generator):
        """The gold rewards of replies that begin with the heads, the rest sampled: [states, several]."""
        open_ = [k for k, head in enumerate(heads) if not self.ends & set(head)] * several
        drawn = set(open_)
        gold = [[] if k in drawn else [self.gold(head)] * several for k, head in enumerate(heads)]
        for k, more in zip(open_, self.sample([prompts[k] + heads[k] for k in open_], generator)):
            gold[k].append(self.gold(heads[k] + more))
        return np.array(gold)

    def pair_advantages(self, seed):
        """The advantage of each token of the seed's pairs under the reference, V(s') - V(s) of four rollouts a state:
        a tensor [C + R] a pair, in a file; and the standard deviation of what is no noise in it."""
        path = self.work / f"advantages-{seed}.pt"
        if not path.exists():
            replies = [(p.prompt.tolist(), ids.tolist()) for p in self.pairs(seed) for ids in (p.chosen, p.rejected)]
            states = [(prompt, reply[:t]) for prompt, reply in replies for t in range(len(reply) + 1)]
            order = sorted(range(len(states)), key=lambda k: -len(states[k][1]))  # rollouts of like length together
            found = np.empty((len(states), 4))
            found[order] = self.returns(*zip(*(states[k] for k in order)), 4, torch.Generator().manual_seed(2 + seed))
            value, noise = torch.tensor(found.mean(1)), torch.tensor(found.var(1, ddof=1) / 4)
            lengths = [len(reply) + 1 for _, reply in replies]
            steps = [v.diff() for v in value.split(lengths)]
            signal = torch.cat(steps).var() - torch.cat([n[1:] + n[:-1] for n in noise.split(lengths)]).mean()
            per_pair = [torch.cat(steps[k : k + 2]).float() for k in range(0, len(steps), 2)]
            write(path, {"advantages": per_pair, "spread": float(signal.clamp(min=1e-9).sqrt())})
        kept = torch.load(path)
        return kept["advantages"], kept["spread"]

    def advantages(self):
        """Of one token in each of many sampled replies its advantage Q - V by rollouts of the reference, kept in
        a file: (prompt and reply ids, the token's place in the reply, estimate, variance of its noise), a list each."""
        path = self.work / "advantages.json"
        if not path.exists():
            generator, rng, several = torch.Generator().manual_seed(1), random.Random(1), self.plan["rollouts"]
            prompts = [self.prompts[k % len(self.prompts)] for k in range(self.plan["states"])]
            replies = self.sample(prompts, generator)
            places = [rng.randrange(len(reply)) for reply in replies]
            before, after = (
                self.returns(prompts, [r[: t + d] for r, t in zip(replies, places)], several, generator) for d in (0, 1)
            )
            advantage = after.mean(1) - before.mean(1)
            noise = (after.var(1, ddof=1) + before.var(1, ddof=1)) / several
            found = list(zip(prompts, replies, places, advantage.tolist(), noise.tolist()))
            write(path, json.dumps(found))
        return json.loads(path.read_text())

    def correlation(self, guide):
        """Pearson's correlation of r_hat and the advantage over those tokens, the estimates' noise taken out."""
        prompts, replies, places, advantage, noise = zip(*self.advantages())
        pairs = [
            data.Pair(np.array(p, np.int32), np.array(r, np.int32), np.array(r[:1], np.int32), "")
            for p, r in zip(prompts, replies)
        ]
        ratios = [g - r for g, r in zip(logps(guide, pairs), logps(self.ref, pairs))]
        r_hat = np.array([float(ratio[t]) for ratio, t in zip(ratios, places)])
        true = max(np.var(advantage) - np.mean(noise), 1e-9)
        return float(np.cov(r_hat, advantage, ddof=0)[0, 1] / np.sqrt(np.var(r_hat) * true))


def write(path, content):
    """The whole file or none: text, or weights."""
    part = path.with_suffix(".part")
    part.write_text(content, encoding="utf-8") if isinstance(content, str) else torch.save(content, part)
    part.rename(path)


@torch.no_grad()
def per_pair(pairs, find):
    """find(pack) -> [R], cut into one tensor [C + R] a pair, chosen then rejected."""
    found = []
    for some in (pairs[k : k + 64] for k in range(0, len(pairs), 64)):
        found += find(data.collate(some)).split([p.scored for p in some])
    return found


def logps(net, pairs):
    return per_pair(pairs, lambda pack: net(pack.tokens, pack))


def divergences(net, other, pairs):
    """KL(net || other) at the state of each token."""
    states = lambda one, pack: one(pack.tokens, pack, states=True)
    return per_pair(pairs, lambda pack: log_prob_kernels.token_divergences(*states(net, pack), *states(other, pack)))


# ------------------------------------------------------------------------------------------------ one training


def guidance(lab, arm, seed, pairs, ref):
    """The guide's log-probs on the seed's pairs, the guide, and the standard deviation of alpha r_hat."""
    beta = arm.get("beta", SETTINGS["beta"])
    net = lab.guide(seed, beta, arm.get("guide_epochs", 1))
    key = (seed, beta, arm.get("guide_epochs", 1))
    guide = lab.once((*key, "guide"), lambda: logps(net, pairs))
    spread = torch.cat([g - r for g, r in zip(guide, ref)]).std()
    if arm.get("centred"):
        centre = lab.once((*key, "centre"), lambda: divergences(lab.ref, net, pairs))
        guide = list(map(tgdpo.centred_guide, guide, centre))
    if arm.get("form") == "one f":  # f_l = 1 + alpha r_hat: r_hat turned round on the rejected response
        sign = [torch.cat([torch.ones(len(p.chosen)), -torch.ones(len(p.rejected))]) for p in pairs]
        guide = [r + s * (g - r) for g, r, s in zip(guide, ref, sign)]
    if arm.get("form") == "gold":  # the gold reward of each token, scaled to the trained guide's spread
        sides = lambda pair: (lab.pieces(pair.chosen), lab.pieces(pair.rejected))
        gold = [torch.tensor([x for side in sides(p) for x in language.gold_rewards(side)]) for p in pairs]
        guide = [r + spread / torch.cat(gold).std() * x for r, x in zip(ref, gold)]
    if arm.get("form") == "advantage":  # likewise its advantage, by what is no noise in it
        advantages, true = lab.pair_advantages(seed)
        guide = [r + spread / true * x for r, x in zip(ref, advantages)]
    return guide, net, float(arm["alpha"] * beta * spread)


def relabelled(labels, seed, pairs, *logps):
    """The pairs, and log-probs of their responses, with chosen and rejected turned round: all, or by a coin each."""
    coin = np.random.default_rng(seed).random(len(pairs)) < (0.5 if labels == "random" else 1)
    turned = [p._replace(chosen=p.rejected, rejected=p.chosen) if c else p for p, c in zip(pairs, coin)]
    cut = [len(p.chosen) for p in pairs]
    turn = lambda many: [torch.cat([x[n:], x[:n]]) if c else x for x, n, c in zip(many, cut, coin)]
    return turned, *(many and turn(many) for many in logps)


def fit(lab, arm, seed, points):
    """Train an arm from the reference. Yields (step, row of the step's metrics, model) at the points, shares of the
    whole training, and at the start what the guidance is: (0, figures, None)."""
    pairs = lab.pairs(seed)
    ref = lab.once((seed, "ref"), lambda: logps(lab.ref, pairs))
    guide, words, net = None, ["--loss", "dpo"], model.load_model(lab.start)
    if "alpha" in arm:
        words = ["--loss", "tgdpo", "--alpha", str(arm["alpha"])]
        guide, trained, spread = guidance(lab, arm, seed, pairs, ref)
        key = (seed, arm.get("beta"), arm.get("guide_epochs"), "correlation")
        yield 0, {"spread": spread, "correlation": lab.once(key, lambda: lab.correlation(trained))}, None
    if "labels" in arm:
        pairs, ref, guide = relabelled(arm["labels"], seed, pairs, ref, guide)
    if "start" in arm:
        net.load_state_dict(lab.guide(seed, SETTINGS["beta"], 1).state_dict())
    words += ["--lr", str(arm.get("lr", SETTINGS["lr"])), "--beta", str(arm.get("beta", SETTINGS["beta"]))]
    words += ["--schedule", "cosine", "--warmup-ratio", "0.1"] + (["--with", arm["with"]] if "with" in arm else [])
    options = option_table.resolve(words)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    run = types.SimpleNamespace(
        options=options,
        rank=0,
        world=1,
        device=torch.device("cpu"),
        plan=types.SimpleNamespace(micro_tokens=8192, cast_once=False),
    )
    stage, size = train.Stage(options.loss, pairs, [], ref, guide), SETTINGS["batch"]
    per_epoch = len(pairs) // size
    steps = max(1, round(per_epoch * arm.get("epochs", 1)))
    reached = [max(1, round(share * steps)) for share in points]
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        batch = data.epoch_order(len(pairs), seed, epoch)[position * size : (position + 1) * size]
        for group in optimiser.param_groups:
            group["lr"] = train.learning_rate(options, step, steps)
        if "distil" in arm:  # its gradient is there before the loss's is added
            towards(net, lab.guide(seed, SETTINGS["beta"], 1), [pairs[i] for i in batch], arm["distil"])
        row = train.optimiser_step(run, net, optimiser, stage, batch)
        if step + 1 in reached:
            yield step + 1, row, net


def towards(net, guide, pairs, alpha):
    """Adds the gradient of D18's right-hand side: alpha beta^2 KL(net || guide), over the states of a response."""
    pack = data.collate(pairs)
    hidden, head, _ = net(pack.tokens, pack, states=True)
    with torch.no_grad():
        other, other_head, _ = guide(pack.tokens, pack, states=True)
    kl = tgdpo.divergence((hidden @ head.t()).log_softmax(-1), (other @ other_head.t()).log_softmax(-1))  # [R]
    (alpha * SETTINGS["beta"] ** 2 * kl.sum() / (2 * len(pairs))).backward()  # each pair holds two responses


def training(job):
    """One training of the study: job = (name of the arm, seed) -> its line of study.jsonl."""
    (name, seed), lab = job, training.lab
    arm, line = ARMS[name], {"arm": name, "seed": seed, "curve": []}
    try:
        if "factors" in arm:
            start, guide = lab.ref.state_dict(), lab.guide(seed, SETTINGS["beta"], 1).state_dict()
            net = model.load_model(lab.start)
            for factor in arm["factors"]:
                net.load_state_dict({key: start[key] + factor * (guide[key] - start[key]) for key in start})
                line["curve"].append({"step": factor} | lab.measure(net))
            return line
        for step, row, net in fit(lab, arm, seed, SETTINGS["points"]):
            if net is None:
                line |= row
            else:
                kept = {key: row[key] for key in ("loss", "f_nonpositive") if key in row}
                whole = len(line["curve"]) == len(SETTINGS["points"]) - 1  # the end is measured on all prompts
                line["curve"].append({"step": step} | kept | lab.measure(net, 1 if whole else 2))
        if not arm:  # DPO itself is the guide of the others
            write(lab.guide_file(seed, SETTINGS["beta"], 1), net.state_dict())
    except RunFailed as failure:
        line["failed"] = str(failure)
    return line


# -------------------------------------------------------------------------------------------------- the study


def worker(plan, work):
    """Each worker process has a group and a lab of its own, and ends at once when the pool's owner says so."""
    with contextlib.redirect_stdout(None):
        process_group.start(5, "cpu")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    training.lab = Lab(plan, work)


def main(argv=None):
    """Run what is missing, then write the page. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of a few arms, to see that it works")
    parser.add_argument(
        "--work", help="where study.jsonl, pairs and guides go [study, with --quick a temporary folder]"
    )
    parser.add_argument("--page", help="[STUDY.md beside the folder]")
    parser.add_argument("--page-only", action="store_true", help="train nothing, write the page of what is there")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread; 0: in this one [2]")
    given = parser.parse_args(argv)
    plan = QUICK if given.quick else FULL
    work = pathlib.Path(given.work or (pathlib.Path(tempfile.mkdtemp()) if given.quick else HERE) / "study")
    page = pathlib.Path(given.page or work.parent / "STUDY.md")
    work.mkdir(parents=True, exist_ok=True)
    path = work / "study.jsonl"
    lines = [json.loads(line) for line in open(path)] if path.exists() else []
    done = {(line["arm"], line["seed"]) for line in lines}
    order = [(arm, seed) for arms, first, last in plan["order"] for seed in range(first, last + 1) for arm in arms]
    order = list(dict.fromkeys(order))
    missing = [] if given.page_only else [job for job in order if job not in done]
    settings = json.loads(json.dumps({name: plan[name] for name in plan if name != "order"} | SETTINGS))
    if not (work / "start.json").exists():
        worker(plan, work)
        training.lab.advantages()
        write(work / "start.json", json.dumps(settings | {"start": training.lab.measure(training.lab.ref)}))
        process_group.stop()
    start = json.loads((work / "start.json").read_text())
    if other := [name for name, value in settings.items() if start.get(name) != value]:
        parser.error(f"{work} holds a study with another {', '.join(other)}; give another --work")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "a"))
        if missing and given.workers:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(given.workers, worker, (plan, work)))
            finished = pool.imap_unordered(training, missing)
        else:
            stack.callback(process_group.stop)
            worker(plan, work)
            finished = map(training, missing)
        for number, line in enumerate(finished, len(done) + 1):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            lines.append(line)
            last = line["curve"][-1] if line["curve"] else {"gold": np.nan, "kl": np.nan}
            told = f"{line['arm']}, seed {line['seed']}: gold {last['gold']:.2f}, KL {last['kl']:.1f}"
            print(f"{number}/{len(done) + len(missing)} {told}", flush=True)
    from examples.tiny import study_page

    study_page.write(page, work, lines, start)
    print(f"written: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
