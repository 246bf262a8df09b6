"""The parts of neighbouring losses against loops over plain numbers, their limits, their gradients and the refusals."""

import math
import random

import pytest
import test_train
import torch
from derive_text import quoted
from pytest import approx
from test_derivation import TREE, policy, probabilities, rng, sequence_optimal, table, total
from test_loss import GUIDE, POLICY, REF
from tiny_world import make_checkpoint, make_pairs

import tgdpo
from files.errors import BadInput
from neighbours import parts as neighbours
from runtime import options
from runtime.parts import PARTS, read

BETA, ALPHA, GUIDE_BETA = 0.3, 0.7, 0.4
LENGTHS = ([3, 5, 1, 4], [4, 2, 6, 4])
SEED = 4  # the chosen have risen in two pairs and fallen in two


def models(dtype=torch.float64):
    """policy, ref, guide: (chosen, rejected) of [4, T], 0 behind each response."""
    torch.manual_seed(SEED)
    real = [torch.arange(max(n)) < torch.tensor(n)[:, None] for n in LENGTHS]
    return [tuple(-3 * torch.rand(mask.shape, dtype=dtype) * mask for mask in real) for _ in range(3)]


def chosen(words):
    parts = [(PARTS[name], number) for name, number in read(words).items()]
    return [neighbours.Chosen(p.kind, getattr(neighbours, p.function), p.takes, number) for p, number in parts]


def loss(words, policy, ref, guide=None, alpha=ALPHA, lengths=LENGTHS):
    more = {"alpha": alpha, "guide_beta": GUIDE_BETA} if guide else {}
    return neighbours.composed(chosen(words), policy, ref, guide, lengths, BETA, **more)


def pair_by_hand(words, policy, ref, guide=None, beta=BETA, alpha=ALPHA, guide_beta=GUIDE_BETA):
    """The loss and the margin of one pair, number by number. policy, ref, guide: (chosen, rejected) lists of log p."""
    parts, sums, sides = read(words), [], []
    L = lambda z: torch.log1p(torch.exp(-z))
    sig = lambda z: 1 / (1 + torch.exp(-z))
    for side, sign in ((0, 1), (1, -1)):
        p, r = policy[side], ref[side]
        T = len(p)
        c, u = [a - b for a, b in zip(p, r)], [1.0] * T
        if guide:
            x = [float(g) - float(b) for g, b in zip(guide[side], r)]
            k = parts.get("clip", math.inf)
            u = [1 + sign * alpha * guide_beta * max(-k, min(k, v)) for v in x]
            if "select" in parts:
                n = max(1, math.floor(round(parts["select"] * T, 6)))
                best = sorted(range(T), key=lambda t: (-sign * x[t], t))[:n]
                u = [v if t in best else 0.0 for t, v in enumerate(u)]
        for t in range(T):
            u[t] *= parts.get("decay", 1.0) ** (t + 1)
            u[t] *= parts.get("ld", 1.0) if t >= min(map(len, policy)) else 1.0
            u[t] *= 1 / T if "norm" in parts else 1.0
            u[t] *= parts.get("shift", 1.0) if side else 1.0
        C = sum(a * b for a, b in zip(u, c))
        if "alpha-div" in parts:
            C = (1 - torch.exp(-parts["alpha-div"] * C)) / parts["alpha-div"]
        if "js" in parts:
            C = math.log(2) + torch.log(sig(C))
        sums.append(C)
        sides.append((p, c, T))
    margin = beta * (sums[0] - sums[1])
    z = margin + parts.get("length", 0.0) * (sides[0][2] - sides[1][2])
    z = z - beta * parts.get("dpop", 0.0) * max(0.0, -sum(sides[0][1])) - parts.get("target", 0.0)
    value = L(z)
    if "cdpo" in parts:
        value = (1 - parts["cdpo"]) * L(z) + parts["cdpo"] * L(-z)
    if "robust" in parts:
        value = ((1 - parts["robust"]) * L(z) - parts["robust"] * L(-z)) / (1 - 2 * parts["robust"])
    if "ipo" in parts:
        value = (z / beta - 1 / (2 * beta)) ** 2
    if "hinge" in parts:
        value = torch.relu(1 - z)
    if "exo" in parts:
        e = parts["exo"]
        value = sig(z) * torch.log(sig(z) / (1 - e)) + sig(-z) * torch.log(sig(-z) / e)
    return value + parts.get("nll", 0.0) * -sum(sides[0][0]) / sides[0][2], margin


def by_hand(words, *given):
    """The losses and margins of the four pairs. given: policy, ref and, with a guide, guide, as in `models`."""
    cut = lambda model, i: model and tuple(list(model[side][i, : LENGTHS[side][i]].detach()) for side in (0, 1))
    pairs = [pair_by_hand(words, *(cut(model, i) for model in given)) for i in range(4)]
    return tuple(torch.stack(column) for column in zip(*pairs))


