"""derive.md, D1 to D10: each step against brute force on problems small enough to enumerate, in float64.

A problem here is a tree of all prefixes: token 0 ends the response, and every token ends it at the last step.
Sums over responses are written out response by response and never use the functions under test.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from derive_text import quoted
from pytest import approx
from torch import Tensor

import tgdpo

log = math.log
F64 = torch.float64


class Tree(NamedTuple):
    child: Tensor  # [S, A]
    depth: list  # of each state
    responses: list  # of lists of (state, action)


def grow(actions, steps):
    prefixes = [p for t in range(steps) for p in itertools.product(range(1, actions), repeat=t)]
    number = {prefix: s for s, prefix in enumerate(prefixes)}
    child = torch.tensor([[number.get(p + (a,), -1) if a else -1 for a in range(actions)] for p in prefixes])

    def ways(s):
        for a, c in enumerate(child[s].tolist()):
            yield from ([(s, a)] + rest for rest in ways(c)) if c >= 0 else [[(s, a)]]

    return Tree(child, [len(p) for p in prefixes], list(ways(0)))


TREE = grow(actions=3, steps=3)  # 7 states, 15 responses
BETA = 0.7


def same(ours, expected, atol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def table(draw, tree=TREE, scale=1.5):
    return scale * torch.randn(*tree.child.shape, generator=draw, dtype=F64)


def policy(draw, tree=TREE, scale=1.5):
    return table(draw, tree, scale).log_softmax(-1)


def weights(draw, tree=TREE):
    """f > 0 around 1, another for every state and action."""
    return 0.4 + 1.4 * torch.rand(*tree.child.shape, generator=draw, dtype=F64)


def total(values, response):
    return math.fsum(values[s, a].item() for s, a in response)


def probabilities(logp, tree=TREE):
    return [math.exp(total(logp, y)) for y in tree.responses]


def enumerated_objective(logp, ref, reward, beta, tree=TREE):
    """E_y [ sum r ] - beta KL(pi || pi_ref) over whole responses, one by one."""
    return math.fsum(
        p * (total(reward, y) - beta * (total(logp, y) - total(ref, y)))
        for p, y in zip(probabilities(logp, tree), tree.responses)
    )


def enumerated_optimum(ref, reward, beta, tree=TREE):
    """The optimum over all distributions of responses and its value: pi_ref(y), tilted (Gibbs' principle)."""
    tilted = [math.exp(total(ref, y) + total(reward, y) / beta) for y in tree.responses]
    return [w / math.fsum(tilted) for w in tilted], beta * log(math.fsum(tilted))


def soft_values(ref, reward, beta, tree=TREE):
    """V(s), what the best policy still earns from s on, by dynamic programming from the end, V(end) = 0."""
    value = [0.0] * (len(tree.child) + 1)
    for s in reversed(range(len(tree.child))):
        value[s] = beta * log(
            math.fsum(
                math.exp(ref[s, a].item() + (reward[s, a].item() + value[c]) / beta)
                for a, c in enumerate(tree.child[s].tolist())
            )
        )
    return value


def sequence_optimal(ref, reward, beta, tree=TREE):
    """The sequence-level optimum as a table, from soft_values."""
    value = torch.tensor(soft_values(ref, reward, beta, tree), dtype=F64)
    return ref + (reward + value[tree.child] - value[:-1, None]) / beta


def ascend(objective, shape):
    """The policy that gradient ascent (L-BFGS) on free logits finds, from the uniform one."""
    logits = torch.zeros(shape, dtype=F64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = -objective(logits.log_softmax(-1))
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().log_softmax(-1)


# The example of D2, D3 and D9: tokens red and blue, two steps, pi_ref uniform, beta = 1.
# At the prompt red earns log 3; after red nothing more can be earned, after blue any token earns log 5.
HAND = Tree(
    torch.tensor([[1, 2], [-1, -1], [-1, -1]]), [0, 1, 1], [[(0, a), (1 + a, c)] for a in (0, 1) for c in (0, 1)]
)
HAND_REF = torch.full((3, 2), 0.5, dtype=F64).log()
HAND_REWARD = torch.tensor([[log(3), 0], [0, 0], [log(5), log(5)]], dtype=F64)


def every_policy_of_hand(points=49):
    grid = [(k + 0.5) / points for k in range(points)] + [3 / 8, 3 / 4]
    p = torch.tensor(list(itertools.product(grid, [0.5, 0.2, 0.9], [0.5, 0.3, 0.8])), dtype=F64)
    return torch.stack([p, 1 - p], -1).log()  # [policies, S, A]


@pytest.mark.parametrize("seed", range(4))
def test_D1_objective_of_all_responses(seed):
    draw = rng(seed)
    logp, ref, reward = policy(draw), policy(draw), table(draw)
    assert math.fsum(probabilities(logp)) == approx(1, abs=1e-12)
    ours = tgdpo.sequence_objective(logp, ref, reward, TREE.child, BETA).item()
    assert ours == approx(enumerated_objective(logp, ref, reward, BETA), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_D2_state_distributions(seed):
    draw = rng(seed)
    logp, ref, reward = policy(draw), policy(draw), table(draw)
    d = tgdpo.state_distributions(logp, TREE.child, 3)
    assert d.shape == (3, 7)
    for t, s in itertools.product(range(3), range(7)):
        passing = math.fsum(p for p, y in zip(probabilities(logp), TREE.responses) if len(y) > t and y[t][0] == s)
        assert d[t, s].item() == approx(passing, abs=1e-14)
    steps = d @ tgdpo.token_objective(logp, ref, reward, BETA)
    assert steps.sum().item() == approx(enumerated_objective(logp, ref, reward, BETA), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_D2_theorem_4_1(seed):
    draw = rng(seed)
    ref, reward = policy(draw), table(draw)
    best, left = enumerated_optimum(ref, reward, BETA)
    # The left side three times over: Gibbs' principle, dynamic programming, search.
    star = sequence_optimal(ref, reward, BETA)
    assert probabilities(star) == approx(best, abs=1e-12)
    assert soft_values(ref, reward, BETA)[0] == approx(left, abs=1e-12)
    assert tgdpo.sequence_objective(star, ref, reward, TREE.child, BETA).item() == approx(left, abs=1e-12)
    found = ascend(lambda p: tgdpo.sequence_objective(p, ref, reward, TREE.child, BETA), ref.shape)
    assert left - 1e-8 < enumerated_objective(found, ref, reward, BETA) <= left + 1e-12
    # The right side: at step t a policy may walk to the best state of that depth (or end before), which costs
    # it nothing at step t, and be optimal there.
    optimal = ascend(lambda p: tgdpo.token_objective(p, ref, reward, BETA).sum(), ref.shape)
    at_state = tgdpo.token_objective(optimal, ref, reward, BETA).tolist()
    right = [max([v for v, depth in zip(at_state, TREE.depth) if depth == t] + [0.0] * (t > 0)) for t in range(3)]
    assert left < sum(right)
    for _ in range(300):
        other = policy(draw, scale=4)
        d = tgdpo.state_distributions(other, TREE.child, 3)
        steps = d @ tgdpo.token_objective(other, ref, reward, BETA)
        assert all(step <= bound + 1e-6 for step, bound in zip(steps.tolist(), right))
        assert steps.sum().item() <= left + 1e-12


def test_D2_gap_by_hand_and_a_tight_case():
    policies = every_policy_of_hand()
    values = [enumerated_objective(p, HAND_REF, HAND_REWARD, 1.0, HAND) for p in policies]
    assert max(values) == approx(quoted("D2", log(4)), abs=1e-12)
    assert policies[values.index(max(values))][0].exp().tolist() == approx([3 / 8, 5 / 8])
    per_state = torch.stack([tgdpo.token_objective(p, HAND_REF, HAND_REWARD, 1.0) for p in policies]).amax(0)
    bound = (per_state[0] + per_state[1:].max()).item()
    assert bound == approx(quoted("D2", log(10)), abs=1e-12)
    assert bound - max(values) == approx(quoted("D2", log(2.5)), abs=1e-12)
    # Tight: where both states of step 1 are worth the same, here log 5 each, no step stands in another's way.
    same = HAND_REWARD.clone()
    same[1] = log(5)
    best = max(enumerated_objective(p, HAND_REF, same, 1.0, HAND) for p in policies)
    per_state = torch.stack([tgdpo.token_objective(p, HAND_REF, same, 1.0) for p in policies]).amax(0)
    assert best == approx((per_state[0] + per_state[1:].max()).item(), abs=1e-12)
    assert best == approx(log(10), abs=1e-12)


def test_D3_what_is_given_up():
    policies = every_policy_of_hand()
    local = torch.stack([tgdpo.token_objective(p, HAND_REF, HAND_REWARD, 1.0) for p in policies])
    for d in ([1, 0.5, 0.5], [1, 0.9, 0.1], [1, 1, 0]):  # whatever D is, the optimum is the greedy one
        best = policies[(local @ torch.tensor(d, dtype=F64)).argmax()]
        assert best[0, 0].exp().item() == approx(3 / 4)
    greedy = torch.tensor([[3 / 4, 1 / 4], [1 / 2, 1 / 2], [1 / 2, 1 / 2]], dtype=F64).log()
    reached = enumerated_objective(greedy, HAND_REF, HAND_REWARD, 1.0, HAND)
    assert reached == approx(quoted("D3", log(2) + log(5) / 4), abs=1e-12)
    lost = quoted("D3", log(4) - reached)
    kl = math.fsum(p * log(p / q) for p, q in [(3 / 4, 3 / 8), (1 / 4, 5 / 8)])
    assert lost == approx(kl, abs=1e-12)
    # The bound of D2 goes too: with D on the state after red, the relaxed optimum is below the true one.
    relaxed = (local @ torch.tensor([1, 1, 0], dtype=F64)).max().item()
    assert relaxed == approx(quoted("D3", log(2)), abs=1e-12) and relaxed < log(4)


def test_D3_more_than_one_v():
    value = torch.tensor([*soft_values(HAND_REF, HAND_REWARD, 1.0, HAND)], dtype=F64)
    for shift in (0.0, 0.7, -2.0):
        v = value + torch.tensor([0, shift, shift, 0], dtype=F64)  # both states of step 1
        shaped = HAND_REWARD + v[HAND.child] - v[:-1, None]
        star = tgdpo.closed_form(HAND_REF, shaped, torch.ones_like(HAND_REF), 1.0)[0]
        assert star[0].exp().tolist() == approx([3 / 8, 5 / 8], abs=1e-12)
    v[1] += 0.1  # one state alone
    shaped = HAND_REWARD + v[HAND.child] - v[:-1, None]
    assert abs(tgdpo.closed_form(HAND_REF, shaped, torch.ones_like(HAND_REF), 1.0)[0][0, 0].exp() - 3 / 8) > 0.01
    # Where every state can end, a shift at the states of step 1 alone changes the policy there or before.
    draw = rng(0)
    ref, reward = policy(draw), table(draw)
    v = torch.tensor(soft_values(ref, reward, BETA), dtype=F64)
    star = lambda v: tgdpo.closed_form(ref, reward + v[TREE.child] - v[:-1, None], torch.ones_like(ref), BETA)[0]
    same(star(v), sequence_optimal(ref, reward, BETA))
    shifted = v + torch.tensor([depth == 1 for depth in TREE.depth] + [False]).to(F64)
    assert (star(shifted) - star(v)).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_D3_what_is_lost_is_the_divergence(seed):
    draw = rng(seed)
    ref, reward = policy(draw), table(draw)
    star, best = enumerated_optimum(ref, reward, BETA)
    for logp in (policy(draw), tgdpo.closed_form(ref, reward, torch.ones_like(ref), BETA)[0]):
        kl = math.fsum(p * log(p / q) for p, q in zip(probabilities(logp), star))
        lost = best - tgdpo.sequence_objective(logp, ref, reward, TREE.child, BETA).item()
        assert lost == approx(BETA * kl, abs=1e-12) and lost > 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_D4_guided_objective(seed):
    draw = rng(seed)
    logp, ref, reward, f = policy(draw), policy(draw), table(draw), weights(draw)
    ours = tgdpo.guided_objective(logp, ref, reward, f, BETA)
    for s in range(7):
        by_hand = math.fsum(
            math.exp(p) * (r / (BETA * w) - (p - q))
            for p, q, r, w in zip(logp[s].tolist(), ref[s].tolist(), reward[s].tolist(), f[s].tolist())
        )
        assert ours[s].item() == approx(by_hand, abs=1e-12)
    # f = 1 is the token-level problem of D3 divided by beta: the same maximisers.
    plain = tgdpo.guided_objective(logp, ref, reward, torch.ones_like(f), BETA)
    same(BETA * plain, tgdpo.token_objective(logp, ref, reward, BETA))


@pytest.mark.parametrize("seed", range(2))
def test_D5_closed_form_beats_10000_policies(seed):
    draw = rng(seed)
    ref, reward, f = policy(draw), table(draw), weights(draw)
    star, log_z = tgdpo.closed_form(ref, reward, f, BETA)
    best = tgdpo.guided_objective(star, ref, reward, f, BETA)
    for scale in (0.03, 0.3, 1.0, 3.0):  # near the optimum and far from it
        others = (star + scale * torch.randn(2500, 7, 3, generator=draw, dtype=F64)).log_softmax(-1)
        assert (tgdpo.guided_objective(others, ref, reward, f, BETA) < best).all()
    found = ascend(lambda p: tgdpo.guided_objective(p, ref, reward, f, BETA).sum(), ref.shape)
    same(found.exp(), star.exp(), 1e-5)
    same(tgdpo.guided_objective(found, ref, reward, f, BETA), best, 1e-8)
    for s in range(7):
        z = math.fsum(math.exp(ref[s, a]) * math.exp(reward[s, a] / (BETA * f[s, a])) for a in range(3))
        assert math.exp(log_z[s]) == approx(z, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_D5_objective_is_log_z_minus_kl(seed):
    draw = rng(seed)
    logp, ref, reward, f = policy(draw), policy(draw), table(draw), weights(draw)
    star, log_z = tgdpo.closed_form(ref, reward, f, BETA)
    kl = (logp.exp() * (logp - star)).sum(-1)
    same(tgdpo.guided_objective(logp, ref, reward, f, BETA), log_z - kl)


def test_D5_fails_where_f_stands_at_the_log_ratio():
    reward, f, ref = [1.0, 0.0], [2.0, 0.5], [0.5, 0.5]

    def undivided(p):  # sum_a pi (r - f log pi/pi_ref), beta = 1
        return sum(q * (r - w * log(q / u)) for q, r, w, u in zip((p, 1 - p), reward, f, ref))

    def divided(p):
        return sum(q * (r / w - log(q / u)) for q, r, w, u in zip((p, 1 - p), reward, f, ref))

    grid = [k / 100000 for k in range(1, 100000)]
    tables = [torch.tensor([x], dtype=F64) for x in (ref, reward, f)]
    star = tgdpo.closed_form(tables[0].log(), tables[1], tables[2], 1.0)[0]
    formula = quoted("D5", star[0, 0].exp().item())
    assert max(grid, key=divided) == approx(formula, abs=1e-5)
    best = max(grid, key=undivided)
    assert quoted("D5", best) < 0.5 < formula
    assert quoted("D5", undivided(best)) - quoted("D5", undivided(formula)) > 0.1
    # What remains: r = f log pi/pi_ref + f + lambda, with one lambda for both actions; and delta with these.
    multipliers = [r - w * log(q / u) - w for q, r, w, u in zip((best, 1 - best), reward, f, ref)]
    assert multipliers[0] == approx(multipliers[1], abs=1e-3)
    one = lambda x: torch.tensor([[x]], dtype=F64)
    phi = tgdpo.weighted_margin(one(log(best / 0.5)), one(log((1 - best) / 0.5)), one(2.0), one(0.5), 1.0).item()
    delta = (f[0] + multipliers[0]) - (f[1] + multipliers[0])
    assert phi + delta == approx(reward[0] - reward[1], abs=1e-3) and abs(delta) > 1


@pytest.mark.parametrize("seed", range(4))
def test_D6_inverted_reward_is_the_reward(seed):
    draw = rng(seed)
    ref, reward, f = policy(draw), table(draw), weights(draw)
    star, log_z = tgdpo.closed_form(ref, reward, f, BETA)
    same(tgdpo.inverted_reward(star, ref, log_z, f, BETA), reward)


@pytest.mark.parametrize("seed", range(4))
def test_D6_policy_and_log_z_are_free(seed):
    draw = rng(seed)
    logp, ref, f, log_z = policy(draw), policy(draw), weights(draw), table(draw)[:, 0]
    reward = tgdpo.inverted_reward(logp, ref, log_z, f, BETA)
    star, z = tgdpo.closed_form(ref, reward, f, BETA)
    same(star, logp)
    same(z, log_z)


def along(values, response):
    """[1, T]: a table's values on the tokens of one response; a vector's on its states."""
    return torch.stack([values[s, a] if values.dim() == 2 else values[s] for s, a in response])[None]


@pytest.mark.parametrize("one_f", [True, False])
def test_D7_bradley_terry(one_f):
    draw = rng(0)
    ref, reward, f_w = policy(draw), table(draw), weights(draw)
    f_l = f_w if one_f else weights(draw)
    star_w, z_w = tgdpo.closed_form(ref, reward, f_w, BETA)
    star_l, z_l = tgdpo.closed_form(ref, reward, f_l, BETA)
    for y_w, y_l in itertools.permutations(TREE.responses, 2):
        f = along(f_w, y_w), along(f_l, y_l)
        phi = tgdpo.weighted_margin(along(star_w - ref, y_w), along(star_l - ref, y_l), *f, BETA)
        delta = tgdpo.partition_term(along(z_w, y_w), along(z_l, y_l), *f, BETA)
        expected = 1 / (1 + math.exp(total(reward, y_l) - total(reward, y_w)))
        assert tgdpo.preference(phi, delta).item() == approx(expected, abs=1e-12)


def scores(policies, ref, f_w, f_l, y_w, y_l):
    """phi of many policies [N, S, A] on one pair: [N]."""
    take = lambda y: (policies - ref)[:, [s for s, _ in y], [a for _, a in y]]
    return tgdpo.weighted_margin(take(y_w), take(y_l), along(f_w, y_w), along(f_l, y_l), BETA)


@pytest.mark.parametrize("shift", [-3.0, 0.4, 5.0])
def test_D8_one_pair(shift):
    draw = rng(1)
    ref, f_w, f_l = policy(draw), weights(draw), weights(draw)
    y_w, y_l = TREE.responses[4], TREE.responses[9]
    policies = table(draw, scale=1).new_empty(4000, 7, 3).normal_(generator=draw).log_softmax(-1)
    phi = scores(policies, ref, f_w, f_l, y_w, y_l)
    plain, shifted = (tgdpo.preference(phi, torch.full_like(phi, d)) for d in (0.0, shift))
    assert ((plain[0::2] < plain[1::2]) == (shifted[0::2] < shifted[1::2])).all()
    assert plain.argmax() == shifted.argmax()
    logits = torch.randn(1, 7, 3, generator=draw, dtype=F64, requires_grad=True)
    gradients = []
    for d in (0.0, shift):
        phi = scores(logits.log_softmax(-1), ref, f_w, f_l, y_w, y_l)
        likelihood = tgdpo.preference(phi, torch.full_like(phi, d)).sum()
        gradients.append(torch.autograd.grad(likelihood, logits)[0])
    assert torch.cosine_similarity(*(g.flatten() for g in gradients), dim=0).item() == approx(1, abs=1e-12)


def test_D8_delta_by_hand():
    # beta 0.5; chosen: f (2, 1), log Z (0.3, -0.1); rejected: f (0.5, padding), log Z (0.4, 0).
    numbers = [torch.tensor([x], dtype=F64) for x in ([0.3, -0.1], [0.4, 0.0], [2.0, 1.0], [0.5, 1.0])]
    assert tgdpo.partition_term(*numbers, 0.5).item() == approx(0.5 * (0.6 - 0.1 - 0.2), abs=1e-15)


def test_D8_a_data_set_may_turn():
    # Responses (red, end) and (blue, end); end is forced. beta = f = 1, pi_ref(red) = 1/2.
    # end earns log 4 after red and 0 after blue. Labels: (red, end) preferred twice, (blue, end) once.
    one = torch.ones(2, 1, dtype=F64)
    log_z = tgdpo.closed_form(0 * one, torch.tensor([[log(4)], [0.0]], dtype=F64), one, 1.0)[1]
    z_red, z_blue = (torch.tensor([[0.0, z]], dtype=F64) for z in log_z.tolist())
    ones = torch.ones(1, 2, dtype=F64)
    delta = tgdpo.partition_term(z_red, z_blue, ones, ones, 1.0)
    assert delta.item() == approx(log(4), abs=1e-15)

    def loss(p, d):  # three pairs; p = pi(red | prompt)
        ratio = lambda q: torch.stack([2 * q, torch.ones_like(q)]).log()[None]
        phi = tgdpo.weighted_margin(ratio(p), ratio(1 - p), ones, ones, 1.0)
        return -2 * tgdpo.preference(phi, d).log().sum() - tgdpo.preference(-phi, -d).log().sum()

    def minimiser(d):
        grid = torch.arange(1, 3000, dtype=F64) / 3000
        return min(grid, key=lambda p: loss(p, d).item()).item()

    without, with_it = minimiser(torch.zeros(1, dtype=F64)), minimiser(delta)
    assert without == approx(quoted("D8", 2 / 3), abs=1e-4)
    assert with_it == approx(quoted("D8", 1 / 3), abs=1e-4)
    # In phi, at phi = 0 (p = 1/2): the sums' gradients point opposite ways, though each pair's does not.
    slope = []
    for d in (0.0, log(4)):
        phi = torch.zeros(3, dtype=F64, requires_grad=True)
        sign = torch.tensor([1, 1, -1], dtype=F64)
        (-tgdpo.preference(sign * phi, sign * d).log()).sum().backward()
        slope.append((sign * phi.grad, phi.grad.sum().item()))
    assert all((s < 0).all() for s, _ in slope)
    assert [-g for _, g in slope] == approx([quoted("D8", 0.5, 1), quoted("D8", -0.4, 1)], abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_D8_a_reward_with_delta_zero(seed):
    draw = rng(seed)
    ref, reward, f = policy(draw), table(draw), weights(draw)
    value = [0.0] * 8
    for s in reversed(range(7)):  # the v at which Z(s) = 1, by bisection: Z falls as v grows
        low, high = -100.0, 100.0
        for _ in range(200):
            v = (low + high) / 2
            z = math.fsum(
                math.exp(min(ref[s, a] + (reward[s, a] + value[c] - v) / (BETA * f[s, a]), 700))
                for a, c in enumerate(TREE.child[s].tolist())
            )
            low, high = (v, high) if z > 1 else (low, v)
        value[s] = v
    v = torch.tensor(value, dtype=F64)
    shaped = reward + v[TREE.child] - v[:-1, None]
    star, log_z = tgdpo.closed_form(ref, shaped, f, BETA)
    assert log_z.abs().max().item() < 1e-12
    for y_w, y_l in itertools.combinations(TREE.responses, 2):
        phi = tgdpo.weighted_margin(along(star - ref, y_w), along(star - ref, y_l), along(f, y_w), along(f, y_l), BETA)
        assert phi.item() == approx(total(reward, y_w) - total(reward, y_l), abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_D9_sequence_optimum(seed):
    draw = rng(seed)
    ref, reward = policy(draw), table(draw)
    best, value = enumerated_optimum(ref, reward, BETA)
    # pi*(a|s) by counting: the share of the responses through s that go on with a.
    guide = torch.zeros(7, 3, dtype=F64)
    for p, y in zip(best, TREE.responses):
        for s, a in y:
            guide[s, a] += p
    guide = (guide / guide.sum(-1, keepdim=True)).log()
    r_hat = tgdpo.token_reward(guide, ref, BETA)
    v = torch.tensor(soft_values(ref, reward, BETA), dtype=F64)
    same(r_hat, reward + v[TREE.child] - v[:-1, None])
    # As a token reward it makes the greedy optimum of D3 the sequence-level one.
    greedy, log_z = tgdpo.closed_form(ref, r_hat, torch.ones_like(ref), BETA)
    assert probabilities(greedy) == approx(best, abs=1e-12) and log_z.abs().max() < 1e-12
    for y in TREE.responses:
        assert total(r_hat, y) == approx(total(reward, y) - value, abs=1e-12)


def fitted(ref, pairs, chance, seed):
    """The guide that L-BFGS from random logits fits to the pairs (i, j) with chance of i over j; beta BETA."""
    logits = table(rng(seed)).requires_grad_()
    marks = torch.zeros(len(TREE.responses), 7, 3, dtype=F64)
    for k, y in enumerate(TREE.responses):
        for s, a in y:
            marks[k, s, a] = 1
    i, j = torch.tensor(pairs).T
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        scores = BETA * (marks * (logits.log_softmax(-1) - ref)).sum((1, 2))
        z = scores[i] - scores[j]
        loss = torch.nn.functional.softplus(-z).mul(chance).add(torch.nn.functional.softplus(z).mul(1 - chance)).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().log_softmax(-1)


def test_D9_what_labels_fix():
    draw = rng(2)
    ref, reward = policy(draw, scale=1.0), table(draw, scale=0.7)
    whole = torch.tensor([total(reward, y) for y in TREE.responses], dtype=F64)
    every = list(itertools.combinations(range(15), 2))
    for pairs in (every, every[::25]):
        i, j = torch.tensor(pairs).T
        fits = [fitted(ref, pairs, torch.sigmoid(whole[i] - whole[j]), seed) for seed in range(3)]
        r_hats = [tgdpo.token_reward(guide, ref, BETA) for guide in fits]
        apart = max((r - r_hats[0]).abs().max().item() for r in r_hats)
        for r_hat in r_hats:  # the margins, in both
            sums = torch.tensor([total(r_hat, y) for y in TREE.responses], dtype=F64)
            assert (sums[i] - sums[j] - whole[i] + whole[j]).abs().max().item() < 1e-5
        if pairs is every:  # every token's r_hat: that of the optimum
            assert apart < 1e-5
            same(fits[0], sequence_optimal(ref, reward, BETA), 1e-5)
        else:
            assert apart > 0.5


def test_D9_by_hand():
    guide = torch.tensor([[3 / 8, 5 / 8]], dtype=F64).log().requires_grad_()
    r_hat = tgdpo.token_reward(guide, HAND_REF[:1].clone().requires_grad_(), 1.0)
    assert not r_hat.requires_grad
    by_hand = [log(3) + 0 - log(4), 0 + log(5) - log(4)]  # r + V(next) - V(prompt)
    assert r_hat[0].tolist() == approx([quoted("D9", v) for v in by_hand], abs=1e-12)
    assert tgdpo.token_reward(guide, HAND_REF[:1], 0.1)[0].tolist() == approx([0.1 * v for v in by_hand], abs=1e-12)


def test_D10_by_hand():
    r_hat = torch.tensor([0.4, -0.2, 0.0], dtype=F64)
    assert tgdpo.chosen_weight(r_hat, 0.5).tolist() == approx([1.2, 0.9, 1.0], abs=1e-15)
    assert tgdpo.rejected_weight(r_hat, 0.5).tolist() == approx([0.8, 1.1, 1.0], abs=1e-15)


def test_D10_no_one_policy_for_both():
    # One state, pi_ref uniform, rewards log 4 and 0, beta = alpha = 1, r_hat = 1/2 on both tokens.
    ref, reward = torch.full((1, 2), 0.5, dtype=F64).log(), torch.tensor([[log(4), 0.0]], dtype=F64)
    r_hat = torch.full((1, 2), 0.5, dtype=F64)
    for f, odds in (
        (tgdpo.chosen_weight(r_hat, 1.0), 4 ** (1 / 1.5)),
        (torch.ones_like(r_hat), 4),
        (tgdpo.rejected_weight(r_hat, 1.0), 4**2),
    ):
        star = tgdpo.closed_form(ref, reward, f, 1.0)[0]
        assert star[0, 0].exp().item() == approx(quoted("D10", odds / (1 + odds)), abs=1e-12)


def test_D10_a_shared_token():
    # Both begin with the same token, log-ratio 0.3, r_hat 0.5; alpha = 1, beta = 0.1.
    ratio, r_hat = torch.tensor([[0.3]], dtype=F64), torch.tensor([[0.5]], dtype=F64)
    phi = tgdpo.weighted_margin(
        ratio, ratio, tgdpo.chosen_weight(r_hat, 1.0), tgdpo.rejected_weight(r_hat, 1.0), 0.1
    ).item()
    assert phi == approx(quoted("D10", 0.1 * (1.5 - 0.5) * 0.3, 2), abs=1e-15)
    # The same phi with the labels swapped: the two sigma(phi) do not sum to 1.
    assert 2 * torch.sigmoid(torch.tensor(phi)).item() > 1.01
    assert tgdpo.weighted_margin(ratio, ratio, torch.ones(1, 1), torch.ones(1, 1), 0.1).item() == 0
