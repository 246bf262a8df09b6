"""Whole runs of train.py, in this process, against a plain loop with transformers' models and torch's AdamW."""

import argparse
import json
import math
import sys
import tomllib

import numpy as np
import pytest
import torch
from tiny_world import KINDS, make_checkpoint, make_pairs

import data
import train
from files.tokenizer import load_tokenizer
from runtime.shards import local_rows

transformers = pytest.importorskip("transformers")

SETTINGS = {
    "beta": 0.3,
    "lr": 2e-3,
    "epochs": 2,
    "batch-size": 4,
    "warmup-ratio": 0.2,
    "max-length": 128,
    "samples": 0,
    "sample-tokens": 4,
}


def run(*arguments, **options):
    """train.main with the settings above; returns the exit status."""
    words = [str(a) for a in arguments]
    for name, value in (SETTINGS | {k.replace("_", "-"): v for k, v in options.items()}).items():
        words += [f"--{name}", str(value)]
    return train.main(words)


def metrics(out, stage=None, evaluation=False):
    rows = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    return [r for r in rows if (stage is None or r["stage"] == stage) and r.get("eval", False) == evaluation]


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def sequence(net, prompt, response):
    """The list of log p of each response token, one by one from the logits."""
    ids = torch.tensor([*prompt, *response]).long()
    logits = net(ids[None]).logits[0]
    return [logits[t - 1].log_softmax(-1)[ids[t]] for t in range(len(prompt), len(ids))]


def plain_training(
    start, pairs, loss, guide=None, alpha=0.5, gamma=1.375, beta=0.3, pair_loss=None, adapt=lambda policy: policy
):
    """The method as paper.md tells it, pair by pair and token by token. Returns each step's loss, and the model.
    pair_loss(policy, ref, guide), (chosen, rejected) lists of log p each, takes the formula's place. adapt: what is
    done to the model before it trains."""
    policy, ref = adapt(load(start)), load(start)
    guide = guide and load(guide)
    optimiser = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    size, epochs = SETTINGS["batch-size"], SETTINGS["epochs"]
    total = epochs * math.ceil(len(pairs) / size)
    warmup = math.ceil(total * SETTINGS["warmup-ratio"])
    losses = []
    for epoch in range(epochs):
        order = data.epoch_order(len(pairs), 0, epoch)
        for begin in range(0, len(order), size):
            batch, step = order[begin : begin + size], len(losses)
            rate = (
                (step + 1) / (warmup + 1)
                if step < warmup
                else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            )
            optimiser.param_groups[0]["lr"] = SETTINGS["lr"] * rate
            mean = 0.0
            for pair in (pairs[i] for i in batch):
                phi, logps = 0.0, []
                for sign, response in ((+1, pair.chosen), (-1, pair.rejected)):
                    logp = sequence(policy, pair.prompt, response)
                    if loss == "simpo":
                        phi = phi + sign * beta * sum(logp) / len(logp)
                        continue
                    with torch.no_grad():
                        logp_ref = sequence(ref, pair.prompt, response)
                        logp_guide = sequence(guide, pair.prompt, response) if guide else logp_ref
                    logps.append((logp, logp_ref, logp_guide))
                    for t in range(len(response)):
                        r_hat = beta * (logp_guide[t] - logp_ref[t])
                        f = 1 + sign * alpha * r_hat if loss == "tgdpo" else 1.0
                        phi = phi + sign * beta * f * (logp[t] - logp_ref[t])
                if loss == "simpo":
                    phi = phi - gamma
                value = torch.log(1 + torch.exp(-phi))
                if pair_loss:
                    models = list(zip(*logps))
                    value = pair_loss(*models[: 3 if guide else 2])
                mean = mean + pair.weight * value / len(batch)
            optimiser.zero_grad()
            mean.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimiser.step()
            losses.append(mean.item())
    return losses, policy


def tokens_of(start, path):
    return data.load_pairs([path], load_tokenizer(start), 128, 100)[0]


def same(found, expected):
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected), 1):
        assert abs(a - b) < 1e-4, f"step {step}: {a} against {b}"


