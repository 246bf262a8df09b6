"""The memory plan: what a rank will hold, from the configuration alone, and what is chosen from it.

Counted in bytes of what is alive, for FSDP2 with float32 master shards; `width` is the compute type's bytes.
What an allocator keeps of freed memory comes on top: on CPU it may more than double it, on CUDA see SHARE.
"""

import itertools
from typing import NamedTuple

from kernels.attention import SCORES
from kernels.log_probs import CPU_LOGITS, CUDA_LOGITS, KEPT
from runtime import container

CPU_TOKENS = 1024  # tokens of a micro-batch on CPU: fixed, so that another machine repeats a run; more gain nothing
CUDA_TOKENS = 16384  # and at most on CUDA; larger packs gain nothing
ENOUGH_TOKENS = 4096  # on CUDA: rather than with fewer, activations are computed again
SHARE = 0.85  # of a GPU's memory that the plan may fill; the rest is for fragments, the library
GPU = 80 * 10**9  # a GPU's memory, for the table of a machine that has none
TABLE = (1, 2, 4, 8, 16, 32, 64)  # numbers of ranks


class Plan(NamedTuple):
    """What the device decides where the options leave it open."""

    micro_tokens: int  # tokens a rank puts through the model at once while it trains
    micro_tokens_forward: int  # and where it only needs log-probs
    recompute: str  # activation checkpointing: none, selective (every second block) or full
    compile: bool
    parts: dict  # what a rank holds at its fullest, name -> bytes
    longest: int  # tokens of the longest pair
    room: int  # the GPU's bytes; 0 on CPU
    alone: bool = False  # one rank on a CPU in float32: fully_shard would only cost it time and memory
    cast_once: bool = False  # one GPU keeps its weights in the compute type from one micro-batch of a step to the next

    def recomputes(self, layer):
        """Whether block number `layer` computes its activations again in the backward pass."""
        return self.recompute == "full" or self.recompute == "selective" and layer % 2 == 1


def parameters(config):
    """(embedding and head, one block): numbers of parameters."""
    C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    block = C * (2 * H + 2 * K) * D + 3 * C * config.intermediate_size + (4 if config.post_norms else 2) * C
    block += config.attention_bias * (H + 2 * K) * D + config.attention_out_bias * C + config.use_qk_norm * 2 * D
    block += config.mlp_bias * (2 * config.intermediate_size + C)
    root = config.vocab_size * C * (1 if config.tie_word_embeddings else 2) + C
    return root, block


def adapters(config, rank):
    """Parameters of one block's LoRA adapters: A [rank, in] and B [out, rank] of its seven linear layers."""
    C, Q, K = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    Q, K = Q * config.head_dim, K * config.head_dim
    return rank * (2 * (C + Q) + 2 * (C + K) + 3 * (C + config.intermediate_size))


def trained(config, rank):
    """How many parameters a training changes: all, or the adapters of a rank."""
    if rank:
        return config.num_hidden_layers * adapters(config, rank)
    root, block = parameters(config)
    return root + config.num_hidden_layers * block


def activation_bytes(config, width, cuda, compiled, rank=0):
    """Bytes that a token leaves in a block for its backward pass. Compiled, some are computed again there. With
    adapters of `rank`, what only gradients of frozen weights would need is not kept."""
    C, I, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    normed = 0 if rank else 4 if config.norm_offset else width
    norm = (2 * width if compiled else 4 + normed + width) * C  # float32 input, normalised, and the output
    norms = 2 * norm + config.post_norms * 2 * (norm - width * C)  # of a sum's part the output is not kept
    heads = config.use_qk_norm * (width if compiled else 4 + (0 if rank else width)) * (H + K) * D
    query = (2 if cuda or config.attn_logit_softcapping else 3) * H * D  # and the output, once more on CPU
    keys = 3 * K * D  # and values, half as many again for prompts
    mlp = (3 if compiled else 4) * I  # gate, up, act(gate) and their product
    return norms + heads + width * (query + keys + mlp + 7 * rank)


