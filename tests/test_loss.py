"""derive.md, D11 to D16: the losses against numbers worked by hand, another DPO, and finite differences."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from derive_text import quoted
from pytest import approx

import tgdpo

F64 = torch.float64
log, exp = math.log, math.exp


def pad(*rows, dtype=F64):
    """[B, T] from rows of per-token numbers, 0 after the shorter."""
    width = max(map(len, rows))
    return torch.tensor([list(row) + [0.0] * (width - len(row)) for row in rows], dtype=dtype)


# The pair that D11, D12 and D13 work out: log-ratios (1, 0.5) and (-0.4); the guide's (0.8, -0.4) and (1).
POLICY = pad([-1.0, -1.0]), pad([-2.0])
REF = pad([-2.0, -1.5]), pad([-1.6])
GUIDE = pad([-1.2, -1.9]), pad([-0.6])


def batch(pairs=6, longest=(9, 7), seed=0, dtype=F64):
    """Random policy, ref and guide with responses of random lengths, and the lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, t + 1, (pairs,), generator=draw) for t in longest]
    real = [torch.arange(t) < n[:, None] for t, n in zip(longest, lengths)]
    make = lambda: tuple(-3 * torch.rand(m.shape, generator=draw, dtype=dtype) * m for m in real)
    return make(), make(), make(), lengths, real


def leaf(pair):
    return tuple(t.clone().requires_grad_() for t in pair)


def independent_dpo(policy, ref, beta):
    """DPO's loss pair by pair in plain Python floats, written from its paper."""
    out = []
    for p_w, p_l, r_w, r_l in zip(*policy, *ref):
        h = beta * ((sum(p_w.tolist()) - sum(r_w.tolist())) - (sum(p_l.tolist()) - sum(r_l.tolist())))
        out.append(log(1 + exp(-h)))
    return out


def test_D11_worked_pair():
    loss = tgdpo.tgdpo_loss(POLICY, REF, GUIDE, beta=0.5, alpha=1.0)
    assert loss.phi.item() == approx(0.5 * (1.4 * 1 + 0.8 * 0.5 - 0.5 * -0.4), abs=1e-14)
    assert quoted("D11", loss.losses.item()) == approx(log(1 + exp(-1.0)), abs=1e-14)
    assert (loss.dpo_margin.item(), loss.logratio_w.item(), loss.logratio_l.item()) == approx(
        (quoted("D11", 0.95, 2), 1.5, -0.4), abs=1e-14
    )
    assert [t[0].tolist() for t in loss.r_hat] == [approx([0.4, -0.2], abs=1e-15), approx([0.5], abs=1e-15)]
    assert [t[0].tolist() for t in loss.f] == [approx([1.4, 0.8], abs=1e-15), approx([0.5], abs=1e-15)]
    plain = tgdpo.dpo_loss(POLICY, REF, beta=0.5)
    assert quoted("D11", plain.losses.item()) == approx(log(1 + exp(-0.95)), abs=1e-14)


def test_D11_starts_at_log_2():
    _, ref, guide, _, _ = batch()
    for alpha in (0.0, 0.5, 40.0):
        losses = tgdpo.tgdpo_loss(ref, ref, guide, 0.1, alpha).losses
        assert losses.tolist() == approx([quoted("D11", log(2))] * 6, abs=1e-15)


