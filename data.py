"""Preference records to token ids to batches.

A row of a file becomes a prompt of messages and two replies; the tokenizer's own chat template and vocabulary
make a `Pair` of token ids of them. Pairs are dealt to ranks and laid out as a `Pack`, one row of tokens
without padding, in which a pair's prompt stands once for both responses.
Letters: B pairs, N rows (tokens of the pack), S segments (two a pair), M keys, R response tokens, V pieces.
"""

import collections
import hashlib
import heapq
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from files.errors import BadInput, BadRow, brief
from files.renderer import Renderer
from files.rows import read_rows

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PROMPTS = ("prompt", "instruction", "conversations")
CHUNK = 512  # rows rendered and tokenised at a time


class Dropped(Exception):
    """A readable row that is not trained on: "kind" or "kind: detail"."""


class Pair(NamedTuple):
    """Token ids of one preference. The responses end with the end-of-turn token, unless they were cut."""

    prompt: np.ndarray  # [P] int32, from the BOS to the assistant header: what inference would feed
    chosen: np.ndarray  # [C] int32, every token of it is scored
    rejected: np.ndarray  # [R] int32, likewise
    source: str  # "FILE:ROW", rows counted from 1: lines, or elements of an array or table


class Counts(NamedTuple):
    """What became of the rows of the files."""

    rows: int
    kept: int
    cut: int  # responses cut at max_length, of kept pairs
    boundary: int  # responses tokenised apart from their prompt, of kept pairs
    dropped: list  # {"file", "row", "reason"}; the reason's kind stands before its first colon


# Rows to messages


def text_of(value, field):
    """A string, or the joined strings of a list of text parts."""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type", "text") == "text"]
        texts = [part.get("value") if part.get("text") is None else part["text"] for part in parts]
        if parts and len(parts) == len(value) and all(isinstance(text, str) for text in texts):
            value = "".join(texts)
    if not isinstance(value, str):
        raise BadRow(
            f"no text: `{field}` must be a string or a list of text parts, and is "
            + ("missing" if value is None else f"a {type(value).__name__}")
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"lone surrogate: {value[error.start]!a} in `{field}` is no character") from None
    return value


def messages_of(value, field):
    """Messages in either spelling (role and content, from and value) as [{"role", "content"}]."""
    messages = []
    for number, message in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise BadRow(f"no message: `{place}` must be an object with role and content")
        role, content = (
            message.get(b) if message.get(a) is None else message[a]
            for a, b in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"unknown role: {brief(role)!r} in `{place}`; known are {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": text_of(content, place)})
    return messages


def prompt_of(row):
    """The messages of a row's own prompt, or None where it has none."""
    given = [field for field in PROMPTS if row.get(field) is not None]
    if not given:
        return None
    if any(row[field] != row[given[0]] for field in given):
        raise BadRow(f"two prompts: {' and '.join(given)} say different things; leave one")
    if isinstance(row[given[0]], list):
        messages = messages_of(row[given[0]], given[0])
    else:
        fields = [given[0]] + [field for field in ("input", "query") if row.get(field) not in (None, "")]
        messages = [{"role": "user", "content": "\n".join(text_of(row[field], field) for field in fields)}]
    if row.get("system") not in (None, "") and "system" not in [message["role"] for message in messages[:1]]:
        messages.insert(0, {"role": "system", "content": text_of(row["system"], "system")})
    return messages