def compositions():
    rng, free = random.Random(0), [name for name in PARTS if PARTS[name].kind not in ("link", "divergence")]
    links = [name for name in PARTS if PARTS[name].kind == "link"]
    divergences = [name for name in PARTS if PARTS[name].kind == "divergence"]
    three = [(rng.choice(links), rng.choice(divergences), rng.choice(free)) for _ in range(6)]
    return [(name,) for name in PARTS] + three + [tuple(rng.sample(free, 3)) for _ in range(6)]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("words", compositions(), ids=" ".join)
def test_parts_equal_loops_over_numbers_and_finite_differences(words, guided):
    policy, ref, guide = models()
    if not guided and any(PARTS[word].tgdpo_only for word in words):
        return
    guide = guide if guided else None
    policy = tuple(side.requires_grad_() for side in policy)
    found = loss(words, policy, ref, guide)
    losses, margins = by_hand(words, policy, ref, guide)
    torch.testing.assert_close(found.losses.detach(), losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.phi.detach(), margins, rtol=1e-10, atol=1e-12)
    sums = [(p - r).sum(-1).detach() for p, r in zip(policy, ref)]
    assert 0 < (sums[0] > 0).sum() < 4  # dpop's offset is there and is not
    torch.testing.assert_close(found.dpo_margin.detach(), BETA * (sums[0] - sums[1]), rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(found.losses.sum(), policy)
    for side in (0, 1):
        for i, T in enumerate(LENGTHS[side]):
            for t in range(T):
                ends = []
                for step in (1e-6, -1e-6):
                    moved = [p.detach().clone() for p in policy]
                    moved[side][i, t] += step
                    ends.append(loss(words, moved, ref, guide).losses.sum())
                assert float(gradients[side][i, t]) == pytest.approx(
                    float(ends[0] - ends[1]) / 2e-6, abs=1e-6, rel=1e-5
                )


LIMITS = ("cdpo=0 robust=0 ld=1 decay=1 shift=1 length=0 dpop=0 target=0 nll=0 clip=1e9 select=1").split()


@pytest.mark.parametrize("word", LIMITS)
def test_at_its_limit_a_part_is_the_loss_bit_for_bit(word):
    policy, ref, guide = models(torch.float32)
    plain = tgdpo.tgdpo_loss(policy, ref, guide, BETA, ALPHA, GUIDE_BETA)
    assert torch.equal(loss([word], policy, ref, guide).losses, plain.losses)
    if not PARTS[word.split("=")[0]].tgdpo_only:
        assert torch.equal(loss([word], policy, ref).losses, tgdpo.dpo_loss(policy, ref, BETA).losses)


def test_a_tokens_gradient_is_minus_beta_u_sigma_of_minus_z():
    policy, ref, guide = models()
    policy = tuple(side.requires_grad_() for side in policy)
    found = loss(["ld", "select", "target"], policy, ref, guide)
    gradient = torch.autograd.grad(found.losses.sum(), policy)[0]
    expected = -BETA * found.u[0] * torch.sigmoid(-(found.phi - 0.5))[:, None]
    real = torch.arange(5) < torch.tensor(LENGTHS[0])[:, None]
    torch.testing.assert_close(gradient[real], expected[real].detach())


def test_D21_the_identity_beside_token_weights():
    """With v the weights without f: the guidance adds alpha beta sum v r_hat rho, and is blind only where v is."""
    swap = lambda sides: (sides[1], sides[0])

    def added(words, swapped=False):
        p, r, g = (swap(sides) if swapped else sides for sides in (POLICY, REF, GUIDE))
        lengths = ([1], [2]) if swapped else ([2], [1])
        with_guide = neighbours.composed(chosen(words), p, r, g, lengths, 0.5, 1.0)
        without = neighbours.composed(chosen(words), p, r, None, lengths, 0.5)
        return without.phi.item(), (with_guide.phi - without.phi).item()

    plain, term = added(["decay=0.5"])
    assert quoted("D21", plain) == approx(0.5 * (0.5 * 1 + 0.25 * 0.5 + 0.5 * 0.4))
    assert quoted("D21", term) == approx(0.5 * (0.5 * 0.4 * 1 - 0.25 * 0.2 * 0.5 - 0.5 * 0.5 * 0.4))
    quoted("D21", plain + term)
    assert added(["decay=0.5"], swapped=True)[1] == approx(term)
    assert quoted("D21", added(["shift=0.5"])[1]) == approx(0.5 * (0.4 - 0.1 - 0.5 * 0.2))
    assert quoted("D21", added(["shift=0.5"], swapped=True)[1]) == approx(0.5 * (0.5 * (0.4 - 0.1) - 0.2))
    for words in (["ld=0.3"], ["norm", "decay"], ["shift"], ["select"]):  # the formula, on pairs of many tokens
        p, r, g = models()
        found, zero = (loss(words, p, r, g, alpha) for alpha in (ALPHA, 0.0))
        parts = [(v * r_hat * (a - b)).sum(-1) for v, r_hat, a, b in zip(zero.u, found.r_hat, p, r)]
        term = found.phi - zero.phi
        torch.testing.assert_close(term, ALPHA * BETA * (parts[0] + parts[1]))
        ends = [loss(words, *map(swap, (p, r, g)), alpha, swap(LENGTHS)).phi for alpha in (ALPHA, 0.0)]
        assert torch.allclose(ends[0] - ends[1], term) == (words[0] not in ("shift", "select"))


def test_D21_the_length_offset_by_enumeration():
    """The optimum for r - a T has the margins r_w - r_l only with + a (T_w - T_l), over all pairs of a small tree."""
    draw = rng(5)
    ref, reward, a = policy(draw), table(draw), 0.3
    best = sequence_optimal(ref, reward - a, BETA)  # every token costs a
    assert math.fsum(probabilities(best)) == approx(1)
    column = lambda values, y: torch.tensor([[values[s, action].item() for s, action in y]], dtype=torch.float64)
    for w in TREE.responses[:6]:
        for y in TREE.responses[6:]:
            sides = [tuple(column(logp, one) for one in (w, y)) for logp in (best, ref)]
            phi = neighbours.composed(chosen([f"length={a}"]), *sides, None, ([len(w)], [len(y)]), BETA)
            expected = total(reward, w) - total(reward, y)
            assert phi.losses.item() == approx(math.log1p(math.exp(-expected)))
            assert phi.phi.item() == approx(expected - a * (len(w) - len(y)))


def test_divergences_are_0_at_the_start():
    for words in ("alpha-div", "js"):
        part = chosen([words])[0]
        assert part.of({"total": torch.zeros(1)}).item() == approx(0, abs=1e-7)


def test_alpha_divergence_stays_finite():
    total = torch.tensor([-1e4, 0.0], requires_grad=True)
    value = neighbours.alpha_divergence(total, 0.5)
    value.sum().backward()
    assert value.isfinite().all() and total.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "words, said",
    [
        ("ldd", "nearest is ld"),
        ("ld ld=.2", "ld is given twice"),
        ("ipo hinge", "ipo and hinge"),
        ("js alpha-div", "js and alpha-div"),
        ("ipo=1", "ipo=1"),
        ("norm=", "norm="),
        ("ld=inf", "ld=inf"),
        ("ld=x", "ld=x"),
        *[(f"{name}={number}", f"{name}={number}") for name, number in (
            ("cdpo", ".5"), ("robust", "-.1"), ("exo", "0"), ("exo", ".5"), ("alpha-div", "0"), ("ld", "1.01"),
            ("decay", "0"), ("shift", "1.1"), ("clip", "0"), ("select", "0"), ("length", "-1"), ("nll", "nan"))],
        ("ld --loss simpo", "--loss simpo"),
        ("clip --loss dpo", "clip"),
        ("select --loss dpo", "select"),
    ],
)  # fmt: skip
def test_refusals(words, said):
    with pytest.raises(BadInput) as error:
        options.resolve(["--with", *words.split()])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_config_toml_gives_the_parts_back(tmp_path):
    chosen = options.resolve(["--with", "ld=0.5", "robust"])
    (tmp_path / "config.toml").write_text(options.to_toml(chosen))
    assert 'with = ["ld=0.5", "robust"]' in options.to_toml(chosen)
    assert options.resolve(["--config", str(tmp_path / "config.toml")]).with_ == ("ld=0.5", "robust")