def test_D11_padding():
    policy, ref, guide, _, real = batch()
    wide = lambda pair, more: tuple(F.pad(t, (0, n)) for t, n in zip(pair, more))
    policy, roomy = leaf(policy), leaf(wide(policy, (4, 1)))
    loss = tgdpo.tgdpo_loss(policy, ref, guide, 0.3, 0.8)
    other = tgdpo.tgdpo_loss(roomy, wide(ref, (4, 1)), wide(guide, (4, 1)), 0.3, 0.8)
    for a, b in zip(loss[:5], other[:5]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)
    for given, absent in ((other.r_hat, 0), (other.f, 1)):
        for tensor, mask in zip(given, real):
            assert (tensor[:, mask.shape[1] :] == absent).all() and (tensor[:, : mask.shape[1]][~mask] == absent).all()
    loss.losses.sum().backward()
    other.losses.sum().backward()
    for tensor, roomy_tensor, mask in zip(policy, roomy, real):
        assert (tensor.grad[~mask] == 0).all() and (tensor.grad[mask] != 0).all()
        assert (roomy_tensor.grad[:, mask.shape[1] :] == 0).all()
        torch.testing.assert_close(roomy_tensor.grad[:, : mask.shape[1]], tensor.grad, rtol=0, atol=1e-15)
    # Real tokens that only one of the two finds certain still count.
    ratios = tgdpo.token_log_ratios(pad([0.0, -1.0, 0.0]), pad([-2.0, 0.0, 0.0]))
    assert ratios.tolist() == [[2.0, -1.0, 0.0]]


def test_D11_each_pair_alone():
    policy, ref, guide = map(leaf, batch()[:3])
    loss = tgdpo.tgdpo_loss(policy, ref, guide, 0.3, 0.8)
    for b in range(6):
        one = tgdpo.tgdpo_loss(*([t[b : b + 1] for t in pair] for pair in (policy, ref, guide)), 0.3, 0.8)
        for field, value in zip(loss[:5], one[:5]):
            assert value.item() == approx(field[b].item(), abs=1e-15)
    loss.losses.mean().backward()
    assert all(t.grad is None for t in ref + guide) and all(t.grad.abs().sum() > 0 for t in policy)


def test_D11_guide_beta():
    policy, ref, guide, _, _ = batch()
    phi = lambda alpha, guide_beta: tgdpo.tgdpo_loss(policy, ref, guide, 0.3, alpha, guide_beta).phi
    torch.testing.assert_close(phi(0.8, 0.3), phi(0.8, None), rtol=0, atol=0)
    torch.testing.assert_close(phi(0.8, 0.15), phi(0.4, 0.3), rtol=0, atol=1e-14)
    assert (phi(0.8, 0.15) - phi(0.8, 0.3)).abs().min() > 1e-3
    margin = tgdpo.tgdpo_loss(policy, ref, guide, 0.3, 0.8, 7.0).dpo_margin  # DPO's, whatever scales the guide
    torch.testing.assert_close(margin, tgdpo.dpo_loss(policy, ref, 0.3).phi, rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_D11_far_from_zero(size):
    policy = leaf((pad([-1.0], [-size], dtype=torch.float32), pad([-size], [-1.0], dtype=torch.float32)))
    ref = pad([-1.0], [-1.0], dtype=torch.float32), pad([-1.0], [-1.0], dtype=torch.float32)
    for loss in (tgdpo.tgdpo_loss(policy, ref, ref, 1.0, 0.5), tgdpo.dpo_loss(policy, ref, 1.0)):
        losses = loss.losses
        assert losses[0] == 0 and losses[1].item() == approx(size, rel=2e-3)
        losses.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in policy)


def test_D10_weights_have_no_bound():
    r_hat = torch.tensor([1e3, 40.0, -40.0, -1e3], dtype=F64)
    assert tgdpo.chosen_weight(r_hat, 3.0).tolist() == [3001, 121, -119, -2999]
    assert tgdpo.rejected_weight(r_hat, 3.0).tolist() == [-2999, -119, 121, 3001]
    far = tuple(t - 300 * (t != 0) for t in REF)  # in the loss too: r_hat -150, f_w = -149 and f_l = 151
    loss = tgdpo.tgdpo_loss(POLICY, REF, far, beta=0.5, alpha=1.0)
    assert [t[0].tolist() for t in loss.f] == [[-149, -149], [151]]
    assert loss.phi.item() == approx(0.5 * (-149 * 1.5 + 151 * 0.4), abs=1e-11)


