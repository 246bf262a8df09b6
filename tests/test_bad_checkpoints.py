"""Checkpoints that strangers made: each is refused with one line that says what and where."""

import json
import os
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from files.errors import BadInput
from files.export import save_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
GEMMA2, QWEN3 = ({"architectures": [f"{name}ForCausalLM"]} for name in ("Gemma2", "Qwen3"))
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def good(tmp_path):
    net = model.random_model(model.parse_config(CONFIG))
    directory = tmp_path / "m"
    save_model(
        str(directory),
        CONFIG,
        {n: tuple(p.shape) for n, p in net.named_parameters()},
        iter(net.named_parameters()),
        torch.float32,
    )
    model.load_model(directory)
    return directory


def refused(directory, words):
    """By the header check, or, for what only the values show, by loading; in one line with these words."""
    with pytest.raises(BadInput, match=words) as caught:
        model.check(str(directory))
        model.load_model(str(directory))
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def configure(directory, **changes):
    raw = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "gone"}))


def retensor(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def shard(directory, names):
    """Move the weights into one shard and name it by `names` in an index."""
    os.rename(directory / WEIGHTS, directory / "a.safetensors")
    tensors = load_file(directory / "a.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": {t: names.get(t, "a.safetensors") for t in tensors}}))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"architectures": "gone", "model_type": "gone"},
            "architecture None is not supported; supported are LlamaForCausalLM, Mistral",
        ),
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture .'GPT2LMHeadModel'. is not supported"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "'Qwen3MoeForCausalLM'. is not supported; .*, Gemma2ForCausalLM$"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "'Gemma3ForConditionalGeneration'. is not supported"),
        ({"architectures": ["Llama4ForConditionalGeneration"]}, "'Llama4ForConditionalGeneration'. is not supported"),
        ({"architectures": "gone", "model_type": "qwen3_moe"}, "architecture 'qwen3_moe' is not supported"),
        ({"architectures": "LlamaForCausalLM"}, "is not supported"),
        ({"hidden_size": "gone"}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, where a positive whole number"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than any model has"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 3}, "hidden_size 8 is no multiple of num_attention_heads 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads 2 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 3}, "head_dim is 3; RoPE turns pairs"),
        ({"vocab_size": "17"}, "vocab_size is '17'"),
        ({"vocab_size": 1e30}, "vocab_size is 1e"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu"),
        (GEMMA2 | {"hidden_act": "silu"}, "hidden_act is 'silu'; only gelu_pytorch_tanh"),
        (GEMMA2 | {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; only gelu_pytorch_tanh"),
        (GEMMA2 | {"final_logit_softcapping": 0}, "final_logit_softcapping is 0"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention is true; only causal"),
        (
            QWEN3 | {"layer_types": ["chunked_attention"]},
            "layer_types is .'chunked_attention'.; .* full_attention, sliding_",
        ),
        (QWEN3 | {"layer_types": []}, "layer_types is ..; for each of 1 layers"),
        (QWEN3 | {"max_window_layers": -1}, "max_window_layers is -1"),
        (QWEN3 | {"use_sliding_window": "no"}, "use_sliding_window is 'no'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope type 'yarn' is not supported; supported are default",
        ),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": "linear"}, "no object"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised, which is not supported"),
    ],
)
def test_configurations(good, changes, words):
    configure(good, **changes)
    refused(good, words)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "no JSON object"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_config_files(good, content, words):
    os.remove(good / "config.json")
    if content is not None:
        (good / "config.json").write_bytes(content)
    refused(good, f"config.json: .*{words}")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:7f5e\nsize 648307032\n"


@pytest.mark.parametrize(
    "content, words",
    [
        (LFS, "a Git LFS pointer, not the weights; run `git lfs pull`"),
        (b"<!DOCTYPE html><html>gated</html>", "a page of HTML"),
        (b"\n <html>", "a page of HTML"),
        (b"PK\x03\x04 archive of torch.save", "a pickle under a safetensors name"),
        (b"\x80\x02}q\x00.", "a pickle under a safetensors name"),
        (b"", "truncated"),
        (
            struct.pack("<Q", 101 << 20) + b"{" + b" " * 600,
            "its header says 105906176 bytes, more than safetensors allows",
        ),
        (struct.pack("<Q", 5000) + b"{" + b" " * 600, "truncated in its header"),
        (struct.pack("<Q", 4) + b'{"a"', "no safetensors file"),
        (b"\0" * 4096, "no safetensors file"),
    ],
)
def test_files_that_are_no_safetensors(good, content, words):
    (good / WEIGHTS).write_bytes(content)
    refused(good, f"{WEIGHTS}: .*{words}")


def padded(good, length):
    """One tensor in a file of its own, whose header is filled up to `length` bytes: its first bytes, the length, are
    those that a pickle, a page of HTML or a zip begins with."""
    shard(good, {Q: "b.safetensors"})
    values = load_file(good / "a.safetensors")[Q].numpy().tobytes()
    header = json.dumps({Q: {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, len(values)]}}, separators=(",", ":"))
    (good / "b.safetensors").write_bytes(struct.pack("<Q", length) + header.encode().ljust(length) + values)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 15392, 19280])