@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_are_the_papers(kind, tmp_path):
    """A guide trained by stage 1, then the policy, for all kinds of checkpoint; at length for the first four."""
    count, longest = (10, 30) if kind in list(KINDS)[:4] else (2, 8)
    start, path = make_checkpoint(tmp_path / "start", kind), make_pairs(tmp_path / "pairs.jsonl", count, 0, longest)
    out = tmp_path / "out"
    assert run("--out", out, "--model", start, "--data", path, alpha=2) == 0
    pairs = tokens_of(start, path)
    dpo, guide = plain_training(start, pairs, "dpo")
    same([r["loss"] for r in metrics(out, "dpo")], dpo)
    assert abs(dpo[0] - math.log(2)) < 1e-6 and abs(metrics(out, "dpo")[0]["loss"] - math.log(2)) < 1e-6
    tgdpo, policy = plain_training(start, pairs, "tgdpo", guide=out / "guide", alpha=2)
    same([r["loss"] for r in metrics(out, "tgdpo")], tgdpo)
    assert abs(metrics(out, "tgdpo")[0]["loss"] - math.log(2)) < 1e-6
    assert max(abs(a - b) for a, b in zip(dpo, tgdpo)) > 1e-3  # the guidance is no ornament
    tokens = torch.randint(0, 260, (2, 40))
    for name, theirs in (("guide", guide), ("policy", policy)):
        ours, info = transformers.AutoModelForCausalLM.from_pretrained(out / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            assert (ours(tokens).logits - theirs(tokens).logits).abs().max() < 1e-3


@pytest.mark.parametrize("loss, options", [("dpo", {}), ("simpo", {"beta": 2.0, "gamma": 0.7})])
def test_the_baselines_are_theirs(loss, options, tmp_path):
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 10)
    assert run("--out", tmp_path / "out", "--model", start, "--data", path, "--loss", loss, **options) == 0
    expected, _ = plain_training(start, tokens_of(start, path), loss, **{"beta": 0.3} | options)
    same([r["loss"] for r in metrics(tmp_path / "out", loss)], expected)
    assert ("dpo_margin" in metrics(tmp_path / "out")[0]) == (loss == "dpo")  # SimPO knows no reference


def test_a_guide_made_by_dpo_serves_as_guide(tmp_path):
    """--loss dpo, then its policy as --guide; the same as a guide trained by stage 1. --guide-beta scales r_hat."""
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 10)
    assert run("--out", tmp_path / "dpo", "--model", start, "--data", path, "--loss", "dpo") == 0
    assert run("--out", tmp_path / "given", "--model", start, "--data", path, "--guide", tmp_path / "dpo/policy") == 0
    assert run("--out", tmp_path / "own", "--model", start, "--data", path) == 0
    same(
        [r["loss"] for r in metrics(tmp_path / "given", "tgdpo")],
        [r["loss"] for r in metrics(tmp_path / "own", "tgdpo")],
    )
    assert not metrics(tmp_path / "given", "dpo") and not (tmp_path / "given/guide").exists()
    # r_hat scales with --guide-beta, so alpha 1 and half the scale is alpha 0.5 and the whole
    assert (
        run(
            "--out",
            tmp_path / "half",
            "--model",
            start,
            "--data",
            path,
            "--guide",
            tmp_path / "dpo/policy",
            guide_beta=0.15,
            alpha=1.0,
        )
        == 0
    )
    same(
        [r["loss"] for r in metrics(tmp_path / "half", "tgdpo")],
        [r["loss"] for r in metrics(tmp_path / "own", "tgdpo")],
    )


def test_bfloat16_starts_at_log_2(tmp_path):
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 10)
    assert run("--out", tmp_path / "out", "--model", start, "--data", path, dtype="bfloat16", micro_tokens=100) == 0
    for stage in ("dpo", "tgdpo"):
        assert abs(metrics(tmp_path / "out", stage)[0]["loss"] - math.log(2)) < 1e-3
    assert load(tmp_path / "out/policy").config.dtype == torch.float32  # loaded as asked
    assert json.load(open(tmp_path / "out/policy/config.json"))["dtype"] == "bfloat16"


