"""Preference records to token ids to batches.

Rows of several forms become a prompt of messages and two replies; a tokenizer's own chat template and vocabulary make
a `Pair` of token ids of them; pairs are dealt to ranks and laid out as a `Pack`: one row of tokens without padding, in
which a pair's prompt stands once for both responses.
Letters: B pairs, N rows (tokens of the pack), S segments (two a pair), M keys, R response tokens.
"""
import collections
import functools
import hashlib
import heapq
import itertools
import json
import re
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SANDBOX = Path(__file__).parent / "harness" / "sandbox.py"
CHUNK = 512     # rows rendered and tokenised at a time


class BadData(ValueError):
    """Input that cannot be used: what, where and the mend, in one line (several bad rows: a line each)."""


class BadRow(BadData):
    """A row that cannot be read. The message is "kind: detail"; file and row are added where they are known."""


class Dropped(Exception):
    """A readable row that is not trained on. The message is "kind" or "kind: detail"."""


def brief(text):
    """Text as one printable line of 200 characters at most, for messages that quote what strangers wrote."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[:1000]).split())
    return line if len(line) <= 200 else line[:197] + "..."


class Pair(NamedTuple):
    """Token ids of one preference. The responses end with the end-of-turn token, unless they were cut."""
    prompt: np.ndarray      # [P] int32, from the BOS to the assistant header: what inference would feed
    chosen: np.ndarray      # [C] int32, every token of it is scored
    rejected: np.ndarray    # [R] int32, likewise
    source: str             # "FILE:ROW", rows counted from 1


class Counts(NamedTuple):
    """What became of the rows of the files."""
    rows: int
    kept: int
    cut: int            # responses cut at max_length, of kept pairs
    boundary: int       # responses tokenised apart from their prompt, of kept pairs
    dropped: list       # {"file", "row", "reason"}; the reason's kind stands before its first colon


# Rows

def open_file(path):
    """Opens a regular file for reading bytes; BadData says what else stands there."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise BadData(f"{path}: is a directory; name the files in it")
        if not stat.S_ISREG(mode):
            raise BadData(f"{path}: is a pipe or a device, not a regular file")
        file = open(path, "rb")
    except FileNotFoundError:
        raise BadData(f"{path}: no such file") from None
    except OSError as error:
        raise BadData(f"{path}: cannot be read: {error.strerror}") from None
    head = file.peek(64)
    if not head:
        raise BadData(f"{path}: is empty")
    if head.startswith(b"\x1f\x8b"):
        raise BadData(f"{path}: is compressed with gzip; gunzip it first")
    if head.startswith(b"version https://git-lfs"):
        raise BadData(f"{path}: is a Git LFS pointer, not the file itself; `git lfs pull` fetches it")
    return file


