"""Preference records to token ids to batches.

A batch is a `Pack`: one row of tokens without padding, in which a pair's prompt stands once for both responses.
Letters: B pairs, N rows (tokens of the pack), S segments (two a pair), M keys, R response tokens.
"""
import hashlib
import heapq
from typing import NamedTuple

import numpy as np
import torch


class Pair(NamedTuple):
    """Token ids of one preference. The responses end with the end-of-turn token, unless they were cut."""
    prompt: np.ndarray      # [P] int32, from the BOS to the assistant header: what inference would feed
    chosen: np.ndarray      # [C] int32, every token of it is scored
    rejected: np.ndarray    # [R] int32, likewise
    source: str             # "FILE:ROW", rows counted from 1


class Pack(NamedTuple):
    """Pairs side by side in one row; see `collate`."""
    tokens: torch.Tensor        # [N] int64
    positions: torch.Tensor     # [N] int64, each branch counted from the prompt's first token
    cu_q: torch.Tensor          # [S + 1] int32, where the queries of each segment begin
    cu_k: torch.Tensor          # [S + 1] int32, where its keys begin; causal, aligned at the bottom right
    max_q: int                  # most queries in a segment
    max_k: int                  # most keys in a segment
    keys: torch.Tensor          # [M] int64, the row that serves as each key
    first: torch.Tensor         # [N] int64, where in keys each row stands first
    shared: torch.Tensor        # [U] int64, the rows that stand there twice (the prompts')
    second: torch.Tensor        # [U] int64, and where they stand again
    predictors: torch.Tensor    # [R] int64, the row that predicts each response token
    targets: torch.Tensor       # [R] int64, the response tokens: pair by pair, chosen then rejected
    chosen_lengths: tuple       # B ints
    rejected_lengths: tuple     # B ints


def collate(pairs, share_prompt=True):
    """Lays pairs out as one Pack. Two pairs, the first with prompt 1 2, chosen 3 4 and rejected 5:

        row         0  1  2  3  4   5  6  7  8
        tokens      1  2  3  4  5   6  7  8  9
                    prompt chosen   prompt 6, chosen 7, rejected 8 9
                              rejected
        positions   0  1  2  3  2   0  1  1  2

    A pair is two segments. The queries of the first are the rows of prompt and chosen, of the second those of
    rejected alone; the keys of the second are the prompt's rows again and then its own:

    >>> ids = lambda *values: np.array(values, np.int32)
    >>> pairs = [Pair(ids(1, 2), ids(3, 4), ids(5), "a:1"), Pair(ids(6), ids(7), ids(8, 9), "a:2")]
    >>> pack = collate(pairs)
    >>> pack.tokens.tolist(), pack.positions.tolist()
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 2, 0, 1, 1, 2])
    >>> pack.cu_q.tolist(), pack.cu_k.tolist(), pack.keys.tolist()
    ([0, 4, 5, 7, 9], [0, 4, 7, 9, 12], [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8])
    >>> pack.first.tolist(), pack.shared.tolist(), pack.second.tolist()
    ([0, 1, 2, 3, 6, 7, 8, 10, 11], [0, 1, 5], [4, 5, 9])

    A response's first token is predicted by the prompt's last row, in both branches:

    >>> pack.predictors.tolist(), pack.targets.tolist()
    ([1, 2, 1, 5, 5, 7], [3, 4, 5, 7, 8, 9])

    With share_prompt=False the prompt is stored for each response, `keys` is every row once and `shared` is empty.
    """
    tokens, positions, cu_q, cu_k, keys, first, shared, second, predictors, targets = ([] for _ in range(10))
    row = key = 0
    for prompt, chosen, rejected, _ in pairs:
        P, C, R = len(prompt), len(chosen), len(rejected)
        own = P if share_prompt else 0                                              # second segment's first own row
        segment_w = np.arange(row, row + P + C)                                     # [P + C] rows
        row += P + C
        segment_l = np.concatenate([segment_w[:own], np.arange(row, row + P + R - own)])  # [P + R] rows
        tokens += [prompt, chosen, prompt[own:], rejected]
        positions += [np.arange(P + C), np.arange(own, P + R)]
        keys += [segment_w, segment_l]
        first += [np.arange(key, key + P + C), np.arange(key + P + C + own, key + P + C + P + R)]
        shared += [segment_w[:own]]
        second += [np.arange(key + P + C, key + P + C + own)]
        predictors += [segment_w[P - 1:-1], segment_l[P - 1:-1]]
        targets += [chosen, rejected]
        cu_q += [row, row + P + R - own]
        cu_k += [key + P + C, key + P + C + P + R]
        row, key = cu_q[-1], cu_k[-1]
    cu_q, cu_k = np.array([0] + cu_q, np.int32), np.array([0] + cu_k, np.int32)
    joined = [torch.from_numpy(np.concatenate(parts).astype(np.int64))
              for parts in (tokens, positions, keys, first, shared, second, predictors, targets)]
    tokens, positions, keys, first, shared, second, predictors, targets = joined
    return Pack(tokens, positions, torch.from_numpy(cu_q), torch.from_numpy(cu_k), int(np.diff(cu_q).max()),
                int(np.diff(cu_k).max()), keys, first, shared, second, predictors, targets,
                tuple(len(pair.chosen) for pair in pairs), tuple(len(pair.rejected) for pair in pairs))


def deal(lengths, world_size, micro_tokens):
    """Deals the pairs of one optimiser step to ranks and micro-batches: [rank][micro-batch] -> indices of `lengths`.

    lengths: tokens of each pair. Longest first, each to the least loaded of world_size * m micro-batches (Graham's
    LPT rule), with the smallest m for which each holds micro_tokens at most; a longer pair stands alone. All ranks
    get m, since their collectives must match; some micro-batches may be empty. The k-th of all ranks are of like
    size, so that no rank waits, and the fuller ones go to the ranks that have less so far.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    least = sum(min(length, micro_tokens) for length in lengths)
    micro_batches = max(1, -(-least // (world_size * micro_tokens)))
    while True:
        bins = [[] for _ in range(world_size * micro_batches)]
        loads = [(0, b) for b in range(len(bins))]      # a heap
        for index in order:
            load, b = loads[0]
            bins[b].append(index)
            heapq.heapreplace(loads, (load + lengths[index], b))
        if all(load <= micro_tokens or len(bins[b]) == 1 for load, b in loads):
            break
        micro_batches += 1
    fullest = sorted(loads, key=lambda item: (-item[0], item[1]))
    ranks, totals = [[] for _ in range(world_size)], [0] * world_size
    for k in range(0, len(bins), world_size):
        emptiest = sorted(range(world_size), key=totals.__getitem__)
        for rank, (load, b) in zip(emptiest, fullest[k:k + world_size]):
            ranks[rank].append(bins[b])
            totals[rank] += load
    return ranks


def epoch_order(count, seed, epoch):
    """The order in which an epoch reads `count` pairs: [count] int64. RandomState's stream is frozen across numpys."""
    stream = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(stream).permutation(count)


def fingerprint(pairs):
    """SHA-256 over all token ids and lengths, in hexadecimal: equal for equal pairs in equal order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(np.array([len(ids) for ids in pair[:3]], np.int64))
        for ids in pair[:3]:
            digest.update(np.ascontiguousarray(ids, np.int32))
    return digest.hexdigest()
