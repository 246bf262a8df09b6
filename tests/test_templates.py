"""Chat templates: the prompt's ids are what inference feeds; behind it, reply and end token are scored."""

import functools
import json

import pytest
import tokenizers
from tiny_tokenizers import (
    DATED,
    GEMMA,
    LLAMA3,
    MISTRAL_V1,
    MISTRAL_V3,
    PLAIN,
    QWEN3,
    QWEN25,
    SIMPO_MISTRAL,
    llama3,
    mistral,
    qwen,
    row,
    write_rows,
)

import data
from files.errors import BadInput
from files.template import ChatTemplate
from files.tokenizer import load_tokenizer, same_vocabulary

INST = ("[INST]", "[/INST]")
KINDS = {
    "llama3": functools.partial(llama3, template=LLAMA3),
    "llama3 dated": functools.partial(llama3, template=DATED),
    "mistral v1": functools.partial(mistral, template=MISTRAL_V1),
    "mistral v3": functools.partial(mistral, template=MISTRAL_V3, control=INST),
    "simpo mistral": functools.partial(mistral, template=SIMPO_MISTRAL),
    "plain": functools.partial(mistral, template=PLAIN),
    "qwen2.5": functools.partial(qwen, template=QWEN25),
    "gemma2": functools.partial(mistral, template=GEMMA, control=("<start_of_turn>", "<end_of_turn>")),
}
CONVERSATIONS = [
    [{"role": "user", "content": "hello there"}],
    [
        {"role": "user", "content": " hello\n"},
        {"role": "assistant", "content": "é😀 there"},
        {"role": "user", "content": "x  y\u2028z"},
    ],
]


def pair_of(directory, tmp_path, chosen="hello", rejected="there", prompt="Hi", limit=1000):
    """The tokenizer, the pair and the counts of one row."""
    tokenizer = load_tokenizer(directory)
    path = write_rows(tmp_path / "rows.jsonl", row(prompt, chosen, rejected))
    (pair,), counts = data.load_pairs([path], tokenizer, limit, limit)
    return tokenizer, pair, counts


def pieces(tokenizer, ids):
    return [tokenizer.backend.id_to_token(int(i)) for i in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_ids_are_those_of_transformers(kind, tmp_path):
    PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast

    directory = KINDS[kind](tmp_path / "model")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **config)
    ours = load_tokenizer(directory)
    for messages in CONVERSATIONS:
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.prompt_ids(messages) == ids
        path = write_rows(tmp_path / "rows.jsonl", row(messages))
        assert data.load_pairs([path], ours, 1000, 1000)[0][0].prompt.tolist() == ids


