"""Rows of every accepted form, truncation, drops and their counts."""

import gzip
import json
import sys

import numpy as np
import pytest
from tiny_tokenizers import llama3, row, write_rows
from tokenizers import normalizers

import data
from files import hub
from files.errors import BadInput
from files.preferences import preference_of
from files.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(llama3(tmp_path_factory.mktemp("model")))


def load(tokenizer, path, *rows):
    return data.load_pairs([write_rows(path, *rows)], tokenizer, 1000, 900)


def said(role, content, **more):
    return {"role": role, "content": content} | more


def part(text, key="text"):
    return {"type": "text", key: text}


USER, SYSTEM = said("user", "Hi"), said("system", "Be kind.")
CHOSEN, REJECTED = said("assistant", "hello"), said("assistant", "there")
EARLIER = [USER, said("assistant", "Yes?"), said("user", "Go on")]
ONE_TURN, WITH_SYSTEM, TURNS = "user:Hi", "system:Be kind.|user:Hi", "user:Hi|assistant:Yes?|user:Go on"
FORMS = {
    "strings": (row(), ONE_TURN),
    "instruction": ({"instruction": "Hi", "chosen": "hello", "rejected": "there"}, ONE_TURN),
    "instruction and input": (
        {"instruction": "Add", "input": "1", "chosen": "hello", "rejected": "there"},
        "user:Add\n1",
    ),
    "prompt and query": (row("Add", query="1", input=""), "user:Add\n1"),
    "prompt and system": (row(system="Be kind."), WITH_SYSTEM),
    "null fields": (row(input=None, system=None, instruction=None, conversations=None), ONE_TURN),
    "lists with the prompt": ({"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, ONE_TURN),
    "UltraFeedback": (
        row("Hi", [USER, CHOSEN], [USER, REJECTED], prompt_id="a", messages=[USER, CHOSEN], score_chosen=8.5),
        ONE_TURN,
    ),
    "lists with system and turns": (
        {"chosen": [SYSTEM, *EARLIER, CHOSEN], "rejected": [SYSTEM, *EARLIER, REJECTED]},
        "system:Be kind.|" + TURNS,
    ),
    "prompt as messages, replies as lists": (row(EARLIER, [CHOSEN], [REJECTED]), TURNS),
    "prompt as messages, replies as strings": (row([SYSTEM, USER]), WITH_SYSTEM),
    "prompt as messages, replies with it": (row([USER], [USER, CHOSEN], [USER, REJECTED]), ONE_TURN),
    "a list and a string": (row([USER], [CHOSEN], "there"), ONE_TURN),
    "ShareGPT": (
        {
            "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "hello"},
            "rejected": {"from": "gpt", "value": "there"},
        },
        WITH_SYSTEM,
    ),
    "ShareGPT and system": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "system": "Be kind.",
            "chosen": {"from": "gpt", "value": "hello"},
            "rejected": "there",
        },
        WITH_SYSTEM,
    ),
    "text parts": (
        row([said("user", [part("H"), part("i")])], [said("assistant", [part("hello")])], [REJECTED]),
        ONE_TURN,
    ),
    "LLaMA-Factory v1": (
        {
            "chosen_messages": [
                said("user", [part("Hi", "value")], loss_weight=0.0),
                said("assistant", [part("hello", "value")], loss_weight=1.0),
            ],
            "rejected_messages": [said("user", [part("Hi", "value")]), said("assistant", [part("there", "value")])],
        },
        ONE_TURN,
    ),
    "arrow's union of fields": (row([said("user", "Hi", **{"from": None, "value": None})]), ONE_TURN),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path, tokenizer):
    value, messages = FORMS[form]
    prompt, chosen, rejected = preference_of(value)
    assert "|".join(f"{message['role']}:{message['content']}" for message in prompt) == messages
    assert (chosen, rejected) == ("hello", "there")


