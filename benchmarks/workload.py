"""What every contender is given: the model's shape, the pairs, and the count of their tokens and FLOPs.

The lengths follow on-policy UltraFeedback: prompts with median 110 and mean 178 tokens, responses of 400 and 400
on average that differ within a pair, so that a pair is 978 tokens with its prompt once, 1156 unpadded, 1298 padded
to its longer response, 1947 padded in fours.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_ROPE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
# The 1B shape at an eighth of its width, for a CPU.
LLAMA_256 = LLAMA_3_2_1B | {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16384,
}
# The least that exercises every path: for tests.
LLAMA_TINY = LLAMA_256 | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "vocab_size": 643,
}
BOS, EOS = 0, 1


class Pair(NamedTuple):
    """Token ids of one preference, with what is asked of data.Pair."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    source: str
    weight: float = 1.0
    scored = property(lambda self: len(self.chosen) + len(self.rejected))
    packed = property(lambda self: len(self.prompt) + self.scored - 2)


def make_pairs(count, vocab, divisor=1, seed=0, longest=2048):
    """Random pairs with UltraFeedback's lengths over `divisor`; a prompt begins with BOS, a response ends with EOS."""
    random = np.random.RandomState(seed)
    normal = random.standard_normal((4, count))
    prompts = np.exp(math.log(110) + 0.981 * normal[0])
    of_prompt = 0.36 * normal[1]  # what both responses of a prompt have in common
    responses = 356 * np.exp(of_prompt + 0.32 * normal[2:])
    pairs = []
    for row, (P, C, R) in enumerate(zip(prompts / divisor, *(responses / divisor)), 1):
        P = int(np.clip(round(P), 2, longest * 7 // 8))
        C, R = (int(np.clip(round(length), 2, longest - P)) for length in (C, R))
        prompt, chosen, rejected = (random.randint(2, vocab, length).astype(np.int32) for length in (P, C, R))
        prompt[0], chosen[-1], rejected[-1] = BOS, EOS, EOS
        pairs.append(Pair(prompt, chosen, rejected, f"random:{row}"))
    return pairs


def lengths(pairs):
    """[B, 3] tokens of prompt, chosen and rejected."""
    return np.array([[len(ids) for ids in pair[:3]] for pair in pairs])


def workload_tokens(pairs):
    """Tokens counted the same for every contender: 2 prompt + chosen + rejected, summed."""
    return int((lengths(pairs) @ [2, 1, 1]).sum())


def write_model(directory, config, seed):
    """A random start N(0, 0.02) in Hugging Face's layout, the same for whoever loads it; `directory` is returned."""
    directory = Path(directory)
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    width, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (width,),
            at + "post_attention_layernorm.weight": (width,),
            at + "self_attn.q_proj.weight": (queries, width),
            at + "self_attn.k_proj.weight": (keys, width),
            at + "self_attn.v_proj.weight": (keys, width),
            at + "self_attn.o_proj.weight": (width, queries),
            at + "mlp.gate_proj.weight": (mlp, width),
            at + "mlp.up_proj.weight": (mlp, width),
            at + "mlp.down_proj.weight": (width, mlp),
        }
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory
