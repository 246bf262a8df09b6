"""Tiny random checkpoints, a byte tokenizer and preference pairs, made in a second, for whole runs in the tests."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONTROL = ["<|begin|>", "<|head|>", "<|end_head|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|end_head|>{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|end_head|>{% endif %}"
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
GEMMA2 = {  # with caps, a scale and a window that show in these sizes
    "head_dim": 6,
    "query_pre_attn_scalar": 3,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 2.0,
    "sliding_window": 6,
    "tie_word_embeddings": True,
    "pad_token_id": None,  # transformers would not train its embedding
}
KINDS = {
    "llama": ("Llama", {}, {}),
    "sharded llama3 rope": ("Llama", {"rope_parameters": LLAMA3}, {"max_shard_size": "30KB"}),
    "tied": ("Llama", {"tie_word_embeddings": True}, {}),
    "mistral window": ("Mistral", {"sliding_window": 6}, {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, {}),
    "qwen3": ("Qwen3", {"head_dim": 6, "tie_word_embeddings": True}, {}),
    "gemma2": ("Gemma2", GEMMA2, {"max_shard_size": "30KB"}),
}


def make_tokenizer(directory):
    """One token a byte, and four control tokens: 260 pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin|>",
                "eos_token": "<|end|>",
                "chat_template": TEMPLATE,
            }
        )
    )


def make_checkpoint(directory, kind="llama", seed=0, **changes):
    """A random model of transformers with the tokenizer, in Hugging Face layout. Returns the directory as str.
    Skips the test that asked for it where transformers is not installed."""
    transformers = pytest.importorskip("transformers")
    family, own, save = KINDS[kind]
    config = getattr(transformers, family + "Config")(
        **{
            "vocab_size": 260,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 256,
            "eos_token_id": 259,
        }
        | own
        | changes
    )
    torch.manual_seed(seed)
    net = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.8, 1.2)
    net.save_pretrained(directory, **save)
    make_tokenizer(directory)
    return str(directory)


def make_pairs(path, count, seed=0, longest=30):
    """A .jsonl of `count` preference rows of random words. Returns the path as str."""
    rng = random.Random(seed)
    text = lambda most: "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(3, most))).strip() or "a"
    rows = [{"prompt": text(15), "chosen": text(longest) + "x", "rejected": text(longest) + "y"} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
