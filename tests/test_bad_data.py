"""Bad files, rows, tokenizers and templates: one clear line each; nothing hangs or grows without bound."""

import dataclasses
import gzip
import json
import os
import random
import re
import time
from pathlib import Path

import pytest
from fuzz_rows import mutated_rows, mutated_templates, mutated_tokenizers
from tiny_tokenizers import LLAMA3, PLAIN, llama3, row, write_rows

import data
from files import rows, template
from files import tokenizer as tokenizer_file
from files.errors import BadInput
from files.tokenizer import load_tokenizer
from runtime import inputs, options
from runtime.signals import to_stderr


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(llama3(tmp_path_factory.mktemp("model")))


def refusal(path, tokenizer, **options):
    """What load_pairs says of a file."""
    with pytest.raises(BadInput) as error:
        data.load_pairs([path], tokenizer, 1000, 900, **options)
    return str(error.value)


FILES = {  # name: (content, message behind the path)
    "missing.jsonl": (None, "no such file"),
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \r\n\n", "has no rows"),
    "none.json": (b"[]", "has no rows"),
    "rows.csv": (b"prompt,chosen\n", "unknown suffix '.csv'; .jsonl, .json and .parquet are read"),
    "packed.jsonl": (gzip.compress(b"{}"), "is compressed with gzip; gunzip it first"),
    "plain.jsonl.gz": (b"{}", "is not compressed with gzip, as its name says"),
    "short.jsonl.gz": (gzip.compress(b"{}" * 99)[:-9], "is damaged or cut short: "),
    "pointer.parquet": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a Git LFS pointer, not the file itself; `git lfs pull` fetches it",
    ),
    "array.json": (b'[{"prompt": "a"},\n {"prompt": }]', "broken JSON: Expecting value at line 2, column 13"),
    "comma.jsonl": (b'[{"prompt": "a"},]', "broken JSON: "),
    "twice.json": (b"[] []", "broken JSON: Extra data at column 4"),
    "latin.json": (b'[{"prompt": "\xe9"}]', "not UTF-8: at byte 14"),
    "utf16.jsonl": (row().__repr__().encode("utf-16"), "is UTF-16 or UTF-32 text; save it as UTF-8"),
    "utf16.json": ("[{}]".encode("utf-16-be"), "is UTF-16 or UTF-32 text; save it as UTF-8"),
    "deep.json": (b"[" * 100_000, "broken JSON: maximum recursion depth exceeded"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(name, tmp_path, tokenizer):
    content, message = FILES[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    said = refusal(path, tokenizer, skip_bad_rows=True)
    assert said.startswith(f"{path}: {message}") and "\n" not in said


def test_directories_pipes_and_devices(tmp_path, tokenizer):
    assert refusal(tmp_path, tokenizer) == f"{tmp_path}: is a directory; name the files in it"
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.jsonl", tmp_path / "zero.jsonl"):
        assert refusal(path, tokenizer) == f"{path}: is a pipe or a device, not a regular file"
    assert refusal("a\0b.jsonl", tokenizer).endswith("cannot be read: embedded null byte")


def message(role="user", content="Hi", **more):
    return {"role": role, "content": content} | more


def dialogue(*roles):
    return [message(role, role[0]) for role in roles]


NO_TEXT = "no text: `%s` must be a string or a list of text parts, and is "
KNOWN = "; known are system, user, human, assistant, gpt"
NO_RESPONSE = "no response: `chosen` must end with a message of the assistant"
ROWS = {  # why: (row, message behind file and row)
    "broken": ('{"prompt": "a" "b"', "broken JSON: Expecting ',' delimiter at column 16"),
    "two on a line": ("{} {}", "broken JSON: Extra data at column 4"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8: at byte 13"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8: at byte 1"),
    "lone surrogate": (json.dumps(row("a\ud800")), "lone surrogate: '\\ud800' in `prompt` is no character"),
    "surrogate in a list": (
        row(chosen=[message(), message("assistant", "\udfff")]),
        "lone surrogate: '\\udfff' in `chosen[2]` is no character",
    ),
    "NaN": ('{"prompt": "a", "score": NaN}', "NaN: is no JSON value; write null"),
    "infinity": ('{"prompt": "a", "scores": [-Infinity]}', "-Infinity: is no JSON value; write null"),
    "duplicate": (
        '{"prompt": "a", "chosen": "b", "prompt": "c"}',
        "duplicate key: 'prompt' stands twice in one object",
    ),
    "duplicate inside": (
        '{"prompt": [{"role": "user", "role": "user"}]}',
        "duplicate key: 'role' stands twice in one object",
    ),
    "long integer": ('{"prompt": ' + "1" * 5000 + "}", "broken JSON: Exceeds the limit (4300"),
    "deep": ("[" * 100_000, "broken JSON: maximum recursion depth exceeded"),
    "deep object": ('{"a":' * 100_000, "broken JSON: maximum recursion depth exceeded"),
    "number": ("17", "no object: the row is a int"),
    "list": ('[{"prompt": "a"}]', "no object: the row is a list"),
    "null": ("null", "no object: the row is a NoneType"),
    "no prompt": (
        {"chosen": "a", "rejected": "b"},
        "missing field: prompt, instruction, conversations, or the prompt's messages in `chosen`",
    ),
    "no chosen": ({"prompt": "a", "rejected": "b"}, "missing field: `chosen`"),
    "null rejected": (row(rejected=None), "missing field: `rejected`"),
    "v1 without rejected": ({"chosen_messages": dialogue("user", "assistant")}, "missing field: `rejected_messages`"),
    "number chosen": (row(chosen=3), "wrong type: `chosen` must be text or messages, and is a int"),
    "number prompt": (row(3), NO_TEXT % "prompt" + "a int"),
    "object prompt": (row({"role": "user"}), NO_TEXT % "prompt" + "a dict"),
    "number input": (row(input=3), NO_TEXT % "input" + "a int"),
    "number system": (row(system=3), NO_TEXT % "system" + "a int"),
    "two prompts": (row(instruction="other"), "two prompts: prompt and instruction say different things; leave one"),
    "no content": (row([{"role": "user"}]), NO_TEXT % "prompt[1]" + "missing"),
    "image part": (row([message(content=[{"type": "image", "text": "a"}])]), NO_TEXT % "prompt[1]" + "a list"),
    "text and image": (
        row([message(content=[{"type": "text", "text": "a"}, {"type": "image"}])]),
        NO_TEXT % "prompt[1]" + "a list",
    ),
    "no parts": (row([message(content=[])]), NO_TEXT % "prompt[1]" + "a list"),
    "message is text": (row(["Hi"]), "no message: `prompt[1]` must be an object with role and content"),
    "unknown role": (row([message("tool\x1b[31m")]), "unknown role: 'tool [31m' in `prompt[1]`" + KNOWN),
    "no role": (row([{"content": "a"}]), "unknown role: 'None' in `prompt[1]`" + KNOWN),
    "list role": (row([message(["user"])]), "unknown role: \"['user']\" in `prompt[1]`" + KNOWN),
    "no final assistant turn": (row(chosen=dialogue("user")), NO_RESPONSE),
    "response by the user": (row([message()], [message()], "b"), NO_RESPONSE),
    "empty lists": (row([], []), NO_RESPONSE),
    "two users": (
        row(dialogue("user", "user")),
        "roles out of order: user, user, assistant in `chosen`; after a system message, if any, user "
        "and assistant speak in turn",
    ),
    "late system": (
        row(dialogue("user", "assistant", "system", "user")),
        "roles out of order: user, assistant, system, user, assistant in `chosen`; ",
    ),
    "no user": (row([]), "roles out of order: assistant in `chosen`"),
    "prompts differ": (
        {"chosen": dialogue("user", "assistant"), "rejected": [message(), message("assistant")]},
        "different prompts: chosen and rejected must answer the same messages",
    ),
    "another prompt": (
        row([message(content="Ho")], [message(), message("assistant")], "b"),
        "different prompts: `chosen` does not begin with the messages of the prompt",
    ),
}


@pytest.fixture(scope="module")
def reasons(tokenizer, tmp_path_factory):
    """Why each of ROWS was dropped, read from one file."""
    bad = [value for value, _ in ROWS.values()]
    path = write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", row(), *bad)
    pairs, counts = data.load_pairs([path], tokenizer, 1000, 900, skip_bad_rows=True)
    assert [pair.source for pair in pairs] == [f"{path}:1"]
    assert [drop["row"] for drop in counts.dropped] == list(range(2, 2 + len(ROWS)))
    return dict(zip(ROWS, (drop["reason"] for drop in counts.dropped)))


@pytest.mark.parametrize("why", ROWS)
def test_rows_that_cannot_be_read(why, reasons):
    assert reasons[why].startswith(ROWS[why][1]) and "\n" not in reasons[why] and len(reasons[why]) < 300


def test_one_bad_row_is_one_line(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", row(), "", "{} {}")
    assert refusal(path, tokenizer) == (
        f"{path}:3: broken JSON: Extra data at column 4; mend the row, or drop such rows with --skip-bad-rows"
    )


def test_each_reason_is_listed_once(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", *(row() if i % 3 else row(chosen=None) for i in range(39)))
    assert refusal(path, tokenizer) == (
        f"{path}:1: missing field: `chosen`; the row has: prompt, chosen, rejected (and 12 more of 39 rows); "
        "mend them, or drop such rows with --skip-bad-rows"
    )
    many = write_rows(tmp_path / "c.jsonl", *(row(**{f"x{i}": 1, "chosen": None}) for i in range(13)), row())
    lines = refusal(many, tokenizer).split("\n")
    assert len(lines) == 12 and lines[11] == "... and 3 more reasons"
    alike = write_rows(tmp_path / "d.jsonl", "{", "{}x", "{} x", row(weight="a"), row(weight=0), row(weight=2))
    lines = refusal(alike, tokenizer, columns={"weight": "weight"}).split("\n")
    assert len(lines) == 4 and "column 3 (and 1 more of 6 rows)" in lines[2] and "is 'a' (and 1 more" in lines[3]
    two = write_rows(tmp_path / "b.jsonl", "{", row(), "}")
    lines = refusal(two, tokenizer).split("\n")
    assert lines[0] == "2 of 3 rows cannot be used; mend them, or drop such rows with --skip-bad-rows"
    assert [line.split(": ")[0] for line in lines[1:]] == [f"{two}:1", f"{two}:3"]


def test_bad_rows_are_skipped_by_kind(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.json", [row(), row(chosen=None), 7])
    _, counts = data.load_pairs([path], tokenizer, 1000, 900, skip_bad_rows=True)
    assert [(drop["row"], drop["reason"]) for drop in counts.dropped] == [
        (2, "missing field: `chosen`; the row has: prompt, chosen, rejected"),
        (3, "no object: the row is a int"),
    ]


def test_bad_elements_of_an_array_are_named_by_row(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text("[" + json.dumps(row()) + ',\n{"a": NaN},\n{"b": 1, "b": 1}, NaN]')
    _, counts = data.load_pairs([tmp_path / "a.json"], tokenizer, 1000, 900, skip_bad_rows=True)
    assert [(drop["row"], drop["reason"].split(":")[0]) for drop in counts.dropped] == [
        (2, "NaN"),
        (3, "duplicate key"),
        (4, "NaN"),
    ]


def test_ten_megabytes_in_one_row(tmp_path, tokenizer):
    """Long texts are never tokenised whole: of blanks, the tokenizers library itself would panic."""
    blanks = " " * 10_000_000
    path = write_rows(
        tmp_path / "a.jsonl",
        row(),
        row("x" * 10_000_000),
        row(blanks + "x", "a", "b"),
        row(chosen="word " * 2_000_000),
        row(rejected="." + blanks + "."),
    )
    began = time.process_time()
    pairs, counts = data.load_pairs([path], tokenizer, 1000, 900)
    room = 1000 - len(pairs[0].prompt)
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    assert lengths == [(2, 5), (2, 2), (room, 5), (2, room)] and counts.cut == 2
    (drop,) = counts.dropped
    assert drop["row"] == 2 and re.fullmatch(r"prompt too long: 10000\d{3} characters", drop["reason"])
    assert time.process_time() - began < 20


def test_a_line_without_end_is_not_read_whole(tmp_path, tokenizer, monkeypatch):
    """As two gigabytes of NULs, which a power cut may leave."""
    monkeypatch.setattr(rows, "LINE", 1000)
    path = write_rows(tmp_path / "a.jsonl", row(), b"\0" * 5500, row(prompt="x" * 990), row(), b"\0" * 999)
    pairs, counts = data.load_pairs([path], tokenizer, 1000, 900, skip_bad_rows=True)
    assert [(drop["row"], drop["reason"].split(":")[0]) for drop in counts.dropped] == [
        (2, "too long"),
        (3, "too long"),
        (5, "broken JSON"),
    ]
    assert len(pairs) == 2


def test_a_prompt_too_long_for_any_template_is_too_long(tmp_path, tokenizer, monkeypatch):
    """A prompt of 120 MB condemned the template."""
    monkeypatch.setattr(data, "HUGE", 1000)
    long = "word " * 100_000
    path = write_rows(tmp_path / "a.jsonl", row(long), row(chosen=long), row())
    asked, plain = [], template.ChatTemplate.render
    monkeypatch.setattr(template.ChatTemplate, "render", lambda *given: asked.append(given[1:]) or plain(*given))
    pairs, counts = data.load_pairs([path], tokenizer, 100, 90)
    assert [drop["reason"] for drop in counts.dropped] == ["prompt too long: 500000 characters"] and counts.cut == 1
    assert max(len(reply) for _, replies in asked for reply in replies) < 10_000
    assert len(pairs[0].chosen) == 100 - len(pairs[0].prompt)


def test_text_of_which_the_tokenizer_makes_no_token(tmp_path):
    directory = llama3(
        tmp_path / "model", "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content }}{% endfor %}"
    )
    state = json.loads((directory / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[zĀ]"}, "content": ""}
    (directory / "tokenizer.json").write_text(json.dumps(state))
    path = write_rows(tmp_path / "a.jsonl", row("zz"), row("a", "zz"), row("a", "b", "zz"), row("a", "b", "c"))
    pairs, counts = data.load_pairs([path], load_tokenizer(directory), 100, 90)
    nothing = "the tokenizer makes no token of it"
    assert [drop["reason"] for drop in counts.dropped] == [f"empty prompt: {nothing}"] + [
        f"empty response: {nothing}"
    ] * 2
    assert len(pairs) == 1


def test_a_tokenizer_that_panics_at_some_rows_only(tmp_path, capfd):
    """At an empty match where the text begins. The library writes pages of it to standard error."""
    directory = llama3(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    state = json.loads((directory / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(?=q)"}, "content": "x"}
    (directory / "tokenizer.json").write_text(json.dumps(state))
    path, tokenizer = write_rows(tmp_path / "a.jsonl", row(), row("qed"), row(chosen="q")), load_tokenizer(directory)
    given, lines = options.resolve(["--data", str(path)]), "tokenizer cannot encode the text: index out of bounds: "
    with pytest.raises(BadInput, match=f"a.jsonl:2: {lines}.*{directory}/tokenizer.json.*; mend the row, or drop"):
        inputs.read_pairs(given.data, given, tokenizer, data.load_pairs)
    skipping = dataclasses.replace(given, skip_bad_rows=True)
    pairs, counts = inputs.read_pairs(given.data, skipping, tokenizer, data.load_pairs)
    assert [(drop["row"], drop["reason"].startswith(lines)) for drop in counts.dropped] == [(2, True)]
    os.write(2, b"heard again\n")
    assert len(pairs) == 2 and capfd.readouterr() == ("", "heard again\n")
    with inputs.stderr_aside():
        os.write(2, b"unheard\n")
        to_stderr("Ctrl-C")
    assert capfd.readouterr().err == "Ctrl-C\n"


def test_parquet_of_what_python_has_no_value_for(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    odd = {
        "date": pyarrow.array([2**30], pyarrow.int32()).cast(pyarrow.date32()),
        "duration": pyarrow.array([1], pyarrow.duration("ns")),
        "time": pyarrow.array([2**62], pyarrow.timestamp("us")),
    }
    for name, column in odd.items():
        table = pyarrow.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], name: column})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert "is no parquet file that pyarrow reads into rows" in refusal(tmp_path / "a.parquet", tokenizer)


def tokenizer_refusal(directory, **options):
    with pytest.raises(BadInput) as error:
        load_tokenizer(directory, **options).prompt_ids([message()])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tokenizers_that_cannot_be_read(tmp_path):
    assert tokenizer_refusal(tmp_path) == f"{tmp_path}/tokenizer.json: no such file"
    (tmp_path / "tokenizer.json").write_text("<!DOCTYPE html>")
    unread = f"{tmp_path}/tokenizer.json: the tokenizers library cannot read it: "
    assert tokenizer_refusal(tmp_path).startswith(unread)
    (tmp_path / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "is a Git LFS pointer" in tokenizer_refusal(tmp_path)
    llama3(tmp_path, None)
    assert tokenizer_refusal(tmp_path) == f"{tmp_path}: has no chat template; --chat-template FILE gives one"
    missing = str(tmp_path / "none.jinja")
    assert tokenizer_refusal(tmp_path, chat_template=missing) == f"{missing}: no such file"
    bad = str(tmp_path / "bad.jinja")
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    assert tokenizer_refusal(tmp_path, chat_template=bad) == f"{bad}: is no chat template: not UTF-8"
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["vocab"]["hello"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert tokenizer_refusal(tmp_path).endswith("/tokenizer.json: has no pieces, or ids beyond 16 million")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}}, "index out of bounds"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "EAAAAGdhcmJhZ2UgZ2FyYmFnZSA="}},
            "index out of bounds",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(x+x+)+y"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            "retry-limit-in-match over",
        ),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10**7}},
            "a few lines of text take more than 20 seconds or 4 GiB (it ended with status -",
        ),
        (
            {"decoder": {"type": "Strip", "content": "ÿ", "start": 1, "stop": 1}},
            "slice index starts at 1 but ends at 0",
        ),
    ],
    ids=[
        "replace of nothing",
        "garbage charsmap",
        "regex without end",
        "explosion",
        "strip of a byte that no text has",
    ],
)
def test_tokenizers_that_panic_or_explode(tmp_path, capfd, monkeypatch, change, said):
    """In a process of their own, which says so in one line."""
    monkeypatch.setattr(tokenizer_file, "TRIAL", tmp_path / "trial.py")
    source = (Path(template.__file__).parent / "trial.py").read_text()
    (tmp_path / "trial.py").write_text(
        source.replace("MEMORY = 4 << 30", "MEMORY = 1 << 29").replace("= 20  #", "= 1  #")
    )
    llama3(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(state | change))
    refused = tokenizer_refusal(tmp_path)
    assert refused.startswith(f"{tmp_path}/tokenizer.json: the tokenizers library fails on it: ") and said in refused
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_waits_for_ever(tmp_path, monkeypatch):
    """As where there is no memory left for the panic itself: no processor time passes."""
    source = tokenizer_file.TRIAL.read_text().replace("6 * SECONDS", "1").replace("import tokenizers", "signal.pause()")
    monkeypatch.setattr(tokenizer_file, "TRIAL", tmp_path / "trial.py")
    (tmp_path / "trial.py").write_text(source)
    monkeypatch.setattr(tokenizer_file, "_tried", set())
    assert "(it ended with status -14)" in tokenizer_refusal(llama3(tmp_path))


def test_sizes_are_looked_at_first(tmp_path, monkeypatch):
    """Files with holes: they take no room, and would take gigabytes of memory."""
    llama3(tmp_path)
    for name, size in (("tokenizer.json", 2**29), ("tokenizer_config.json", 2**30), ("big.jinja", 2**25)):
        before = (tmp_path / name).read_bytes() if name != "big.jinja" else b"x"
        with open(tmp_path / name, "wb") as file:
            file.write(before)
            file.truncate(size)
        refused = tokenizer_refusal(tmp_path, chat_template=tmp_path / "big.jinja" if name == "big.jinja" else None)
        assert refused == f"{tmp_path / name}: has {size / 1e6:.0f} MB, more than such a file ever has"
        (tmp_path / name).write_bytes(before)


@pytest.mark.parametrize(
    "config, expected",
    [
        ("{", "broken JSON: Expecting property name"),
        ("[]", "must be a JSON object"),
        ("[" * 100_000, "broken JSON: maximum recursion depth exceeded"),
        ('{"bos_token": 3}', "its named tokens and chat template must be text"),
        ('{"bos_token": {"content": ["a"]}}', "its named tokens and chat template must be text"),
        ('{"eos_token": "\\ud800"}', "its named tokens and chat template must be text"),
        ('{"chat_template": 3}', "its named tokens and chat template must be text"),
        ('{"chat_template": "\\udc00"}', "its named tokens and chat template must be text"),
        ('{"chat_template": [{"name": "rag", "template": "a"}, 3]}', "none of its chat templates is named"),
    ],
)
def test_tokenizer_configs_that_cannot_be_used(config, expected, tmp_path):
    (llama3(tmp_path) / "tokenizer_config.json").write_text(config)
    assert tokenizer_refusal(tmp_path).startswith(f"{tmp_path}/tokenizer_config.json: {expected}")


REACHES, TOO_MUCH = "reaches for what a template may not: ", "writes too much text or needs more than 1 GiB"
TEMPLATES = {  # why: (template, message behind its file's name)
    "syntax": ("{% for %}", "line 1: Expected an expression, got 'end of statement block'"),
    "unknown tag": ("\n{% import_os %}", "line 2: Encountered unknown tag 'import_os'."),
    "attribute": ("{{ ''.__class__.__mro__ }}", REACHES + "access to attribute '__class__'"),
    "builtins": ("{{ raise_exception.__globals__['sys'] }}", REACHES + "access to attribute"),
    "namespace": ("{% set ns = namespace(__init__=1) %}", REACHES + "namespace attribute"),
    "changes the messages": ("{{ messages.append(1) }}", REACHES),
    "endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "takes too long for one row",
    ),
    "endless arithmetic": ("{{ 9 ** (9 ** 9) % 7 }}", "takes too long for one row"),
    "300 MB": ("{{ messages[0].content * 30000000 }}0123456789", TOO_MUCH),
    "30 MB in a loop": ("{% for i in range(3000) %}{{ 'x' * 10000 }}{% endfor %}", TOO_MUCH),
    "doubling": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        TOO_MUCH,
    ),
}


@pytest.mark.parametrize(
    "why",
    [
        pytest.param(why, marks=pytest.mark.linux("address-space limits")) if why == "doubling" else why
        for why in TEMPLATES
    ],
)
def test_templates_that_must_not_run(why, tmp_path):
    template, expected = TEMPLATES[why]
    directory = llama3(tmp_path / "model", template)
    path = write_rows(tmp_path / "a.jsonl", row("0123456789"))
    began = time.monotonic()
    said = refusal(path, load_tokenizer(directory), skip_bad_rows=True)
    assert time.monotonic() - began < 60  # 3 s of processor time, on a machine that may have other work
    name = f"{directory}/tokenizer_config.json"
    assert said.startswith(f"{name}: the chat template cannot be used: {expected}"), said
    assert said.endswith("; --chat-template gives another") and "\n" not in said


def disturbed(monkeypatch, tmp_path, lines):
    """Has the templates' process run these lines of Python before its own, `source`."""
    script = tmp_path / "disturbed.py"
    source = template.SANDBOX.read_text()
    script.write_text(f"source = {source!r}\n{lines}\nexec(compile(source, 'sandbox.py', 'exec'))\n")
    monkeypatch.setattr(template, "SANDBOX", script)


NO_LIMITS = """import resource
def refuse(limit, value): raise ValueError("current limit exceeds maximum limit")
resource.setrlimit = refuse"""


