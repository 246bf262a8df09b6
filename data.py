"""Preference records to token ids to batches.

A row of a file is a prompt of messages and two replies (files/preferences.py), and becomes with the tokenizer's own
chat template and vocabulary a `Pair` of token ids (`pair_of`). Pairs are put in order, dealt to ranks and laid out as a
`Pack`, all tokens in one line without padding, in which a pair's prompt stands once for both responses.
Letters: B pairs, N tokens, S segments (two a pair), M keys, R response tokens, V pieces.
"""

import collections
import hashlib
import heapq
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from files.errors import BadInput, BadRow, brief
from files.preferences import fields_read, has, preference_of, renamed, weight_of
from files.rows import read_rows
from files.template import ChatTemplate
from files.tokenizer import ChatTokenizer

CHUNK = 512  # rows in memory at a time
DEALT = 4096  # pairs of a pass without gradients that are dealt to ranks and packs together
HUGE = 2 * 10**7  # characters that a template is never given: they are too long a prompt, or are cut from a response


class Pair(NamedTuple):
    """Token ids of one preference. The responses end with the end-of-turn token, unless they were cut."""

    prompt: np.ndarray  # [P] int32, from the BOS to the assistant header: what inference would feed
    chosen: np.ndarray  # [C] int32, every token of it is scored
    rejected: np.ndarray  # [R] int32, likewise
    source: str  # "FILE:ROW", rows counted from 1: lines, or elements of an array or table
    cut: int = 0  # how many of the responses were cut
    apart: int = 0  # how many were tokenised apart from the prompt
    weight: float = 1.0  # multiplies its loss in training

    @property
    def scored(self) -> int:
        """How many response tokens there are."""
        return len(self.chosen) + len(self.rejected)

    @property
    def packed(self) -> int:
        """How many tokens a pack takes for it: the prompt once, no response's last token."""
        return len(self.prompt) + self.scored - 2


FILLER = Pair(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), "")


class Counts(NamedTuple):
    """What became of the rows of the files."""

    rows: int
    kept: int
    cut: int  # responses cut at max_length, of kept pairs
    boundary: int  # responses tokenised apart from their prompt, of kept pairs
    dropped: list  # {"file", "row", "reason"}; the reason's kind stands before its first colon
    unused: tuple = ()  # columns that no part of a pair was read from


# Rows to pairs


def load_pairs(
    paths: Sequence[str],
    tokenizer: ChatTokenizer,
    max_length: int,
    max_prompt_length: int,
    skip_bad_rows: bool = False,
    columns: dict[str, str] | None = None,
    limit: int = 0,
) -> tuple[list[Pair], Counts]:
    """Reads files of preference rows.

    paths: .jsonl, .json or .parquet files. max_length: most tokens of prompt and response; max_prompt_length:
    of the prompt alone. columns: {name: column} of --columns; limit: read on only until so many pairs are kept
    (0: all). Raises BadInput for a file or template that cannot be used, for a column that no row has, for rows that
    cannot be read (skip_bad_rows drops these), and where no pair is left.
    """
    rows = ((path, row, value) for path in map(Path, paths) for row, value in read_rows(path))
    total, pairs, dropped, columns = 0, [], [], columns or {}
    bad, found = {}, {}  # reason without its values -> ["FILE:ROW: reason"]; column -> its last value
    with ChatTemplate(tokenizer) as template, ThreadPoolExecutor() as pool:
        make = lambda numbered: pair_of(*numbered, tokenizer, template, max_length, max_prompt_length, columns)
        while (not limit or len(pairs) < limit) and (chunk := list(itertools.islice(rows, CHUNK))):
            for (path, row, value), result in zip(chunk, pool.map(make, chunk)):
                if limit and len(pairs) == limit:
                    break
                total += 1
                if isinstance(value, dict):
                    found |= value
                if isinstance(result, Pair):
                    pairs.append(result)
                    continue
                dropped.append({"file": str(path), "row": row, "reason": str(result)})
                if isinstance(result, BadRow):
                    alike = re.sub(r"column \d+|and is .*|'.*?'", "", str(result))
                    bad.setdefault(alike, []).append(f"{path}:{row}: {result}")
    absent = [f"{name}={column}" for name, column in columns.items() if column not in found]
    if absent and found:
        where = ", ".join(map(str, paths))
        raise BadInput(f"{where}: --columns {' '.join(absent)}: in none of {total} rows; {has(found)}")
    if bad and not skip_bad_rows:
        raise BadInput(refusal(bad, total))
    if not pairs:
        kinds = collections.Counter(drop["reason"].split(":")[0] for drop in dropped)
        first = (
            next(iter(bad.values()))[0] if bad else "give other data, or longer --max-length and --max-prompt-length"
        )
        raise BadInput(
            f"{', '.join(map(str, paths))}: no pair is left of {total} rows: "
            + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            + f"; {first}"
        )
    cut, apart = sum(pair.cut for pair in pairs), sum(pair.apart for pair in pairs)
    unused = found.keys() - fields_read(columns) - set(columns.values())
    return pairs, Counts(total, len(pairs), cut, apart, dropped, tuple(field for field in found if field in unused))


