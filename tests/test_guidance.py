"""derive.md, D17 to D20, what the guidance adds to DPO: by enumeration of small trees in float64.

Pairs are enumerated too: P [Y, Y] is the probability that response i is chosen and response j rejected, so that
losses and gradients are exact expectations. Log-ratios, divergences and visits are summed response by response.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from derive_text import quoted
from pytest import approx
from test_derivation import F64, TREE, policy, rng, same, sequence_optimal, table
from test_loss import GUIDE, POLICY, REF, batch

import tgdpo

log = math.log
BETA, GUIDE_BETA, ALPHA = 0.7, 0.3, 0.5
VISITS = torch.stack(
    [
        torch.zeros(7, 3, dtype=F64).index_put(tuple(torch.tensor(y).T), torch.ones(len(y), dtype=F64))
        for y in TREE.responses
    ]
)  # [Y, S, A], 1 where the response takes the action in the state


def response_probabilities(logp):
    return (VISITS * logp).sum((1, 2)).exp()  # [Y]


def expected_loss(logp, ref, r_hat, pairs, alpha, beta):
    """E of TGDPO's loss over the pairs; alpha 0 is DPO. Written from the definition, not with tgdpo."""
    score = lambda sign: (VISITS * (1 + sign * alpha * r_hat) * (logp - ref)).sum((1, 2))  # [Y]
    phi = beta * (score(1)[:, None] - score(-1)[None, :])
    return (pairs * torch.log1p((-phi).exp())).sum()


def independent_pairs(ref, label):
    """Two independent responses, of which label(i, j) [Y, Y] is the probability that i is preferred."""
    p = response_probabilities(ref)
    return p[:, None] * p * (label + 1 - label.T) / ((p[:, None] * p) * (label + 1 - label.T)).sum()


def best_and_worst(ref, reward, n=5):
    """The best and the worst of n independent responses, those pairs left out that are twice the same response."""
    p, order = response_probabilities(ref), reward.argsort()
    sums = torch.cat([torch.zeros(1, dtype=F64), p[order].cumsum(0)])
    between = lambda j, i: max(0.0, (sums[i + 1] - sums[j]).item()) ** n if i >= j else 0.0  # all n in ranks j..i
    pairs = torch.zeros(len(p), len(p), dtype=F64)
    for i in range(len(p)):
        for j in range(i):
            exactly = between(j, i) - between(j + 1, i) - between(j, i - 1) + between(j + 1, i - 1)
            pairs[order[i], order[j]] = exactly
    return pairs / pairs.sum()


def gradient(function, logits):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits.log_softmax(-1)), logits)[0]


def off(a, b):
    """(|a - b| / |b|, cosine)"""
    return ((a - b).norm() / b.norm()).item(), F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_D17_identity():
    policy, ref, guide, _, _ = batch()
    for alpha, beta, guide_beta in ((0.8, 0.3, 0.3), (1.7, 0.2, 0.9)):
        ours = tgdpo.tgdpo_loss(policy, ref, guide, beta, alpha, guide_beta)
        r_hat = [guide_beta * (g - r) for g, r in zip(guide, ref)]
        rho = [p - r for p, r in zip(policy, ref)]
        added = tgdpo.guidance_term(*rho, *r_hat, alpha, beta)
        same(ours.phi, tgdpo.dpo_loss(policy, ref, beta).phi + added, 1e-13)
        same(tgdpo.guidance_term(*rho[::-1], *r_hat[::-1], alpha, beta), added, 0)  # it does not look at the label
    # D11's pair, and a token that both share (D10): 2 alpha beta r_hat rho.
    rho, r_hat = [p - r for p, r in zip(POLICY, REF)], [0.5 * (g - r) for g, r in zip(GUIDE, REF)]
    assert tgdpo.guidance_term(*rho, *r_hat, 1.0, 0.5).item() == approx(quoted("D17", 0.05, 2), abs=1e-14)
    assert 0.95 + 0.05 == approx(tgdpo.tgdpo_loss(POLICY, REF, GUIDE, 0.5, 1.0).phi.item(), abs=1e-14)
    one = lambda x: torch.tensor([[x]], dtype=F64)
    assert tgdpo.guidance_term(one(0.3), one(0.3), one(0.5), one(0.5), 1.0, 0.1).item() == approx(0.03, abs=1e-15)


def random_problem(seed):
    draw = rng(seed)
    ref = policy(draw, scale=1.0)
    guide = (ref + table(draw, scale=0.5)).log_softmax(-1)
    visits = (VISITS.sum(-1) * response_probabilities(ref)[:, None]).sum(0)  # [S]
    return draw, ref, guide, visits