def test_a_header_whose_length_looks_like_another_files_first_bytes(good, length):
    padded(good, length)
    model.check(good)
    assert torch.equal(model.load_model(good).get_parameter(Q), load_file(good / "a.safetensors")[Q])
    whole = (good / "b.safetensors").read_bytes()
    (good / "b.safetensors").write_bytes(whole[:-100])
    refused(good, "b.safetensors: no safetensors file, or a truncated one")
    (good / "b.safetensors").write_bytes(whole[:300])
    refused(good, "b.safetensors: truncated in its header")


def test_a_truncated_file(good):
    whole = (good / WEIGHTS).read_bytes()
    (good / WEIGHTS).write_bytes(whole[:-100])
    refused(good, f"{WEIGHTS}: no safetensors file, or a truncated one")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.pth"])
def test_only_pickles(good, name):
    os.rename(good / WEIGHTS, good / name)
    refused(good, f"no safetensors weights: only {name}, a pickle, which can run code")


def test_no_weights_at_all(good):
    os.remove(good / WEIGHTS)
    refused(good, "no safetensors weights: neither model.safetensors nor")


def test_sizes_are_looked_at_first(good):
    os.truncate(good / "config.json", 2**30)
    with pytest.raises(BadInput, match="config.json: has 1074 MB, more than such a file ever has"):
        model.read_config(good)


def test_fifos_and_devices_are_not_opened(good):
    os.remove(good / WEIGHTS)
    os.mkfifo(good / WEIGHTS)
    refused(good, "no regular file")
    os.remove(good / WEIGHTS)
    os.symlink("/dev/zero", good / WEIGHTS)
    refused(good, "no regular file")
    os.remove(good / "config.json")
    os.mkfifo(good / "config.json")
    refused(good, "config.json: no regular file")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(Q), f"the tensor {Q} is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "the tensor extra has no place in the model"),
        (lambda t: t.update({Q: torch.zeros(8, 9)}), rf"{Q} has shape \[8, 9\], but config.json makes it \[8, 8\]"),
        (lambda t: t.update({Q: torch.zeros(8)}), rf"{Q} has shape \[8\]"),
        (lambda t: t.update({Q: torch.zeros(8, 8, dtype=torch.int8)}), f"{Q} is of type I8; supported are BF16"),
        (lambda t: t.update({Q: torch.zeros(8, 8).to(torch.float8_e4m3fn)}), f"{Q} is of type F8_E4M3"),
        (lambda t: t[Q].fill_(float("inf")), f"{Q} holds values that are not finite"),
        (lambda t: t[Q][7].fill_(float("nan")), f"{Q} holds values that are not finite"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing, though config.json does not tie the head"),
    ],
)
def test_tensors(good, change, words):
    retensor(good, change)
    refused(good, words)


def test_a_tied_head_that_is_stored_must_be_the_embedding(good):
    configure(good, tie_word_embeddings=True)
    refused(good, "lm_head.weight differs from model.embed_tokens.weight, though config.json ties them")
    retensor(good, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model.load_model(good)


def test_frequency_tables_of_early_llamas_are_known(good):
    retensor(good, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    model.load_model(good)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "a\0b", "..", "", "x\\a"])
def test_an_index_names_only_files_in_its_directory(good, name):
    shard(good, {Q: name})
    refused(good, "leaves the directory; only files in it are read")


def test_an_index_that_does_not_fit(good):
    shard(good, {})
    model.load_model(good)
    (good / INDEX).write_text(json.dumps({"weight_map": {Q: "b.safetensors"}}))
    refused(good, "b.safetensors: No such file or directory; the checkpoint is incomplete")
    tensors = load_file(good / "a.safetensors")
    (good / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "ghost"], "a.safetensors")}))
    refused(good, "'ghost' is not in a.safetensors, where the index puts it")
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]"):
        (good / INDEX).write_text(content)
        refused(good, re.escape(INDEX))


def test_mutated_configs_and_headers_give_one_line_or_load(good):
    """A short, seeded form of the fuzzing in tests/fuzz_checkpoints.py."""
    from fuzz_checkpoints import fuzz

    assert fuzz(good, seed=0, rounds=150) == 150
