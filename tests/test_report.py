"""The report page, of run directories made here: in an HTML parser and, where installed, in Chromium."""

import base64
import hashlib
import html.parser
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from report import answer, figures, report
from report.text import UNSEEN, signed, visible

ROOT = pathlib.Path(__file__).resolve().parent.parent

WORDS = (
    " the",
    " cat",
    " sat",
    " quietly",
    " on",
    " a",
    " mat",
    ",",
    ".",
    "\n\n",
    " and",
    " said",
    " “",
    "”",
    "hello",
    " 42",
    " of",
    " course",
    ":",
    " no",
    " yes",
    " blue",
    " small",
    "!",
    " tre",
    "es",
    " run",
    "ning",
)


def with_results(row, loss="tgdpo", beta=0.1, alpha=0.5, guide_beta=1.0):
    """A row of tokens.jsonl with what a run records beside the log-probabilities, as train.py does."""
    for side, sign in (("chosen", 1), ("rejected", -1)):
        part = row[side]
        logps = {name: np.array(part[name]) for name in ("ref", "guide", "policy") if name in part}
        if "ref" in logps and "policy" in logps:
            part["moved"] = (logps["policy"] - logps["ref"]).tolist()
        if loss == "tgdpo" and "guide" in logps:
            reward = guide_beta * (logps["guide"] - logps["ref"])
            part |= {"reward": reward.tolist(), "f": (1 + sign * alpha * reward).tolist()}
        elif loss == "dpo" and "moved" in part:
            part["reward"] = (beta * np.array(part["moved"])).tolist()
        elif loss == "simpo" and "policy" in logps:
            part["reward"] = (beta / len(logps["policy"]) * logps["policy"]).tolist()
    difference = lambda values: float(values(row["chosen"]) - values(row["rejected"]))
    if "reward" in row["chosen"]:
        row["margin"] = difference(lambda part: sum(part["reward"]))
    if "moved" in row["chosen"]:
        row["dpo_margin"] = beta * difference(lambda part: sum(part["moved"]))
        if "f" in row["chosen"]:
            row["phi"] = beta * difference(lambda part: np.dot(part["f"], part["moved"]))
    return row


