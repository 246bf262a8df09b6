"""Chat tokenizers: a tokenizer.json with its named tokens and chat template, text to ids and back."""

import contextlib
import functools
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import tokenizers

from files.errors import BadInput, BadRow, brief
from files.rows import open_file, read_object
from files.template import THINK, ChatTemplate

TRIAL = Path(__file__).with_name("trial.py")
LARGEST_VOCABULARY, LARGEST_TEMPLATE = 1 << 28, 1 << 24  # bytes
_tried = set()  # digests of the tokenizer.json that stood the trial
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTokenizer:
    """A tokenizer.json with its named tokens and chat template; `load_tokenizer` makes one."""

    def __init__(self, directory, backend, tokens, template, template_name):
        self.directory, self.backend, self.tokens = directory, backend, tokens
        self.template, self.template_name = template, template_name
        self.vocabulary = backend.get_vocab()  # piece -> id
        self.vocab_size = max(self.vocabulary.values()) + 1
        self.longest = max(map(len, self.vocabulary))  # most characters a token stands for
        special = {
            token.content: i
            for i, token in backend.get_added_tokens_decoder().items()
            if token.content and (token.special or token.content in tokens.values())
        }
        self.control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        special.pop(getattr(backend.model, "unk_token", None), None)  # its id may stand for any text
        self.is_control = np.zeros(self.vocab_size, bool)  # [V]
        self.is_control[list(special.values())] = True

    @functools.cached_property
    def digest(self):
        """SHA-256 of pieces, named tokens and template, in hexadecimal."""
        parts = [sorted(self.vocabulary.items()), self.tokens, self.template]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @functools.cached_property
    def end_ids(self):
        """The ids that end the assistant's turn: the template's end-of-turn token, and eos."""
        prompt, reply = [{"role": "user", "content": "Hi"}], "Hello"
        with ChatTemplate(self) as template:
            _, end = self.scored(*template.render(prompt, [reply]), reply)
        return {end, self.vocabulary.get(self.tokens.get("eos_token"), end)}

    def decode(self, ids):
        """The text of token ids, control tokens included."""
        with self.panics("decode the tokens"):
            return self.backend.decode(list(map(int, ids)), skip_special_tokens=False)

    def pieces(self, ids):
        """The text that each token adds; of tokens that share a character the last has it, the others ''."""
        anchor = self.encode(["x"])[0][-1:]  # keeps a first space from being cut
        known = len(self.decode(anchor))
        texts = []
        start = 0  # the first token whose character is not complete
        for end in range(1, len(ids) + 1):
            text = self.decode([*anchor, *ids[start:end]])[known:]
            if text.endswith("\ufffd") and end - start < 4 and end < len(ids):
                text = ""  # the character goes on in the next token: it has four bytes at most
            else:
                start = end
            texts.append(text)
        return texts

    def prompt_ids(self, messages):
        """The ids that inference feeds: transformers' apply_chat_template(…, add_generation_prompt=True)."""
        with ChatTemplate(self) as template:
            return self.encode(template.render(messages))[0]

    def scored(self, prompt, dialogue, reply):
        """What a reply is trained on: (the text after the prompt that is scored, the id that ends it). Raises BadRow.

        The template writes the dialogue as [prompt][lead][reply][tail][end token][rest]. Scored are lead, reply and
        end token (eos where the template has none). Blanks that the template adds as a tail are not: at
        inference the turn ends right behind the reply. A reply that begins with <think> is scored as it is, however
        the template would lay its reasoning out.
        """
        after = dialogue[len(prompt) :]
        core = reply.strip()
        end = self.control.search(after)
        end_id = self.vocabulary.get(end[0] if end else self.tokens.get("eos_token"))
        body = after[: end.start()] if end else after  # [lead][reply][tail]
        lead = len(body) - len(body.lstrip())
        text, tail = body[: lead + len(core)], body[lead + len(core) :]
        if core.startswith(THINK) and body.lstrip().startswith(THINK):
            text, lead, tail = core, 0, ""
        if not prompt or not dialogue.startswith(prompt):
            fault = "changes the prompt: with a response, the conversation does not begin with what inference feeds"
        elif text[lead:] != core and body.lstrip().startswith(THINK):
            fault = (
                f"writes {brief(body[: body.find(core)])!r} before a response without reasoning, which cannot stand in "
                "the prompt: the other response begins with <think>, or the template has no enable_thinking"
            )
        elif text[lead:] != core and core in after:
            found = brief(after[: after.find(core)])
            fault = f"writes no generation prompt: {found!r} stands before the response"
        elif text[lead:] != core:
            fault = "drops or changes the response: it is not what follows the prompt"
        elif tail.strip():
            fault = f"ends the turn with text: {brief(tail)!r} is no control token of the tokenizer"
        elif end_id is None:
            fault = "ends no turn: no control token stands behind the response, and the tokenizer has no eos_token"
        else:
            blanks = reply[len(reply.rstrip()) :]  # the reply's own, which some templates keep
            return (text + blanks if tail.startswith(blanks) else text), end_id
        raise BadRow(f"chat template {fault} ({self.template_name})")

    def encode(self, texts):
        """Token ids of each text, [list of ids], without a BOS of the tokenizer's own. Raises BadRow."""
        with self.panics("encode the text"):
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    @contextlib.contextmanager
    def panics(self, what):
        """What the tokenizers library raises, bare Exceptions and panics that are not even those, as a BadRow."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BadRow(f"tokenizer cannot {what}: {brief(error)} ({self.directory}/tokenizer.json)") from None

    def encode_after(self, prompt, replies):
        """Token ids of a prompt and of replies behind it, and how many were encoded apart: (ids, [ids], int).

        Prompt and reply are encoded as one text. Where a token then reaches across the boundary, the prompt keeps
        the ids that inference feeds, and the reply is encoded as if it followed other text.
        """
        controls = [found.start() for found in self.control.finditer(prompt)]
        tail = prompt[controls[-1] :] if controls else prompt  # what stands before a control token changes no id behind
        ids, before, *joint = self.encode([prompt, tail, *(tail + reply for reply in replies)])
        responses, apart = [], 0
        for both, reply in zip(joint, replies):
            if both[: len(before)] == before:
                responses.append(both[len(before) :])
            else:
                responses.append(self.continuation(reply))
                apart += 1
        return ids, responses, apart

    def continuation(self, text):
        """Token ids of text in the middle of other text: no BOS and no dummy space stands before it."""
        for anchor in ("\n", "x", "."):
            before, joint = self.encode([anchor, anchor + text])
            if joint[: len(before)] == before:
                return joint[len(before) :]
        return self.encode([text])[0]


def load_tokenizer(directory, chat_template=None):
    """Reads tokenizer.json, the named tokens and the chat template of a model directory into a ChatTokenizer.

    chat_template: a file to use in place of the tokenizer's own. A tokenizer without a template loads, and is
    refused when something is to be rendered. Raises BadInput.
    """
    directory = Path(directory)
    with open_file(directory / "tokenizer.json", LARGEST_VOCABULARY) as file:
        content = file.read()
        try_out(content, file.name)
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exceptions
            raise BadInput(f"{file.name}: the tokenizers library cannot read it: {brief(error)}") from None
    vocabulary = backend.get_vocab()
    if not 0 < max(vocabulary.values(), default=0) < 1 << 24:
        raise BadInput(f"{directory / 'tokenizer.json'}: has no pieces, or ids beyond 16 million")
    backend.no_truncation()
    backend.no_padding()
    tokens, template = named_tokens(directory)
    name = directory / "tokenizer_config.json"
    file = Path(chat_template or directory / "chat_template.jinja")
    if chat_template or file.exists():
        with open_file(file, LARGEST_TEMPLATE) as opened:
            try:
                template, name = opened.read().decode("utf-8-sig"), file
            except UnicodeDecodeError:
                raise BadInput(f"{file}: is no chat template: not UTF-8") from None
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    plain = [token for token in tokens.values() if token in vocabulary and token not in added]
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in plain])
    return ChatTokenizer(directory, backend, tokens, template, name)


def try_out(content, name):
    """Raises BadInput where the tokenizers library panics with the bytes of a tokenizer.json, or takes for ever."""
    digest = hashlib.sha256(content).digest()
    if digest in _tried:
        return
    done = subprocess.run([sys.executable, "-P", str(TRIAL)], input=content, capture_output=True)
    fault = brief(done.stdout.decode(errors="replace"))
    if done.returncode and not fault:
        fault = f"a few lines of text take more than 20 seconds or 4 GiB (it ended with status {done.returncode})"
    if fault:
        raise BadInput(f"{name}: the tokenizers library fails on it: {fault}; fetch the model's own anew")
    _tried.add(digest)


def named_tokens(directory):
    """What tokenizer_config.json says: {kind: token}, and the default chat template or None."""
    name = directory / "tokenizer_config.json"
    config, older = read_object(name), read_object(directory / "special_tokens_map.json")
    tokens = {}
    for kind in TOKENS:
        token = older.get(kind) if config.get(kind) is None else config[kind]
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            tokens[kind] = token
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
    if isinstance(template, dict):
        if "default" not in template:
            raise BadInput(f"{name}: none of its chat templates is named default; --chat-template gives one")
        template = template["default"]
    try:
        for text in (*tokens.values(), template or ""):
            text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise BadInput(f"{name}: its named tokens and chat template must be text") from None
    return tokens, template


def same_vocabulary(a, b):
    """Raises BadInput unless the vocabularies of two ChatTokenizers are the same, piece by piece."""
    pieces_a, pieces_b = ({i: piece for piece, i in tokenizer.vocabulary.items()} for tokenizer in (a, b))
    other = [i for i in sorted(pieces_a.keys() | pieces_b.keys()) if pieces_a.get(i) != pieces_b.get(i)]
    if other:
        first_a, first_b = (brief(repr(pieces.get(other[0]))) for pieces in (pieces_a, pieces_b))
        raise BadInput(
            f"{b.directory}: its tokenizer is not that of {a.directory}: {len(other)} ids mean other pieces, "
            f"the first {other[0]}, {first_b} against {first_a}; a guide must share the policy's tokenizer"
        )