GOLDEN = {  # kind: what ends the prompt, and the scored pieces of the reply "hello"
    "llama3": (["<|start_header_id|>", *"assistant", "<|end_header_id|>", "ĊĊ"], ["hello", "<|eot_id|>"]),
    "mistral v1": (["▁", "[", "/", "INST", "]"], ["▁hello", "</s>"]),
    "mistral v3": (["[INST]", "▁", "▁h", "i", "[/INST]"], ["▁", "▁hello", "</s>"]),
    "simpo mistral": (["▁", "[", "/", "INST", "]"], ["▁hello", "</s>"]),  # no blank before </s>
    "plain": ([*"assistant", "<0x3A>"], ["▁hello", "</s>"]),  # it writes no end token: eos
    "qwen2.5": (  # its own system message, as there is none in the row
        ["<|im_start|>", *"systemĊYouĠareĠQwen.", "<|im_end|>", "Ċ", "<|im_start|>", *"userĊhi", "<|im_end|>", "Ċ"]
        + ["<|im_start|>", *"assistantĊ"],
        ["hello", "<|im_end|>"],
    ),
    "gemma2": (
        ["<start_of_turn>", *"▁user", "<0x0A>", *"hi", "<end_of_turn>", "▁", "<0x0A>"]
        + ["<start_of_turn>", *"▁model", "<0x0A>"],
        [*"hello", "<end_of_turn>"],
    ),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_pieces(kind, tmp_path):
    tokenizer, pair, counts = pair_of(KINDS[kind](tmp_path / "model"), tmp_path, prompt="hi")
    prompt, scored = GOLDEN[kind]
    assert pieces(tokenizer, pair.prompt)[-len(prompt) :] == prompt
    assert pieces(tokenizer, pair.chosen) == scored
    assert (counts.rows, counts.kept, counts.cut, counts.boundary, counts.dropped) == (1, 1, 0, 0, [])
    assert pair.source == f"{tmp_path / 'rows.jsonl'}:1"


END = {"llama3": "<|eot_id|>", "qwen2.5": "<|im_end|>", "gemma2": "<end_of_turn>"}
REPLIES = ["hello", "é😀\n\n x", "<b>hello</b> there", "a [/INST", "hello <|eot", "  \u2028x", "x\r\n\ty", "<0x0A>"]


@pytest.mark.parametrize("kind", KINDS)
def test_scored_tokens_are_the_reply_and_one_end_token(kind, tmp_path):
    tokenizer = load_tokenizer(KINDS[kind](tmp_path / "model"))
    path = write_rows(tmp_path / "rows.jsonl", *(row(chosen=reply) for reply in REPLIES))
    pairs, counts = data.load_pairs([path], tokenizer, 1000, 1000)
    end = END.get(kind.split()[0], "</s>")
    begin = tokenizer.vocabulary.get(tokenizer.tokens.get("bos_token"))
    assert len(pairs) == len(REPLIES)
    for pair, reply in zip(pairs, REPLIES):
        if kind in ("llama3", "llama3 dated", "simpo mistral", "gemma2"):
            reply = reply.strip()  # as the template does, also at inference
        written = tokenizer.decode([*pair.prompt, *pair.chosen])[len(tokenizer.decode(pair.prompt)) :]
        assert written.lstrip() == reply.lstrip() + end and reply + end in written
        assert tokenizer.is_control[pair.chosen].sum() == 1 and pieces(tokenizer, pair.chosen)[-1] == end
        assert (pair.prompt == begin).sum() == (kind not in ("plain", "qwen2.5"))


THINK = "<think> ĊĊ </think> ĊĊ".split()
REASONED = ["<think>", "Ċ", "hello", "Ċ", "</think>", "ĊĊ", "t", "he", "r", "e"]


@pytest.mark.parametrize(
    "chosen, rejected, block, scored",
    [
        ("hello", "there", THINK, ["hello"]),  # what enable_thinking=False feeds, unscored
        ("<think>\nhello\n</think>\n\nthere", "<think>\n\n</think>\n\nno", [], REASONED),
        ("<think>hello</think> there", "<think>no", [], ["<think>", "hello", "</think>", "Ġthere"]),  # as it is
        (
            "<think>hello",
            "<think>no",
            [],
            ["<think>", "hello"],
        ),  # cut in its thoughts, before which an empty block stands
    ],
)
def test_reasoning(chosen, rejected, block, scored, tmp_path):
    """Qwen3's template: its empty <think> block stands in the prompt, a reply's own is scored."""
    tokenizer, pair, _ = pair_of(qwen(tmp_path / "model", QWEN3), tmp_path, chosen, rejected)
    header = ["<|im_start|>", *"assistantĊ", *block]
    assert pieces(tokenizer, pair.prompt)[-len(header) :] == header
    assert pieces(tokenizer, pair.chosen) == [*scored, "<|im_end|>"]
    if block:
        theirs = pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
        asked = [{"role": "user", "content": "Hi"}]
        given = {"add_generation_prompt": True, "return_dict": False}
        quiet = theirs.apply_chat_template(asked, enable_thinking=False, **given)
        assert (
            quiet == pair.prompt.tolist() != theirs.apply_chat_template(asked, **given) == tokenizer.prompt_ids(asked)
        )


def test_replies_with_and_without_reasoning_share_no_prompt(tmp_path):
    with pytest.raises(BadInput, match=r"rows.jsonl:1: .* the other response begins with <think>.* mend the row"):
        pair_of(qwen(tmp_path / "model", QWEN3), tmp_path, "<think>a</think>b", "there")


def test_gemma_knows_no_system_message(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", row(), row(system="Be brief."))
    said = r"rows.jsonl:2: refused by the chat template: System role not supported .*; put the system message into the "
    with pytest.raises(BadInput, match=said + r"first user message; mend the row, or drop such rows with") as caught:
        data.load_pairs([path], load_tokenizer(KINDS["gemma2"](tmp_path / "model")), 1000, 1000)
    assert "\n" not in str(caught.value)


def test_blanks_of_the_reply_are_scored_where_the_template_keeps_them(tmp_path):
    tokenizer, pair, _ = pair_of(mistral(tmp_path / "model"), tmp_path, chosen="hello \n", rejected="hello")
    assert pieces(tokenizer, pair.chosen) == ["▁hello", "▁", "<0x0A>", "</s>"]
    tokenizer, pair, _ = pair_of(llama3(tmp_path / "model"), tmp_path, chosen=" hello \n")
    assert pieces(tokenizer, pair.chosen) == ["hello", "<|eot_id|>"]


def test_what_follows_the_end_token_is_not_scored(tmp_path):
    template = LLAMA3.replace("'<|eot_id|>'", "'<|eot_id|>\n<|end_of_text|>'")
    tokenizer, pair, _ = pair_of(llama3(tmp_path / "model", template), tmp_path)
    assert pieces(tokenizer, pair.chosen) == ["hello", "<|eot_id|>"]
    assert {tokenizer.backend.id_to_token(i) for i in tokenizer.end_ids} == {"<|eot_id|>", "<|end_of_text|>"}


@pytest.mark.parametrize(
    "make, ends_in, reply, prompt, scored",
    [
        (llama3, "\n", "\nhello", ["Ċ"], ["Ċ", "hello", "<|end_of_text|>"]),  # jointly, ĊĊ
        (mistral, " ", "hello", ["▁"], ["h", "e", "l", "l", "o", "</s>"]),  # jointly, ▁hello
    ],
)
def test_where_a_token_would_cross_the_boundary(make, ends_in, reply, prompt, scored, tmp_path):
    """The prompt keeps its ids, and the reply is tokenised as if it followed other text."""
    template = PLAIN.replace("': '", "':" + ends_in.replace("\n", "\\n") + "'").replace(
        "'assistant:'", "'assistant:" + ends_in.replace("\n", "\\n") + "'"
    )
    tokenizer, pair, counts = pair_of(make(tmp_path / "model", template), tmp_path, reply, "there you")
    assert pieces(tokenizer, pair.prompt)[-1:] == prompt
    assert pieces(tokenizer, pair.chosen) == scored
    assert counts.boundary == (1 if make is llama3 else 2)
    alone = tokenizer.prompt_ids([{"role": "user", "content": "Hi"}])
    assert pair.prompt.tolist() == alone


def test_date_is_fixed(tmp_path):
    tokenizer = load_tokenizer(llama3(tmp_path / "model", DATED))
    assert "Today: 26 Jul 2024\n" in tokenizer.decode(tokenizer.prompt_ids(CONVERSATIONS[0]))


@pytest.mark.parametrize(
    "template, text",
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "x<y"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{% set ns = namespace(a=1) %}{% for i in [1] %}{% set ns.a = 2 %}{% endfor %}{{ ns.a }}", "2"),
        ("{{ dict(a=1) | tojson(indent=1) }}{{ dict.update is defined }}", '{\n "a": 1\n}False'),
        ("  {% if true %}\nx{% endif %}\n", "x"),
        ("{{ tools is defined and tools is none }}", "True"),
        ("{{ unknown }}|{{ add_generation_prompt }}|{{ eos_token }}", "|True|<|end_of_text|>"),
    ],
)
def test_template_language_is_that_of_transformers(template, text, tmp_path):
    PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast

    directory = llama3(tmp_path / "model", template)
    messages = [{"role": "user", "content": "x<y"}]
    with ChatTemplate(load_tokenizer(directory)) as template:
        assert template.render(messages) == [text]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **config)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == text


