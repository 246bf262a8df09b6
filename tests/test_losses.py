"""The table of losses: its entries fit their functions, nothing else knows a loss by name, and a new one trains.

And the one way of the numbers from tgdpo.py to metrics.jsonl, tokens.jsonl and the final table.
"""

import ast
import inspect
import json
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from tiny_world import make_checkpoint, make_pairs

import tgdpo
import train
from runtime.losses import LOSSES, Entry
from runtime.tally import Tally

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A start, 8 pairs and 5 held out."""
    directory = tmp_path_factory.mktemp("world")
    make_checkpoint(directory / "start")
    make_pairs(directory / "pairs.jsonl", 8)
    make_pairs(directory / "held_out.jsonl", 5, seed=1)
    return directory


def run(world, out, loss, *more):
    """Two steps of the loss; returns the rows of metrics.jsonl."""
    given = ["--model", world / "start", "--data", world / "pairs.jsonl", "--out", out, "--loss", loss, *more]
    given += ["--batch-size", 4, "--lr", 2e-3, "--max-length", 128, "--samples", 0]
    assert train.main(list(map(str, given))) == 0
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def test_entries_fit_their_functions():
    for entry in LOSSES.values():
        takes = list(inspect.signature(getattr(tgdpo, entry.function)).parameters)
        assert takes == [*entry.tensors, *entry.options]
        assert set(entry.tensors) <= {"policy", "ref", "guide", "lengths"}


def test_no_loss_is_compared_by_name():
    """What depends on a loss is read from its entry. (Stage 1 is DPO by name: that is the method.)"""
    for path in [ROOT / "train.py", *(ROOT / "ends").glob("*.py"), *(ROOT / "runtime").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not constants & LOSSES.keys(), f"{path.name}:{node.lineno}"


def hinge_loss(policy, ref, beta):
    """relu(1 - phi)."""
    dpo = tgdpo.dpo_loss(policy, ref, beta)
    return dpo._replace(losses=F.relu(1 - dpo.phi))


def guided_hinge_loss(policy, lengths, guide, ref, guide_beta, beta, gamma):
    """relu(gamma - phi), phi of TGDPO at alpha = 1; its tensors and options in another order."""
    assert all(int(n) == (side[i] != 0).sum() for side, counts in zip(ref, lengths) for i, n in enumerate(counts))
    loss = tgdpo.tgdpo_loss(policy, ref, guide, beta, 1.0, guide_beta)
    return loss._replace(losses=F.relu(gamma - loss.phi))


@pytest.mark.parametrize(
    "function, entry, first, passes",
    [
        (hinge_loss, Entry("hinge_loss", ("policy", "ref"), ("beta",), beta=0.2), 1.0, ["ref"]),
        (
            guided_hinge_loss,
            Entry(
                "guided_hinge_loss", ("policy", "lengths", "guide", "ref"), ("guide_beta", "beta", "gamma"), beta=0.3
            ),
            1.375,
            ["guide", "ref"],
        ),
    ],
)
def test_a_loss_is_a_function_and_an_entry(world, tmp_path, monkeypatch, capsys, function, entry, first, passes):
    """It trains, is logged under its name, has the table's beta, and reads what its entry says it reads."""
    monkeypatch.setattr(tgdpo, function.__name__, function, raising=False)
    monkeypatch.setitem(LOSSES, "hinge", entry)
    rows = run(world, tmp_path / "out", "hinge", "--eval-data", world / "held_out.jsonl")
    steps = [row for row in rows if row["stage"] == "hinge" and not row.get("eval")]
    assert [row["step"] for row in steps] == [1, 2] and steps[0]["loss"] == approx(first, abs=1e-6)
    assert steps[1]["loss"] != steps[0]["loss"] and steps[0]["grad_norm"] > 0
    assert [row["stage"] for row in rows if row.get("eval")] == ["dpo", "hinge"][-len(passes) :]
    assert ("r_hat_mean" in steps[0]) == ("guide" in passes) and "dpo_margin" in steps[0]
    assert sorted({path.name.split("-")[0] for path in (tmp_path / "out/cache").iterdir()}) == passes
    saved = tomllib.loads((tmp_path / "out/config.toml").read_text())
    assert (saved["loss"], saved["beta"]) == ("hinge", entry.beta)
    assert ("gamma" in saved) == ("gamma" in entry.options) and "alpha" not in saved
    capsys.readouterr()
    assert train.main(["--loss", "hinge", "--alpha", "1"]) == 2
    assert "--alpha 1.0: --loss hinge has no use for it" in capsys.readouterr().err