def test_D7_preference_at_extremes():
    phi = torch.tensor([-700.0, -40.0, 0.0, 30.0, 1e4], dtype=F64)
    expected = [exp(-701), exp(-41) / (1 + exp(-41)), exp(-1) / (1 + exp(-1)), 1 / (1 + exp(-29)), 1.0]
    assert tgdpo.preference(phi, torch.full_like(phi, -1.0)).tolist() == approx(expected, rel=1e-12, abs=0)


def test_D11_gradients_of_what_the_loss_returns():
    policy, ref, guide = leaf(POLICY), REF, GUIDE
    loss = tgdpo.tgdpo_loss(policy, ref, guide, beta=0.5, alpha=1.0, guide_beta=0.25)  # f_w = (1.2, 0.9), f_l = 0.75
    plain = tgdpo.dpo_loss(policy, ref, beta=0.5)
    simple = tgdpo.simpo_loss(policy, ([2], [1]), beta=2.0, gamma=0.5)
    for value, expected in (
        (loss.phi, [0.6, 0.45, -0.375]),
        (loss.dpo_margin, [0.5, 0.5, -0.5]),
        (loss.logratio_w, [1, 1, 0]),
        (loss.logratio_l, [0, 0, 1]),
        (plain.phi, [0.5, 0.5, -0.5]),
        (plain.logratio_w, [1, 1, 0]),
        (plain.logratio_l, [0, 0, 1]),
        (simple.phi, [1, 1, -2]),
    ):
        found = torch.autograd.grad(value.sum(), policy, retain_graph=True, materialize_grads=True)
        assert torch.cat([t[0] for t in found]).tolist() == approx(expected, abs=1e-14)
    assert not any(t.requires_grad for t in (*loss.r_hat, *loss.f))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
def test_D12_formula(alpha):
    policy, ref, guide, _, real = batch(pairs=3, longest=(4, 3))
    policy = leaf(policy)
    loss = tgdpo.tgdpo_loss(policy, ref, guide, 0.3, alpha)
    loss.losses.sum().backward()
    r_hat_w, r_hat_l = (tgdpo.token_reward(g, r, 0.3) for g, r in zip(guide, ref))
    f = tgdpo.chosen_weight(r_hat_w, alpha), tgdpo.rejected_weight(r_hat_l, alpha)
    assert all((a == b).all() for a, b in zip((*loss.r_hat, *loss.f), (r_hat_w, r_hat_l, *f)))
    formula = tgdpo.token_gradients(loss.phi.detach(), *f, 0.3)
    for side, mask in enumerate(real):
        torch.testing.assert_close(formula[side][mask], policy[side].grad[mask], rtol=0, atol=1e-14)
        for b, t in mask.nonzero().tolist():
            ends = []
            for step in (1e-5, -1e-5):
                moved = [p.detach().clone() for p in policy]
                moved[side][b, t] += step
                ends.append(tgdpo.tgdpo_loss(moved, ref, guide, 0.3, alpha).losses.sum().item())
            assert formula[side][b, t].item() == approx((ends[0] - ends[1]) / 2e-5, abs=1e-9)


def test_D12_down_to_the_logits():
    draw = torch.Generator().manual_seed(3)
    logits, ref_logits, guide_logits = (torch.randn(5, 4, generator=draw, dtype=F64) for _ in range(3))
    # The tokens of the chosen response in states 0 to 2, those of the rejected in states 3 and 4.
    take = lambda x: [x.log_softmax(-1)[s, a][None] for s, a in (([0, 1, 2], [0, 2, 1]), ([3, 4], [3, 3]))]
    value = lambda x: tgdpo.tgdpo_loss(take(x), take(ref_logits), take(guide_logits), 0.4, 0.7).losses.sum()
    gradient = torch.autograd.functional.jacobian(value, logits)
    for s, a in itertools.product(range(5), range(4)):
        step = torch.zeros_like(logits)
        step[s, a] = 1e-5
        assert gradient[s, a].item() == approx((value(logits + step) - value(logits - step)).item() / 2e-5, abs=1e-9)