@pytest.mark.parametrize("seed", range(8))
def test_D18_theorem(seed):
    draw, ref, guide, visits = random_problem(seed)
    same(visits, tgdpo.state_distributions(ref, TREE.child, 3).sum(0))
    label = torch.rand(15, 15, generator=draw, dtype=F64)  # any label that depends on both
    pairs = independent_pairs(ref, label)
    r_hat = GUIDE_BETA * (guide - ref)
    loss = lambda alpha: lambda logp: expected_loss(logp, ref, r_hat, pairs, alpha, BETA)
    added = gradient(loss(ALPHA), ref) - gradient(loss(0.0), ref)
    divergence = lambda logp: ALPHA * BETA * GUIDE_BETA * (visits @ tgdpo.divergence(logp, guide))
    same(added, gradient(divergence, ref), 1e-15)
    assert added.abs().max() > 1e-3
    # The same gradient as tgdpo_loss gives it, every pair a row of the batch.
    take = lambda values: (
        (VISITS * values).sum(-1)[:, None].expand(-1, 15, -1).reshape(225, 7),
        (VISITS * values).sum(-1)[None].expand(15, -1, -1).reshape(225, 7),
    )
    ours = lambda alpha: (
        lambda logp: (
            pairs.flatten() @ tgdpo.tgdpo_loss(take(logp), take(ref), take(guide), BETA, alpha, GUIDE_BETA).losses
        )
    )
    same(gradient(ours(ALPHA), ref) - gradient(ours(0.0), ref), added, 1e-14)
    # A policy gradient whose advantage is r_hat: E over responses of pi_ref, the sampled tokens' scores.
    p = response_probabilities(ref)
    policy_gradient = gradient(lambda logp: p @ (VISITS * r_hat * logp).sum((1, 2)), ref)
    same(added, -ALPHA * BETA * policy_gradient, 1e-15)


def test_D18_best_and_worst_of_five():
    found = []
    for seed in range(8):
        draw, ref, guide, visits = random_problem(seed)
        pairs = best_and_worst(ref, torch.randn(15, generator=draw, dtype=F64))
        assert pairs.sum().item() == approx(1) and (pairs.diagonal() == 0).all()
        r_hat = GUIDE_BETA * (guide - ref)
        loss = lambda alpha: lambda logp: expected_loss(logp, ref, r_hat, pairs, alpha, BETA)
        added = gradient(loss(ALPHA), ref) - gradient(loss(0.0), ref)
        found.append(
            off(added, gradient(lambda p: ALPHA * BETA * GUIDE_BETA * visits @ tgdpo.divergence(p, guide), ref))
        )
    errors, cosines = zip(*found)
    for value in (min(errors), max(errors)):
        quoted("D18", value, 2)
    for value in (min(cosines), max(cosines)):
        quoted("D18", value, 3)


def test_D18_what_is_left_along_a_training():
    # A perfect guide, labels of Bradley-Terry, pairs drawn from pi_ref for good; descent on free logits.
    draw = rng(1)
    ref, reward = policy(draw, scale=1.0), table(draw, scale=0.5)
    guide, beta = sequence_optimal(ref, reward, 0.5), 0.5
    r_hat, p, whole = 0.5 * (guide - ref), response_probabilities(ref), (VISITS * reward).sum((1, 2))
    visits = (VISITS.sum(-1) * p[:, None]).sum(0)
    pairs = independent_pairs(ref, torch.sigmoid(whole[:, None] - whole))
    logits = ref.clone()
    for step in range(101):
        loss = lambda alpha: lambda logp: expected_loss(logp, ref, r_hat, pairs, alpha, beta)
        slope = gradient(loss(0.5), logits)
        if step in (10, 30, 100):
            added = slope - gradient(loss(0.0), logits)
            distilled = gradient(lambda logp: 0.5 * beta * 0.5 * visits @ tgdpo.divergence(logp, guide), logits)
            reinforced = gradient(lambda logp: -0.5 * beta * p @ (VISITS * r_hat * logp).sum((1, 2)), logits)
            logp = logits.log_softmax(-1)
            kl = response_probabilities(logp) @ (VISITS * (logp - ref)).sum((1, 2))
            quoted("D18", kl.item(), 3)
            quoted("D18", off(added, distilled)[1], 2)
            quoted("D18", off(added, reinforced)[1], 3)
        logits -= 2.0 * slope