def test_files_of_every_kind_give_the_same_pairs(tmp_path, tokenizer):
    rows = [row(f"Hi\u2028\x85{i}", "hello \u2029", "there") for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    files = {
        "plain.jsonl": b"\n".join(lines),
        "bom.jsonl": b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n",
        "crlf.jsonl": b"\r\n".join(lines),
        "array.json": b" [" + b",\n".join(lines) + b"]\n",
        "array.jsonl": b"\xef\xbb\xbf\n[" + b",".join(lines) + b"]",
        "lines.json": b"\n".join(lines),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        pairs, counts = data.load_pairs([tmp_path / name], tokenizer, 1000, 900)
        assert [pair.source for pair in pairs] == [f"{tmp_path / name}:{i}" for i in (1, 2, 3)]
        assert counts == data.Counts(3, 3, 0, 0, [])
        if name == "plain.jsonl":
            expected = data.fingerprint(pairs)
        assert data.fingerprint(pairs) == expected, name
    assert "\u2028\x85" in tokenizer.decode(pairs[0].prompt)


def test_rows_of_a_file_of_lines_are_its_lines(tmp_path, tokenizer):
    pairs, counts = load(tokenizer, tmp_path / "a.jsonl", "", row(), "  \r", row("again"))
    assert [pair.source.rsplit(":", 1)[1] for pair in pairs] == ["2", "4"] and counts.rows == 2


def test_several_files_are_read_one_after_another(tmp_path, tokenizer):
    files = [write_rows(tmp_path / "a.jsonl", row(), row(chosen=" ")), write_rows(tmp_path / "b.json", [row()])]
    pairs, counts = data.load_pairs(files, tokenizer, 1000, 900)
    assert [pair.source for pair in pairs] == [f"{files[0]}:1", f"{files[1]}:1"]
    assert counts == data.Counts(3, 2, 0, 0, [{"file": str(files[0]), "row": 2, "reason": "empty response"}])


def test_more_rows_than_are_tokenised_at_a_time_keep_their_order(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 3)
    rows = [row("Hi", "x" * i, "there") for i in range(1, 9)]
    pairs, counts = load(tokenizer, tmp_path / "a.jsonl", *rows, row(chosen=""))
    assert [len(pair.chosen) for pair in pairs] == list(range(2, 10)) and counts.rows == 9


def test_long_responses_are_cut_at_the_end(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", row(chosen="a b c d", rejected="x"))
    (whole,), _ = data.load_pairs([path], tokenizer, 1000, 900)
    room = len(whole.chosen)
    for lost in (0, 1, 3):
        (pair,), counts = data.load_pairs([path], tokenizer, len(whole.prompt) + room - lost, 900)
        assert pair.chosen.tolist() == whole.chosen[: room - lost].tolist()
        assert pair.rejected.tolist() == whole.rejected.tolist()
        assert pair.prompt.tolist() == whole.prompt.tolist()
        assert counts.cut == (lost > 0)
        assert (pair.chosen[-1] in tokenizer.end_ids) == (lost == 0)
        assert pair.chosen.dtype == np.int32


def test_drops_are_counted_and_listed(tmp_path, tokenizer):
    (pair,), _ = load(tokenizer, tmp_path / "a.jsonl", row())
    limit = len(pair.prompt) + 6
    rows = [
        (row(), None),
        (row("Hi" * 50), f"prompt too long: {len(pair.prompt) + 98} tokens, at most {limit}"),
        (row("Hi" + "i" * 6), f"prompt fills the context: {limit} tokens of {limit}"),
        (row(chosen=""), "empty response"),
        (row(rejected=" \n\u3000"), "empty response"),
        (row(chosen="same", rejected="same"), "equal responses"),
        (row(chosen="same", rejected=" same "), "equal responses"),
        (row(chosen="abcdefgh", rejected="abcdefzz"), "equal responses after the cut"),
        (row("a <|eot_id|> b"), "control token in the text: <|eot_id|>"),
        (row(chosen="x<|end_of_text|>"), "control token in the text: <|end_of_text|>"),
        (row([said("system", "<|begin_of_text|>"), USER]), "control token in the text: <|begin_of_text|>"),
        (row([said("user", [part("<|eot"), part("_id|>")])]), "control token in the text: <|eot_id|>"),
    ]
    path = str(write_rows(tmp_path / "a.jsonl", *(value for value, _ in rows)))
    pairs, counts = data.load_pairs([path], tokenizer, limit, limit)
    assert counts.dropped == [
        {"file": path, "row": i, "reason": reason} for i, (_, reason) in enumerate(rows, 1) if reason
    ]
    assert (counts.rows, counts.kept, counts.cut) == (12, 1, 0)
    assert [pair.source for pair in pairs] == [path + ":1"]


def test_no_text_becomes_a_control_token_as_the_tokenizer_normalises(tmp_path):
    directory = llama3(tmp_path / "model")
    state = json.loads((directory / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "NFKC"}
    for token in state["added_tokens"]:
        token["normalized"] = True
    (directory / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(directory)
    wide = "\uff1c\uff5ceot\uff3fid\uff5c\uff1e"
    assert normalizers.NFKC().normalize_str(wide) == "<|eot_id|>"
    rows = [row(), row(wide), row(chosen="x " + wide), row(rejected=wide + wide)]
    pairs, counts = load(tokenizer, tmp_path / "a.jsonl", *rows)
    assert len(pairs) == 1
    assert {drop["reason"].split(":")[0] for drop in counts.dropped} == {"control token in the text"}


def test_no_pair_left(tmp_path, tokenizer):
    with pytest.raises(BadInput) as error:
        load(tokenizer, tmp_path / "a.jsonl", row(chosen=""), row(rejected=""), row(chosen="there"))
    said = (
        "no pair is left of 3 rows: 2 empty response, 1 equal responses; "
        "give other data, or longer --max-length and --max-prompt-length"
    )
    assert str(error.value) == f"{tmp_path / 'a.jsonl'}: {said}"


def test_parquet(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    rows = [row([USER], [CHOSEN], [REJECTED]), row([USER], [CHOSEN], [said("assistant", "")])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs, counts = data.load_pairs([tmp_path / "a.parquet"], tokenizer, 1000, 900)
    assert [pair.source for pair in pairs] == [f"{tmp_path / 'a.parquet'}:1"]
    assert counts.dropped[0]["row"] == 2
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BadInput, match="b.parquet: is no parquet file that pyarrow reads"):
        data.load_pairs([tmp_path / "b.parquet"], tokenizer, 1000, 900)


def test_parquet_without_pyarrow(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput) as error:
        data.load_pairs([tmp_path / "a.parquet"], tokenizer, 1000, 900)
    said = "needs pyarrow; pip install pyarrow, or convert the file to .jsonl"
    assert str(error.value) == f"{tmp_path / 'a.parquet'}: {said}"


def prompt_text(tokenizer, pair):
    return tokenizer.decode(pair.prompt)


def test_history_stands_before_the_prompt_and_behind_the_system(tmp_path, tokenizer):
    given = row("Go on", history=[["Hi", "Yes?"]], system="Be kind.")
    as_messages = row([SYSTEM, *EARLIER])
    pairs, _ = load(tokenizer, tmp_path / "a.jsonl", given, as_messages)
    assert pairs[0].prompt.tolist() == pairs[1].prompt.tolist()
    own = row([SYSTEM, said("user", "Go on")], history=[["Hi", "Yes?"]])
    assert load(tokenizer, tmp_path / "own.jsonl", own)[0][0].prompt.tolist() == pairs[1].prompt.tolist()
    none = [load(tokenizer, tmp_path / "n.jsonl", row(history=empty))[0][0] for empty in ("[]", [], None, "")]
    assert len({pair.prompt.tobytes() for pair in none}) == 1 and len(none[0].prompt) < len(pairs[0].prompt)
    with pytest.raises(BadInput, match="`history` must be a list of"):
        load(tokenizer, tmp_path / "b.jsonl", row(history="Hi"))
    with pytest.raises(BadInput, match=r"`history\[1\]` must be a pair"):
        load(tokenizer, tmp_path / "c.jsonl", row(history=[["Hi"]]))


@pytest.mark.parametrize("field", ["tools", "functions", "images", "videos", "audios"])
def test_what_would_change_a_prompt_is_refused_by_name(field, tmp_path, tokenizer):
    for empty in (None, "", "[]", []):
        assert len(load(tokenizer, tmp_path / "a.jsonl", row(**{field: empty}))[0]) == 1
    with pytest.raises(BadInput, match=f"`{field}` would change the prompt"):
        load(tokenizer, tmp_path / "b.jsonl", row(**{field: ["x"]}))


def test_transcripts_of_hh_rlhf(tmp_path, tokenizer):
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go on\n\nAssistant:"
    given = {"chosen": f"{start} hello", "rejected": f"{start} there"}
    pairs, _ = load(tokenizer, tmp_path / "a.jsonl", given, row(EARLIER))
    for ours, theirs in zip(pairs[0][:3], pairs[1][:3]):
        assert ours.tolist() == theirs.tolist()


H, A = "\n\nHuman:", "\n\nAssistant:"
TALK = f"{H} Hi{A} Yes?{H} Go on{A}"
TRANSCRIPTS = (  # chosen, rejected; what the row is dropped for, or the chosen reply where it is kept
    (f"{TALK} a\n\nb \n\n\nc\n", f"{TALK} x", "a\n\nb \n\n\nc"),
    (f"{H} Hi\n\nyou{A} a", f"{H} Hi\n\nyou\n{A} x", "a"),
    (f"{H}Hi{A}a", f"{H} Hi{A} x", "a"),
    (f"{H}{A} a", f"{H}{A} x", "a"),
    (f"{H} Hi{A}{H} Go on{A} a", f"{H} Hi{A} {H} Go on{A} x", "a"),
    (f"{TALK} Human: a\nHuman: b\nAssistant: c", f"{TALK} x", "Human: a\nHuman: b\nAssistant: c"),
    (f"{TALK} a\n\nHumans: b\n\n Human: c", f"{TALK} x", "a\n\nHumans: b\n\n Human: c"),
    (f"{TALK} a{H} b{A} c", f"{TALK} a{H} b{A} x", "c"),
    (f"{TALK} a{H} b{A} c", f"{TALK} x", "different prompts"),
    (f"{H} Hi{A} a{H} b{A} c", f"{H} Hi{A} x{H} b{A} c", "different prompts"),
    (f"{H} Hi{A} a{H} b{A} c", f"{H} Hi{A} a{H} y{A} z", "different prompts"),
    (f"{H} Hi{A} a", f"{H} Ho{A} x", "different prompts"),
    (f"{H} Hi{A} a", TALK + " x", "different prompts"),
    (TALK, f"{TALK} x", "empty response"),
    (f"{TALK} a", f"{TALK} \n\n ", "empty response"),
    (TALK, TALK, "empty response"),
    (f"{TALK} a", f"{TALK} a", "equal responses"),
    (f"{TALK} a ", f"{TALK}\n\na", "equal responses"),
    (f"{TALK} a{H} bye", f"{TALK} a{H} bye", "no response"),
    (f"{TALK} a", f"{TALK} x{H} bye", "no response"),
    (f"{TALK} a{H}", f"{TALK} x", "no response"),
    (f"{H} Hi", f"{H} Hi", "no response"),
    (f"{H} Hi{H} you{A} a", f"{H} Hi{H} you{A} x", "roles out of order"),
    (f"{TALK} a{A} b", f"{TALK} a{A} x", "roles out of order"),
    (f"{TALK}{A} b", f"{TALK}{A} x", "roles out of order"),
    (f"{A} Hi{H} Go on{A} a", f"{A} Hi{H} Go on{A} x", "missing field"),
    (f"Human: Hi{A} a", f"Human: Hi{A} x", "missing field"),
    (f"{TALK} a", "x", "missing field"),
    (f"{TALK} <|eot_id|>", f"{TALK} x", "control token in the text"),
)


def test_hard_transcripts(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", *({"chosen": row[0], "rejected": row[1]} for row in TRANSCRIPTS))
    pairs, counts = data.load_pairs([path], tokenizer, 1000, 900, skip_bad_rows=True)
    found = {drop["row"]: drop["reason"].split(":")[0] for drop in counts.dropped}
    found |= {int(pair.source.rpartition(":")[2]): tokenizer.decode(pair.chosen[:-1]) for pair in pairs}
    assert [found[number] for number in range(1, len(TRANSCRIPTS) + 1)] == [row[2] for row in TRANSCRIPTS]


def test_columns_rename_and_weigh(tmp_path, tokenizer):
    given = {"question": "Hi", "j": "hello", "k": "there", "chosen": 3, "instruction": "no", "w": 2.5}
    path = write_rows(tmp_path / "a.jsonl", given)
    columns = {"prompt": "question", "chosen": "j", "rejected": "k", "weight": "w"}
    (pair,), counts = data.load_pairs([path], tokenizer, 1000, 900, columns=columns)
    (plain,), _ = load(tokenizer, tmp_path / "b.jsonl", row())
    assert [ids.tolist() for ids in pair[:3]] == [ids.tolist() for ids in plain[:3]] and pair.weight == 2.5
    assert counts.unused == ("chosen", "instruction")
    assert data.fingerprint([pair]) != data.fingerprint([pair._replace(weight=1.0)]) == data.fingerprint([plain])
    for weight in (0, -1, "1", True, None, 1e999):
        bad = write_rows(tmp_path / "c.jsonl", json.dumps(given | {"w": weight}).replace("Infinity", "1e999"))
        with pytest.raises(BadInput, match="no weight|missing field: `w`"):
            data.load_pairs([bad], tokenizer, 1000, 900, columns=columns)
    for name in ("prompt", "system", "history", "weight"):  # a name that no row has is not the row's fault
        with pytest.raises(
            BadInput, match=f"a.jsonl: --columns {name}=no: in none of 1 rows; the row has: question, j"
        ):
            data.load_pairs([path], tokenizer, 1000, 900, skip_bad_rows=True, columns=columns | {name: "no"})
    (alone,), counts = load(tokenizer, tmp_path / "d.jsonl", row(weight=7))
    assert alone.weight == 1 and counts.unused == ("weight",)


def test_a_refusal_tells_the_columns_and_those_that_would_do(tmp_path, tokenizer):
    for skipped in (False, True):
        with pytest.raises(BadInput) as error:
            path = write_rows(tmp_path / "a.jsonl", {"question": "a", "response_j": "b", "response_k": "c"})
            data.load_pairs([path], tokenizer, 1000, 900, skip_bad_rows=skipped)
        assert "the row has: question, response_j, response_k; try --columns" in str(error.value)
        assert "prompt=question chosen=response_j rejected=response_k" in str(error.value)


def test_gz_folders_globs_and_limit(tmp_path, tokenizer):
    lines = [json.dumps(row(f"Hi {i}")) for i in range(6)]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[:3]))
    with gzip.open(tmp_path / "c.json.gz", "wt") as file:
        file.write("[" + ",".join(lines[3:5]) + "]")
    (tmp_path / "a.jsonl").write_text(lines[5])
    (tmp_path / "notes.txt").write_text("no data")
    files = hub.data_files(str(tmp_path))
    assert files == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.json.gz")]
    assert hub.data_files(str(tmp_path / "*.gz")) == files[1:]
    texts = [prompt_text(tokenizer, pair) for pair in data.load_pairs(files, tokenizer, 1000, 900)[0]]
    assert [next(i for i in range(6) if f"Hi {i}" in text) for text in texts] == [5, 0, 1, 2, 3, 4]
    pairs, counts = data.load_pairs(files, tokenizer, 1000, 900, limit=2)
    assert (len(pairs), counts.rows, counts.kept) == (2, 2, 2)
    for name in ("none*.jsonl", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(BadInput):
            hub.data_files(str(tmp_path / name))


SAID_TWICE = {  # why: (row, what is said; None: the pair is kept)
    "system and its message": (row([SYSTEM, USER], system="Be kind."), None),
    "another system": (row([SYSTEM, USER], system="Be rude."), "two systems: `system` and the system message"),
    "system beside whole dialogues": (
        {"system": "Be rude.", "chosen": [SYSTEM, USER, CHOSEN], "rejected": [SYSTEM, USER, REJECTED]},
        "two systems: ",
    ),
    "another prompt": (row("Bye", [USER, CHOSEN], [USER, REJECTED]), "two prompts: the row's own prompt is not in"),
    "prompt of a turn": (row(" Go on ", [*EARLIER, CHOSEN], [*EARLIER, REJECTED]), None),
    "input beside messages": (row([USER], input="1"), "two prompts: `input` is not in the messages of the prompt"),
    "query in the messages": (row([USER], query="Hi"), None),
    "thoughts of a message": (
        row([USER], [CHOSEN | {"reasoning_content": "Hm."}], [REJECTED]),
        "reasoning_content: `chosen[1]` has reasoning_content",
    ),
    "call of a tool": (
        row([*EARLIER[:1], EARLIER[1] | {"tool_calls": [{"name": "f"}]}, EARLIER[2]]),
        "tool_calls: `prompt[2]` has tool_calls",
    ),
    "answer of a tool": (row([USER, said("tool", "3")]), "unknown role: 'tool'"),
    "no call of a tool": (row([USER | {"tool_calls": [], "function_call": None}]), None),
    "transcript as the prompt": (row("\n\nHuman: Hi\n\nAssistant:"), None),
    "transcript and transcripts": (
        row("\n\nHuman: Hi\n\nAssistant:", *(f"\n\nHuman: Hi\n\nAssistant: {reply}" for reply in ("a", "b"))),
        None,
    ),
}


@pytest.mark.parametrize("why", SAID_TWICE)
def test_nothing_that_changes_a_prompt_is_passed_over(why):
    value, refusal = SAID_TWICE[why]
    if refusal is None:
        messages, *_ = preference_of(value)
        assert "\n\nHuman:" not in messages[-1]["content"] and messages[-1]["role"] == "user"
    else:
        with pytest.raises(BadInput) as error:
            preference_of(value)
        assert str(error.value).startswith(refusal)


def test_a_column_that_is_taken_is_not_read_under_its_own_name(tmp_path, tokenizer):
    """SHP's post is called history, Orca's prompt input."""
    plain = load(tokenizer, tmp_path / "a.jsonl", row(system="Be kind."))[0][0].prompt.tolist()
    for given, columns in (
        (row(None, history="Hi", system="Be kind."), {"prompt": "history"}),
        (row(input="Be kind."), {"system": "input"}),
    ):
        path = write_rows(tmp_path / "b.jsonl", given)
        (pair,), _ = data.load_pairs([path], tokenizer, 1000, 900, columns=columns)
        assert pair.prompt.tolist() == plain
