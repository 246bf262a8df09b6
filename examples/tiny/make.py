"""Makes everything in this folder: python -m examples.tiny.make   (a few minutes on one core)

A byte-level BPE tokenizer is trained on text of the grammar (language.py), a small Llama is pretrained on it with
plain next-token cross-entropy, in the chat format, and preference pairs are sampled from that Llama and labelled
by Bradley-Terry with the gold reward. Everything follows from the seed: on the same machine, with the same torch,
a second run writes the same bytes. Another CPU may round otherwise, and then sample other pairs.
"""

import argparse
import itertools
import json
import math
import random
import tempfile
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import model
from examples.tiny import language
from files.export import save_model
from files.template import ChatTemplate
from files.tokenizer import load_tokenizer
from runtime import sampling

HERE = Path(__file__).parent
CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Llama 3's: a line break never joins the word after it, so prompt and response meet at a token's edge.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
END = CONTROL.index("<|eot_id|>")
VOCABULARY = 640
LONGEST_REPLY = 48  # tokens, in samples
TEMPERATURE = 0.8  # of the samples, as the authors drew theirs
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": END,
    "torch_dtype": "float32",
}


def make_tokenizer(directory, rng):
    """Trains the tokenizer on grammar text and writes tokenizer.json and tokenizer_config.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROL),
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    questions = language.questions()
    text = [question for question, _ in questions]
    text += [language.reply(rng, kind) for _, kind in questions]
    tokenizer.train_from_iterator(text + ["user\n\n", "assistant\n\n"] * len(text), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CONTROL[0],
        "eos_token": CONTROL[3],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class Speaker:
    """Text to ids and back: a question as data.py renders it for inference, and the reply's own ids behind it."""

    def __init__(self, directory):
        tokenizer = self.tokenizer = load_tokenizer(str(directory))
        questions = [question for question, _ in language.questions()]
        with ChatTemplate(tokenizer) as template:
            texts = [template.render([{"role": "user", "content": question}])[0] for question in questions]
        self.prompts = dict(zip(questions, tokenizer.encode(texts)))  # question -> ids

    def replies(self, texts):
        """The ids of each reply, its end-of-turn token included."""
        return [ids + [END] for ids in self.tokenizer.encode(texts)]

    def texts(self, replies):
        """The text of each sampled reply, or None where it cannot stand in the data: it is cut, holds a control
        token, is empty or padded with space, or has other ids than its text."""
        texts = [self.tokenizer.decode(ids[:-1]) for ids in replies]
        return [
            text if text == text.strip() != "" and again == ids and not self.tokenizer.control.search(text) else None
            for text, ids, again in zip(texts, replies, self.replies(texts))
        ]


def pretrain(speaker, rng, steps, batch=32, lr=3e-3):
    """A Llama of CONFIG's shape trained on `steps` batches of fresh grammar text by next-token cross-entropy
    of the replies."""
    network = model.random_model(model.parse_config(CONFIG), seed=rng.getrandbits(32))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    questions = language.questions()
    for step in range(steps):
        drawn = rng.choices(questions, k=batch)
        replies = speaker.replies([language.reply(rng, kind) for _, kind in drawn])
        prompts = [speaker.prompts[question] for question, _ in drawn]
        tokens = pad_sequence([torch.tensor(a + b) for a, b in zip(prompts, replies)], True)  # [B, T]
        targets = pad_sequence([torch.tensor([-100] * len(a) + b) for a, b in zip(prompts, replies)], True, -100)
        loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), targets[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"pretraining: step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)
    return network


def preference_pairs(network, speaker, questions, rng, batch=256):
    """Pairs sampled from `network`, at most one a question: rows {"prompt", "chosen", "rejected"}.

    Two replies to a question are drawn at TEMPERATURE, and Bradley-Terry on their gold rewards says which one is
    chosen: sigma(gold(first) - gold(second)) is the chance of the first. A question is passed over where the two
    replies are equal, or one of them is cut or no text that reads back as the same tokens.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    for start in range(0, len(questions), batch):
        asked = questions[start : start + batch]
        twice = [speaker.prompts[question] for question in asked for _ in range(2)]
        texts = speaker.texts(sampling.generate(network, twice, LONGEST_REPLY, {END}, TEMPERATURE, generator))
        for question, first, second in zip(asked, texts[::2], texts[1::2]):
            if first is None or second is None or first == second:
                continue
            margin = language.gold_reward(first) - language.gold_reward(second)
            if rng.random() >= 1 / (1 + math.exp(-margin)):
                first, second = second, first
            yield {"prompt": question, "chosen": first, "rejected": second}


def make(out, seed=0, steps=2500, pairs=3072, held_out=256):
    """Writes model/, train.jsonl and held_out.jsonl into `out`; no question stands in both files."""
    torch.set_num_threads(1)
    out, rng = Path(out), random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        make_tokenizer(Path(scratch), rng)
        speaker = Speaker(scratch)
        network = pretrain(speaker, rng, steps)
        shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
        files = [(str(Path(scratch) / name), name) for name in ("tokenizer.json", "tokenizer_config.json")]
        save_model(str(out / "model"), CONFIG, shapes, network.named_parameters(), torch.float32, files)
    questions = [question for question, _ in language.questions()]
    rng.shuffle(questions)
    made = itertools.islice(preference_pairs(network, speaker, questions, rng), pairs + held_out)
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in made]
    if len(rows) < pairs + held_out:
        raise SystemExit(f"make.py: only {len(rows)} pairs for {pairs} + {held_out}; ask for fewer, or train longer")
    (out / "train.jsonl").write_text("".join(rows[:pairs]), encoding="utf-8")
    (out / "held_out.jsonl").write_text("".join(rows[pairs:]), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Makes the tiny example: the model, its tokenizer and the pairs.")
    parser.add_argument("--out", default=HERE, help="where to write [this folder]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500, help="of pretraining [2500]")
    parser.add_argument("--pairs", type=int, default=3072, help="to train on [3072]")
    parser.add_argument("--held-out", type=int, default=256, help="to evaluate on [256]")
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
