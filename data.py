"""Preference records to token ids to batches.

A row of a file becomes a prompt of messages and two replies (`preference_of`), and with the tokenizer's own chat
template and vocabulary a `Pair` of token ids (`pair_of`). Pairs are put in order, dealt to ranks and laid out as a
`Pack`, all tokens in one line without padding, in which a pair's prompt stands once for both responses.
Letters: B pairs, N tokens, S segments (two a pair), M keys, R response tokens, V pieces.
"""

import collections
import hashlib
import heapq
import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from files.errors import BadInput, BadRow, brief
from files.rows import read_rows
from files.template import ChatTemplate

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PROMPTS = ("prompt", "instruction", "conversations")
REFUSED = ("tools", "functions", "images", "videos", "audios")  # they change the prompt, and are not rendered
READ = {*PROMPTS, *REFUSED, *"input query system history chosen rejected chosen_messages rejected_messages".split()}
# What else a name of --columns stands for, which is not read beside the column that was named.
ALIASES = {"prompt": (*PROMPTS, "input", "query"), "chosen": ("chosen_messages",), "rejected": ("rejected_messages",)}
LIKE = {  # how others name them
    "prompt": "prompt|question|instruction|query|input",
    "chosen": "chosen|(?<!dis)prefer|accept|better|win|response_j|positive",
    "rejected": "reject|disprefer|worse|los|response_k|negative",
}
TURN = re.compile(r"\n\n(Human|Assistant):")  # of hh-rlhf's transcripts
CHUNK = 512  # rows in memory at a time
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


class Counts(NamedTuple):
    """What became of the rows of the files."""

    rows: int
    kept: int
    cut: int  # responses cut at max_length, of kept pairs
    boundary: int  # responses tokenised apart from their prompt, of kept pairs
    dropped: list  # {"file", "row", "reason"}; the reason's kind stands before its first colon
    unused: tuple = ()  # columns that no part of a pair was read from


# Rows to messages


def preference_of(row):
    """A row of any accepted form as (prompt messages, chosen text, rejected text). Raises BadRow."""
    for field in REFUSED:
        if row.get(field) not in (None, "", "[]", [], {}):
            raise BadRow(f"{field}: `{field}` would change the prompt, and is not rendered; leave such rows out")
    before = history_of(row)
    chosen, rejected = (under_system(row, before, dialogue) for dialogue in dialogues_of(row))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("different prompts: chosen and rejected must answer the same messages")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def hidden_by(columns):
    """The columns that --columns hides: of the names it gives, and of what else these stand for."""
    return {alias for name in columns for alias in (name, *ALIASES.get(name, ()))}


def renamed(row, columns):
    """The row with the columns of --columns under the names that are read. columns: {name: column}. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"no object: the row is a {type(row).__name__}")
    hidden = hidden_by(columns)
    for name, column in columns.items():
        if row.get(column) is None and name not in ("system", "history"):
            raise BadRow(f"missing field: `{column}`, which --columns reads as {name}; {has(row)}")
    own = {field: value for field, value in row.items() if field not in hidden}
    return own | {name: row.get(column) for name, column in columns.items()}


def has(row):
    """The columns of a row in words, and the --columns that would read it, where one is near."""
    found, texts = {}, [field for field, value in row.items() if isinstance(value, (str, list, dict))]
    for name, like in LIKE.items():
        taken = [name] if name in texts else [field for field in texts if re.search(like, field)]
        found |= {name: taken[0]} if taken else {}
    near = " ".join(f"{name}={field}" for name, field in found.items() if name != field)
    offer = f"; try --columns {near}" if near and len(found) == 3 and len(set(found.values())) == 3 else ""
    return f"the row has: {', '.join(map(brief, row)) or 'no columns'}{offer}"


def weight_of(row):
    """The row's weight, a finite number above 0. Raises BadRow."""
    weight = row["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise BadRow(f"no weight: the weight must be a number greater than 0, and is {brief(repr(weight))}")
    return float(weight)


def history_of(row):
    """LLaMA-Factory's `history`, a list of [user, assistant] pairs, as messages."""
    messages = []
    turns = [] if row.get("history") in (None, "") else row["history"]
    if not isinstance(turns, list):
        raise BadRow(
            f"wrong type: `history` must be a list of [user, assistant] pairs, and is a {type(turns).__name__}"
        )
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow(f"wrong type: `history[{number}]` must be a pair [user, assistant]")
        for role, text in zip(("user", "assistant"), turn):
            messages.append({"role": role, "content": text_of(text, f"history[{number}]")})
    return messages


def under_system(row, before, dialogue):
    """The dialogue behind the row's `system`, where it has no system message of its own, and behind the history."""
    own = dialogue[:1] if dialogue[0]["role"] == "system" else []
    if not own and row.get("system") not in (None, ""):
        system = [{"role": "system", "content": text_of(row["system"], "system")}]
        return system + before + dialogue
    return own + before + dialogue[len(own) :]


def dialogues_of(row):
    """The two dialogues of a row, messages that end with the reply. A new form of rows is one more case here."""
    if row.get("chosen_messages") is not None:  # LLaMA-Factory's v1 form
        return [dialogue_of(row, field, None) for field in ("chosen_messages", "rejected_messages")]
    prompt = prompt_of(row)
    return [dialogue_of(row, field, prompt) for field in ("chosen", "rejected")]


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
    return messages


def dialogue_of(row, field, prompt):
    """The messages in a field of a row, which hold the prompt's or follow them: roles in order, the reply last."""
    value = row.get(field)
    if value is None:
        raise BadRow(f"missing field: `{field}`; {has(row)}")
    if not isinstance(value, (str, list, dict)):
        raise BadRow(f"wrong type: `{field}` must be text or messages, and is a {type(value).__name__}")
    if isinstance(value, str) and prompt is None and TURN.match(value):
        _, *turns = TURN.split(value)
        value = [{"role": who.lower(), "content": text.strip()} for who, text in zip(turns[::2], turns[1::2])]
    dialogue = messages_of({"role": "assistant", "content": value} if isinstance(value, str) else value, field)
    if not dialogue or dialogue[0]["role"] == "assistant":
        if prompt is None:
            raise BadRow(f"missing field: {', '.join(PROMPTS)}, or the prompt's messages in `{field}`; {has(row)}")
        dialogue = prompt + dialogue
    elif any(isinstance(row.get(name), list) for name in PROMPTS) and dialogue[: len(prompt)] != prompt:
        raise BadRow(f"different prompts: `{field}` does not begin with the messages of the prompt")
    roles = [message["role"] for message in dialogue]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[-1:] != ["assistant"]:
        raise BadRow(f"no response: `{field}` must end with a message of the assistant")
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRow(
            f"roles out of order: {', '.join(roles[:8])} in `{field}`; after a system message, if any, "
            "user and assistant speak in turn"
        )
    return dialogue


def messages_of(value, field):
    """Messages in either spelling (role and content, from and value) as [{"role", "content"}]."""
    messages = []
    for number, message in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise BadRow(f"no message: `{place}` must be an object with role and content")
        role = message.get("from") if message.get("role") is None else message["role"]
        content = message.get("value") if message.get("content") is None else message["content"]
        if message.get("tool_calls") or message.get("function_call"):
            raise BadRow(f"tools: `{place}` calls a tool, which is not rendered; leave such rows out")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"unknown role: {brief(role)!r} in `{place}`; known are {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": text_of(content, place)})
    return messages