def test_where_the_template_comes_from(tmp_path):
    directory = llama3(tmp_path / "model", "one")
    assert load_tokenizer(directory).template == "one"
    llama3(directory, [{"name": "rag", "template": "no"}, {"name": "default", "template": "two"}])
    assert load_tokenizer(directory).template == "two"
    (directory / "chat_template.jinja").write_text("three")
    assert load_tokenizer(directory).template == "three"
    (tmp_path / "own.jinja").write_text("four")
    tokenizer = load_tokenizer(directory, str(tmp_path / "own.jinja"))
    assert (tokenizer.template, str(tokenizer.template_name)) == ("four", str(tmp_path / "own.jinja"))


def test_named_tokens_may_be_objects_or_stand_in_the_older_file(tmp_path):
    begin = {"content": "<|begin_of_text|>", "lstrip": False}
    directory = llama3(tmp_path / "model", bos_token=begin, eos_token=None)
    older = {"eos_token": {"content": "<|eot_id|>"}, "pad_token": "!"}
    (directory / "special_tokens_map.json").write_text(json.dumps(older))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "!"}
    assert tokenizer.end_ids == {tokenizer.backend.token_to_id("<|eot_id|>")}
    assert tokenizer.control.search("!")  # transformers makes a control token of any named piece


def test_a_named_token_is_control_even_if_the_tokenizer_calls_it_plain(tmp_path):
    directory = llama3(tmp_path / "model")
    state = json.loads((directory / "tokenizer.json").read_text())
    for token in state["added_tokens"]:
        token["special"] = False
    (directory / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.control.search("<|end_of_text|>") and not tokenizer.control.search("<|eot_id|>")


def test_the_longest_control_token_counts(tmp_path):
    tokenizer = load_tokenizer(mistral(tmp_path / "model", control=("<a>", "<a><b>")))
    assert tokenizer.control.findall("<a> <a><b>") == ["<a>", "<a><b>"]


def test_characters_without_a_piece_are_no_control_tokens(tmp_path):
    """Where the tokenizer has no bytes to fall back on, they become <unk>, which stands for any text."""
    directory = mistral(tmp_path / "model")
    state = json.loads((directory / "tokenizer.json").read_text())
    state["model"]["byte_fallback"] = False
    (directory / "tokenizer.json").write_text(json.dumps(state))
    tokenizer, pair, _ = pair_of(directory, tmp_path, chosen="a\u4e00b")
    assert pieces(tokenizer, pair.chosen) == ["▁", "a", "<unk>", "b", "</s>"]
    path = write_rows(tmp_path / "rows.jsonl", row(chosen="a<unk>b"))
    with pytest.raises(BadInput, match="no pair is left of 1 rows: 1 control token in the text"):
        data.load_pairs([path], tokenizer, 1000, 1000)


def test_truncation_and_padding_of_the_tokenizer_file_are_off(tmp_path):
    directory = llama3(tmp_path / "model")
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=50, pad_id=0, pad_token="!")
    backend.save(str(directory / "tokenizer.json"))
    tokenizer, pair, _ = pair_of(directory, tmp_path)
    assert len(pair.prompt) > 4 and pieces(tokenizer, pair.chosen) == ["hello", "<|eot_id|>"]