def preference_of(row):
    """A row of any accepted form as (prompt messages, chosen text, rejected text). Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"no object: the row is a {type(row).__name__}")
    typed = "_messages" if row.get("chosen_messages") is not None else ""  # LLaMA-Factory's v1 form
    prompt, sides = None if typed else prompt_of(row), []
    for field in ("chosen" + typed, "rejected" + typed):
        value = row.get(field)
        if not isinstance(value, (str, list, dict)):
            raise BadRow(
                f"missing field: `{field}`"
                if value is None
                else f"wrong type: `{field}` must be text or messages, and is a {type(value).__name__}"
            )
        value = {"role": "assistant", "content": value} if isinstance(value, str) else value
        side = messages_of(value, field)
        if not side or side[0]["role"] == "assistant":
            if prompt is None:
                raise BadRow(f"missing field: {', '.join(PROMPTS)}, or the prompt's messages in `{field}`")
            side = prompt + side
        elif any(isinstance(row.get(name), list) for name in PROMPTS) and side[: len(prompt)] != prompt:
            raise BadRow(f"different prompts: `{field}` does not begin with the messages of the prompt")
        roles = [message["role"] for message in side]
        turns = roles[roles[:1] == ["system"] :]
        if turns[-1:] != ["assistant"]:
            raise BadRow(f"no response: `{field}` must end with a message of the assistant")
        if turns != ["user", "assistant"] * (len(turns) // 2):
            raise BadRow(
                f"roles out of order: {', '.join(roles[:8])} in `{field}`; after a system message, "
                "if any, user and assistant speak in turn"
            )
        sides.append(side)
    if sides[0][:-1] != sides[1][:-1]:
        raise BadRow("different prompts: chosen and rejected must answer the same messages")
    return sides[0][:-1], sides[0][-1]["content"], sides[1][-1]["content"]


# Files to pairs


def load_pairs(paths, tokenizer, max_length, max_prompt_length, skip_bad_rows=False):
    """Reads files of preference rows into ([Pair], Counts).

    paths: .jsonl, .json or .parquet files. max_length: most tokens of prompt and response; max_prompt_length:
    of the prompt alone. Raises BadInput for a file or template that cannot be used, for rows that cannot be
    read (skip_bad_rows drops these), and where no pair is left.
    """
    rows = ((path, row, value) for path in map(Path, paths) for row, value in read_rows(path))
    clip = (max_length + 1) * tokenizer.longest  # more characters are more than max_length tokens
    outcomes = []  # (file, row, Pair or BadRow or Dropped, responses cut, responses tokenised apart)
    with ThreadPoolExecutor(1) as pool, Renderer(tokenizer) as renderer:

        def render_some():
            return [
                (path, row, texts_of(value, tokenizer, renderer, clip))
                for path, row, value in itertools.islice(rows, CHUNK)
            ]

        ahead = pool.submit(render_some)
        while chunk := ahead.result():
            ahead = pool.submit(render_some)  # the next rows are rendered while these are tokenised
            outcomes += pairs_of(chunk, tokenizer, max_length, max_prompt_length)
    bad = [f"{path}:{row}: {outcome}" for path, row, outcome, _, _ in outcomes if isinstance(outcome, BadRow)]
    if bad and not skip_bad_rows:
        if len(bad) == 1:
            raise BadInput(f"{bad[0]}; mend the row, or drop such rows with --skip-bad-rows")
        more = f"\n... and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise BadInput(
            f"{len(bad)} of {len(outcomes)} rows cannot be used; mend them, or drop such rows with "
            "--skip-bad-rows\n" + "\n".join(bad[:10]) + more
        )
    pairs = [outcome for _, _, outcome, _, _ in outcomes if isinstance(outcome, Pair)]
    dropped = [
        {"file": str(path), "row": row, "reason": str(outcome)}
        for path, row, outcome, _, _ in outcomes
        if not isinstance(outcome, Pair)
    ]
    if not pairs:
        kinds = collections.Counter(drop["reason"].split(":")[0] for drop in dropped)
        raise BadInput(
            f"{', '.join(map(str, paths))}: no pair is left of {len(outcomes)} rows: "
            + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            + "; give other data, or longer --max-length and --max-prompt-length"
        )
    cut, boundary = (sum(outcome[i] for outcome in outcomes) for i in (3, 4))
    return pairs, Counts(len(outcomes), len(pairs), cut, boundary, dropped)


def texts_of(row, tokenizer, renderer, clip):
    """One row's texts: (prompt, scored text of each response, id that ends each), or why it has none.

    A response of more than `clip` characters is cut there, which ends it without an id.
    """
    try:
        prompt, *replies = preference_of(row)
        control = tokenizer.control.search("\0".join([message["content"] for message in prompt] + replies))
        if control:
            return Dropped(f"control token in the text: {control[0]}")
        if not all(reply.strip() for reply in replies):
            return Dropped("empty response")
        before, *full = renderer.render(prompt, replies)
        if len(before) > clip:
            return Dropped(f"prompt too long: {len(before)} characters")
        texts, ends = zip(*(tokenizer.scored(before, *both) for both in zip(full, replies)))
        return (
            before,
            [text[:clip] for text in texts],
            [end if len(text) <= clip else None for text, end in zip(texts, ends)],
        )
    except BadRow as error:
        return error


def pairs_of(chunk, tokenizer, max_length, max_prompt_length):
    """Tokenises (file, row, what texts_of gave) into the outcomes of load_pairs."""
    good = [texts for _, _, texts in chunk if not isinstance(texts, Exception)]
    encoded = iter(tokenizer.encode_after([prompt for prompt, _, _ in good], [both for _, both, _ in good]))
    outcomes = []
    for path, row, outcome in chunk:
        cut = apart = 0
        if not isinstance(outcome, Exception):
            (text, _, ends), (prompt, responses, apart) = outcome, next(encoded)
            room = max(max_length - len(prompt), 0)
            cut = sum(end is None or len(ids) >= room for ids, end in zip(responses, ends))
            chosen, rejected = (
                np.array((ids if end is None else [*ids, end])[:room], np.int32) for ids, end in zip(responses, ends)
            )
            written = len(tokenizer.control.findall(text))  # the template's own control tokens
            if sum(tokenizer.is_control[ids].sum() for ids in (prompt, *responses)) > written:
                outcome = Dropped("control token in the text: it appears as the tokenizer normalises")
            elif len(prompt) > max_prompt_length:
                outcome = Dropped(f"prompt too long: {len(prompt)} tokens, at most {max_prompt_length}")
            elif room == 0:
                outcome = Dropped(f"prompt fills the context: {len(prompt)} tokens of {max_length}")
            elif np.array_equal(chosen, rejected):
                outcome = Dropped("equal responses after the cut" if cut else "equal responses")
            else:
                outcome = Pair(np.array(prompt, np.int32), chosen, rejected, f"{path}:{row}")
        kept = isinstance(outcome, Pair)
        outcomes.append((path, row, outcome, cut * kept, apart * kept))
    return outcomes


# Pairs to batches


class Pack(NamedTuple):
    """Pairs side by side in one row; see `collate`."""

    tokens: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64, each branch counted from the prompt's first token
    cu_q: torch.Tensor  # [S + 1] int32, where the queries of each segment begin
    cu_k: torch.Tensor  # [S + 1] int32, where its keys begin; causal, aligned at the bottom right
    max_q: int  # most queries in a segment
    max_k: int  # most keys in a segment
    keys: torch.Tensor  # [M] int64, the row that serves as each key
    first: torch.Tensor  # [N] int64, where in keys each row stands first
    shared: torch.Tensor  # [U] int64, the rows that stand there twice (the prompts')
    second: torch.Tensor  # [U] int64, and where they stand again
    predictors: torch.Tensor  # [R] int64, the row that predicts each response token
    targets: torch.Tensor  # [R] int64, the response tokens: pair by pair, chosen then rejected
    chosen_lengths: tuple  # B ints
    rejected_lengths: tuple  # B ints


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

    With share_prompt=False the prompt is stored for each response, `keys` is every row, `shared` is empty.
    """
    tokens, positions, cu_q, cu_k, keys, first, shared, second, predictors, targets = ([] for _ in range(10))
    row = key = 0
    for prompt, chosen, rejected, _ in pairs:
        P, C, R = len(prompt), len(chosen), len(rejected)
        own = P if share_prompt else 0  # where the second segment's own rows begin
        segment_w = np.arange(row, row + P + C)  # [P + C] rows
        row += P + C
        segment_l = np.concatenate([segment_w[:own], np.arange(row, row + P + R - own)])  # [P + R] rows
        tokens += [prompt, chosen, prompt[own:], rejected]
        positions += [np.arange(P + C), np.arange(own, P + R)]
        keys += [segment_w, segment_l]
        first += [np.arange(key, key + P + C), np.arange(key + P + C + own, key + P + C + P + R)]
        shared += [segment_w[:own]]
        second += [np.arange(key + P + C, key + P + C + own)]
        predictors += [segment_w[P - 1 : -1], segment_l[P - 1 : -1]]
        targets += [chosen, rejected]
        cu_q += [row, row + P + R - own]
        cu_k += [key + P + C, key + P + C + P + R]
        row, key = cu_q[-1], cu_k[-1]
    cu_q, cu_k = np.array([0] + cu_q, np.int32), np.array([0] + cu_k, np.int32)
    joined = [
        torch.from_numpy(np.concatenate(parts).astype(np.int64))
        for parts in (tokens, positions, keys, first, shared, second, predictors, targets)
    ]
    tokens, positions, keys, first, shared, second, predictors, targets = joined
    return Pack(
        tokens,
        positions,
        torch.from_numpy(cu_q),
        torch.from_numpy(cu_k),
        int(np.diff(cu_q).max()),
        int(np.diff(cu_k).max()),
        keys,
        first,
        shared,
        second,
        predictors,
        targets,
        tuple(len(pair.chosen) for pair in pairs),
        tuple(len(pair.rejected) for pair in pairs),
    )


def deal(lengths, world_size, micro_tokens):
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


def epoch_order(count, seed, epoch):
    """The order in which an epoch reads `count` pairs: [count] int64."""
    stream = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(stream).permutation(count)  # numpy never changes RandomState's draws


def held_back(pairs, share, seed):
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


def fingerprint(pairs):
    """SHA-256 over all token ids and lengths, in hexadecimal: equal for equal pairs in equal order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(np.array([len(ids) for ids in pair[:3]], np.int64))
        for ids in pair[:3]:
            digest.update(np.ascontiguousarray(ids, np.int32))
    return digest.hexdigest()