def text_of(value, field):
    """A string, or the joined strings of a list of text parts."""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type", "text") == "text"]
        texts = [part.get("value") if part.get("text") is None else part["text"] for part in parts]
        if parts and len(parts) == len(value) and all(isinstance(text, str) for text in texts):
            value = "".join(texts)
    if not isinstance(value, str):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise BadRow(f"no text: `{field}` must be a string or a list of text parts, and is {found}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"lone surrogate: {value[error.start]!a} in `{field}` is no character") from None
    return value


# Messages to pairs


def load_pairs(paths, tokenizer, max_length, max_prompt_length, skip_bad_rows=False, columns=None, limit=0):
    """Reads files of preference rows into ([Pair], Counts).

    paths: .jsonl, .json or .parquet files. max_length: most tokens of prompt and response; max_prompt_length:
    of the prompt alone. columns: {name: column} of --columns; limit: read on only until so many pairs are kept
    (0: all). Raises BadInput for a file or template that cannot be used, for rows that cannot be
    read (skip_bad_rows drops these), and where no pair is left.
    """
    rows = ((path, row, value) for path in map(Path, paths) for row, value in read_rows(path))
    total, pairs, dropped, bad, unused = 0, [], [], {}, {}  # bad: reason -> ["FILE:ROW"]; unused: an ordered set
    columns = columns or {}
    read = (READ - hidden_by(columns)) | set(columns.values())
    with ChatTemplate(tokenizer) as template, ThreadPoolExecutor() as pool:
        make = lambda numbered: pair_of(*numbered, tokenizer, template, max_length, max_prompt_length, columns)
        while (not limit or len(pairs) < limit) and (chunk := list(itertools.islice(rows, CHUNK))):
            for (path, row, value), result in zip(chunk, pool.map(make, chunk)):
                if limit and len(pairs) == limit:
                    break
                total += 1
                unused |= (
                    dict.fromkeys(field for field in value if field not in read) if isinstance(value, dict) else {}
                )
                if isinstance(result, Pair):
                    pairs.append(result)
                    continue
                dropped.append({"file": str(path), "row": row, "reason": str(result)})
                if isinstance(result, BadRow):
                    bad.setdefault(str(result), []).append(f"{path}:{row}")
    if bad and not skip_bad_rows:
        raise BadInput(refusal(bad, total))
    if not pairs:
        kinds = collections.Counter(drop["reason"].split(":")[0] for drop in dropped)
        raise BadInput(
            f"{', '.join(map(str, paths))}: no pair is left of {total} rows: "
            + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            + "; give other data, or longer --max-length and --max-prompt-length"
        )
    cut, apart = sum(pair.cut for pair in pairs), sum(pair.apart for pair in pairs)
    return pairs, Counts(total, len(pairs), cut, apart, dropped, tuple(unused))


def refusal(bad, total):
    """Bad rows in words, each reason once. bad: reason -> ["FILE:ROW"]; total: rows read."""
    count, lines = sum(map(len, bad.values())), []
    for reason, (first, *others) in list(bad.items())[:10]:
        lines.append(f"{first}: {reason}" + (f" (and {len(others)} more rows)" if others else ""))
    if count == 1:
        return f"{lines[0]}; mend the row, or drop such rows with --skip-bad-rows"
    more = [f"... and {len(bad) - 10} more reasons"] if len(bad) > 10 else []
    what = f"{count} of {total} rows cannot be used; mend them, or drop such rows with --skip-bad-rows"
    return "\n".join([what, *lines, *more])


def pair_of(path, row, value, tokenizer, template, max_length, max_prompt_length, columns=None):
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
    except BadRow as error:
        return error
    prompt, responses, apart = tokenizer.encode_after(text, [response[:most] for response, _ in scored])
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

    tokens: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64, each branch counted from the prompt's first token
    keys: torch.Tensor  # [M] int64, the place of the token that serves as each key
    first: torch.Tensor  # [N] int64, where in keys each token stands first
    shared: torch.Tensor  # [U] int64, the places of the tokens that stand there twice (the prompts')
    second: torch.Tensor  # [U] int64, and where they stand again
    predictors: torch.Tensor  # [R] int64, the place of the token that predicts each response token
    targets: torch.Tensor  # [R] int64, the response tokens: pair by pair, chosen then rejected
    cu_q: torch.Tensor  # [S + 1] int32, where the queries of each segment begin
    cu_k: torch.Tensor  # [S + 1] int32, where its keys begin; causal, aligned at the bottom right
    max_q: int  # most queries in a segment
    max_k: int  # most keys in a segment
    chosen_lengths: tuple  # B ints
    rejected_lengths: tuple  # B ints


def collate(pairs, share_prompt=True):
    """Lays pairs out as one Pack. Two pairs, the first with prompt 1 2, chosen 3 4 and rejected 5:

        place       0  1  2  3  4   5  6  7  8
        tokens      1  2  3  4  5   6  7  8  9
                    prompt chosen   prompt 6, chosen 7, rejected 8 9
                              rejected
        positions   0  1  2  3  2   0  1  1  2

    A pair is two segments. The queries of the first are the tokens of prompt and chosen, of the second those of
    rejected alone; the keys of the second are the prompt's tokens again and then its own:

    >>> ids = lambda *values: np.array(values, np.int32)
    >>> pairs = [Pair(ids(1, 2), ids(3, 4), ids(5), "a:1"), Pair(ids(6), ids(7), ids(8, 9), "a:2")]
    >>> pack = collate(pairs)
    >>> pack.tokens.tolist(), pack.positions.tolist()
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 2, 0, 1, 1, 2])
    >>> pack.cu_q.tolist(), pack.cu_k.tolist(), pack.keys.tolist()
    ([0, 4, 5, 7, 9], [0, 4, 7, 9, 12], [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8])
    >>> pack.first.tolist(), pack.shared.tolist(), pack.second.tolist()
    ([0, 1, 2, 3, 6, 7, 8, 10, 11], [0, 1, 5], [4, 5, 9])

    A response's first token is predicted by the prompt's last token, in both branches:

    >>> pack.predictors.tolist(), pack.targets.tolist()
    ([1, 2, 1, 5, 5, 7], [3, 4, 5, 7, 8, 9])

    With share_prompt=False the prompt is stored for each response, `keys` is every place, `shared` is empty.
    """
    tokens, positions, keys, first, shared, second, predictors, targets = ([] for _ in range(8))
    cu_q, cu_k = [0], [0]
    for prompt, chosen, rejected in (pair[:3] for pair in pairs):
        P, C, R = len(prompt), len(chosen), len(rejected)
        own = P if share_prompt else 0  # where the second segment's own tokens begin
        place, key = cu_q[-1], cu_k[-1]
        segment_w = np.arange(place, place + P + C)  # [P + C] places
        place_l, key_l = place + P + C, key + P + C
        segment_l = np.concatenate([segment_w[:own], np.arange(place_l, place_l + P + R - own)])  # [P + R] places
        tokens += [prompt, chosen, prompt[own:], rejected]
        positions += [np.arange(P + C), np.arange(own, P + R)]
        keys += [segment_w, segment_l]
        first += [np.arange(key, key_l), np.arange(key_l + own, key_l + P + R)]
        shared += [segment_w[:own]]
        second += [np.arange(key_l, key_l + own)]
        predictors += [segment_w[P - 1 : -1], segment_l[P - 1 : -1]]
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
    """SHA-256 over token ids, lengths and weights other than 1, in hexadecimal: equal for equal pairs in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(np.array([len(ids) for ids in pair[:3]], np.int64))
        for ids in pair[:3]:
            digest.update(np.ascontiguousarray(ids, np.int32))
        if pair.weight != 1:
            digest.update(np.float64(pair.weight))
    return digest.hexdigest()