def test_limits_that_the_system_refuses_are_done_without(tmp_path, monkeypatch, tokenizer):
    """macOS refuses those on memory."""
    disturbed(monkeypatch, tmp_path, NO_LIMITS)
    assert len(data.load_pairs([write_rows(tmp_path / "a.jsonl", row())], tokenizer, 1000, 900)[0]) == 1


@pytest.mark.linux("a process's peak memory is read from /proc")
def test_a_doubling_template_without_limits_does_not_eat_the_memory(tmp_path, monkeypatch):
    disturbed(monkeypatch, tmp_path, NO_LIMITS + "\nsource = source.replace('MEMORY = 1 << 30', 'MEMORY = 1 << 26')")
    doubling = load_tokenizer(llama3(tmp_path / "model", TEMPLATES["doubling"][0]))
    with template.ChatTemplate(doubling) as process:
        with pytest.raises(BadInput, match=f"the chat template cannot be used: {TOO_MUCH}"):
            process.render([message()])
        status = Path(f"/proc/{process.process.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) < 1 << 20  # KiB


@pytest.mark.parametrize(
    "lines, said",
    [
        ("import json\njson.dumps = None", "status 1: TypeError: 'NoneType' object is not callable"),
        ("import sys\nsys.modules['jinja2'] = None", "status 1: ModuleNotFoundError: No module named"),
        ("import os\nos.abort()", "status -6: memory may be short"),
        (
            "import importlib.metadata\nimportlib.metadata.version = lambda name: '3.1.5'",
            "status 1: jinja2 3.1.5 has a leaky sandbox; pip install -U 'jinja2>=3.1.6'",
        ),
    ],
)
def test_a_process_that_ends_is_quoted(tmp_path, monkeypatch, tokenizer, lines, said):
    disturbed(monkeypatch, tmp_path, lines)
    message = refusal(write_rows(tmp_path / "a.jsonl", row()), tokenizer)
    name = tokenizer.template_name
    assert message.startswith(f"{name}: the process that renders the chat template ended with {said}")
    assert "\n" not in message and "--chat-template" not in message


REFUSALS = {  # why: (template, the bad row's message)
    "raises": ("{{ raise_exception('Only one\n turn') }}", "refused by the chat template: Only one turn"),
    "undefined": (
        "{{ messages[7].content }}",
        "refused by the chat template: 'list object' has no element 7|"
        "refused by the chat template: list object has no element 7",
    ),
    "type error": ("{{ messages + 1 }}", "refused by the chat template: TypeError: "),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refused by the chat template: RecursionError: "),
    "surrogate": ("{{ '\\ud800' }}", "refused by the chat template: UnicodeEncodeError: "),
    "drops the response": (
        PLAIN.replace("message.content", "(message.content if loop.index == 1 else '')"),
        "chat template drops or changes the response: it is not what follows the prompt",
    ),
    "drops the turn": ("{{ messages[0].content }}", "chat template drops or changes the response: "),
    "changes the response": (
        PLAIN.replace("message.content", "message.content | upper"),
        "chat template drops or changes the response: ",
    ),
    "changes the prompt": (
        "{{ messages | length }}" + PLAIN,
        "chat template changes the prompt: with a response, the conversation ",
    ),
    "has no generation prompt": (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
        "chat template writes no generation prompt: 'assistant:' stands before",
    ),
    "has no assistant header": (
        LLAMA3.replace("add_generation_prompt", "false"),
        "chat template writes no generation prompt: '<|start_header_id|>assistant",
    ),
    "ends in text": (
        PLAIN.replace("'\n'", "'</end>'"),
        "chat template ends the turn with text: '</end>' is no control",
    ),
    "writes nothing": ("", "chat template changes the prompt: "),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_templates_that_do_not_suit_a_row(why, tmp_path):
    template, expected = REFUSALS[why]
    directory = llama3(tmp_path / "model", template)
    path = write_rows(tmp_path / "a.jsonl", row())
    said = refusal(path, load_tokenizer(directory))
    assert any(said.startswith(f"{path}:1: {part}") for part in expected.split("|")), said
    assert f"({directory}/tokenizer_config.json)" in said and "\n" not in said


def test_a_template_without_end_token_needs_eos(tmp_path):
    directory = llama3(tmp_path / "model", PLAIN, eos_token=None)
    said = refusal(write_rows(tmp_path / "a.jsonl", row()), load_tokenizer(directory))
    assert "a.jsonl:1: chat template ends no turn: no control token stands behind the response" in said


def test_no_template_outlives_its_work(tmp_path, tokenizer):
    with template.ChatTemplate(tokenizer) as process:
        assert process.render([message()])
    assert process.process.returncode is not None
    refused = template.ChatTemplate(load_tokenizer(llama3(tmp_path, "{% for %}")))
    with pytest.raises(BadInput):
        refused.__enter__()
    assert refused.process.returncode is not None


@pytest.mark.parametrize("fuzz", [mutated_rows, mutated_tokenizers, mutated_templates])
def test_fuzzing_in_short(fuzz, tmp_path):
    """tests/fuzz_rows.py does the same for as long as it is told."""
    assert fuzz(random.Random(0), tmp_path, 10) < 10