def test_bfloat16_trains_and_reduces_in_float32(tmp_path, monkeypatch):
    """Master weights, optimiser and the gradients' sums over ranks: steps far below bfloat16's resolution add up."""
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 8)
    shard, step, policies, seen = train.fully_shard, train.optimiser_step, [], []

    def sharding(module, **settings):
        policies.append(settings["mp_policy"])
        return shard(module, **settings)

    def stepping(run, net, optimiser, stage, batch):
        before = [p.to_local().clone() for p in net.parameters()]
        row = step(run, net, optimiser, stage, batch)
        seen.append((before, [p.to_local().clone() for p in net.parameters()], optimiser))
        return row

    monkeypatch.setattr(train, "fully_shard", sharding)
    monkeypatch.setattr(train, "optimiser_step", stepping)
    given = ("--out", tmp_path / "out", "--model", start, "--data", path, "--loss", "dpo")
    assert run(*given, dtype="bfloat16", lr=1e-5, epochs=1) == 0
    assert policies and {(p.param_dtype, p.reduce_dtype) for p in policies} == {(torch.bfloat16, torch.float32)}
    for before, after, optimiser in seen:
        for a, b in zip(before, after):
            assert a.dtype == b.dtype == torch.float32 and 0 < (a - b).abs().max() < 2e-5
        state = optimiser.state_dict()["state"].values()
        assert {s[name].dtype for s in state for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    weights = [b for b in seen[-1][1] if b.dim() > 1]  # of about 0.2, where bfloat16 steps by 1e-3
    assert all((b != b.bfloat16().float()).double().mean() > 0.9 for b in weights)


def test_weights_cast_once_a_step_train_the_same_policy(tmp_path, monkeypatch):
    """What one GPU does where memory allows, here on a CPU: each block is gathered once a step, not twice a pack."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 8)
    begin, gather, step, policies = train.begin, FSDPParamGroup._to_unsharded, train.optimiser_step, {}
    for cast_once in (False, True):
        gathered, out = [], tmp_path / f"out{cast_once}"

        def begun(*given):
            run = begin(*given)
            return run._replace(plan=run.plan._replace(cast_once=cast_once))

        def stepping(*given):
            before = len(gathered)
            row = step(*given)
            counts.append(len(gathered) - before)
            return row

        counts = []
        monkeypatch.setattr(train, "begin", begun)
        monkeypatch.setattr(train, "optimiser_step", stepping)
        counted = lambda group: (gathered.append(1) if group.is_sharded else None, gather(group))
        monkeypatch.setattr(FSDPParamGroup, "_to_unsharded", counted)
        given = ("--model", start, "--data", path, "--eval-data", path, "--loss", "dpo", "--eval-every", 1)
        assert run("--out", out, *given, dtype="bfloat16", micro_tokens=1) == 0
        policies[cast_once] = (load(out / "policy").state_dict(), [r["loss"] for r in metrics(out)], counts)
    (plain, losses, often), (once, same_losses, seldom) = policies[False], policies[True]
    layers = load(start).config.num_hidden_layers
    assert set(often) == {4 * (2 * layers + 1)} and set(seldom) == {layers + 1}  # four packs of a pair
    assert losses == same_losses and all(torch.equal(plain[name], once[name]) for name in plain)


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_a_step_waits_for_the_device_three_times(micro_tokens, tmp_path, monkeypatch):
    """Whatever asks a tensor for its value: twice for the row of metrics, once for the gradient's norm, never within a
    micro-batch. Left out are a pack before it is on the device (data.py), and the loop over segments on CPU."""
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 8)
    step, waits = train.optimiser_step, []

    def watched(plain):
        def asked(tensor, *given, **named):
            file = sys._getframe(1).f_code.co_filename
            if not file.endswith(("data.py", "kernels/attention.py")):
                waits[-1].append((plain.__name__, file))
            return plain(tensor, *given, **named)

        return asked

    def stepping(*given):
        waits.append([])
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
                patch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
            return step(*given)

    monkeypatch.setattr(train, "optimiser_step", stepping)
    given = ("--out", tmp_path / "out", "--model", start, "--data", path)
    assert run(*given, micro_tokens=micro_tokens, epochs=1) == 0
    assert len(waits) == 4 and {len(each) for each in waits} == {3}, waits


def test_a_ragged_batch_is_divided_by_its_own_pairs(tmp_path):
    """Two pairs in a batch of four: the gradient, before any clipping, is that of their mean. AdamW would not tell."""
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 2)
    given = ("--out", tmp_path / "out", "--model", start, "--data", path, "--loss", "dpo")
    assert run(*given, epochs=1, max_grad_norm=1e9) == 0
    net, total = load(start), 0.0
    for pair in tokens_of(start, path):  # at the start -log sigma(0.3 h) has the gradient -0.15 grad h
        h = sum(sequence(net, pair.prompt, pair.chosen)) - sum(sequence(net, pair.prompt, pair.rejected))
        total = total - 0.15 * h / 2
    norm = torch.stack([g.norm() for g in torch.autograd.grad(total, list(net.parameters()))]).norm()
    (row,) = metrics(tmp_path / "out")
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_another_guide_is_read_anew_and_its_figures_are_logged(tmp_path, capfd):
    """--overwrite keeps the cache: its key knows whose weights it holds. r_hat and f by side, alpha's bounds."""
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 4)
    guides = [make_checkpoint(tmp_path / f"guide{seed}", seed=seed) for seed in (1, 2)]
    given = ("--out", tmp_path / "out", "--model", start, "--data", path, "--overwrite")
    means = []
    for guide in guides:
        capfd.readouterr()
        assert run(*given, "--guide", guide, alpha=0.4, guide_beta=0.15, epochs=1) == 0
        ref, teacher, r_hat = load(start), load(guide), {1: [], -1: []}
        with torch.no_grad():
            for pair in tokens_of(start, path):
                for sign, response in ((1, pair.chosen), (-1, pair.rejected)):
                    logps = (torch.stack(sequence(net, pair.prompt, response)) for net in (teacher, ref))
                    r_hat[sign] += (0.15 * torch.sub(*logps)).tolist()
        f = np.array([1 + sign * 0.4 * r for sign, side in r_hat.items() for r in side])
        (row,) = metrics(tmp_path / "out")
        for name, values in (("r_hat", np.array(r_hat[1] + r_hat[-1])), ("f", f)):
            found = [row[f"{name}_{figure}"] for figure in ("mean", "std", "min", "max")]
            assert found == pytest.approx([values.mean(), values.std(), values.min(), values.max()], abs=1e-4)
        slopes = sorted(-sign * r for sign, side in r_hat.items() for r in side)  # f = 1 - alpha slope
        n = len(slopes)
        bounds = [1 / slopes[math.ceil(round(share * n, 6)) - 1] for share in (1, 0.99, 0.95)]
        printed = capfd.readouterr()
        printed = printed.out + printed.err
        assert "below alpha {:.3g}, on 99 % below {:.3g}, on 95 % below {:.3g}".format(*bounds) in printed
        assert ("f is not positive on" in printed) == (f.min() <= 0)
        means.append(row["r_hat_mean"])
    assert abs(means[0] - means[1]) > 1e-3 and len(list((tmp_path / "out/cache").glob("guide-*"))) == 2


