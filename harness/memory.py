"""The memory plan: what a rank will hold, from the configuration alone, and what is chosen from it.

Counted in bytes, for FSDP2 with float32 master shards: W ranks share the weights, C is the compute type's width.
"""

from typing import NamedTuple

CPU_TOKENS = 4096           # tokens of a micro-batch on CPU: fixed, so that a run repeats itself on another machine
CUDA_TOKENS = 16384         # and at most on CUDA; larger packs gain nothing
SHARE = 0.85                # of a GPU's memory that the plan may fill; the rest is for fragments and the library
CUDA_LOGITS, CPU_LOGITS = 1 << 30, 32 << 20     # float32 logits alive at once: model.chunk_rows' budgets


class Plan(NamedTuple):
    """What the device decides where the options leave it open."""
    micro_tokens: int               # tokens a rank puts through the model at once while it trains
    micro_tokens_forward: int       # and where it only needs log-probs
    recompute: str                  # activation checkpointing: none, selective (every second block) or full
    compile: bool
    parts: dict                     # what a rank holds, name -> bytes
    longest: int                    # tokens of the longest pair

    def recomputes(self, layer):
        """Whether block number `layer` computes its activations again in the backward pass."""
        return self.recompute == "full" or self.recompute == "selective" and layer % 2 == 1


def parameters(config):
    """(embedding and head, one block): numbers of parameters."""
    C, H, K, D = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    block = C * (2 * H + 2 * K) * D + 3 * C * config.intermediate_size + 2 * C
    block += config.attention_bias * ((H + 2 * K) * D + C) + config.mlp_bias * (2 * config.intermediate_size + C)
    root = config.vocab_size * C * (1 if config.tie_word_embeddings else 2) + C
    return root, block


def activation_bytes(config, width, recompute):
    """Bytes a token leaves for the backward pass over all blocks: what each block saves, or only its input."""
    C, I = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = 2 * (4 + 2 * width) * C                         # float32 input, normalised, and the output
    attention = width * (2 * heads + 3 * kv_heads)          # q, keys and values with the prompt twice, the output
    mlp = width * 4 * I                                     # gate, up, silu(gate) and their product
    kept, again = norms + attention + mlp, width * C
    layers = config.num_hidden_layers
    full = {"none": layers, "selective": layers - layers // 2, "full": 1}[recompute]
    return full * kept + (layers - full) * again + 3 * width * C


def parts(config, world, width, tokens, recompute, cuda, offload=False):
    """What a rank holds at its fullest while it trains: name -> bytes."""
    root, block = parameters(config)
    total = root + config.num_hidden_layers * block
    shard = -(-total // world)
    logits = CUDA_LOGITS if cuda else CPU_LOGITS
    return {
        "weights": 0 if offload else 4 * shard,
        "gradients": 0 if offload else 4 * shard,
        "optimiser": 0 if offload else 8 * shard,
        "gathered": width * (root + 2 * block),             # the root stays gathered, a block and its successor
        "gradients gathered": (width + 4) * max(root, 2 * block),
        "activations": tokens * activation_bytes(config, width, recompute),
        "logits": 2 * logits + 4 * config.vocab_size * config.hidden_size,
    }


def make(config, options, shards, device_type, width, longest, memory):
    """Plan for `shards` ranks a copy. longest: tokens of the longest pair; memory: a GPU's bytes (unused on CPU)."""
    cuda = device_type == "cuda"
    asked = options.activation_checkpointing
    choices = ("none", "selective", "full") if asked == "auto" and cuda else ("none",) if asked == "auto" else (asked,)
    offload = options.cpu_offload and cuda
    for recompute in choices:
        tokens = options.micro_tokens or (CUDA_TOKENS if cuda else CPU_TOKENS)
        held = parts(config, shards, width, 0, recompute, cuda, offload)
        if cuda and not options.micro_tokens:
            room = SHARE * memory - sum(held.values())
            tokens = min(tokens, int(room // activation_bytes(config, width, recompute)))
        if tokens >= min(max(longest, 8192), CUDA_TOKENS) or not cuda:
            break
    tokens = max(tokens, longest, 1)
    held = parts(config, shards, width, tokens, recompute, cuda, offload)
    compiled = cuda if options.compile is None else options.compile
    return Plan(tokens, max(tokens, 2 * tokens if cuda else tokens), recompute, compiled, held, longest)


def lines(plan, world):
    """The plan for a person: one line a part, in GB."""
    total = sum(plan.parts.values())
    rows = [f"  {name:<20}{size / 1e9:10.3f} GB" for name, size in plan.parts.items()]
    return [f"memory of a rank (of {world}), planned:", *rows, f"  {'together':<20}{total / 1e9:10.3f} GB",
            f"micro-batches of {plan.micro_tokens} tokens, activation checkpointing {plan.recompute}, "
            f"compile {'on' if plan.compile else 'off'}"]