def refusal(bad: dict[str, list[str]], total: int) -> str:
    """Bad rows in words, each reason once. bad: reason -> ["FILE:ROW: reason"], alike; total: rows read."""
    count, lines = sum(map(len, bad.values())), []
    for first, *others in list(bad.values())[:10]:
        lines.append(first + (f" (and {len(others)} more of {total} rows)" if others else ""))
    if len(bad) == 1:
        return f"{lines[0]}; mend {'the row' if count == 1 else 'them'}, or drop such rows with --skip-bad-rows"
    more = [f"... and {len(bad) - 10} more reasons"] if len(bad) > 10 else []
    what = f"{count} of {total} rows cannot be used; mend them, or drop such rows with --skip-bad-rows"
    return "\n".join([what, *lines, *more])


def pair_of(
    path: Path,
    row: int,
    value: Any,
    tokenizer: ChatTokenizer,
    template: ChatTemplate,
    max_length: int,
    max_prompt_length: int,
    columns: dict[str, str] | None = None,
) -> Pair | BadRow | str:
    """The Pair of a row; or why there is none: BadRow where it cannot be read, a string where it is dropped."""
    most = (max_length + 1) * tokenizer.longest  # more characters are more than max_length tokens
    try:
        value = renamed(value, columns or {})
        weight = weight_of(value) if columns and "weight" in columns else 1.0
        messages, *replies = preference_of(value)
        control = tokenizer.control.search("\0".join([message["content"] for message in messages] + replies))
        if control:
            return f"control token in the text: {brief(control[0])}"
        if not all(reply.strip() for reply in replies):
            return "empty response"
        if (length := sum(len(message["content"]) for message in messages)) > max(most, HUGE):
            return f"prompt too long: {length} characters"
        replies = [reply[: max(2 * most, HUGE)] for reply in replies]
        text, *dialogues = template.render(messages, replies)
        if len(text) > most:
            return f"prompt too long: {len(text)} characters"
        scored = [tokenizer.scored(text, *both) for both in zip(dialogues, replies)]  # [(text, id that ends it)]
        prompt, responses, apart = tokenizer.encode_after(text, [response[:most] for response, _ in scored])
    except BadRow as error:
        return error
    room, cut = max_length - len(prompt), 0
    if sum(tokenizer.is_control[ids].sum() for ids in (prompt, *responses)) > len(tokenizer.control.findall(text)):
        return "control token in the text: it appears as the tokenizer normalises"
    if not prompt:
        return "empty prompt: the tokenizer makes no token of it"
    if not all(responses):
        return "empty response: the tokenizer makes no token of it"
    if len(prompt) > max_prompt_length:
        return f"prompt too long: {len(prompt)} tokens, at most {max_prompt_length}"
    if room <= 0:
        return f"prompt fills the context: {len(prompt)} tokens of {max_length}"
    for ids, (response, end) in zip(responses, scored):
        ids.append(end)
        cut += len(ids) > room or len(response) > most
        del ids[room:]
    chosen, rejected = (np.array(ids, np.int32) for ids in responses)
    if np.array_equal(chosen, rejected):
        return "equal responses after the cut" if cut else "equal responses"
    return Pair(np.array(prompt, np.int32), chosen, rejected, f"{path}:{row}", cut, apart, weight)