@pytest.mark.parametrize("loss", LOSSES)
def test_the_numbers_that_a_run_records(world, tmp_path, loss):
    """tokens.jsonl, worked out again from its log-probs; the table and the evaluation, from its rows."""
    settings = {"tgdpo": ["--alpha", 2, "--guide-beta", 0.2], "dpo": [], "simpo": ["--gamma", 0.7]}[loss]
    held_out = "--eval-data", world / "held_out.jsonl"
    evaluated = run(world, tmp_path / "out", loss, *held_out, "--beta", 0.4, *settings)[-1]
    pairs = [json.loads(line) for line in open(tmp_path / "out/tokens.jsonl")]
    assert len(pairs) == 5 and evaluated["eval"]
    for pair in pairs:
        summed = {"reward": 0.0, "weighted": 0.0, "moved": 0.0}
        for name, sign in (("chosen", 1), ("rejected", -1)):
            side = pair[name]
            moved = [p - r for p, r in zip(side["policy"], side["ref"])] if loss != "simpo" else None
            if loss == "tgdpo":
                reward = [0.2 * (g - r) for g, r in zip(side["guide"], side["ref"])]
                assert side["f"] == approx([1 + sign * 2 * r for r in reward], abs=1e-5)
                summed["weighted"] += sign * 0.4 * sum(f * m for f, m in zip(side["f"], moved))
            elif loss == "dpo":
                reward = [0.4 * m for m in moved]
            else:
                reward = [0.4 * p / len(side["tokens"]) for p in side["policy"]]
            assert side["reward"] == approx(reward, abs=1e-5) and ("f" in side) == (loss == "tgdpo")
            assert (side["moved"] == approx(moved, abs=1e-5)) if moved else ("moved" not in side)
            assert len(side["reward"]) == len(side["tokens"])
            summed["reward"] += sign * sum(reward)
            summed["moved"] += sign * 0.4 * sum(moved or [])
        phi = summed["weighted"] if loss == "tgdpo" else summed["reward"]
        assert (pair["margin"], pair["phi"]) == approx((summed["reward"], phi), abs=1e-4)
        assert pair.get("dpo_margin") == (None if loss == "simpo" else approx(summed["moved"], abs=1e-4))
        assert pair["phi"] != 0 and all(x == round(x, 6) for x in (*pair["chosen"]["reward"], pair["phi"]))
    mean = lambda key: sum(pair[key] for pair in pairs) / 5
    plain = "phi" if loss == "simpo" else "dpo_margin"
    assert evaluated["margin"] == approx(mean("phi"), abs=1e-5)
    table = {row.pop("model"): row for row in json.loads((tmp_path / "out/run.json").read_text())["table"]}
    names = {"tgdpo": ["reference", "guide", "policy"], "dpo": ["reference", "policy"], "simpo": ["policy"]}
    assert list(table) == names[loss] and table["policy"]["margin"] == approx(mean(plain), abs=1e-5)
    assert table["policy"]["accuracy"] == sum(pair[plain] > 0 for pair in pairs) / 5
    if loss == "tgdpo":  # the guide's margin in the table is at --beta, in the rows at --guide-beta
        assert table["guide"]["margin"] == approx(2 * mean("margin"), abs=1e-5)


def test_a_tally_is_the_figures_of_real_tokens_and_all_packs(monkeypatch):
    """Two packs of a loss, its padding left out, against the same pairs one by one."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    draw = torch.Generator().manual_seed(0)
    lengths = ((4, 2, 3), (1, 3, 2))
    mask = [torch.arange(4) < torch.tensor(counts)[:, None] for counts in lengths]
    policy, ref, guide = (tuple(-torch.rand(3, 4, generator=draw) * side for side in mask) for _ in range(3))
    take = lambda pairs, sides: tuple(side[pairs] for side in sides)
    tally, r_hat, f = Tally(torch.device("cpu"), reference=True), [], []
    for pairs in (slice(0, 2), slice(2, 3)):
        loss = tgdpo.tgdpo_loss(*(take(pairs, model) for model in (policy, ref, guide)), 0.5, 3.0)
        tally.add(loss, take(pairs, lengths))
    for i, side in ((i, side) for i in range(3) for side in (0, 1)):
        for t in range(lengths[side][i]):
            r_hat.append(0.5 * (guide[side][i, t] - ref[side][i, t]).item())
            f.append(1 + (-1) ** side * 3.0 * r_hat[-1])
    row, whole = tally.row(), tgdpo.tgdpo_loss(policy, ref, guide, 0.5, 3.0)
    assert (row["loss"], row["margin"]) == approx((whole.losses.mean().item(), whole.phi.mean().item()), abs=1e-6)
    assert row["dpo_accuracy"] == approx((whole.dpo_margin > 0).double().mean().item())
    assert row["logratio_rejected"] == approx(whole.logratio_l.mean().item(), abs=1e-6)
    for name, values in (("r_hat", torch.tensor(r_hat)), ("f", torch.tensor(f))):
        found = [row[f"{name}_{figure}"] for figure in ("mean", "std", "min", "max")]
        wanted = [values.mean(), values.std(correction=0), values.min(), values.max()]
        assert found == approx([x.item() for x in wanted], abs=1e-6)
    assert row["f_nonpositive"] == approx((torch.tensor(f) <= 0).double().mean().item()) and len(f) == 15
    none = tgdpo.Loss(
        torch.zeros(1), torch.zeros(1), r_hat=(torch.zeros(1, 1),) * 2, f=(torch.zeros(1, 1), torch.ones(1, 1))
    )
    edge = Tally(torch.device("cpu"), reference=False)
    edge.add(none, ([1], [1]))
    assert edge.row()["f_nonpositive"] == 0.5  # f = 0 is not positive
    assert list(Tally(torch.device("cpu"), reference=False).means) == ["loss", "margin", "accuracy"]