def read_text(path):
    """The text of a small UTF-8 file."""
    with open_file(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadData(f"{path}: is not UTF-8 at byte {error.start}") from None


def strict_json(faults):
    """A decoder that notes in `faults` what Python's accepts beyond JSON: constants, and keys that stand twice."""
    def object_of(members):
        value = dict(members)
        if len(value) < len(members):
            keys = [key for key, _ in members]
            faults.append(f"duplicate key: {brief(next(key for key in keys if keys.count(key) > 1))!r}")
        return value
    return json.JSONDecoder(object_pairs_hook=object_of,
                            parse_constant=lambda name: faults.append(f"{name}: is no JSON value; write null"))


def read_rows(path):
    """Yields (row, value) for each row of a .jsonl, .json or .parquet file; the value is a BadRow where it cannot
    be read. Rows count from 1: lines of a file of lines, else elements. Raises BadData for the file as a whole."""
    with open_file(path) as file:
        if path.suffix == ".parquet":
            yield from parquet_rows(path)
        elif path.suffix not in (".jsonl", ".json"):
            raise BadData(f"{path}: unknown suffix {path.suffix!r}; rows are read from .jsonl, .json and .parquet")
        elif file.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from array_rows(path)
        else:       # lines of bytes end at newlines only, not at the others that str.splitlines() knows
            for row, line in enumerate(file, 1):
                if row == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield row, line_value(line)


def line_value(line):
    """The JSON value of one line, or a BadRow that says why there is none."""
    faults = []
    try:
        value = strict_json(faults).decode(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRow(f"broken JSON: {error.msg}, column {error.colno}")
    except (RecursionError, ValueError) as error:       # ValueError: an integer of more than 4300 digits
        return BadRow(f"broken JSON: {brief(error)}")
    return BadRow(faults[0]) if faults else value


def array_rows(path):
    """Rows of a file that is one JSON array. Where an element is broken, none after it can be read."""
    text, faults = read_text(path), []
    decoder, skip = strict_json(faults), re.compile(r"[ \t\r\n]*")
    at = skip.match(text, text.index("[") + 1).end()
    for row in itertools.count(1):
        if row == 1 and text[at:at + 1] == "]":
            break
        try:
            value, at = decoder.raw_decode(text, at)
            at = skip.match(text, at).end()
            if text[at:at + 1] not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except (RecursionError, ValueError) as error:
            raise BadData(f"{path}:{row}: broken JSON: {brief(error)}") from None
        yield row, BadRow(faults[0]) if faults else value
        faults.clear()
        if text[at] == "]":
            break
        at = skip.match(text, at + 1).end()
    if text[at + 1:].strip():
        raise BadData(f"{path}: broken JSON: text follows the array")


def parquet_rows(path):
    """Rows of a parquet file, for which pyarrow must be there."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadData(f"{path}: parquet needs pyarrow; pip install pyarrow, or convert the file to .jsonl") from None
    try:
        row = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(CHUNK):
            for value in batch.to_pylist():
                row += 1
                yield row, value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadData(f"{path}: is no parquet file that pyarrow reads: {brief(error)}") from None


# Rows to messages

def text_of(value, field):
    """A string, or the joined strings of a list of text parts."""
    if isinstance(value, list):
        parts = [part if isinstance(part, dict) and part.get("type", "text") == "text" else {} for part in value]
        texts = [part.get("text") if part.get("text") is not None else part.get("value") for part in parts]
        value = "".join(texts) if texts and all(isinstance(text, str) for text in texts) else value
    if not isinstance(value, str):
        kind = "missing" if value is None else "list of other things" if isinstance(value, list) else type(value).__name__
        raise BadRow(f"no text: `{field}` must be a string or a list of text parts, and is {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"lone surrogate: `{field}` has \\u{ord(value[error.start]):04x}, which is no character") from None
    return value


def messages_of(value, field):
    """Messages in either spelling (role and content, from and value) as [{"role", "content"}]."""
    messages = []
    for number, message in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise BadRow(f"no message: `{place}` must be an object with role and content")
        role, content = (message.get(a) if message.get(a) is not None else message.get(b)
                         for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"unknown role: {brief(role)!r} in `{place}`; known are {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": text_of(content, place)})
    return messages


def prompt_of(row):
    """The messages of a row's own prompt field, or None where it has none."""
    given = [field for field in ("prompt", "instruction", "conversations") if row.get(field) is not None]
    if not given:
        return None
    if any(row[field] != row[given[0]] for field in given):
        raise BadRow(f"two prompts: `{given[0]}` and `{given[1]}` say different things; leave one out")
    if isinstance(row[given[0]], list):
        return messages_of(row[given[0]], given[0])
    texts = [text_of(row[field], field) for field in (given[0], "input", "query") if row.get(field) not in (None, "")]
    return [{"role": "user", "content": "\n".join(texts)}]


def preference_of(row):
    """A row of any accepted form as (prompt messages, chosen text, rejected text)."""
    if not isinstance(row, dict):
        raise BadRow(f"no object: the row is a {type(row).__name__}")
    typed = "_messages" if row.get("chosen_messages") is not None else ""       # LLaMA-Factory's v1 form
    given, sides = None if typed else prompt_of(row), []
    for field in ("chosen" + typed, "rejected" + typed):
        value = row.get(field)
        if value is None:
            raise BadRow(f"missing field: `{field}`")
        if not isinstance(value, (str, list, dict)):
            raise BadRow(f"wrong type: `{field}` must be a string or messages, and is a {type(value).__name__}")
        side = [{"role": "assistant", "content": text_of(value, field)}] if isinstance(value, str) else \
            messages_of(value, field)
        if not side or side[0]["role"] == "assistant":
            if given is None:
                raise BadRow(f"missing field: `prompt` (or `instruction`, `conversations`, or a prompt in `{field}`)")
            side = given + side
        elif isinstance(row.get("prompt"), list) and side[:len(given)] != given:
            raise BadRow(f"different prompts: `{field}` does not begin with the messages of `prompt`")
        roles = [message["role"] for message in side]
        turns = roles[roles[:1] == ["system"]:]
        if turns[-1:] != ["assistant"]:
            raise BadRow(f"no response: `{field}` must end with a message of the assistant")
        if len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
            raise BadRow(f"roles out of order: {', '.join(roles[:8])} in `{field}`; first a system message, if any, "
                          "then user and assistant in turn")
        sides.append(side)
    if sides[0][:-1] != sides[1][:-1]:
        raise BadRow("different prompts: chosen and rejected must answer the same messages")
    return sides[0][:-1], sides[0][-1]["content"], sides[1][-1]["content"]


# Messages to token ids

class Renderer:
    """A chat template in a process of its own (harness/sandbox.py); use it in a `with` statement."""

    def __init__(self, tokenizer):
        if tokenizer.template is None:
            raise BadData(f"{tokenizer.directory}: the tokenizer has no chat template; give one with --chat-template FILE")
        self.name = tokenizer.template_name
        self.process = subprocess.Popen([sys.executable, "-P", str(SANDBOX)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        self.ask({"template": tokenizer.template, "tokens": tokenizer.tokens})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def ask(self, job):
        """Sends one object and returns the answer; BadData where the template must not be used."""
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            status = self.process.wait()
            raise BadData(f"{self.name}: the chat template " + (
                "takes more than 5 seconds for one row" if status == -signal.SIGPROF else
                f"ended the process that renders it (status {status})") + "; use another with --chat-template FILE")
        answer = json.loads(line)
        if "template" in answer:
            raise BadData(f"{self.name}: the chat template cannot be used: {brief(answer['template'])}")
        return answer

    def render(self, prompt, replies=()):
        """The text of the prompt with the generation prompt, then of the conversation with each reply."""
        answer = self.ask({"prompt": prompt, "replies": replies})
        if "row" in answer:
            raise BadRow(f"refused by the chat template: {brief(answer['row'])} ({self.name})")
        return answer["texts"]


class ChatTokenizer:
    """A tokenizer.json with its chat template and named control tokens; made by `load_tokenizer`."""

    def __init__(self, directory, backend, template, template_name, tokens):
        self.directory, self.backend = directory, backend
        self.template, self.template_name, self.tokens = template, template_name, tokens
        self.vocabulary = backend.get_vocab()                       # piece -> id
        self.vocab_size = max(self.vocabulary.values()) + 1
        special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        longest_first = sorted((piece for piece in special if piece), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")     # of text
        unknown = special.pop(getattr(backend.model, "unk_token", None), None)             # may stand for any text
        self.is_control = np.zeros(self.vocab_size, bool)                                  # [V], of ids
        self.is_control[list(special.values())] = True
        self.is_control[[] if unknown is None else unknown] = False

    @functools.cached_property
    def digest(self):
        """SHA-256 of pieces and template, in hexadecimal."""
        return hashlib.sha256(json.dumps([sorted(self.vocabulary.items()), self.template, self.tokens]).encode()).hexdigest()

    @functools.cached_property
    def end_ids(self):
        """The ids that end the assistant's turn: the template's end-of-turn token, and eos."""
        prompt, reply = [{"role": "user", "content": "Hi"}], "Hello"
        with Renderer(self) as renderer:
            _, end = self.scored(*renderer.render(prompt, [reply]), reply)
        return {end, self.vocabulary.get(self.tokens.get("eos_token"), end)}

    def decode(self, ids):
        """The text of token ids, control tokens included."""
        return self.backend.decode(list(map(int, ids)), skip_special_tokens=False)

    def pieces(self, ids):
        """The text that each token adds; of tokens that share a character, the last has it and the others ''."""
        anchor = self.backend.encode("x", add_special_tokens=False).ids[-1:]    # keeps a first space from being cut
        known, texts, start = len(self.decode(anchor)), [], 0
        for end in range(1, len(ids) + 1):
            text = self.decode([*anchor, *ids[start:end]])[known:]
            if text.endswith("\ufffd") and end - start < 4 and end < len(ids):  # a character has four bytes at most
                text = ""
            else:
                start = end
            texts.append(text)
        return texts

    def prompt_ids(self, messages):
        """The ids that inference feeds for messages: transformers' apply_chat_template with generation prompt."""
        with Renderer(self) as renderer:
            return self.backend.encode(renderer.render(messages)[0], add_special_tokens=False).ids

    def scored(self, prompt, full, reply):
        """The text after the prompt that is scored, and the id that ends it.

        The template writes [lead][reply][tail][end token][rest] after the prompt. Lead and reply are scored, and the
        end token, or eos where the template has none. A tail of blanks the template adds is not: inference must stop
        right behind the reply. BadRow where the template writes something else.
        """
        if not prompt or not full.startswith(prompt):
            raise BadRow("chat template changes the prompt: with the response, the conversation does not begin as "
                          f"its generation prompt does ({self.template_name})")
        after, core = full[len(prompt):], reply.strip()
        end = self.control.search(after)
        body = after[:end.start()] if end else after
        lead = len(body) - len(body.lstrip())
        if not body.startswith(core, lead):
            raise BadRow(f"chat template writes no generation prompt: {brief(after[:after.find(core)])!r} stands before "
                          f"the response ({self.template_name})" if core in after else
                          f"chat template drops or changes the response ({self.template_name})")
        tail, own = body[lead + len(core):], reply[len(reply.rstrip()):]
        if tail.strip():
            raise BadRow(f"chat template writes {brief(tail)!r} behind the response, which is no control token "
                          f"({self.template_name})")
        end = self.vocabulary.get(end[0] if end else self.tokens.get("eos_token"))
        if end is None:
            raise BadRow(f"chat template ends no turn: it writes no control token behind the response, and the "
                          f"tokenizer has no eos_token ({self.template_name})")
        return body[:lead + len(core)] + (own if tail.startswith(own) else ""), end

    def encode(self, texts):
        """Token ids of each text, [list of ids], without any BOS of the tokenizer's own."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_after(self, prompts, texts):
        """Token ids of texts that follow prompts, [(ids of the prompt, [ids of each text], texts encoded apart)].

        prompts: B strings; texts: B lists of strings. Both are encoded jointly; where tokens reach across the
        boundary the prompt keeps its own ids, and the text is encoded as if it followed something else.
        """
        prompt_ids = self.encode(prompts)
        starts = []     # a control token splits the text, so that nothing before the last one matters
        for prompt, ids in zip(prompts, prompt_ids):
            last = max((i for i in range(max(0, len(ids) - 64), len(ids)) if self.is_control[ids[i]]), default=0)
            piece = self.backend.id_to_token(ids[last]) if ids else ""
            start = prompt.rfind(piece)
            starts.append((last, start) if self.control.fullmatch(piece) and start >= 0 else (0, 0))
        joint = iter(self.encode([prompt[start:] + text for prompt, (_, start), several in zip(prompts, starts, texts)
                                  for text in several]))
        results = []
        for ids, (last, _), several in zip(prompt_ids, starts, texts):
            known, responses, apart = ids[last:], [], 0
            for text in several:
                response = next(joint)
                if response[:len(known)] != known:
                    apart += 1
                    response = known + self.continuation(text)
                responses.append(response[len(known):])
            results.append((ids, responses, apart))
        return results

    def continuation(self, text):
        """Token ids of text in the middle of other text: without a BOS or a dummy space before it."""
        for anchor in ("\n", "x", "."):
            before, joint = self.encode([anchor, anchor + text])
            if joint[:len(before)] == before:
                return joint[len(before):]
        return self.encode([text])[0]


def read_object(path):
    """The object of a small JSON file, or {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except BadData:
        raise
    except (RecursionError, ValueError) as error:
        raise BadData(f"{path}: broken JSON: {brief(error)}") from None
    if not isinstance(value, dict):
        raise BadData(f"{path}: must be a JSON object, and is a {type(value).__name__}")
    return value


def load_tokenizer(directory, chat_template=None):
    """Reads tokenizer.json, the named tokens and the chat template of a model directory into a ChatTokenizer.

    chat_template: a file to use in place of the tokenizer's own. A tokenizer without a template loads, and is
    refused when something is to be rendered. Raises BadData.
    """
    directory = Path(directory)
    file, config_file = directory / "tokenizer.json", directory / "tokenizer_config.json"
    try:
        backend = tokenizers.Tokenizer.from_str(read_text(file))
    except BadData:
        raise
    except Exception as error:      # the library raises bare Exceptions
        raise BadData(f"{file}: is no tokenizer that the tokenizers library reads: {brief(error)}") from None
    backend.no_truncation()
    backend.no_padding()
    config, older, tokens = read_object(config_file), read_object(directory / "special_tokens_map.json"), {}
    for name in TOKENS:
        token = config.get(name) if config.get(name) is not None else older.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise BadData(f"{config_file}: {name} must be a string or an object with content")
        if token is not None:
            tokens[name] = token
    known = [token for token in tokens.values() if backend.token_to_id(token) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in known])
    template, name = config.get("chat_template"), config_file
    if isinstance(template, list):
        template = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
    if isinstance(template, dict):
        if "default" not in template:
            raise BadData(f"{config_file}: no chat template is named default; give one with --chat-template FILE")
        template = template["default"]
    for path in [chat_template and Path(chat_template), directory / "chat_template.jinja"]:
        if path and (path == chat_template or path.exists()):
            template, name = read_text(path), path
            break
    if template is not None and not isinstance(template, str):
        raise BadData(f"{config_file}: chat_template must be a string; give one with --chat-template FILE")
    return ChatTokenizer(directory, backend, template, name, tokens)


def same_vocabulary(a, b):
    """Raises BadData unless the vocabularies of two ChatTokenizers are the same, piece by piece."""
    if a.vocabulary == b.vocabulary:
        return
    pieces_a, pieces_b = ({i: piece for piece, i in tokenizer.vocabulary.items()} for tokenizer in (a, b))
    other = [i for i in sorted(pieces_a.keys() | pieces_b.keys()) if pieces_a.get(i) != pieces_b.get(i)]
    raise BadData(f"{b.directory}: its tokenizer is not that of {a.directory}: {len(other)} ids mean other pieces, the "
                  f"first is {other[0]}, {pieces_b.get(other[0])!r} against {pieces_a.get(other[0])!r}; the guide must "
                  "share the policy's tokenizer")


# Files to pairs

def load_pairs(paths, tokenizer, max_length, max_prompt_length, skip_bad_rows=False):
    """Reads files of preference rows into ([Pair], Counts).

    paths: .jsonl, .json or .parquet files. max_length: most tokens of prompt and response together; max_prompt_length:
    of the prompt alone. Raises BadData for a file or template that cannot be used, for rows that cannot be read
    (skip_bad_rows drops these), and where no pair is left.
    """
    rows = ((path, row, value) for path in map(Path, paths) for row, value in read_rows(path))
    outcomes = []       # (file, row, Pair or BadRow or Dropped, responses cut, responses encoded apart)
    with ThreadPoolExecutor(1) as pool, Renderer(tokenizer) as renderer:
        def render_some():
            return [(path, row, texts_of(value, tokenizer, renderer))
                    for path, row, value in itertools.islice(rows, CHUNK)]
        ahead = pool.submit(render_some)
        while chunk := ahead.result():
            ahead = pool.submit(render_some)        # one chunk is rendered while another is tokenised
            outcomes += pairs_of(chunk, tokenizer, max_length, max_prompt_length)
    pairs = [outcome for _, _, outcome, _, _ in outcomes if isinstance(outcome, Pair)]
    bad = [f"{path}:{row}: {outcome}" for path, row, outcome, _, _ in outcomes if isinstance(outcome, BadRow)]
    if len(bad) == 1 and not skip_bad_rows:
        raise BadData(f"{bad[0]}; mend the row, or drop such rows with --skip-bad-rows")
    if bad and not skip_bad_rows:
        more = f"\n... and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise BadData(f"{len(bad)} of {len(outcomes)} rows cannot be used; mend them, or drop them with "
                      "--skip-bad-rows:\n" + "\n".join(bad[:10]) + more)
    dropped = [{"file": str(path), "row": row, "reason": str(outcome)}
               for path, row, outcome, _, _ in outcomes if not isinstance(outcome, Pair)]
    if not pairs:
        kinds = collections.Counter(drop["reason"].split(":")[0] for drop in dropped)
        raise BadData(f"{', '.join(map(str, paths))}: no pair is left of {len(outcomes)} rows: " +
                      ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    cut, boundary = (sum(outcome[i] for outcome in outcomes) for i in (3, 4))
    return pairs, Counts(len(outcomes), len(pairs), cut, boundary, dropped)


def texts_of(value, tokenizer, renderer):
    """The texts of one row: (prompt, [scored text of chosen and rejected], [id that ends each]), or why it has none.
    """
    try:
        if isinstance(value, BadRow):
            return value
        prompt, *replies = preference_of(value)
        control = tokenizer.control.search("\0".join([message["content"] for message in prompt] + replies))
        if control:
            return Dropped(f"control token in the text: {control[0]}")
        if not all(reply.strip() for reply in replies):
            return Dropped("empty response")
        before, *full = renderer.render(prompt, replies)
        texts, ends = zip(*(tokenizer.scored(before, *both) for both in zip(full, replies)))
        return before, texts, ends
    except BadRow as error:
        return error


def pairs_of(chunk, tokenizer, max_length, max_prompt_length):
    """Tokenises what texts_of gave: [(file, row, Pair or why there is none, responses cut, responses apart)]."""
    texts = [texts for _, _, texts in chunk if not isinstance(texts, Exception)]
    encoded = iter(tokenizer.encode_after([prompt for prompt, _, _ in texts], [scored for _, scored, _ in texts]))
    outcomes = []
    for path, row, texts in chunk:
        cut = apart = 0
        if not isinstance(texts, Exception):
            prompt, responses, apart = next(encoded)
            room = max_length - len(prompt)
            cut = sum(len(ids) >= room for ids in responses)        # the end token is still to come
            chosen, rejected = (np.array([*ids, end][:max(room, 0)], np.int32) for ids, end in zip(responses, texts[2]))
            prompt, written = np.array(prompt, np.int32), len(tokenizer.control.findall(texts[0]))
            is_control = tokenizer.is_control
            if is_control[prompt].sum() > written or any(is_control[ids].any() for ids in responses):
                texts = Dropped("control token in the text: once the tokenizer has normalised it")
            elif len(prompt) > max_prompt_length:
                texts = Dropped(f"prompt too long: {len(prompt)} tokens, at most {max_prompt_length}")
            elif room < 1:
                texts = Dropped(f"prompt fills the context: {len(prompt)} tokens of {max_length}")
            elif np.array_equal(chosen, rejected):
                texts = Dropped("equal responses after the cut" if cut else "equal responses")
            else:
                texts = Pair(prompt, chosen, rejected, f"{path}:{row}")
        kept = isinstance(texts, Pair)
        outcomes.append((path, row, texts, cut * kept, apart * kept))
    return outcomes


# Pairs to batches

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