@pytest.mark.parametrize(
    "name, words", [("dpo", "cdpo alpha-div norm target nll"), ("tgdpo", "robust select=0.5 length dpop=0.1")]
)
def test_a_run_with_parts_is_a_plain_loops(name, words, tmp_path, capfd):
    """Every kind of part, through train.py; and a checkpoint of other parts is refused by name."""
    start, path, guide = make_checkpoint(tmp_path / "start"), make_pairs(tmp_path / "pairs.jsonl", 6), None
    more = ["--model", start, "--data", path, "--loss", name]
    if name == "tgdpo":
        guide = make_checkpoint(tmp_path / "guide", seed=3)
        more += ["--guide", guide, "--alpha", 0.7, "--guide-beta", 0.4]
    out, settings = tmp_path / "out", {"beta": 0.3, "alpha": 0.7, "guide_beta": 0.4}
    assert test_train.run("--out", out, *more, "--with", *words.split()) == 0
    hand = lambda *models: pair_by_hand(words.split(), *models, **settings)[0]
    expected, _ = test_train.plain_training(start, test_train.tokens_of(start, path), name, guide, pair_loss=hand)
    test_train.same([row["loss"] for row in test_train.metrics(out, name)], expected)
    capfd.readouterr()
    assert test_train.run("--out", out, *more, "--with", words.split()[0], "--resume") == 2
    assert "these differ: with (" in capfd.readouterr().err
