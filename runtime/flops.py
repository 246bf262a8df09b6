"""How much arithmetic a pair takes, how much a GPU could do, and how fast a run is."""

import resource
import sys
import time

import torch

from runtime import memory

# Peak dense bfloat16 rate in FLOP/s, by words of the device's name (the makers' data sheets, without sparsity).
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}


def pair_flops(config, prompt, chosen, rejected, lora_rank=0):
    """FLOPs of one pair's forward and backward pass, with the prompt once, without padding and recomputation:
    3 · [2 · N_body · (P+C+R) + 2 · N_head · (C+R)] + 6 · L · d · [(P+C)² + (P+R)² − P²], lengths in tokens.
    With LoRA of a rank the frozen weights have no gradient: 2 in place of the first 3, and the adapters' own products,
    3 · 2 · N_adapters · (P+C+R), are added."""
    head_size = config.num_attention_heads * config.head_dim
    attention = config.hidden_size * (2 * head_size + 2 * config.num_key_value_heads * config.head_dim)
    body = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    adapters = config.num_hidden_layers * memory.adapters(config, lora_rank)
    tokens, passes = prompt + chosen + rejected, 2 if lora_rank else 3
    products = passes * (2 * body * tokens + 2 * head * (chosen + rejected)) + 6 * adapters * tokens
    squares = (prompt + chosen) ** 2 + (prompt + rejected) ** 2 - prompt**2
    return products + 6 * config.num_hidden_layers * head_size * squares


def peak_flops(device_name):
    """The device's peak in FLOP/s, or None where it is not known."""
    words = f" {device_name.replace('-', ' ')} "
    return next((peak for name, peak in PEAKS.items() if f" {name} " in words), None)


def peak_resident():
    """The most memory that this process has had, in bytes: macOS counts in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def speed(device, world, pairs, began, trained=None, lora_rank=0):
    """Throughput of what began at `began` (time.perf_counter()) on `world` devices and saw `pairs` (data.Pair). Tokens
    are counted the same for every method: 2 P + C + R. trained: the Config of the model that made a training step, for
    its MFU on a GPU whose peak is known, and the rank of its adapters (0: it trained all)."""
    seconds = time.perf_counter() - began
    shapes = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]
    row = {
        "seconds": seconds,
        "pairs_per_second": len(pairs) / seconds,
        "tokens_per_second": sum(2 * P + C + R for P, C, R in shapes) / seconds,
        "peak_memory": peak_resident(),
    }
    if device.type == "cuda":
        row["peak_memory"] = torch.cuda.max_memory_allocated()
        if trained and (peak := peak_flops(torch.cuda.get_device_name())):
            row["mfu"] = sum(pair_flops(trained, *shape, lora_rank) for shape in shapes) / seconds / (peak * world)
    return row