@pytest.mark.parametrize("seed", range(4))
def test_D19_mean_and_centred(seed):
    _, ref, guide, _ = random_problem(seed)
    kl = tgdpo.divergence(ref, guide)
    for s in range(7):  # KL and the mean, token by token
        assert kl[s].item() == approx(
            math.fsum(math.exp(r) * (r - g) for r, g in zip(ref[s].tolist(), guide[s].tolist())), abs=1e-14
        )
    mean = (ref.exp() * tgdpo.token_reward(guide, ref, GUIDE_BETA)).sum(-1)
    same(mean, -GUIDE_BETA * kl, 1e-14)
    assert (mean < 0).all()
    centred = tgdpo.token_reward(tgdpo.centred_guide(guide, kl[:, None]), ref, GUIDE_BETA)
    same((ref.exp() * centred).sum(-1), torch.zeros(7, dtype=F64), 1e-14)
    same(centred, GUIDE_BETA * (guide - ref) - mean[:, None], 1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_D19_the_expected_gradient_stays(seed):
    draw, ref, guide, _ = random_problem(seed)
    pairs = independent_pairs(ref, torch.rand(15, 15, generator=draw, dtype=F64))
    plain = GUIDE_BETA * (guide - ref)
    centred = plain - (ref.exp() * plain).sum(-1, keepdim=True)
    of = lambda r_hat: gradient(lambda logp: expected_loss(logp, ref, r_hat, pairs, ALPHA, BETA), ref)
    same(of(centred), of(plain), 1e-15)
    # Without the mean, the responses that were sampled are lowered: the mean of sum r_hat over responses.
    p = response_probabilities(ref)
    assert p @ (VISITS * plain).sum((1, 2)) < -1e-4 and (p @ (VISITS * centred).sum((1, 2))).abs() < 1e-15


def test_D19_variance_by_hand():
    ref, guide = [0.9, 0.1], [0.8, 0.2]
    r_hat = [log(g / r) for g, r in zip(guide, ref)]
    mean = sum(p * r for p, r in zip(ref, r_hat))

    def variance(values):  # of value times the score of the first token's logit, 1 - p or -p
        terms = [v * score for v, score in zip(values, (0.1, -0.9))]
        return sum(p * t**2 for p, t in zip(ref, terms)) - sum(p * t for p, t in zip(ref, terms)) ** 2

    assert quoted("D19", variance(r_hat)) < quoted("D19", variance([r - mean for r in r_hat]))
    kl = tgdpo.divergence(torch.tensor(ref, dtype=F64).log(), torch.tensor(guide, dtype=F64).log()).item()
    assert quoted("D19", kl) == approx(-mean, abs=1e-15)


def least(loss):
    """Where a function of one number in (0, 1) is least: a grid, then golden section."""
    n, ratio = 2000, (math.sqrt(5) - 1) / 2
    near = min(range(1, n), key=lambda k: loss(k / n))
    low, high = (near - 1) / n + 1e-12, (near + 1) / n - 1e-12
    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize("labels, guide, alphas", [(0.5, 0.8, (0.0, 0.5, 1.0)), (2 / 3, 2 / 3, (0.0, 0.5, 1.0, 2.0))])
def test_D20_population(labels, guide, alphas):
    # One state, red and blue, pi_ref uniform, beta = guide_beta = 1; red is chosen in `labels` of the mixed pairs.
    def loss(p, alpha, drawn):
        rho, r_hat = [[log(2 * x), log(2 - 2 * x)] for x in (p, guide)]
        cost = lambda w, l: math.log1p(math.exp((1 - alpha * r_hat[l]) * rho[l] - (1 + alpha * r_hat[w]) * rho[w]))
        mixed = labels * cost(0, 1) + (1 - labels) * cost(1, 0)
        return mixed if not drawn else mixed / 2 + (cost(0, 0) + cost(1, 1)) / 4

    for alpha in alphas:
        assert max(abs(alpha * log(2 * x)) for x in (guide, 1 - guide)) < 1  # f > 0
        for drawn in (False, True):
            best = least(lambda p: loss(p, alpha, drawn))
            if alpha:
                quoted("D20", best)
            else:
                assert best == approx(labels, abs=1e-6)  # DPO
            # Nothing pulls there in tgdpo_loss either.
            q = torch.tensor(best, dtype=F64, requires_grad=True)
            sides = [(0, 1, labels), (1, 0, 1 - labels)] + [(0, 0, 0.5), (1, 1, 0.5)] * drawn
            red_blue = lambda x: [x.log().reshape(1, 1), (1 - x).log().reshape(1, 1)]
            half, given = red_blue(torch.tensor(0.5, dtype=F64)), red_blue(torch.tensor(guide, dtype=F64))
            ours = sum(
                share * tgdpo.tgdpo_loss(*((m[w], m[l]) for m in (red_blue(q), half, given)), 1.0, alpha).losses
                for w, l, share in sides
            )
            assert torch.autograd.grad(ours.sum(), q)[0].abs().item() < 1e-6


def test_D20_the_loss_falls_along_the_guide():
    # Labels by a coin, a policy that goes the guide's way: DPO's loss rises, TGDPO's falls below log 2.
    losses = lambda alpha: expected_loss(logp, ref, r_hat, pairs, alpha, BETA).item()
    _, ref, guide, _ = random_problem(0)
    r_hat, pairs = 1.0 * (guide - ref), independent_pairs(ref, torch.full((15, 15), 0.5, dtype=F64))
    logp = (ref + 0.3 * (guide - ref)).log_softmax(-1)
    assert losses(0.0) > log(2) > losses(0.5)
