"""Chat tokenizers: a tokenizer.json with its named tokens and chat template, text to ids and back."""

import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import tokenizers

from files.errors import BadInput, BadRow, brief
from files.renderer import Renderer
from files.rows import open_file, read_object

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
        with Renderer(self) as renderer:
            _, end = self.scored(*renderer.render(prompt, [reply]), reply)
        return {end, self.vocabulary.get(self.tokens.get("eos_token"), end)}

    def decode(self, ids):
        """The text of token ids, control tokens included."""
        return self.backend.decode(list(map(int, ids)), skip_special_tokens=False)

    def pieces(self, ids):
        """The text that each token adds; of tokens that share a character the last has it, the others ''."""
        anchor = self.encode(["x"])[0][-1:]  # keeps a first space from being cut
        known, texts, start = len(self.decode(anchor)), [], 0
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
        with Renderer(self) as renderer:
            return self.encode(renderer.render(messages))[0]

    def scored(self, prompt, full, reply):
        """The text after the prompt that is scored, and the id that ends it. Raises BadRow.

        The template writes [lead][reply][tail][end token][rest] after the prompt. Scored are lead, reply and
        end token (eos where the template has none). Blanks that the template adds as a tail are not: at
        inference the turn ends right behind the reply.
        """
        if not prompt or not full.startswith(prompt):
            raise BadRow(
                "chat template changes the prompt: with a response, the conversation does not begin "
                f"with the text that inference feeds ({self.template_name})"
            )
        after, core = full[len(prompt) :], reply.strip()
        end = self.control.search(after)
        body = after[: end.start()] if end else after
        lead = len(body) - len(body.lstrip())
        if not body.startswith(core, lead):
            raise BadRow(
                "chat template "
                + (
                    f"writes no generation prompt: {brief(after[: after.find(core)])!r} stands before the response"
                    if core in after
                    else "drops or changes the response: it is not what follows the prompt"
                )
                + f" ({self.template_name})"
            )
        tail, own = body[lead + len(core) :], reply[len(reply.rstrip()) :]
        if tail.strip():
            raise BadRow(
                f"chat template ends the turn with text: {brief(tail)!r} is no control token of the "
                f"tokenizer ({self.template_name})"
            )
        end = self.vocabulary.get(end[0] if end else self.tokens.get("eos_token"))
        if end is None:
            raise BadRow(
                "chat template ends no turn: no control token stands behind the response, and the "
                f"tokenizer has no eos_token ({self.template_name})"
            )
        return body[: lead + len(core)] + (own if tail.startswith(own) else ""), end

    def encode(self, texts):
        """Token ids of each text, [list of ids], without a BOS of the tokenizer's own. Raises BadInput."""
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:  # bare Exceptions, and panics that are not even those
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BadInput(f"{self.directory}: its tokenizer.json cannot encode: {brief(error)}") from None
        return [encoding.ids for encoding in encodings]

    def encode_after(self, prompts, texts):
        """Ids of texts that follow prompts: [(ids of the prompt, [ids of each text], texts encoded apart)].

        prompts: B strings; texts: B lists of strings. Both are encoded jointly; where a token reaches across
        the boundary the prompt keeps its own ids, and the text is encoded as if it followed something else.
        """
        prompt_ids, starts, wholes = self.encode(prompts), [], []
        for prompt, ids, both in zip(prompts, prompt_ids, texts):
            last = max(np.flatnonzero(self.is_control[ids]), default=0)  # a control token splits the text
            start = prompt.rfind(self.backend.id_to_token(ids[last])) if self.is_control[ids[last]] else 0
            starts.append((last, start) if start > 0 else (0, 0))
            wholes += [prompt[max(start, 0) :] + text for text in both]
        joint, results = iter(self.encode(wholes)), []
        for ids, (last, _), both in zip(prompt_ids, starts, texts):
            known, responses, apart = ids[last:], [], 0
            for text, tokens in zip(both, joint):
                agree = tokens[: len(known)] == known
                responses.append(tokens[len(known) :] if agree else self.continuation(text))
                apart += not agree
            results.append((ids, responses, apart))
        return results

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
    with open_file(directory / "tokenizer.json") as file:
        try:
            backend = tokenizers.Tokenizer.from_buffer(file.read())
        except Exception as error:  # the library raises bare Exceptions
            raise BadInput(f"{file.name}: the tokenizers library cannot read it: {brief(error)}") from None
    vocabulary = backend.get_vocab()
    if not 0 < max(vocabulary.values(), default=0) < 1 << 24:
        raise BadInput(f"{directory / 'tokenizer.json'}: has no pieces, or ids beyond 16 million")
    backend.no_truncation()
    backend.no_padding()
    name = directory / "tokenizer_config.json"
    config, older, tokens = read_object(name), read_object(directory / "special_tokens_map.json"), {}
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
    file = Path(chat_template or directory / "chat_template.jinja")
    if chat_template or file.exists():
        with open_file(file) as opened:
            try:
                template, name = opened.read().decode("utf-8-sig"), file
            except UnicodeDecodeError:
                raise BadInput(f"{file}: is no chat template: not UTF-8") from None
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    plain = [token for token in tokens.values() if token in vocabulary and token not in added]
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in plain])
    return ChatTokenizer(directory, backend, tokens, template, name)


def same_vocabulary(a, b):
    """Raises BadInput unless the vocabularies of two ChatTokenizers are the same, piece by piece."""
    pieces_a, pieces_b = ({i: piece for piece, i in tokenizer.vocabulary.items()} for tokenizer in (a, b))
    other = [i for i in sorted(pieces_a.keys() | pieces_b.keys()) if pieces_a.get(i) != pieces_b.get(i)]
    if other:
        piece_a, piece_b = pieces_a.get(other[0]), pieces_b.get(other[0])
        raise BadInput(
            f"{b.directory}: its tokenizer is not that of {a.directory}: {len(other)} ids mean "
            f"other pieces, the first {other[0]}, {piece_b!r} against {piece_a!r}; a guide must "
            "share the policy's tokenizer"
        )