def test_D12_worked_pair():
    policy = leaf(POLICY)
    tgdpo.tgdpo_loss(policy, REF, GUIDE, 0.5, 1.0).losses.sum().backward()
    strength = 0.5 / (1 + exp(1.0))
    by_hand = [-strength * 1.4, -strength * 0.8, strength * 0.5]
    assert torch.cat([t.grad[0] for t in policy]).tolist() == approx([quoted("D12", g) for g in by_hand], abs=1e-14)


def test_D12_four_kinds_of_token():
    ref = pad([-1.0, -1.0, -1.0]), pad([-1.0, -1.0, -1.0])
    guide = pad([-0.5, -1.0, -1.5]), pad([-0.5, -1.0, -1.5])  # good, neutral, bad on either side
    ours, dpo = leaf(ref), leaf(ref)
    loss, plain = tgdpo.tgdpo_loss(ours, ref, guide, 0.5, 1.0), tgdpo.dpo_loss(dpo, ref, 0.5)
    assert loss.losses.item() == plain.losses.item()
    loss.losses.sum().backward()
    plain.losses.sum().backward()
    up_w, dpo_up_w = -ours[0].grad[0], -dpo[0].grad[0]  # what descent does to log pi
    up_l, dpo_up_l = -ours[1].grad[0], -dpo[1].grad[0]
    assert (dpo_up_w > 0).all() and (dpo_up_l < 0).all()
    assert up_w[0] > dpo_up_w[0] and 0 < up_w[2] < dpo_up_w[2]  # good encouraged more, bad less
    assert dpo_up_l[0] < up_l[0] < 0 and up_l[2] < dpo_up_l[2]  # good suppressed less, bad more
    assert up_w[1] == dpo_up_w[1] and up_l[1] == dpo_up_l[1]
    assert (up_w / dpo_up_w).tolist() == approx([1.25, 1.0, 0.75])
    assert (up_l / dpo_up_l).tolist() == approx([0.75, 1.0, 1.25])


def test_D12_one_larger_f_alone():
    ref, reward = torch.full((1, 3), 1 / 3, dtype=F64).log(), torch.tensor([[1.0, 5.0, 0.0]], dtype=F64)
    for f_a in (1.0, 2.0):
        star = tgdpo.closed_form(ref, reward, torch.tensor([[f_a, 1.0, 1.0]], dtype=F64), 1.0)[0]
        odds = [exp(1 / f_a), exp(5), 1]
        assert quoted("D12", star[0, 0].exp().item()) == approx(odds[0] / sum(odds), abs=1e-14)


def test_D11_separable_labels_have_no_minimum():
    losses = []
    for far in (0, 10, 100, 1000):  # one pair, the policy ever further along one direction
        policy = REF[0] + far * torch.tensor([[1.0, 0.0]], dtype=F64), REF[1] - far
        losses.append(tgdpo.tgdpo_loss(policy, REF, GUIDE, 0.5, 1.0).losses.item())
    assert losses == sorted(losses, reverse=True) and losses[0] == approx(log(2)) and losses[-1] < 1e-100