def make_run(out, seed=0, loss="tgdpo", pairs=24, length=40, words=WORDS, steps=60):
    """A finished run's files, made up: a guide that likes some words, a policy that followed it half-way."""
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    likes = rng.normal(0, 4, len(words))
    (out / "config.toml").write_text(
        f'loss = "{loss}"\nmodel = "example/tiny"\nbeta = 0.1\nalpha = 0.5\n'
        'guide_beta = 1.0\nlr = 7e-7\nbatch_size = 32\ndata = ["pairs.jsonl"]\n'
    )
    rows = []
    for stage in ("dpo", "tgdpo") if loss == "tgdpo" else (loss,):
        for step in range(1, steps + 1):
            done = 1 - math.exp(-3 * step / steps)
            row = {
                "stage": stage,
                "step": step,
                "epoch": 1,
                "loss": 0.693 - 0.4 * done + rng.normal(0, 0.02),
                "margin": 0.9 * done,
                "dpo_margin": 0.9 * done,
                "accuracy": min(1, 0.5 + 0.4 * done + rng.normal(0, 0.03)),
                "dpo_accuracy": 0.5 + 0.3 * done,
                "logratio_chosen": -2 * done,
                "logratio_rejected": -11 * done,
                "lr": 7e-7 * math.cos(1.5 * step / steps),
                "grad_norm": 20 * rng.lognormal(0, 0.2),
                "tokens_per_second": 8000 + 200 * rng.normal(),
            }
            if stage != "tgdpo":
                row["accuracy"] = row["dpo_accuracy"]
            else:
                row |= {
                    "dpo_margin": 1.1 * done,
                    "logratio_chosen": -3 * done,
                    "margin": 1.3 * done + rng.normal(0, 0.05),
                    "f_nonpositive": 0.02 * done,
                    "r_hat_mean": 0.01,
                    "r_hat_std": 0.3,
                    "r_hat_min": -2 + rng.normal(0, 0.2),
                    "r_hat_max": 1.8,
                    "f_mean": 1.0,
                    "f_std": 0.15,
                    "f_min": -0.1,
                    "f_max": 2.1,
                }
            rows.append(row)
            if step % (steps // 6) == 0:
                held_out = {key: value for key, value in row.items() if key not in ("lr", "grad_norm")}
                rows.append(held_out | {"eval": True})
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    with open(out / "tokens.jsonl", "w") as file:
        for number in range(pairs):
            row = {
                "source": f"pairs.jsonl:{number + 1}",
                "prompt": f"<|user|>\nQuestion {number}: what did the cat do?<|assistant|>\n",
            }
            turn = rng.normal(0, 0.3, 2)  # what the policy does to a whole response
            for side, sign, more in (("chosen", 0.5, turn[0]), ("rejected", -0.5, turn[1])):
                T = int(rng.integers(length // 2, length + 1))
                ids = rng.integers(0, len(words), T)
                ref = -rng.gamma(1.2, 1.5, T)
                pull = 0.2 * likes[ids] * rng.normal(1, 0.5, T) + 0.1 * sign
                row[side] = {
                    "tokens": [words[i] for i in ids[:-1]] + ["<|end|>"],
                    "policy": (ref + 0.7 * pull + more + rng.normal(0, 0.1, T)).round(5).tolist(),
                }
                if loss != "simpo":
                    row[side]["ref"] = ref.round(5).tolist()
                if loss == "tgdpo":
                    row[side]["guide"] = (ref + pull).round(5).tolist()
            file.write(json.dumps(with_results(row, loss)) + "\n")
    (out / "samples.json").write_text(
        json.dumps([{"prompt": "What is <b>bold</b>?", "reference": "A tag.\n", "guide": "HTML", "policy": "Tag"}] * 3)
    )
    drop = {"file": "pairs.jsonl", "row": 7, "reason": "empty response: chosen"}
    (out / "dropped.jsonl").write_text(f"{json.dumps(drop)}\n" * 2)
    (out / "run.json").write_text(
        json.dumps(
            {
                "command": "python train.py --seed 0",
                "machine": {"device": "2 cores", "gpu": None},
                "versions": {"torch": "2.13.0"},
                "data": {"train": {"rows": 130, "kept": 128, "cut": 3, "dropped": 2}, "eval": {"rows": 24}},
                "table": [{"model": "reference", "accuracy": 0.5}, {"model": "policy", "accuracy": 0.8125}],
            }
        )
    )
    return out


def one_pair(out, config='loss = "tgdpo"\nbeta = 0.5\nalpha = 2.0\nguide-beta = 0.25\n', **results):
    """A run of one pair with numbers small enough to check by hand."""
    out.mkdir(exist_ok=True)
    (out / "config.toml").write_text(config)
    row = {
        "source": "a.jsonl:1",
        "prompt": "Q",
        "chosen": {"tokens": ["yes", "<e>"], "ref": [-2, -1], "guide": [-1, -2], "policy": [-1, -1]},
        "rejected": {"tokens": ["no", "!", "<e>"], "ref": [-1, -1, -1], "guide": [-3, -1, -1], "policy": [-2, -1, -3]},
    }
    row = with_results(row, **({"beta": 0.5, "alpha": 2.0, "guide_beta": 0.25} | results))
    (out / "tokens.jsonl").write_text(json.dumps(row) + "\n")
    return out


def pairs_of(out):
    rows, _ = report.read_rows(out / "tokens.jsonl")
    return [report.read_pair(number, row) for number, row in enumerate(rows, 1)]


def on_the_page(path, pairs=True):
    """What the HTML file says: its data, with the packed numbers of its pairs as lists."""
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    for pair in data["pairs"] if pairs else ():
        for side in figures.SIDES:
            for name in report.NUMBERS:
                if name in pair[side]:
                    pair[side][name] = np.frombuffer(base64.b64decode(pair[side][name]), "<f4").tolist()
    return data


def test_a_pair_by_hand(tmp_path):
    (pair,) = pairs_of(one_pair(tmp_path))
    assert [part["reward"].tolist() for part in (pair.chosen, pair.rejected)] == [[0.25, -0.25], [-0.5, 0, 0]]
    assert [part["f"].tolist() for part in (pair.chosen, pair.rejected)] == [[1.5, 0.5], [2, 1, 1]]
    assert pair.margin == 0.0 - -0.5
    assert pair.dpo_margin == 0.5 * (1 - -3)  # moved: 1 0 and -1 0 -2
    assert pair.phi == 0.5 * (1.5 * 1 - (2 * -1 + 1 * -2))


def test_recorded_numbers_reach_the_page_unchanged(tmp_path):
    """Numbers that follow from no formula: whatever the run recorded is what the page holds."""
    one_pair(tmp_path)
    row = json.loads((tmp_path / "tokens.jsonl").read_text())
    rng = np.random.default_rng(0)
    for side in figures.SIDES:
        for name in report.NUMBERS:
            row[side][name] = rng.normal(0, 1, len(row[side]["tokens"])).astype(np.float32).tolist()
    row |= {"margin": 0.1234567890123, "dpo_margin": -17.25, "phi": 3e-9}  # the policy is wrong, the guide right
    (tmp_path / "tokens.jsonl").write_text(json.dumps(row))
    (pair,) = on_the_page(report.write(tmp_path))["pairs"]
    for side in figures.SIDES:
        assert {name: pair[side][name] for name in report.NUMBERS} == {name: row[side][name] for name in report.NUMBERS}
    for name in ("margin", "dpo_margin", "phi"):
        assert pair[name] == row[name]
    data = report.gather(tmp_path)
    assert {each["name"]: each["pairs"] for each in data["classes"] if each["pairs"]} == {"turned wrong": [1]}
    means = [signed(np.mean(np.float32(row[side]["reward"]))) for side in figures.SIDES]
    note = data["moved"]["charts"][0]["note"]
    assert re.findall(r"mean ([+−][\d.]+)", note) == means


def test_tokens_of_an_earlier_run_still_give_a_page(tmp_path):
    run = make_run(tmp_path, pairs=4)
    rows, _ = report.read_rows(run / "tokens.jsonl")
    for row in rows:
        for name in ("margin", "dpo_margin", "phi"):
            del row[name]
        for side in figures.SIDES:
            row[side] = {name: row[side][name] for name in ("tokens", "ref", "guide", "policy")}
    (run / "tokens.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = on_the_page(report.write(run))
    assert len(data["pairs"]) == 4 and data["pairs"][0]["chosen"]["guide"] == pytest.approx(rows[0]["chosen"]["guide"])
    assert (data["moved"], data["classes"], data["colours"]) == (None, [], [])
    assert data["curves"] and "tokens.jsonl holds no rewards" in data["notes"][-1]


def test_without_a_guide_the_policy_is_the_reward(tmp_path):
    (pair,) = pairs_of(one_pair(tmp_path, config='loss = "dpo"\nbeta = 0.5\n', loss="dpo"))
    assert [part["reward"].tolist() for part in (pair.chosen, pair.rejected)] == [[0.5, 0], [-0.5, 0, -1]]
    assert "f" not in pair.chosen and pair.phi is None and pair.margin == pair.dpo_margin == 2.0
    data = report.gather(tmp_path)
    assert data["symbol"] == "β log π/π_ref" and [each["key"] for each in data["colours"]] == ["reward", "moved"]
    assert [(each["name"], each["pairs"]) for each in data["classes"]] == [("right", [1]), ("wrong", [])]
    assert not any(" f" in chart["title"] for chart in data["moved"]["charts"])


def test_simpo_has_no_reference(tmp_path):
    run = make_run(tmp_path, loss="simpo", pairs=2)
    row = report.read_rows(run / "tokens.jsonl")[0][0]
    pair, _ = pairs_of(run)
    for side in figures.SIDES:
        policy = row[side]["policy"]
        assert getattr(pair, side)["reward"] == pytest.approx(0.1 / len(policy) * np.array(policy), rel=1e-5)
    assert ("moved" in pair.chosen, pair.dpo_margin, pair.phi) == (False, None, None)
    data = report.gather(run)
    assert data["symbol"] == "β/|y| log π" and "policy ranks them wrong" in data["classes"][1]["note"].lower().replace(
        "the ", ""
    )
    assert "of Σ|f|" not in data["moved"]["columns"] and {len(row) for row in data["moved"]["table"]} == {6}
    (loss,) = [chart for chart in data["curves"] if chart["title"] == "Loss"]
    assert "log 2" not in [series["name"] for series in loss["series"]]


def test_pairs_by_what_the_guidance_turned():
    def pair(number, margin, plain):
        return report.Pair(number, "", "", {}, {}, margin, plain, 9.0)

    pairs = [
        pair(1, 1, 3),
        pair(2, -2, 1),
        pair(3, 0, 2),
        pair(4, 5, -6),
        pair(5, -1, -1),
        pair(6, 0.1, 0),
        pair(7, 4, 4),
    ]
    found = {each["name"]: each["pairs"] for each in answer.classes_of(pairs, True)}
    assert found == {"turned right": [3, 2], "turned wrong": [4, 6], "both right": [7, 1], "both wrong": [5]}
    begun = [p._replace(dpo_margin=None) for p in pairs]  # the policy is not there yet
    found = {each["name"]: each["pairs"] for each in answer.classes_of(begun, True)}
    assert found == {"right": [4, 7, 1, 6], "wrong": [2, 5, 3]}


def told(out, **changes):
    """The words of a run's page, one text each, run.json's table and more replaced."""
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | changes))
    return [" ".join(each) for each in report.gather(out)["answer"]["words"]]


def test_the_answer_says_recorded_figures_and_no_more_than_they_show(tmp_path):
    run, model = make_run(tmp_path), {"logratio_chosen": -1.5, "logratio_rejected": -2.5}
    guide = {"model": "guide", "accuracy": 0.5, "margin": 0.25} | model
    policy = {"model": "policy", "accuracy": 0.625, "margin": 0.75} | model
    words = told(run, table=[guide, policy], table_pairs=400)
    assert words[0].startswith("In ranking pairs, yes. Of 400 training pairs, the policy (TGDPO) puts 62.5% ")
    assert (
        "the guide (DPO) 50.0%; chance alone moves either by some 5.0%" in words[0]
        and "+0.75 against +0.25" in words[0]
    )
    assert "no." in told(run, table=[guide, policy | {"accuracy": 0.4}])[0][:25]
    assert "neither way" in told(run, table=[guide, policy | {"accuracy": 0.54}])[0]
    with open(run / "config.toml", "a") as file:
        file.write('eval_data = ["held.jsonl"]\n')
    words = told(
        run, table=[guide | {"gold": 2.5, "wins": 0.75, "kl": 1.25}, policy | {"gold": 3, "wins": 0.8, "kl": 4}]
    )
    assert "400 held-out pairs" in words[0]
    assert words[1].startswith("By the true reward, yes, at more KL.") and "guide +2.5 at KL 1.25" in words[1]
    counts = [len(each["pairs"]) for each in report.gather(run)["classes"]]
    assert all(counts) and sum(counts) == 24
    assert f"turned {counts[0]} right" in words[2] and f"and {counts[1]} wrong" in words[2]
    assert "chosen −1.5 and −1.5, rejected −2.5 and −2.5" in words[3] and "lose likelihood" in words[3]
    last = [row for row in report.read_rows(run / "metrics.jsonl")[0] if row.get("eval")][-1]
    assert words[4].startswith("φ, ") and signed(last["margin"]) in words[4] and f"{last['accuracy']:.1%}" in words[4]
    pictures = []
    for stages in (("dpo", "tgdpo"), ("dpo",), ("tgdpo",)):  # the second: still at it, the third: with --guide
        rows = [row for row in report.read_rows(run / "metrics.jsonl")[0] if row["stage"] in stages]
        pictures.append(answer.answer({}, {}, "tgdpo", figures.stages_of(rows, "tgdpo"), [])["picture"])
    both = "Guide (DPO) and policy (TGDPO) on the same pairs"
    assert pictures == [both, "The guide against steps", "The policy against steps"]
    words = told(run, table=None)  # before it has ended: the last evaluations
    assert signed(last["dpo_margin"]) in words[0] and len(words) == 4


def test_what_carries_the_reward_by_hand(tmp_path):
    moved = report.gather(one_pair(tmp_path))["moved"]
    table = {(row[0], row[1]): row[2:] for row in moved["table"]}
    # tokens, share of tokens, of the summed |r_hat|, mean r_hat, share of the summed |f|
    assert table["end token", "chosen"] == ["1", "50.0%", "50.0%", "−0.25", "25.0%"]
    assert table["punctuation", "rejected"] == ["1", "33.3%", "0.0%", "+0", "25.0%"]
    assert table["other", "rejected"] == ["1", "33.3%", "100.0%", "−0.5", "50.0%"]
    assert table["white space", "chosen"] == ["0", "0.0%", "0.0%", "–", "0.0%"]
    assert moved["end"] == "<e>"
    assert "f ≤ 0: 0.0% of the chosen tokens, 0.0% of the rejected." in moved["charts"][1]["note"]


def test_the_reward_is_correlated_with_length(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(30):
        row = {"source": "", "prompt": ""}
        for side in figures.SIDES:
            T = int(rng.integers(2, 30))
            guide = rng.normal(-0.9, 0.01, T).tolist()
            row[side] = {"tokens": ["a"] * T, "ref": [-1] * T, "guide": guide}
        rows.append(json.dumps(with_results(row)))
    one_pair(tmp_path)
    (tmp_path / "tokens.jsonl").write_text("\n".join(rows))
    note = report.gather(tmp_path)["moved"]["charts"][-1]["note"]
    alone, differences = (float(value) for value in re.findall(r"[+−-]\d[\d.]*\d", note))
    assert alone > 0.95 and differences > 0.95


def test_kinds_of_tokens():
    kinds = {
        "other": (" the", "x.", "日", "<e>", ""),
        "white space": ("\n", " "),
        "punctuation": (".", " (", "...", "+"),
    }
    for kind, tokens in kinds.items():
        assert {figures.kind_of(token) for token in tokens} == {kind}


def test_distributions_hold_every_token(tmp_path):
    charts = {chart["title"]: chart for chart in report.gather(make_run(tmp_path))["moved"]["charts"]}
    for title in ("Distribution of r̂", "Distribution of f"):
        assert [sum(series["y"]) for series in charts[title]["series"]] == pytest.approx([1, 1], abs=1e-3)
    chart = charts["Where the policy moved, by weight f"]
    mean = np.array([(x, y) for x, y in zip(chart["x"], chart["series"][0]["y"]) if y is not None])
    assert len(mean) == 12 and np.corrcoef(mean.T)[0, 1] > 0.9  # make_run's policy follows its guide
    chart = charts["Σ r̂ of a response by its length"]
    assert len(chart["x"]) == 48 and chart["x"] == sorted(chart["x"])
    assert [sum(y is not None for y in series["y"]) for series in chart["series"]] == [24, 24]


def test_what_was_added_to_the_loss_is_told(tmp_path):
    plain = report.gather(make_run(tmp_path))
    with open(tmp_path / "config.toml", "a") as file:
        file.write('with = ["length", "clip=2"]\ncentre_guidance = true\nlora_rank = 4\n')
    data = report.gather(tmp_path)
    assert data["about"].startswith(
        "TGDPO with β 0.1, α 0.5, parts length clip=2, centred guidance, adapters of rank 4"
    )
    assert "less its mean under the reference" in data["meaning"] and "clamped" in data["meaning"]
    assert "parts" not in plain["about"] and "mean" not in plain["meaning"]


def test_curves_by_stage(tmp_path):
    make_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:  # a resumed run writes its last steps again
        file.write(json.dumps({"stage": "tgdpo", "step": 60, "loss": 0.125, "lr": 1e-9}) + "\n")
    data = report.gather(tmp_path)
    assert "Stage 2: TGDPO, step 60" in data["about"]
    titles = [stage["title"] for stage in figures.stages_of(report.read_rows(tmp_path / "metrics.jsonl")[0], "tgdpo")]
    assert titles == ["Stage 1: the guide, trained with DPO", "Stage 2: TGDPO"]
    assert [chart["title"] for chart in data["answer"]["charts"]] == [
        "Plain DPO accuracy",
        "Plain DPO margin",
        "log π/π_ref of the chosen response",
        "log π/π_ref of the rejected response",
    ]
    for chart, last in zip(
        data["answer"]["charts"][1:], ((0.9, 1.1), (-2, -3), (-11, -11))
    ):  # guide and policy, one axis
        assert [series["name"] for series in chart["series"]] == ["guide", "policy"]
        ends = [series["y"][-1] for series in chart["series"]]
        assert ends == pytest.approx([value * (1 - math.exp(-3)) for value in last], rel=1e-4)
    charts = {chart["title"]: chart for chart in data["curves"]}
    both = ["Plain DPO accuracy", "Plain DPO margin", "log π/π_ref of the chosen response"]
    both += ["log π/π_ref of the rejected response", "Loss", "Gradient norm", "Learning rate", "Tokens per second"]
    alone = ["Accuracy by φ, the optimised margin", "φ, the optimised margin", "r̂: mean, least and greatest"]
    alone += ["f: mean, least and greatest", "Share of tokens with f ≤ 0"]
    titles = [f"{title}: {role}" for title in both for role in ("guide", "policy")]
    assert list(charts) == titles + [f"{title}: policy" for title in alone]
    loss = {series["name"]: series for series in charts["Loss: policy"]["series"]}
    assert list(loss) == ["training", "held out", "log 2"] and charts["Loss: policy"]["x"] == list(range(1, 61))
    assert len({series["colour"] for series in loss.values()}) == 3 and "smooth" in loss["training"]
    held_out = zip(charts["Loss: policy"]["x"], loss["held out"]["y"])
    assert [step for step, y in held_out if y is not None] == list(range(10, 61, 10))
    assert None not in loss["training"]["y"] and loss["training"]["y"][-1] == 0.125
    for title in both:  # on the same scale, which holds both
        ranges = [charts[f"{title}: {role}"]["range"] for role in ("guide", "policy")]
        assert ranges[0] == ranges[1] and ranges[0][0] < ranges[0][1]
    (band,) = charts["f: mean, least and greatest: policy"]["series"]
    assert all(low < mean < high for low, mean, high in zip(band["low"], band["y"], band["high"]))


def test_few_evaluations_leave_training_in_the_picture():
    rows = [{"step": step, "dpo_margin": step / 8} for step in range(1, 9)]
    rows += [{"step": 8, "dpo_margin": 0.5, "eval": True}]
    (chart,) = figures.together([("guide", rows)])
    assert [(series["name"], series["y"][-1]) for series in chart["series"]] == [("guide, training", 1), ("guide", 0.5)]
    simpo = [{"step": step, "margin": 1.0, "accuracy": 0.5} for step in (1, 2)]
    assert [chart["title"] for chart in figures.together([("policy", simpo)])] == [
        "Accuracy by φ, the optimised margin",
        "φ, the optimised margin",
    ]


def test_several_runs_on_the_same_axes(tmp_path):
    outs = [
        make_run(tmp_path / name / "run", seed=seed, loss=loss)
        for seed, (name, loss) in enumerate((("a", "tgdpo"), ("b", "dpo")))
    ]
    data = report.compared(outs)
    margin = data["answer"]["charts"][1]
    assert [series["name"] for series in margin["series"]] == list(map(str, outs))  # as both are called run
    assert margin["series"][0]["y"][-1] > margin["series"][1]["y"][-1] and margin["x"] == list(range(10, 61, 10))
    tables = {each["id"]: each for each in data["tables"]}
    assert (
        tables["evaluation"]["rows"][1] == [str(outs[0]), "policy", "0.8125"] and len(tables["evaluation"]["rows"]) == 4
    )
    assert tables["settings"]["rows"] == [["loss", "tgdpo", "dpo"]]
    command = [sys.executable, ROOT / "report" / "report.py", *outs]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "compare.html\n", "")
    assert on_the_page(tmp_path / "compare.html", pairs=False)["name"] == "2 runs compared"
    assert (
        report.main([*map(str, outs), "--to", str(tmp_path / "other.html")]) == 0 and (tmp_path / "other.html").exists()
    )
    assert report.main([str(outs[0]), str(tmp_path / "no")]) == 2


def test_samples_of_a_run_that_goes_on(tmp_path):
    rows = [{"step": 20, "prompt": "Why?", "answer": "b"}, {"step": 10, "prompt": "Why?", "answer": "a"}]
    rows += [
        {"step": 20, "prompt": "Why?", "answer": "c"},
        {"step": 10, "prompt": "How?\u202e", "answer": "x"},
        {"step": 1},
        7,
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"st')
    assert on_the_page(report.write(tmp_path))["growth"] == [
        {"prompt": "Why?", "answers": [[10, "a"], [20, "c"]]},
        {"prompt": "How?⟨U+202E⟩", "answers": [[10, "x"]]},
    ]


def test_a_long_curve_keeps_its_spikes():
    values = [0.0] * 50_000
    values[31_415], values[271] = 9.0, -7.0
    keep = figures.thinned(values)
    assert len(keep) <= figures.MOST_POINTS + 2 and keep == sorted(keep)
    assert {31_415, 271} <= set(keep) and (keep[0], keep[-1]) == (0, 49_999)


def test_a_smooth_curve_keeps_its_mean():
    assert figures.smoothed(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    assert figures.smoothed(np.array([5.0])).tolist() == [5.0]
    spiky = np.where(np.arange(200) % 2, 1.0, -1.0)
    assert abs(figures.smoothed(spiky)[20:-20]).max() < 0.2


FILES = ("metrics.jsonl", "config.toml", "tokens.jsonl", "samples.json", "dropped.jsonl", "run.json")


def test_the_page_shows_what_there_is(tmp_path):
    run = make_run(tmp_path / "run", pairs=4, length=8, steps=12)
    whole = {name: (run / name).read_bytes() for name in FILES}
    for name in FILES:
        (run / name).unlink()
        report.write(run)
        for cut in (0, 1, len(whole[name]) // 2, len(whole[name]) - 3):
            (run / name).write_bytes(whole[name][:cut])
            report.write(run)
        (run / name).write_bytes(whole[name])
    (run / "tokens.jsonl").write_bytes(whole["tokens.jsonl"][:-40])
    (run / "metrics.jsonl").write_bytes(whole["metrics.jsonl"][:-40])
    (run / "config.toml").write_bytes(whole["config.toml"][: len(b'loss = "tgdpo"\nmodel = "exa')])
    data = report.gather(run)
    assert [pair["number"] for pair in data["pairs"]] == [1, 2, 3]
    assert data["notes"] == [
        "1 line(s) of metrics.jsonl could not be read and are left out.",
        "1 line(s) of tokens.jsonl could not be read and are left out.",
    ]
    for name in FILES:
        (run / name).unlink()
    empty = report.gather(run)
    assert not any(empty[key] for key in ("curves", "pairs", "moved", "tables", "samples", "notes"))


def test_values_that_no_run_writes_are_left_out(tmp_path):
    run = make_run(tmp_path, pairs=2, length=6, steps=6)
    values = ["null", "true", "-1", '"x"', "[]", "{}", "1e300", "NaN", "1e999", "9" * 400, '"\\ud800"']

    def damaged(row, places=1):
        """Row in JSON, each value of it in turn replaced by each of those, also `places` times as a list."""
        for key in row:
            rest = json.dumps({name: value for name, value in row.items() if name != key})[1:]
            for value in values:
                yield f'{{"{key}": {value}, {rest}'
                yield f'{{"{key}": [{", ".join([value] * places)}], {rest}'

    for name in ("metrics.jsonl", "dropped.jsonl", "tokens.jsonl"):
        row = report.read_rows(run / name)[0][-1]
        lines = list(damaged(row))
        for side in figures.SIDES if name == "tokens.jsonl" else ():
            rest = json.dumps({key: value for key, value in row.items() if key != side})[1:]
            lines += [f'{{"{side}": {text}, {rest}' for text in damaged(row[side], len(row[side]["tokens"]))]
        with open(run / name, "a") as file:
            file.write("\n".join(lines))
    data = report.gather(run)
    report.page(data)
    assert len(data["pairs"]) > 2 and "could not be read" in data["notes"][0]
    for chart in data["moved"]["charts"] + data["curves"]:
        assert None not in chart["x"] and chart["x"] == sorted(chart["x"]), chart["title"]
        for series in chart["series"]:
            assert len(series["y"]) == len(chart["x"]) and any(y is not None for y in series["y"]), chart["title"]


def test_no_damage_to_a_file_stops_the_page(tmp_path):
    run = make_run(tmp_path / "run", pairs=3, length=6, steps=6)
    rng = np.random.default_rng(1)
    junk = [b"null", b"-1", b'"x"', b"[]", b"{}", b"\xff", b'"', b"}", b"\\ud800", b"\x00", b""]
    for name in FILES:
        whole = (run / name).read_bytes()
        values = [match.span() for match in re.finditer(rb'"[^"]*"|-?\d[\d.e-]*|\[|\{', whole)]
        for _ in range(8):
            begin, end = values[rng.integers(len(values))]
            (run / name).write_bytes(whole[:begin] + junk[rng.integers(len(junk))] + whole[end:])
            report.page(report.gather(run))
        (run / name).write_bytes(whole)


def test_data_counts_settings_machine_and_command(tmp_path):
    run = make_run(tmp_path)
    data = report.gather(run)
    tables = {each["id"]: each for each in data["tables"]}
    assert tables["evaluation"]["rows"][1] == ["policy", "0.8125"]
    assert tables["data"]["columns"] == ["", "train", "eval"]
    assert tables["data"]["rows"][:2] == [["rows read", "130", "24"], ["pairs kept", "128", "–"]]
    assert tables["reasons"]["rows"] == [["empty response", "2"]]
    assert ["lr", "7e-07"] in tables["settings"]["rows"] and ["guide_beta", "1"] in tables["settings"]["rows"]
    assert tables["machine"]["rows"] == [["device", "2 cores"], ["gpu", "–"], ["torch", "2.13.0"]]
    assert data["command"] == "python train.py --seed 0" and len(data["samples"]) == 3


# --- nothing that a token holds acts on the page --------------------------------------------------


def awkward_tokens():
    """Some thousand tokens that a page could trip over."""
    fragments = [
        "<",
        ">",
        "&",
        '"',
        "'",
        "`",
        "</script>",
        "<script>alert(1)</script>",
        "<!--",
        "-->",
        "]]>",
        "\\",
        "<img src=x onerror=alert(1)>",
        "&lt;",
        "&#60;",
        "javascript:alert(1)",
        "\\u003c",
        "${1}",
        "{{DATA}}",
        "__proto__",
        "constructor",
        "</style>",
        "</textarea>",
        "<svg/onload=alert(1)>",
        "%3Cscript%3E",
        "'-alert(1)-'",
        "Ġthe",
        "Ċ",
        "▁a",
        "<0x0A>",
        "<|endoftext|>",
        "🙂",
        "👨‍👩‍👧",
        "🇩🇪",
        "❤️",
        "é",
        "e\u0301",
        "\u0301",
        "日本",
        "العربية",
        "עברית",
        "\ufffd",
        "a\u0300" * 60,
        "=" * 300,
        " " * 128,
        "",
    ]
    codes = [
        *range(0x20),
        *range(0x7F, 0xA1),
        0xAD,
        0x61C,
        *range(0x2000, 0x2010),
        *range(0x2028, 0x2030),
        *range(0x205F, 0x2070),
        0x3000,
        0x3164,
        0xD800,
        0xDBFF,
        0xDC00,
        0xDFFF,
        0xE000,
        0xFE0F,
        0xFEFF,
        0xFFF9,
        0xFFFE,
        0xE0001,
        0xE0041,
        0xE0100,
        0x10FFFF,
    ]
    byte_level = [chr(code) for code in range(0x21, 0x180)]
    controls = [chr(code) for code in codes]
    return fragments + controls + byte_level + [a + b for a in fragments for b in fragments + controls[::2]]


def awkward_run(out, tokens):
    """A run that has these tokens as its tokens and in every other text of the page."""
    run = make_run(out, pairs=-(-len(tokens) // 400))
    rows = []
    for i, row in enumerate(report.read_rows(run / "tokens.jsonl")[0]):
        for start, side in zip((400 * i, 400 * i + 200), figures.SIDES):
            part = tokens[start : start + 200] + ["<|end|>"]
            logps = {key: [-1 - k / 100 for k in range(len(part))] for key in ("ref", "guide", "policy")}
            row[side] = {"tokens": part, **logps}
        with_results(row)
        row |= {"prompt": "".join(tokens[50 * i : 50 * i + 50]), "source": tokens[i]}
        rows.append(json.dumps(row))
    (run / "tokens.jsonl").write_text("\n".join(rows))
    bad = "".join(tokens[:200])
    (run / "samples.json").write_text(json.dumps([{"prompt": bad, bad: bad, "__proto__": bad}]))
    (run / "dropped.jsonl").write_text(json.dumps({"file": bad, "row": 1, "reason": bad}))
    (run / "run.json").write_text(
        json.dumps({"command": bad, "machine": {bad: bad}, "data": {bad: {bad: bad}}, "table": [{bad: bad}]})
    )
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"stage": bad, "step": 1, "loss": 1.0}) + "\n")
    return run


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *[name for name, _ in attributes]))


def hidden(text):
    """The characters of text that show nothing, or more than themselves."""
    unseen = UNSEEN - {0xFE0F}  # an emoji may keep it
    return {hex(ord(c)) for c in set(text) if not c.isprintable() and c not in "\n\t" or ord(c) in unseen}


def test_tokens_leave_only_our_own_tags(tmp_path):
    tokens = awkward_tokens()
    assert len(tokens) > 4000
    (tmp_path / "none").mkdir()
    plain = report.write(tmp_path / "none").read_text(encoding="utf-8")
    text = report.write(awkward_run(tmp_path / "<img src=x>\u202e", tokens)).read_text(encoding="utf-8")
    ours = "html head meta meta meta meta title style body header nav main noscript p script script"
    assert Tags(text).tags == Tags(plain).tags and " ".join(tag for tag, *_ in Tags(plain).tags) == ours
    assert not hidden(text)
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert embedded.isascii() and not set("<>&") & set(embedded)
    data = json.loads(embedded)
    assert not hidden("".join(data["pieces"]))
    assert {visible(token) for token in tokens} <= set(data["pieces"])


def test_every_character_that_cannot_be_seen_is_spelled():
    codes = [*range(0x20000), *range(0xE0000, 0xE0200), *range(0xF0000, 0x110000, 997)]
    everything = "".join(map(chr, codes))
    assert not hidden(visible(everything))
    assert visible("a\u202eb\x00\x1b[2J\u200b") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+001B⟩[2J⟨U+200B⟩"
    assert visible("\ud800\r\n\tc d") == "⟨U+D800⟩⟨U+000D⟩\n\tc d"
    assert visible("❤\ufe0f a\ufe0f") == "❤\ufe0f a⟨U+FE0F⟩" and visible("\ufe0f") == "⟨U+FE0F⟩"
    assert visible("\u0301x") == "◌\u0301x"
    assert visible("\u034f\u3164\U000e0041\u2800") == "⟨U+034F⟩⟨U+3164⟩⟨U+E0041⟩⟨U+2800⟩"
    assert visible("naïve 日本 🙂 ⟨") == "naïve 日本 🙂 ⟨"


def test_the_page_runs_and_loads_nothing_else(tmp_path):
    text = report.write(make_run(tmp_path)).read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for kind, pattern in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        digest = hashlib.sha256(re.search(pattern, text, re.S)[1].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert set(re.findall(r"https?://[^\"'\s]*", text)) == {"https://github.com/leeoniya/uPlot"}  # not fetched
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]  # uPlot's with ours
    assert "Copyright (c) 2022 Leon Sorokin" in script and "THE SOFTWARE IS PROVIDED" in script
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|fetch\(|XMLHttp"
    assert not re.search(ways, script)


def luminance(colour):
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_contrast(mode):
    """WCAG AA: 4.5 for text, also on the strongest colours of the heat map; 3 for lines."""
    style = (ROOT / "report" / "page.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.S)[mode]
    colour = {
        name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4))
        for name, value in re.findall(r"--(\w+): #(\w{6});", block)
    }
    for pair in (
        "ink paper",
        "ink back",
        "muted paper",
        "muted back",
        "accent back",
        "ink warn",
        "paper accent",
        "blue paper",
        "orange paper",
    ):
        assert contrast(*(colour[name] for name in pair.split())) >= 4.5, pair
    for name in ("more", "less"):
        strongest = tuple(0.6 * a + 0.4 * b for a, b in zip(colour[name], colour["paper"]))
        assert contrast(colour["ink"], strongest) >= 4.5, name
    for line in ("blue", "orange", "green", "purple", "accent"):
        assert contrast(colour[line], colour["paper"]) >= 3, line


# --- the file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big_page(tmp_path_factory):
    """200 pairs of two responses with 400 tokens each, thousands of different pieces."""
    run = make_run(tmp_path_factory.mktemp("report") / "big", pairs=1)
    rng = np.random.default_rng(0)
    row = report.read_rows(run / "tokens.jsonl")[0][0]
    with open(run / "tokens.jsonl", "w") as file:
        for _ in range(200):
            for side in figures.SIDES:
                logps = np.round(-rng.gamma(1.2, 1.5, (3, 400)), 5).tolist()
                row[side] = {
                    "tokens": [f" word{i}" for i in rng.integers(0, 8000, 400)],
                    **dict(zip(("ref", "guide", "policy"), logps)),
                }
            file.write(json.dumps(with_results(row) | {"prompt": "What? " * 300}) + "\n")
    return report.write(run)


def test_a_big_page_stays_small(big_page):
    assert 4e6 < big_page.stat().st_size < 8e6


def test_more_tokens_than_the_page_carries(tmp_path, monkeypatch):
    run = make_run(tmp_path, pairs=30, length=40)
    everything = report.gather(run)
    monkeypatch.setattr(report, "MOST_TOKENS", 1000)
    part = report.gather(run)
    assert 10 < len(part["pairs"]) < 30 and part["moved"] == everything["moved"]
    listed = {number for each in part["classes"][:2] for number in each["pairs"]}
    assert listed <= {pair["number"] for pair in part["pairs"]}
    assert f"Token by token the page holds {len(part['pairs'])} of the 30 pairs" in part["notes"][-1]


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", pairs=2)
    page = report.write(run)
    assert page == run / "report.html"
    before = page.read_text(encoding="utf-8")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(run)
    assert page.read_text(encoding="utf-8") == before and not list(run.glob(".report*"))


def test_the_command(tmp_path):
    run = make_run(tmp_path / "run", pairs=2)
    command = [sys.executable, ROOT / "report" / "report.py"]
    done = subprocess.run([*command, run, "--to", tmp_path / "page.html"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'page.html'}\n", "")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert not (run / "report.html").exists()
    done = subprocess.run([*command, tmp_path / "no"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    told = f"report.py: error: {tmp_path / 'no'} is no directory; give a run's output directory\n"
    assert done.stderr == told


# --- in a browser ---------------------------------------------------------------------------------


class Browser:
    """Headless Chromium through chromedriver's HTTP interface (W3C WebDriver)."""

    def __init__(self, profile):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(
            match[1]
            for match in (re.search(r"started successfully on port (\d+)", line) for line in self.driver.stdout)
            if match
        )
        self.base = f"http://127.0.0.1:{port}"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        ]
        wanted = {
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")},
        }
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += "/session/" + session["sessionId"]

    def call(self, method, path, body=None):
        content = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, content, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path, width=1280, height=900, mode="light"):
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
        for command, parameters in (("setDeviceMetricsOverride", screen), ("setEmulatedMedia", media)):
            self.call("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": parameters})
        self.call("POST", "/url", {"url": path.as_uri()})

    def run(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": arguments})

    def click(self, selector):
        element = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(element.values()))}/click")

    def press(self, *keys):
        """W3C key values, such as U+E014 for the right arrow."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def log(self):
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def wait_for(condition):
    """Waits up to five seconds until the browser has drawn what is asked for."""
    limit = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


RIGHT, UP, END = "\ue014", "\ue013", "\ue010"
READ = """return [...document.querySelector('.read').querySelectorAll('div')].map(
              row => [...row.children].map(cell => cell.textContent))"""
NUMBERS = """return [...document.querySelectorAll('.list [role=option]')].map(
                 option => Number(option.dataset.pair))"""
COUNT = "return document.querySelectorAll(arguments[0]).length"


def test_in_a_browser(browser, tmp_path):
    run = make_run(tmp_path / "run")
    page = report.write(run)
    pairs = pairs_of(run)
    data = report.gather(run)
    browser.open(page)
    assert browser.run("return [...document.querySelectorAll('h2')].map(h => h.textContent)") == [
        "Did the guidance help, and where?",
        "Tokens",
        "All curves",
        "What moved",
        "Samples",
        "The run",
    ]
    charts = len(data["answer"]["charts"]) + len(data["curves"]) + len(data["moved"]["charts"])
    wait_for(lambda: browser.run(COUNT, "figure .uplot canvas") == charts)

    # filters: by class, by text, by number
    # it opens on a pair that the guidance turned right
    helped, wrong = (data["classes"][i]["pairs"] for i in (0, 1))
    assert browser.run(NUMBERS) == helped != []
    assert f"Pair {helped[0]}:" in browser.run("return document.querySelector('.explorer summary').textContent")
    browser.click("button[data-key='turned wrong']")
    assert 0 < len(wrong) < 24 and browser.run(NUMBERS) == wrong
    browser.click("button[data-key='all']")
    assert browser.run(NUMBERS) == list(range(1, 25))
    for wanted, found in (("question 17:", [18]), ("#7", [7]), ("no such text", []), ("2", [2])):
        browser.run(
            """const find = document.getElementById('find');
                       find.value = arguments[0];
                       find.dispatchEvent(new Event('input'))""",
            wanted,
        )
        assert browser.run(NUMBERS) == found

    # token by token, by keyboard
    pair = pairs[1]
    assert browser.run(COUNT, ".tok") == len(pair.chosen["tokens"]) + len(pair.rejected["tokens"])
    browser.run("document.querySelector('.tok').focus()")
    browser.press(RIGHT, RIGHT)
    tip = {row[0]: row[1] for row in browser.run(READ)}
    number = lambda text: float(text.replace("−", "-").rstrip("%").split(" (")[0])
    response, tokens = pair.chosen, pair.chosen["tokens"]
    assert tip["token"] == f"3 of {len(tokens)}"
    for name, value in (
        ("r̂", response["reward"]),
        ("weight f", response["f"]),
        ("log π_ref", response["ref"]),
        ("log π_guide", response["guide"]),
        ("log π (policy)", response["policy"]),
        ("log π/π_ref", response["moved"]),
    ):
        assert number(tip[name]) == pytest.approx(value[2], rel=2e-3), name
    share = 100 * abs(response["f"][2]) / abs(response["f"]).sum()
    assert number(tip["share of Σ|f|"]) == pytest.approx(share, abs=0.006)
    browser.press(END, UP)
    assert browser.run("return document.activeElement.textContent") in tokens
    browser.press(END)
    assert browser.run("return document.activeElement.textContent") == "<|end|>"
    assert browser.run(READ)[0] == ["token", f"{len(tokens)} of {len(tokens)}"]

    # colours: the switch changes them, and a rejected token's weight has the sign opposite to its reward
    painted = """return [...document.querySelectorAll('.tokens')].map(
                     box => [...box.querySelectorAll('.tok')].map(token => token.classList[1]))"""
    by_reward = browser.run(painted)
    browser.click("button[data-key='f']")
    by_weight = browser.run(painted)
    assert by_weight[0] == by_reward[0] == ["more" if r > 0 else "less" for r in response["reward"]]
    assert by_weight[1] == ["less" if name == "more" else "more" for name in by_reward[1]]
    assert browser.run(COUNT, ".tok.flip") == (pair.chosen["f"] <= 0).sum() + (pair.rejected["f"] <= 0).sum()

    # a curve, by keyboard
    browser.run("document.querySelector('.uplot[tabindex]').focus()")
    browser.press(RIGHT, RIGHT)
    wait_for(lambda: browser.run("return document.querySelector('.u-legend .u-value').textContent") == "20")
    legend = {
        name: value
        for name, value in browser.run("""
            const rows = document.querySelector('.u-legend').querySelectorAll('tr:not(.silent)');
            return [...rows].map(row => [...row.children].map(cell => cell.textContent))""")
    }
    for each in data["answer"]["charts"][0]["series"]:
        assert number(legend[each["name"]]) == pytest.approx(each["y"][1], rel=2e-3)

    # the legend tells at rest where the curves end, else the nearest held-out figure; a name hides its raw curve too
    small = """const figure = [...document.querySelectorAll('.wall figure')].find(
                   one => one.innerText.startsWith('Loss: policy'));
               figure.querySelector('.uplot').focus();
               if (arguments[0]) figure.querySelectorAll('.u-legend tr:not(.silent) th')[1].click();
               return [...figure.querySelectorAll('.u-legend tr' + (arguments[0] || ':not(.silent)'))].map(
                   row => row.lastChild.textContent)"""
    (loss,) = [chart for chart in data["curves"] if chart["title"] == "Loss: policy"]
    training, held_out = (series["y"] for series in loss["series"][:2])
    at_rest = list(map(number, browser.run(small, "")))
    assert at_rest[:3] == pytest.approx([60, training[59], held_out[59]], rel=2e-3)
    browser.press(*[RIGHT] * 12)
    wait_for(lambda: browser.run(small, "")[0] == "12")
    at_12 = list(map(number, browser.run(small, "")[:3]))
    assert at_12 == pytest.approx([12, training[11], held_out[9]], rel=2e-3)
    assert len(browser.run(small, ".u-off")) == 2

    for mode in ("light", "dark"):  # a phone: nothing is wider than it, and a table's cells stand below each other
        browser.open(page, width=360, height=720, mode=mode)
        assert browser.run("return document.documentElement.scrollWidth") == 360
        cut = "return [...document.querySelectorAll('.box')].filter(box => box.scrollWidth > box.clientWidth).length"
        assert browser.run(COUNT, ".box.wide td") > 20 and browser.run(cut) == 0
        below = """return [...document.querySelectorAll('.wide tbody tr')].every(row => [...row.children].every(
                       (cell, i, all) => !i || cell.offsetTop > all[i - 1].offsetTop))"""
        assert browser.run(below)
        named = "return getComputedStyle(document.querySelector('.box.wide td:nth-child(3)'), '::before').content"
        assert browser.run(named) == '"tokens"'
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(14, 18, 23)"
    assert browser.log() == []


def test_awkward_tokens_in_a_browser(browser, tmp_path):
    page = report.write(awkward_run(tmp_path / "run", awkward_tokens()))
    browser.open(page, width=360, height=720)
    count = browser.run(COUNT, ".list [role=option]")
    browser.run("document.querySelectorAll('.list [role=option]').forEach(option => option.click())")
    names, attributes, text, width = browser.run("""
        const all = [...document.querySelectorAll('*')];
        return [[...new Set(all.map(e => e.localName))],
                [...new Set(all.flatMap(e => e.getAttributeNames()))],
                document.body.innerText, document.documentElement.scrollWidth]""")
    assert count > 10 and width == 360
    ours = """html head meta title style body header nav main div p a b h1 h2 h3 h4 section span wbr button
              input dl dt dd figure figcaption canvas table thead tbody tr th td
              details summary pre code script footer noscript"""
    assert set(names) <= set(ours.split())
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcdoc", "action")]
    assert not hidden(text)
    assert browser.log() == []


def test_a_big_page_opens_quickly(browser, big_page):
    began = time.monotonic()
    browser.open(big_page)
    browser.click(".list [data-pair='2']")
    assert browser.run(COUNT, ".tok") == 800  # one pair at a time is drawn
    assert time.monotonic() - began < 8
    assert browser.log() == []


def test_a_run_that_has_just_begun_in_a_browser(browser, tmp_path):
    run = make_run(tmp_path / "run", pairs=2)
    rows, _ = report.read_rows(run / "tokens.jsonl")
    for row in rows:
        for side in figures.SIDES:
            row[side] = {"tokens": row[side]["tokens"], "ref": row[side]["ref"]}
    (run / "tokens.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().split("\n")[0])
    browser.open(report.write(run))
    assert browser.run(COUNT, ".tok") > 0 and browser.log() == []
    for name in FILES:
        (run / name).unlink()
    browser.open(report.write(run))
    assert "has not written anything yet" in browser.run("return document.querySelector('main').textContent")
    assert browser.log() == []
