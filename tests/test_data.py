"""Batches: what a pack must let attention see, how pairs are dealt to ranks, orders and fingerprints."""

import doctest
import random

import numpy as np
import pytest
import torch

import data


def make_pairs(count, seed=0, longest=9):
    draw = random.Random(seed)
    ids = lambda: np.array([draw.randrange(500) for _ in range(draw.randint(1, longest))], np.int32)
    return [data.Pair(ids(), ids(), ids(), f"made:{row + 1}") for row in range(count)]


def test_the_drawing_in_collate_runs():
    assert doctest.testmod(data).attempted >= 6 and doctest.testmod(data).failed == 0


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("count", [1, 7])
def test_pack_lets_each_token_see_its_own_branch_only(count, share_prompt):
    pairs = make_pairs(count)
    pack = data.collate(pairs, share_prompt)
    cu_q, cu_k = pack.cu_q.tolist(), pack.cu_k.tolist()
    seen = {}  # place -> [(token, position)] of all keys that the causal mask, bottom right, leaves it
    for s in range(2 * count):
        pair = pairs[s // 2]
        response = pair.rejected if s % 2 else pair.chosen
        rows = pack.keys[cu_k[s] : cu_k[s + 1]]
        assert pack.tokens[rows].tolist() == [*pair.prompt, *response[:-1]]  # the last predicts nothing
        assert pack.positions[rows].tolist() == list(range(len(rows)))
        queries = range(cu_q[s], cu_q[s + 1])
        for i, row in enumerate(queries):
            seen[row] = pack.tokens[rows[: len(rows) - len(queries) + i + 1]].tolist()
    assert sorted(seen) == list(range(len(pack.tokens)))
    r = 0
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            for t, token in enumerate(response):
                assert pack.targets[r] == token
                assert seen[int(pack.predictors[r])] == [*pair.prompt, *response[:t]]
                r += 1
    assert r == len(pack.targets) == len(pack.predictors)
    assert pack.chosen_lengths == tuple(len(pair.chosen) for pair in pairs)
    assert pack.rejected_lengths == tuple(len(pair.rejected) for pair in pairs)
    assert (pack.max_q, pack.max_k) == (np.diff(cu_q).max(), np.diff(cu_k).max())


@pytest.mark.parametrize("share_prompt", [True, False])
def test_first_and_second_invert_keys(share_prompt):
    """Each key is the first or the second copy of a row: the gather's backward is two gathers and an add."""
    pack = data.collate(make_pairs(5), share_prompt)
    places = torch.cat([pack.first, pack.second])
    assert sorted(places.tolist()) == list(range(len(pack.keys)))
    assert pack.keys[pack.first].tolist() == list(range(len(pack.tokens)))
    assert pack.keys[pack.second].tolist() == pack.shared.tolist()
    assert len(pack.shared) == (sum(len(pair.prompt) for pair in make_pairs(5)) if share_prompt else 0)


def test_pack_types():
    pack = data.collate(make_pairs(3))
    for name in ("tokens", "positions", "keys", "first", "shared", "second", "predictors", "targets"):
        assert getattr(pack, name).dtype == torch.int64, name
    assert pack.cu_q.dtype == pack.cu_k.dtype == torch.int32
    assert type(pack.max_q) is int and type(pack.max_k) is int


def realistic_lengths(count, seed):
    """Pairs as on-policy UltraFeedback has them: 178 prompt tokens (median 110), responses of 400 each."""
    draw = np.random.RandomState(seed)
    prompt = draw.lognormal(np.log(110), 0.98, count).clip(10, 1800)
    responses = draw.lognormal(np.log(350), 0.5, (2, count)).clip(5, 1024).sum(0)
    return (prompt + responses).astype(int).tolist()


@pytest.mark.parametrize("world_size, micro_tokens", [(1, 10**9), (3, 50), (4, 7), (8, 200), (5, 1)])
def test_deal_gives_every_pair_once_and_keeps_to_micro_tokens(world_size, micro_tokens):
    draw = random.Random(1)
    for count in (1, 2, 7, 40):
        lengths = [draw.randint(1, 60) for _ in range(count)]
        ranks = data.deal(lengths, world_size, micro_tokens)
        assert len(ranks) == world_size and len({len(rank) for rank in ranks}) == 1
        micro = [pairs for rank in ranks for pairs in rank]
        assert sorted(index for pairs in micro for index in pairs) == list(range(count))
        assert all(len(pairs) <= 1 or sum(lengths[i] for i in pairs) <= micro_tokens for pairs in micro)
        assert ranks == data.deal(list(lengths), world_size, micro_tokens)


def test_deal_takes_the_fewest_micro_batches():
    assert data.deal([10] * 8, 2, 40) == [[[0, 2, 4, 6]], [[1, 3, 5, 7]]]
    assert [len(rank) for rank in data.deal([10] * 8, 2, 39)] == [2, 2]
    assert [len(rank) for rank in data.deal([500, 10, 10], 1, 20)] == [2]  # a longer pair stands alone
    assert data.deal([5], 3, 10) == [[[0]], [[]], [[]]]


@pytest.mark.parametrize("world_size, micro_tokens", [(8, 10**9), (8, 8192), (8, 4096), (2, 2048)])
def test_deal_balances_realistic_lengths(world_size, micro_tokens):
    worst, gaps = [], []
    for seed in range(5):
        lengths = realistic_lengths(128, seed)
        ranks = [
            [sum(lengths[i] for i in micro) for micro in rank] for rank in data.deal(lengths, world_size, micro_tokens)
        ]
        totals = [sum(rank) for rank in ranks]
        worst.append(max(totals) / np.mean(totals))
        gaps += [max(column) / max(1, min(column)) for column in zip(*ranks)]
    assert np.mean(worst) < 1.01 and max(worst) < 1.02
    assert np.mean(gaps) < 1.1


def test_epoch_order_depends_on_seed_and_epoch_alone():
    order = data.epoch_order(10, seed=3, epoch=0)
    assert sorted(order) == list(range(10)) and order.dtype == np.int64
    assert order.tolist() == data.epoch_order(10, seed=3, epoch=0).tolist() == [1, 5, 9, 0, 4, 7, 2, 8, 3, 6]
    others = [data.epoch_order(10, *pair).tolist() for pair in ((3, 1), (4, 0), (0, 3))]
    assert order.tolist() not in others and others[0] != others[2]


def test_fingerprint_sees_ids_lengths_and_order():
    pairs = make_pairs(4)
    same = data.fingerprint([pair._replace(source="elsewhere") for pair in pairs])
    assert data.fingerprint(pairs) == same
    assert data.fingerprint(pairs[::-1]) != same
    swapped = pairs[0]._replace(chosen=pairs[0].rejected, rejected=pairs[0].chosen)
    assert data.fingerprint([swapped, *pairs[1:]]) != same
    prompt, chosen = pairs[0].prompt, pairs[0].chosen
    moved = pairs[0]._replace(prompt=np.append(prompt, chosen[0]), chosen=chosen[1:])
    assert data.fingerprint([moved, *pairs[1:]]) != same