def parts(config, world, width, tokens, recompute, cuda, compiled, longest, rank=0, alone=False, cast_once=False):
    """What a rank holds at its fullest while it trains on micro-batches of `tokens`: name -> bytes. Which
    of four moments of the backward pass that is depends on the sizes. longest: tokens of the longest pair."""
    root, block = parameters(config)
    V, C, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    shard, own = -(-trained(config, rank) // world), adapters(config, rank)
    frozen = -(-(root + layers * block) // world) if rank else 0
    ahead = width * (block + own) if world > 1 else 0  # the next block is fetched while one is at work
    kept = tokens * activation_bytes(config, width, cuda, compiled, rank)
    whole = {"none": layers, "selective": layers - layers // 2, "full": 0}[recompute]  # blocks that keep all
    saved = whole * kept + tokens * ((layers - whole) * width + 4 + 3 * width) * C  # with the last norm's
    again = 0 if recompute == "none" else kept  # computed again, a block at a time
    passed = min(layers, {"none": 2, "selective": 1, "full": 0}[recompute]) * kept  # kept by the last two
    mlp = tokens * width * (2 * config.intermediate_size + 2 * C)  # gradients within a block
    if config.attn_logit_softcapping:
        mlp = max(mlp, 5 * 4 * min(SCORES, config.num_attention_heads * longest**2))  # or its scores, explicit
    chunks = max(1, -(-4 * V * tokens // (CUDA_LOGITS if cuda else CPU_LOGITS)))
    chunk = 4 * V * tokens // chunks  # of logits; some are kept until the backward pass, which makes
    slope = chunk // 2 * (width < 4) + chunk * bool(config.final_logit_softcapping)  # in `width`, and the cap's own
    head = 0 if rank else V * C  # whose gradient is made
    logits = min(chunks, KEPT) * chunk + slope + 4 * head

    summed = max(width, 4 // world)  # bytes of a gradient, or of what this rank keeps of the ranks' sum
    moments = [
        # The head's backward pass.
        (width * root + ahead, 0, saved, logits),
        # The last block's: nothing is let go yet.
        (width * (root + block + own) + ahead, width * head, saved + again + mlp, 0),
        # Late in the one before: its gradients, a third of what it kept, the last one's in the sum's buffer.
        (width * root + summed * block + ahead, width * V * C + (width + 4) * block, saved - passed + kept // 3, 0),
        # The end: the buffer of the sum for embedding and head, with their gradients or this rank's shard.
        (0, (4 + summed) * root, 0, 0),
    ]
    if alone:  # nothing is gathered, and each gradient is added to the sum as it is made
        moments = [(0, 0, saved, logits), (0, 0, saved + again + mlp, 0), (0, 4 * head, 0, 0)]
    if cast_once:
        moments = [(width * (root + layers * block), *others) for _, *others in moments]
    gathered, gradients, activations, logits = max(moments[:2] if rank else moments, key=sum)
    held = {"weights": 4 * shard + width * frozen, "gradients": 4 * shard, "optimiser": 8 * shard, "gathered": gathered}
    return held | {"gathered gradients": gradients, "activations": activations, "logits": logits}


def side_by_side(config, world, width, tokens, cuda, alone):
    """What a rank holds in the pass of --centre-guidance, with two frozen models: name -> bytes, as `parts`. More than
    in training only where adapters train."""
    root, block = parameters(config)
    V, C, I = config.vocab_size, config.hidden_size, config.intermediate_size
    chunk = 4 * V * min(tokens, max(1, (CUDA_LOGITS if cuda else CPU_LOGITS) // (4 * V)))
    weights = 2 * width * -(-(root + config.num_hidden_layers * block) // world)
    gathered = 0 if alone else width * (2 * root + 2 * block)
    held = {"weights": weights, "gradients": 0, "optimiser": 0, "gathered": gathered}
    return held | {"activations": tokens * width * (3 * I + 4 * C), "logits": chunk}


def make(config, options, shards, device_type, width, longest, room, can_compile=True, alone=False):
    """Plan for `shards` ranks a copy. longest: tokens of the longest pair; room: a GPU's bytes, 0 on CPU; alone: see
    Plan."""
    cuda = device_type == "cuda"
    compiled = cuda and can_compile if options.compile is None else options.compile
    most = max(longest, options.micro_tokens or (CUDA_TOKENS if cuda else CPU_TOKENS))
    least = most if options.micro_tokens else longest
    asked = options.activation_checkpointing
    choices = (asked,) if asked != "auto" else ("none", "selective", "full") if cuda else ("none",)
    tries = [
        (tokens, recompute)
        for recompute in choices
        for tokens in range(most, min(most, max(least, ENOUGH_TOKENS)) - 1, -256)
    ]
    tries += [(tokens, choices[-1]) for tokens in (*range(most, least, -256), least)]
    once = cuda and shards == 1 and width < 4 and not options.lora_rank and not options.cpu_offload
    for (tokens, recompute), cast_once in itertools.product(tries, (True, False) if once else (False,)):
        how = (recompute, cuda, compiled, longest, options.lora_rank, alone, cast_once)
        held = parts(config, shards, width, tokens, *how)
        forward = 2 * tokens if cuda else tokens
        if options.centre_guidance and options.lora_rank:
            held = max(
                held, side_by_side(config, shards, width, forward, cuda, alone), key=lambda each: sum(each.values())
            )
        if options.cpu_offload and cuda:
            held |= {"weights": 0, "gradients": 0, "optimiser": 0}
        if not cuda or sum(held.values()) <= SHARE * room:
            break
    return Plan(tokens, forward, recompute, compiled, held, longest, room, alone, cast_once)


def lines(plan, world):
    """The plan for a person: one line a part, in GB."""
    held = plan.parts | {"together": sum(plan.parts.values())}
    sizes = [f"  {name:<20}{size / 1e9:10.3f} GB" for name, size in held.items()]
    if plan.room:
        sizes[-1] += f" of the GPU's {plan.room / 1e9:.0f}"
    return [
        f"memory of a rank (of {world}), planned:",
        *sizes,
        f"micro-batches of {plan.micro_tokens} tokens, activation checkpointing {plan.recompute}, "
        f"compile {'on' if plan.compile else 'off'}",
    ]


def warnings(plan, ranks):
    """A line if the plan is more than a GPU has, or on CPU, where nothing else tells, more than this machine has for
    its `ranks`."""
    rank = sum(plan.parts.values())
    if plan.room:
        mend = "; take more ranks, --cpu-offload, a smaller --micro-tokens or --max-length, or a smaller model"
        return [f"warning: the plan of a rank {fit(rank, plan.room)}{mend}"] if rank > plan.room else []
    need, available = ranks * rank, container.memory()
    if need <= available:
        return []
    return [
        f"warning: the plan needs {need / 1e9:.1f} GB, this machine (or its container) has {available / 1e9:.1f} GB, "
        "and a run that takes more is killed without a word: give a smaller --micro-tokens or a smaller model"
    ]


def fit(need, room):
    """What is to be said of a plan of so many bytes for a GPU of `room`: "" where it fits with some to spare."""
    if need > room:
        return f"does not fit: {need / 1e9:.0f} GB of {room / 1e9:.0f}"
    return f"tight: more than {SHARE:.0%} of {room / 1e9:.0f} GB" if need > SHARE * room else ""


def table(config, options, plan):
    """What the plan would be for other numbers of GPUs, a line each."""
    room, width = plan.room or GPU, 4 if options.dtype == "float32" else 2
    lines = [
        f"planned for GPUs of {room / 1e9:.0f} GB:",
        "    ranks   weights, gradients, optimiser   together   micro-batch   checkpointing",
    ]
    for ranks in TABLE:
        other = make(config, options, ranks, "cuda", width, plan.longest, room)
        held = other.parts.values()
        words = ", ".join(filter(None, (other.recompute, fit(sum(held), room))))
        sizes = f"{sum(list(held)[:3]) / 1e9:>29.1f} GB{sum(held) / 1e9:>8.1f} GB"
        lines.append(f"  {ranks:>7}{sizes}{other.micro_tokens:>14}   {words}")
    return lines