def test_f_of_exactly_0_is_not_positive(capfd):
    """In the advice on alpha, and in the metrics (test_losses)."""
    pair = data.Pair(*(np.zeros(n, np.int32) for n in (1, 2, 1)), "")
    options = argparse.Namespace(alpha=2.0, guide_beta=0.5)
    ref, guide = [torch.zeros(3)], [torch.tensor([-1.0, 1.0, 0.5])]  # r_hat -0.5, 0.5; 0.25: f = 0, 2; 0.5
    train.say_alpha(argparse.Namespace(options=options, rank=0), [pair], ref, guide)
    printed = "".join(capfd.readouterr())
    assert "all tokens below alpha 2," in printed and "f is not positive on 33.33% of the tokens" in printed


@pytest.mark.parametrize("micro_tokens", [1, 70, 150])
def test_a_step_does_not_depend_on_micro_tokens(micro_tokens, tmp_path):
    """One pair at a time, anything between and all in one: the same gradient, in the ragged last batch as well."""
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 10)
    grads = []
    step = train.optimiser_step
    for tokens in (micro_tokens, 100_000):

        def keep(run, net, optimiser, stage, batch):
            optimiser.step = lambda: grads.append([local_rows(p.grad)[0].clone() for p in net.parameters()])
            return step(run, net, optimiser, stage, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "optimiser_step", keep)
            assert (
                run(
                    "--out",
                    tmp_path / str(tokens),
                    "--model",
                    start,
                    "--data",
                    path,
                    "--loss",
                    "dpo",
                    "--no-compile",
                    micro_tokens=tokens,
                    epochs=1,
                    max_grad_norm=1e9,
                )
                == 0
            )
    assert len(grads) == 6 and len(data.epoch_order(10, 0, 0)) % 4 == 2
    for few, all_in_one in zip(grads[:3], grads[3:]):
        for a, b in zip(few, all_in_one):
            assert (a - b).abs().max() < 1e-6