def test_D13_negative_f():
    policy = leaf(POLICY)
    loss = tgdpo.tgdpo_loss(policy, REF, GUIDE, 0.5, 6.0)  # f_w = (3.4, -0.2), f_l = -2
    loss.losses.sum().backward()
    strength = 0.5 / (1 + exp(0.5 * (3.4 - 0.1 - 0.8)))
    signed = [-strength * 3.4, strength * 0.2, -strength * 2.0]
    assert loss.phi.item() == approx(quoted("D13", 1.25, 2), abs=1e-14)
    assert torch.cat([t.grad[0] for t in policy]).tolist() == approx([quoted("D13", g) for g in signed], abs=1e-14)
    # The loss can go to 0 by making this chosen token impossible.
    losses = [
        tgdpo.tgdpo_loss((pad([-1.0, -1.0 - far]), POLICY[1]), REF, GUIDE, 0.5, 6.0).losses.item()
        for far in (0, 10, 100, 1000)
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-40


def positive_share(r_hat_w, r_hat_l, alpha):
    f = [1 + alpha * r for r in r_hat_w] + [1 - alpha * r for r in r_hat_l]
    return sum(x > 0 for x in f) / len(f)


def test_D13_by_hand():
    r_hat_w, r_hat_l = [0.5, -0.25, -0.1, 0.3, 0.0], [0.2, -0.6, 0.4, 0.05, 0.1]
    ask = lambda share: tgdpo.largest_alpha(pad(r_hat_w), pad(r_hat_l), share)
    assert ask(1.0) == approx(quoted("D13", 1 / 0.4, 1))  # the rejected 0.4
    assert ask(0.9) == approx(quoted("D13", 1 / 0.25, 1))  # then the chosen -0.25
    assert ask(0.8) == approx(quoted("D13", 1 / 0.2, 1))
    assert ask(0.85) == ask(0.9) and ask(0.4) == math.inf  # 0.5 and 0.3 chosen, 0, -0.6 rejected: never


def test_D13_by_counting():
    draw = torch.Generator().manual_seed(5)
    r_hat_w, r_hat_l = (torch.randn(n, generator=draw, dtype=F64) for n in (137, 163))
    for share in (1.0, 0.99, 0.95, 0.7):
        edge = tgdpo.largest_alpha(r_hat_w, r_hat_l, share)
        for alpha in (edge * (1 - 1e-9), edge / 2, edge / 100):
            assert positive_share(r_hat_w.tolist(), r_hat_l.tolist(), alpha) >= share
        for alpha in (edge * (1 + 1e-9), edge * 2, edge * 100):
            assert positive_share(r_hat_w.tolist(), r_hat_l.tolist(), alpha) < share
    # 0.07 * 100 is a little more than 7 in floating point: still 7 tokens.
    ramp = torch.arange(1, 101, dtype=F64)
    assert tgdpo.largest_alpha(-ramp, ramp[:0], 0.07) == approx(1 / 7)


def test_D13_limits():
    none = torch.zeros(0)
    assert tgdpo.largest_alpha(none, none) == math.inf
    assert tgdpo.largest_alpha(torch.tensor([0.0, 1.0]), torch.tensor([[-1.0], [0.0]])) == math.inf
    assert tgdpo.largest_alpha(torch.tensor([-0.5]), none) == 2.0
    assert tgdpo.largest_alpha(torch.tensor([-0.5, -1.0]), none, 1e-9) == 2.0  # a share of one token
    for share in (0.0, 1.1, -1.0, math.nan):
        with pytest.raises(ValueError, match="share"):
            tgdpo.largest_alpha(torch.ones(2), torch.ones(2), share)


def test_D13_fine_shares_and_weak_guides():
    ramp = torch.arange(1, 20001, dtype=F64)
    for lost in (0, 1, 2, 19):  # of 20,000 tokens: a share of 0.99995 keeps all but one
        assert tgdpo.largest_alpha(-ramp, ramp[:0], 1 - lost / 20000) == approx(1 / (20000 - lost), rel=1e-12)
    assert tgdpo.largest_alpha(ramp[:0], ramp, 0.99993) == approx(1 / 19999, rel=1e-12)  # one less would be too few
    slopes = torch.tensor([1.0, 2.0, 4.0])  # 4e-6 of a token beyond two is a third; 4e-7 is how floats are
    assert [tgdpo.largest_alpha(-slopes, slopes[:0], (2 + more) / 3) for more in (4e-6, 4e-7)] == [0.25, 0.5]
    for weak in (1e-5, 1e-9, 1e-30):
        assert tgdpo.largest_alpha(torch.tensor([-weak, weak], dtype=F64), torch.zeros(3)) == approx(1 / weak, rel=1e-9)


def test_D14_special_cases():
    policy, ref, guide, _, _ = batch()
    expected = independent_dpo(policy, ref, 0.3)
    dpo = tgdpo.dpo_loss(policy, ref, 0.3)
    assert dpo.losses.tolist() == approx(expected, abs=1e-13)
    assert (dpo.phi == dpo.dpo_margin).all()
    for its_guide, alpha in ((guide, 0.0), (ref, 0.8)):
        special = tgdpo.tgdpo_loss(policy, ref, its_guide, 0.3, alpha)
        assert all((ours == theirs).all() for ours, theirs in zip(special[:5], dpo[:5]))  # to the last bit
    other = tgdpo.tgdpo_loss(policy, ref, guide, 0.3, 0.8)
    assert (other.losses - dpo.losses).abs().min() > 1e-3
    torch.testing.assert_close(other.dpo_margin, dpo.phi, rtol=0, atol=1e-15)
    assert dpo.r_hat is None and dpo.f is None


def test_D14_partition_function_cancels():
    # Four responses to one prompt: pi* = pi_ref exp(r / beta) / Z, and no Z is left in the margin.
    ref, reward, beta = [0.1, 0.2, 0.3, 0.4], [1.0, -0.5, 0.3, 0.0], 0.5
    tilted = [p * exp(r / beta) for p, r in zip(ref, reward)]
    star = [w / sum(tilted) for w in tilted]
    for w, l in itertools.permutations(range(4), 2):
        policy, start = ((pad([log(p[w])]), pad([log(p[l])])) for p in (star, ref))
        loss = tgdpo.dpo_loss(policy, start, beta)
        assert exp(-loss.losses.item()) == approx(1 / (1 + exp(reward[l] - reward[w])), abs=1e-12)


def test_D15_by_hand():
    loss = tgdpo.simpo_loss((pad([-2, -2, -2]), pad([-2.5, -2.5])), ([3], [2]), beta=2.0, gamma=0.5)
    assert loss.phi.item() == approx(2 * (-2 + 2.5), abs=1e-14)
    assert quoted("D15", loss.losses.item()) == approx(log(1 + exp(-0.5)), abs=1e-14)
    assert loss[2:] == (None,) * 5


def test_D15_a_certain_token_is_a_token():
    """Lengths count what is there, not what is below 0: a real token of log-prob 0 makes the mean smaller."""
    loss = tgdpo.simpo_loss((pad([0, -2, 0]), pad([-3, 0])), ([3], [2]), beta=2.0, gamma=0.5)
    assert loss.phi.item() == approx(2 * (-2 / 3 + 3 / 2), abs=1e-14)


def test_D15_the_reward_of_a_token():
    reward = tgdpo.mean_reward(pad([-2, -1, -3], [-4]), torch.tensor([3, 1]), 1.5)
    assert reward.tolist() == [approx([-1.0, -0.5, -1.5], abs=1e-15), approx([-6, 0, 0], abs=1e-15)]


def test_D15_uniform_reference():
    policy, _, _, lengths, real = batch()
    uniform = tuple(-log(50) * mask.to(F64) for mask in real)  # a vocabulary of 50
    loss = tgdpo.simpo_loss(policy, lengths, 2.5, 1.375)
    for b in range(6):
        mean = [(policy[i][b].sum() - uniform[i][b].sum()).item() / int(lengths[i][b]) for i in (0, 1)]
        assert loss.phi[b].item() == approx(2.5 * (mean[0] - mean[1]), abs=1e-12)
        assert loss.losses[b].item() == approx(log(1 + exp(1.375 - loss.phi[b].item())), abs=1e-12)
    policy = leaf(policy)
    tgdpo.simpo_loss(policy, [n.tolist() for n in lengths], 2.5, 1.375).losses.sum().backward()
    strength = torch.sigmoid(1.375 - loss.phi)[:, None] * 2.5
    for side, sign in ((0, -1), (1, 1)):
        expected = sign * strength / lengths[side][:, None] * torch.ones_like(policy[side])
        torch.testing.assert_close(policy[side].grad[real[side]], expected[real[side]], rtol=0, atol=1e-14)


def test_D16_own_optimum():
    draw = torch.Generator().manual_seed(7)
    guide, ref = (torch.randn(5, 4, generator=draw, dtype=F64).log_softmax(-1) for _ in range(2))
    for guide_beta in (0.1, 2.5):
        r_hat = tgdpo.token_reward(guide, ref, guide_beta)
        star, log_z = tgdpo.closed_form(ref, r_hat, torch.ones_like(ref), guide_beta)
        torch.testing.assert_close(star, guide, rtol=0, atol=1e-12)
        assert log_z.abs().max() < 1e-12


def test_D16_wrong_way_round():
    guide, ref = (pad([-2, -2, -2]), pad([-2.5, -2.5])), (pad([-1.5, -1.5, -1.5]), pad([-3, -3]))
    assert tgdpo.simpo_loss(guide, ([3], [2]), 2.0, 0.5).phi.item() > 0.5
    sums = [tgdpo.token_reward(g, r, 0.1).sum().item() for g, r in zip(guide, ref)]
    assert sums == approx([quoted("D16", -0.15, 2), quoted("D16", 0.1, 2)], abs=1e-15)
    # A DPO guide cannot: the sums' difference is its own margin.
    dpo = tgdpo.dpo_loss(guide, ref, 0.1)
    assert sums[0] - sums[1] == approx(dpo.phi.item(), abs=1e-15) and dpo.phi.item() < 0


@pytest.mark.parametrize(
    "change, words",
    [
        *((dict(beta=beta), "^beta") for beta in (0.0, -1.0, math.nan, math.inf)),
        *((dict(alpha=alpha), "alpha") for alpha in (-0.1, math.nan, math.inf)),
        (dict(guide_beta=0.0), "guide_beta"),
        (dict(ref=(torch.zeros(2, 3), torch.zeros(2, 5))), "ref rejected.*2, 5"),
        (dict(guide=(torch.zeros(2, 2), torch.zeros(2, 4))), "guide chosen.*2, 2"),
        (dict(policy=(torch.zeros(2, 3), torch.zeros(1, 4))), "policy rejected.*1, 4"),
        (dict(policy=(torch.zeros(3), torch.zeros(4))), "policy chosen"),
    ],
)
def test_losses_refuse_what_cannot_be(change, words):
    pair = (torch.zeros(2, 3), torch.zeros(2, 4))
    good = dict(policy=pair, ref=pair, guide=pair, beta=0.1, alpha=0.5)
    tgdpo.tgdpo_loss(**good)
    with pytest.raises(ValueError, match=words) as error:
        tgdpo.tgdpo_loss(**good | change)
    assert "\n" not in str(error.value)


def test_dpo_and_simpo_refuse_what_cannot_be():
    pair = (torch.zeros(2, 3), torch.zeros(2, 4))
    for call in (
        lambda: tgdpo.dpo_loss(pair, pair, 0.0),
        lambda: tgdpo.dpo_loss(pair, pair[::-1], 0.1),
        lambda: tgdpo.simpo_loss(pair, ([3, 3], [4, 4]), -2.5, 1.0),
        lambda: tgdpo.simpo_loss((pair[0], torch.zeros(3, 4)), ([3, 3], [4, 4, 4]), 2.5, 1.0),
        lambda: tgdpo.simpo_loss(pair, ([3, 0], [4, 4]), 2.5, 1.0),
        lambda: tgdpo.simpo_loss(pair, ([3], [4]), 2.5, 1.0),
    ):
        with pytest.raises(ValueError):
            call()


def test_float32_agrees_with_float64():
    policy, ref, guide, lengths, _ = batch()
    single = lambda pair: tuple(t.float() for t in pair)
    losses = lambda p, r, g: (tgdpo.tgdpo_loss(p, r, g, 0.1, 0.5), tgdpo.simpo_loss(p, lengths, 2.5, 1.375))
    for small, exact in zip(losses(*map(single, (policy, ref, guide))), losses(policy, ref, guide)):
        assert small.losses.dtype == torch.float32 and exact.losses.dtype == F64
        torch.testing.assert_close(small.losses.double(), exact.losses, rtol=0, atol=1e-5)