# Pairs to batches


class Pack(NamedTuple):
    """Pairs side by side, all tokens in one line; see `collate`."""

    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64, each branch counted from the prompt's first token
    keys: Tensor  # [M] int64, the place of the token that serves as each key
    first: Tensor  # [N] int64, where in keys each token stands first
    shared: Tensor  # [U] int64, the places of the tokens that stand there twice (the prompts')
    second: Tensor  # [U] int64, and where they stand again
    predictors: Tensor  # [R] int64, the place of the token that predicts each response token
    targets: Tensor  # [R] int64, the response tokens: pair by pair, chosen then rejected
    cu_q: Tensor  # [S + 1] int32, where the queries of each segment begin
    cu_k: Tensor  # [S + 1] int32, where its keys begin; causal, aligned at the bottom right
    max_q: int  # most queries in a segment
    max_k: int  # most keys in a segment
    chosen_lengths: tuple  # B ints
    rejected_lengths: tuple  # B ints

    def to(self, device: torch.device) -> "Pack":
        """The pack with its tensors on the device."""
        return self._make(moved(x, device) if torch.is_tensor(x) else x for x in self)

    def sides(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """A number a response token, [R] -> (chosen, rejected), each [B, T], 0 where there is no token."""
        parts = flat.split([n for both in zip(self.chosen_lengths, self.rejected_lengths) for n in both])
        return pad_sequence(parts[0::2], batch_first=True), pad_sequence(parts[1::2], batch_first=True)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; nobody waits for the copy."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def collate(pairs: Sequence[Pair], share_prompt: bool = True) -> Pack:
    """Lays pairs out as one Pack, without each response's last token: it predicts nothing, and no token sees it. Two
    pairs, the first with prompt 1 2, chosen 3 4 0 and rejected 5 0:

        place       0  1  2  3  4   5  6  7  8
        tokens      1  2  3  4  5   6  7  8  9
                    prompt chosen   prompt 6, chosen 7 0, rejected 8 9 0
                              rejected
        positions   0  1  2  3  2   0  1  1  2

    A pair is two segments. The queries of the first are the tokens of prompt and chosen, of the second those of
    rejected alone; the keys of the second are the prompt's tokens again and then its own:

    >>> ids = lambda *values: np.array(values, np.int32)
    >>> pairs = [Pair(ids(1, 2), ids(3, 4, 0), ids(5, 0), "a:1"), Pair(ids(6), ids(7, 0), ids(8, 9, 0), "a:2")]
    >>> pack = collate(pairs)
    >>> pack.tokens.tolist(), pack.positions.tolist()
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 2, 0, 1, 1, 2])
    >>> pack.cu_q.tolist(), pack.cu_k.tolist(), pack.keys.tolist()
    ([0, 4, 5, 7, 9], [0, 4, 7, 9, 12], [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8])
    >>> pack.first.tolist(), pack.shared.tolist(), pack.second.tolist()
    ([0, 1, 2, 3, 6, 7, 8, 10, 11], [0, 1, 5], [4, 5, 9])

    A response's first token is predicted by the prompt's last token, in both branches:

    >>> pack.predictors.tolist(), pack.targets.tolist()
    ([1, 2, 3, 1, 4, 5, 6, 5, 7, 8], [3, 4, 0, 5, 0, 7, 0, 8, 9, 0])

    With share_prompt=False the prompt is stored for each response, `keys` is every place, `shared` is empty. Without
    pairs, for a rank that must run along, FILLER is laid out.
    """
    pairs = pairs or [FILLER]
    tokens, positions, keys, first, shared, second, predictors, targets = ([] for _ in range(8))
    cu_q, cu_k = [0], [0]
    for prompt, chosen, rejected in (pair[:3] for pair in pairs):
        P, C, R = len(prompt), len(chosen) - 1, len(rejected) - 1
        own = P if share_prompt else 0  # where the second segment's own tokens begin
        place, key = cu_q[-1], cu_k[-1]
        segment_w = np.arange(place, place + P + C)  # [P + C] places
        place_l, key_l = place + P + C, key + P + C
        segment_l = np.concatenate([segment_w[:own], np.arange(place_l, place_l + P + R - own)])  # [P + R] places
        tokens += [prompt, chosen[:-1], prompt[own:], rejected[:-1]]
        positions += [np.arange(P + C), np.arange(own, P + R)]
        keys += [segment_w, segment_l]
        first += [np.arange(key, key_l), np.arange(key_l + own, key_l + P + R)]
        shared += [segment_w[:own]]
        second += [np.arange(key_l, key_l + own)]
        predictors += [segment_w[P - 1 :], segment_l[P - 1 :]]
        targets += [chosen, rejected]
        cu_q += [place_l, place_l + P + R - own]
        cu_k += [key_l, key_l + P + R]
    int64 = [
        torch.from_numpy(np.concatenate(parts).astype(np.int64))
        for parts in (tokens, positions, keys, first, shared, second, predictors, targets)
    ]
    cu_q, cu_k = (torch.tensor(begins, dtype=torch.int32) for begins in (cu_q, cu_k))
    lengths = [tuple(len(pair.chosen) for pair in pairs), tuple(len(pair.rejected) for pair in pairs)]
    return Pack(*int64, cu_q, cu_k, cu_q.diff().max().item(), cu_k.diff().max().item(), *lengths)


def deal(lengths: Sequence[int], world_size: int, micro_tokens: int) -> list[list[list[int]]]:
    """Deals a step's pairs to ranks and micro-batches: [rank][micro-batch] -> indices of `lengths`.

    lengths: tokens of each pair. Longest first, each to the least loaded of world_size * m micro-batches
    (Graham's LPT rule), with the smallest m for which each holds micro_tokens at most; a longer pair stands
    alone. All ranks get m, since their collectives must match; some micro-batches may be empty. The k-th of
    all ranks are of like size, so that no rank waits, and the fuller go to the ranks that have less so far.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    least = sum(min(length, micro_tokens) for length in lengths)
    micro_batches = max(1, -(-least // (world_size * micro_tokens)))
    while True:
        bins = [[] for _ in range(world_size * micro_batches)]
        loads = [(0, b) for b in range(len(bins))]  # a heap
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
        for rank, (load, b) in zip(emptiest, fullest[k : k + world_size]):
            ranks[rank].append(bins[b])
            totals[rank] += load
    return ranks


def shares(lengths: Sequence[int], rank: int, world_size: int, micro_tokens: int) -> Iterator[list[int]]:
    """A rank's packs for a pass over all pairs: yields lists of indices, as many on every rank. Dealt some thousands at
    a time, as the deal of n pairs to n packs takes n² log n."""
    for start in range(0, len(lengths), DEALT):
        for pack in deal(lengths[start : start + DEALT], world_size, micro_tokens)[rank]:
            yield [start + i for i in pack]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch reads `count` pairs: [count] int64."""
    stream = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(stream).permutation(count)  # numpy never changes RandomState's draws


def held_back(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """-> the pairs to train on, and this share of them to evaluate on: at least one of each, drawn by the seed."""
    if not share:
        return pairs, []
    if len(pairs) == 1:
        raise BadInput(
            f"--eval-fraction {share}: there is only one pair, which is needed to train on; leave it out, or give "
            "--eval-data"
        )
    kept = min(max(1, round(len(pairs) * (1 - share))), len(pairs) - 1)
    mixed = [pairs[i] for i in epoch_order(len(pairs), seed, 0)]
    return mixed[:kept], mixed[kept:]


def fingerprint(pairs: Sequence[Pair]) -> str:
    """SHA-256 over token ids, lengths and weights other than 1, in hexadecimal: equal for equal pairs in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(np.array([len(ids) for ids in pair[:3]], np.int64))
        for ids in pair[:3]:
            digest.update(np.ascontiguousarray(ids, np.int32))
        if pair.weight != 1:
            digest.update(np.float64(pair.weight))
    return digest.hexdigest()
