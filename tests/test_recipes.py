"""recipes/*.toml: each is understood, is what the paper says where it says so, and fits its eight GPUs."""

import pathlib

import pytest
import torch

import model
from runtime import memory, options

RECIPES = pathlib.Path(__file__).resolve().parent.parent / "recipes"
AUTHORS = "mk1111/{}-ultrafeedback{}"
# What config.json of each model says beyond the defaults; and the authors' data set, in the paper's rows.
LLAMA = {"architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA_8B = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3B = LLAMA | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "tie_word_embeddings": True,
}
GEMMA_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 256000,
}
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
MISTRAL_7B = LLAMA_8B | {"architectures": ["MistralForCausalLM"], "sliding_window": None, "vocab_size": 32000}
KNOWN = {  # recipe: model, its configuration, billions of parameters, data
    "llama-3-8b-instruct": ("Meta-Llama-3-8B-Instruct", LLAMA_8B, 8.030, AUTHORS.format("llama3-8b-instruct", "")),
    "llama-3-8b-lora": ("Meta-Llama-3-8B-Instruct", LLAMA_8B, 8.030, AUTHORS.format("llama3-8b-instruct", "")),
    "llama-3-8b-instruct-armorm": (
        "Meta-Llama-3-8B-Instruct",
        LLAMA_8B,
        8.030,
        AUTHORS.format("llama3-8b-instruct", "-armorm"),
    ),
    "llama-3.2-3b-instruct": (
        "Llama-3.2-3B-Instruct",
        LLAMA_3B,
        3.213,
        AUTHORS.format("llama3.2-3b-instruct", "-armorm"),
    ),
    "gemma-2-2b-it": ("gemma-2-2b-it", GEMMA_2B, 2.614, AUTHORS.format("gemma2-2b-it", "-armorm")),
    "qwen2.5-7b-instruct": ("Qwen2.5-7B-Instruct", QWEN_7B, 7.616, "HuggingFaceH4/ultrafeedback_binarized:train_prefs"),
    "mistral-7b-instruct": (
        "Mistral-7B-Instruct-v0.2",
        MISTRAL_7B,
        7.242,
        "princeton-nlp/mistral-instruct-ultrafeedback:train",
    ),
}
PAPER = {
    "loss": "tgdpo",
    "beta": 0.1,
    "alpha": 0.5,
    "lr": 7e-7,
    "epochs": 1,
    "batch_size": 128,
    "warmup_ratio": 0.1,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 2048,
    "max_prompt_length": 1800,
    "dtype": "bfloat16",
}


def test_every_recipe_is_known():
    assert {path.stem for path in RECIPES.glob("*.toml")} == KNOWN.keys()


@pytest.mark.parametrize("name", KNOWN)
def test_a_recipe_is_the_papers_and_fits(name):
    """Its plan on eight GPUs of 80 GB: micro-batches that hold the longest pair, within their share."""
    text, (known, raw, billions, data) = (RECIPES / f"{name}.toml").read_text(), KNOWN[name]
    assert f"--config recipes/{name}.toml" in text and "Ours" in text
    found = options.resolve(["--config", str(RECIPES / f"{name}.toml")])
    assert found.model.split("/")[1] == known and found.data == (data,)
    numbers, ranks = (PAPER | {"lr": 7e-6}, 1) if found.lora_rank else (PAPER, 8)
    assert {option: getattr(found, option) for option in PAPER} == numbers
    config, longest = model.parse_config(raw), 2 * 2048
    with torch.device("meta"):
        assert round(sum(p.numel() for p in model.CausalLM(config).parameters()) / 1e9, 3) == billions
    plan = memory.make(config, found, ranks, "cuda", 2, longest, 80 * 10**9)
    assert plan.micro_tokens >= longest and sum(plan.parts.values()) <= memory.SHARE * plan.room
