"""Mutated rows, tokenizer files and chat templates by the thousand: BadInput or pairs, no other end.

    python tests/fuzz_rows.py [SECONDS [SEED]]

Not part of the suite, which runs a short form of it (test_bad_data.py).
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from tiny_tokenizers import LLAMA3, MISTRAL_V3, PLAIN, llama3, mistral, row

import data
from files.errors import BadInput
from files.tokenizer import load_tokenizer

SEEDS = [
    row(),
    row([{"role": "user", "content": "Hi"}]),
    row(input="x", system="y"),
    {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    {
        "chosen": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}],
    },
]
STRANGE = [
    None,
    True,
    -1,
    1e308,
    "",
    "\ud800",
    "\0",
    "<|eot_id|>",
    "\u202e",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [{"role": "user"}],
    {"content": {}},
    "assistant",
    "system",
    ["a"],
    10**30,
]
TEMPLATE_PARTS = [
    "{{ ",
    " }}",
    "{% ",
    " %}",
    "{#",
    "#}",
    "for ",
    "if ",
    "endfor",
    "endif",
    "messages",
    "[0]",
    ".content",
    "['role']",
    " | trim",
    " | tojson",
    "set x = ",
    "x + x",
    "namespace(a=1)",
    "raise_exception('a')",
    "''.__class__",
    "range(9999)",
    " * 99999",
    "loop.index",
    "eos_token",
    "macro m()",
    "endmacro",
    "m()",
    "strftime_now('%Y')",
    "-",
    "\n",
    "'",
    "caller()",
    "\ud800",
    "generation",
    "endgeneration",
    "break",
    "{{ eos_token }}",
    "{% set x = 1 %}",
    " ",
    "x",
]


def mutate(rng, value):
    """One place of a JSON value, changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        changed = {k: mutate(rng, v) if k == key else v for k, v in value.items()}
        if rng.random() < 0.15:
            del changed[key]
        if rng.random() < 0.1:
            changed[rng.choice(["prompt", "chosen", "rejected", "role", "from"])] = rng.choice(STRANGE)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        changed = value[:at] + [mutate(rng, value[at])] * rng.choice([0, 1, 1, 1, 2]) + value[at + 1 :]
        return changed
    if isinstance(value, str) and rng.random() < 0.4:
        at = rng.randint(0, len(value))
        return value[:at] + rng.choice(["\n", "<|eot_id|>", "\ufeff", "é", "\ud800", " "]) + value[at:]
    return rng.choice(STRANGE)


def damage(rng, raw):
    """Bytes with a few of them changed, removed or doubled."""
    raw = bytearray(raw)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 3])):
        at = rng.randrange(len(raw))
        new = rng.choice([b"", b"\xff", b"\n", b"[", b"]", b"{", b'"', b"\\", bytes([rng.randrange(256)])])
        raw[at : at + rng.choice([0, 1, 1, 5])] = new
        raw = raw or bytearray(b" ")
    return bytes(raw)


def load(directory, path, skip_bad_rows):
    """Whether load_pairs gives pairs; anything but pairs or BadInput is raised."""
    try:
        tokenizer = load_tokenizer(directory)
        assert len(tokenizer.digest) == 64
        pairs, counts = data.load_pairs([path], tokenizer, 200, 100, skip_bad_rows)
    except BadInput:
        return False
    assert counts.rows == counts.kept + len(counts.dropped) and counts.kept == len(pairs) > 0
    for pair in pairs:
        assert 0 < len(pair.prompt) <= 100 and len(pair.chosen) and len(pair.rejected)
        assert tokenizer.is_control[pair.chosen].sum() <= 1 and tokenizer.is_control[pair.rejected].sum() <= 1
    return True


def mutated_rows(rng, folder, count):
    """Files of a hundred mutated rows, in lines or an array."""
    directory = rng.choice([llama3, mistral])(folder / "model")
    good = 0
    for _ in range(count):
        rows = [rng.choice(SEEDS) for _ in range(100)]
        for _ in range(rng.choice([0, 1, 3])):
            rows = [mutate(rng, value) for value in rows]
        lines = [damage(rng, json.dumps(value).encode()) for value in rows]
        style = rng.choice(["lines", "lines", "array"])
        raw = b"[" + b",".join(lines) + b"]" if style == "array" else b"\n".join(lines)
        path = folder / f"rows.{rng.choice(['json', 'jsonl'])}"
        path.write_bytes(raw)
        good += load(directory, path, rng.random() < 0.9)
    return good


def mutated_tokenizers(rng, folder, count):
    """tokenizer_config.json, special_tokens_map.json and, more rarely, tokenizer.json, mutated."""
    good, path = 0, folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(value) for value in SEEDS))
    for _ in range(count):
        directory = rng.choice([llama3, mistral])(folder / "model")
        names = ["tokenizer_config.json"] * 3 + ["special_tokens_map.json", "tokenizer.json"]
        file = directory / rng.choice(names)
        value = json.loads(file.read_bytes()) if file.exists() else {"bos_token": {"content": "<s>"}}
        for _ in range(rng.choice([0, 1, 2])):
            value = mutate(rng, value)
        file.write_bytes(damage(rng, json.dumps(value).encode()))
        good += load(directory, path, True)
        (directory / "special_tokens_map.json").unlink(missing_ok=True)
    return good


def mutated_templates(rng, folder, count):
    """Templates with parts changed, moved and added."""
    good, path = 0, folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(value) for value in SEEDS))
    for _ in range(count):
        template = rng.choice([LLAMA3, MISTRAL_V3, PLAIN])
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            at, width = rng.randrange(len(template) + 1), rng.choice([0, 0, 1, 10])
            template = template[:at] + rng.choice(TEMPLATE_PARTS) + template[at + width :]
        good += load(llama3(folder / "model", template), path, True)
    return good


def main(seconds, seed):
    rng, began, rounds, good = random.Random(seed), time.monotonic(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - began < seconds:
            for fuzz in (mutated_rows, mutated_tokenizers, mutated_templates):
                start, name = time.monotonic(), fuzz.__name__
                good[name] = good.get(name, 0) + fuzz(rng, Path(folder), 20)
                rounds[name] = rounds.get(name, 0) + 20
                if time.monotonic() - start > 120:
                    print(f"{name}: 20 files took {time.monotonic() - start:.0f} s")
    for name, count in rounds.items():
        print(f"{name}: {count} files, {good[name]} of them gave pairs, the others BadInput")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