def test_metrics_rows_and_evaluation(tmp_path):
    start = make_checkpoint(tmp_path / "start")
    path, held_out = make_pairs(tmp_path / "pairs.jsonl", 8), make_pairs(tmp_path / "held_out.jsonl", 5, seed=1)
    out = tmp_path / "out"
    assert run("--out", out, "--model", start, "--data", path, "--eval-data", held_out, eval_every=2, samples=2) == 0
    for stage in ("dpo", "tgdpo"):
        rows = metrics(out, stage)
        assert [r["step"] for r in rows] == [1, 2, 3, 4] and [r["epoch"] for r in rows] == [1, 1, 2, 2]
        for row in rows:
            assert {
                "loss",
                "margin",
                "accuracy",
                "lr",
                "grad_norm",
                "tokens_per_second",
                "pairs_per_second",
                "peak_memory",
                "dpo_margin",
                "logratio_chosen",
                "logratio_rejected",
            } <= row.keys()
        evaluations = metrics(out, stage, evaluation=True)
        assert [r["step"] for r in evaluations] == [2, 4] and all("lr" not in r for r in evaluations)
        assert all(r["tokens_per_second"] > 0 and r["peak_memory"] > 0 for r in evaluations)
    row = metrics(out, "tgdpo")[-1]
    assert row["r_hat_min"] <= row["r_hat_mean"] <= row["r_hat_max"] and row["r_hat_std"] > 0
    assert row["f_min"] <= row["f_mean"] <= row["f_max"] and 0 <= row["f_nonpositive"] <= 1
    # the evaluation row of the exported policy, worked out with transformers
    pairs = tokens_of(start, held_out)
    policy, ref = load(out / "policy"), load(start)
    with torch.no_grad():
        ratios = [
            [sum(sequence(policy, p.prompt, r)) - sum(sequence(ref, p.prompt, r)) for r in (p.chosen, p.rejected)]
            for p in pairs
        ]
    row = metrics(out, "tgdpo", evaluation=True)[-1]
    assert row["dpo_margin"] == pytest.approx(0.3 * np.mean([float(w - l) for w, l in ratios]), abs=1e-4)
    assert row["logratio_chosen"] == pytest.approx(np.mean([float(w) for w, _ in ratios]), abs=1e-3)
    assert len(json.load(open(out / "samples.json"))) == 2
    assert len(open(out / "tokens.jsonl").readlines()) == 5
    assert (out / "report.html").stat().st_size > 1000


def test_the_saved_config_repeats_the_run(tmp_path):
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 9)
    assert run("--out", tmp_path / "a", "--model", start, "--data", path, "--loss", "dpo") == 0
    assert train.main(["--config", str(tmp_path / "a/config.toml"), "--out", str(tmp_path / "b")]) == 0
    losses = [[r["loss"] for r in metrics(tmp_path / o)] for o in "ab"]
    assert losses[0] == losses[1]
    configs = [tomllib.load(open(tmp_path / o / "config.toml", "rb")) for o in "ab"]
    assert configs[0] == configs[1]


def test_a_dry_run_trains_nothing(tmp_path, capsys):
    start, path = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 9)
    assert run("--dry-run", "--out", tmp_path / "out", "--model", start, "--data", path) == 0
    printed = capsys.readouterr().out
    assert "9 rows read, 9 pairs kept" in printed and "6 steps of 4 pairs, in each of two stages" in printed
    assert "<|end|>" in printed and "memory of a rank" in printed
    assert not (tmp_path / "out").exists()


def test_learning_rates_by_hand():
    class Options:
        lr, warmup_ratio, schedule = 1.0, 0.2, "cosine"

    rates = [train.learning_rate(Options, step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])  # W = 2, then k = 0 of N = 8
    assert rates[6] == pytest.approx(0.5) and rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    Options.schedule = "linear"
    assert train.learning_rate(Options, 4, 10) == pytest.approx(1 - 2 / 8)
    Options.schedule, Options.warmup_ratio = "constant", 0
    assert {train.learning_rate(Options, step, 10) for step in range(10)} == {1.0}


def test_a_weight_multiplies_its_pairs_loss(tmp_path):
    """--columns weight=COLUMN: the training of a plain loop with the same weights, and of no loop without them."""
    start, path = make_checkpoint(tmp_path / "start"), tmp_path / "pairs.jsonl"
    make_pairs(path, 10)
    rows = [json.loads(line) | {"w": 0.1 + i} for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--model", start, "--data", path, "--loss", "dpo", "--columns", "weight=w")
    assert run("--out", tmp_path / "out", *given) == 0
    plain = tokens_of(start, path)
    expected, _ = plain_training(start, [p._replace(weight=0.1 + i) for i, p in enumerate(plain)], "dpo", beta=0.3)
    found = [r["loss"] for r in metrics(tmp_path / "out", "dpo")]
    same(found, expected)
    assert max(abs(a - b) for a, b in zip(found, plain_training(start, plain, "dpo", beta=0.3)[0])) > 0.1
    assert run("--out", tmp_path / "short", *given, "--max-steps", "2") == 0
    assert len(metrics(tmp_path / "short", "dpo")) == 2