def test_masks_come_from_lengths(tmp_path):
    """Where the end token is the pad too, it is scored all the same."""
    tokenizer, pair, _ = pair_of(llama3(tmp_path / "model", pad_token="<|eot_id|>"), tmp_path)
    pack = data.collate([pair])
    assert pieces(tokenizer, pack.targets) == ["hello", "<|eot_id|>", "t", "he", "r", "e", "<|eot_id|>"]
    assert pack.chosen_lengths == (2,) and pack.rejected_lengths == (5,)


@pytest.mark.parametrize("make", [llama3, mistral])
def test_pieces_add_up_to_the_text(make, tmp_path):
    tokenizer = load_tokenizer(make(tmp_path / "model"))
    text = " hello é😀\nx hello"
    ids = tokenizer.encode(["x" + text])[0]
    parts = tokenizer.pieces(ids)
    assert len(parts) == len(ids) and "".join(parts).lstrip() == "x" + text
    assert "é" in parts and "😀" in parts and " hello" in parts and parts[parts.index("😀") - 1] == ""
    cut = tokenizer.encode(["😀"])[0][:-1]
    assert len(tokenizer.pieces(cut)) == len(cut)


def test_vocabularies_are_compared_piece_by_piece(tmp_path):
    one, same = (load_tokenizer(llama3(tmp_path / name)) for name in "ab")
    same_vocabulary(one, same)
    assert one.digest == same.digest
    other = load_tokenizer(llama3(tmp_path / "c", words=("hello", " hello", " there", "ĊĊ", "more")))
    with pytest.raises(BadInput, match="ids mean other pieces"):
        same_vocabulary(one, other)


def test_vocabularies_of_one_size_may_differ(tmp_path):
    one = load_tokenizer(llama3(tmp_path / "a", words=("hello", " there")))
    other = load_tokenizer(llama3(tmp_path / "b", words=(" there", "hello")))
    assert one.vocab_size == other.vocab_size and one.digest != other.digest
    with pytest.raises(BadInput) as error:
        same_vocabulary(one, other)
    assert str(error.value) == (
        f"{tmp_path / 'b'}: its tokenizer is not that of {tmp_path / 'a'}: 9 ids mean other pieces, the "
        "first 256, 'Ġt' against 'he'; a guide must share the policy's tokenizer"
    )
