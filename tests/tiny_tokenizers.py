"""Tokenizers and chat templates of three kinds, small enough to read, and rows for them."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LLAMA3 = """{{- bos_token }}{% for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
DATED = LLAMA3.replace("bos_token }}", "bos_token + 'Today: ' + strftime_now('%d %b %Y') + '\n' }}")
MISTRAL_V1 = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}
{{- ' [INST] ' + message.content + ' [/INST]' }}{% else %}
{{- ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""
MISTRAL_V3 = MISTRAL_V1.replace("' [INST] '", "'[INST] '").replace("' [/INST]'", "'[/INST]'")
SIMPO_MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}
{{- '[INST] ' + message.content.strip() + ' [/INST]' }}{% else %}
{{- ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
PLAIN = """{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
CHATML = "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
QWEN25 = """{% if messages[0].role != 'system' %}
{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}{% for message in messages %}
{{- CHATML }}{% endfor %}{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}{% endif %}""".replace("{{- CHATML }}", CHATML.replace("{{", "{{-"))
# Reasoning stands in a block of its own, an empty one where there is none; of earlier turns it is left out.
QWEN3 = """{% for message in messages %}{% if message.role == 'assistant' %}
{%- set parts = message.content.split('</think>') %}
{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}
{{- '<|im_start|>assistant\n' }}{% if loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- parts[-1].lstrip('\n') + '<|im_end|>\n' }}{% else %}
{{- CHATML }}{% endif %}{% endfor %}{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}""".replace("{{- CHATML }}", CHATML.replace("{{", "{{-"))
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}{% for message in messages %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- message.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}
{{- '<start_of_turn>model\n' }}{% endif %}"""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pieces_and_merges(start, words, space):
    """A vocabulary that holds each word whole: its letters, and merges from the left."""
    words = [word.replace(" ", space) for word in words]
    pieces, merges = dict.fromkeys([*start, *"".join(words)]), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                merges.append((word[: end - 1], word[end - 1]))
                pieces[word[:end]] = None
    return {piece: i for i, piece in enumerate(pieces)}, merges


def write(directory, backend, config):
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


LLAMA3_CONTROL = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()


def llama3(
    directory, template=LLAMA3, words=("hello", " hello", " there", "ĊĊ"), control=LLAMA3_CONTROL, added=(), **config
):
    """Byte-level BPE whose control tokens follow the pieces, as Llama 3 has it. added: tokens that control nothing."""
    vocabulary, merges = pieces_and_merges(sorted(pre_tokenizers.ByteLevel.alphabet()), words, "Ġ")
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in added])
    begin = backend.token_to_id(control[0])
    backend.post_processor = processors.TemplateProcessing(  # which add_special_tokens would apply
        single=f"{control[0]} $A", special_tokens=[(control[0], begin)]
    )
    named = {"bos_token": control[0], "eos_token": control[1], "chat_template": template}
    return write(directory, backend, named | config)


def qwen(directory, template):
    """Byte-level BPE as well; <|im_end|> ends a turn, and no text begins with a token of its own."""
    control, added = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"], ["<think>", "</think>"]
    return llama3(directory, template, control=control, added=added, bos_token=None)


def mistral(directory, template=MISTRAL_V1, control=(), words=("▁hello", "▁there", "INST"), **config):
    """SentencePiece's BPE: a dummy space before each stretch of text, and bytes for what has no piece."""
    start = ["<unk>", "<s>", "</s>", *control, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary, merges = pieces_and_merges([*start, *"abcdefghijklmnopqrstuvwxyz[]/"], words, "▁")
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in start[: 3 + len(control)]])
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    return write(directory, backend, named | config)


def row(prompt="Hi", chosen="hello", rejected="there", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def write_rows(path, *rows):
    """Rows as .jsonl or .json; strings and bytes are written as they stand, a line each."""
    lines = [row if isinstance(row, (bytes, str)) else json.dumps(row) for row in rows]
    lines = [line.encode() if isinstance(line, str) else line for line in lines]
    Path(path).write_bytes(b"\n".join(lines) + b"\n")
    return Path(path)
