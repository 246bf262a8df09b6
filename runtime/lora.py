"""LoRA (Hu et al. 2021) around a model, from outside. On every linear layer of the blocks

    h = W x + (alpha / rank) · B A x,    A [rank, in] ~ U(-1/√in, 1/√in),    B [out, rank] = 0 at the start,

so that a training begins at the model itself, and its first loss is log 2. A starts as PEFT's does (Kaiming-uniform
with a = √5). The base is frozen in the compute type; A and B are float32, and they alone have gradients, an optimiser's
state and a place in checkpoints.

In this order: `add` on the meta device, before fully_shard; `aside` while the base's weights are read; `start`;
training; `merged` and `save`. A model without adapters goes through `aside`, `start` and `merged` as it is.
"""

import contextlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from files.hub import MODEL_ID
from runtime import disk, shards
from runtime.process_group import on_rank_0, rank_and_world


def add(net, rank, alpha):
    """Put adapters of `rank` on all linear layers of net.model.layers: of any model whose blocks hold nn.Linear."""
    for module in net.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.lora_A = nn.Parameter(module.weight.new_empty(rank, module.in_features, dtype=torch.float32))
            module.lora_B = nn.Parameter(module.weight.new_empty(module.out_features, rank, dtype=torch.float32))
            module.lora_alpha, module.lora_scale = alpha, alpha / rank
            module.register_forward_hook(_adapted)


def _adapted(linear, inputs, output):
    """Its output W x (and the bias) [..., out] -> + scale · B A x."""
    low = F.linear(inputs[0], linear.lora_A) * linear.lora_scale  # [..., rank]
    return output + F.linear(low, linear.lora_B)


def adapted(net):
    """{name: module} of the linear layers that have adapters."""
    return {name: module for name, module in net.named_modules() if hasattr(module, "lora_A")}


def names(net):
    """The adapters' names among the parameters."""
    return {f"{name}.{letter}" for name in adapted(net) for letter in ("lora_A", "lora_B")}


@contextlib.contextmanager
def aside(net):
    """Meanwhile the adapters are not among the parameters, as no checkpoint of the base holds them."""
    modules = adapted(net).values()
    taken = [(module, letter, module._parameters.pop(letter)) for module in modules for letter in ("lora_A", "lora_B")]
    yield
    for module, letter, parameter in taken:
        module.register_parameter(letter, parameter)


@torch.no_grad()
def start(net, seed, local=shards.local_rows):
    """Draw each A from `seed` alone, the same for any number of ranks, and set each B to 0. local: gives this process's
    part of a parameter, and where in its first dimension that begins."""
    generator = torch.Generator().manual_seed(seed)
    for module in adapted(net).values():
        bound = module.in_features**-0.5
        drawn = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
        mine, first = local(module.lora_A)
        mine.copy_(drawn[first : first + len(mine)])
        local(module.lora_B)[0].zero_()


@torch.no_grad()
def merged(net, dtype, keep):
    """(name, tensor) of every parameter of the base, W + scale · B A where there are adapters: summed in float32, then
    of `dtype`, on ranks with `keep`; None on the others. Collective; one tensor after the other is made."""
    linears, passed = adapted(net), names(net)
    for name, parameter in net.named_parameters():
        linear = linears.get(name.removesuffix(".weight"))
        if linear is not None:
            W, A, B = (shards.whole(p, torch.float32, keep) for p in (parameter, linear.lora_A, linear.lora_B))
            yield name, torch.addmm(W, B, A, alpha=linear.lora_scale).to(dtype) if keep else None
        elif name not in passed:
            yield name, shards.whole(parameter, dtype, keep)


def save(net, directory, base):
    """Write the adapters in PEFT's layout, float32, whole or not at all. base: the model's name as it was given, which
    the configuration names. Collective."""
    keep, tensors, linears = rank_and_world()[0] == 0, {}, adapted(net)
    for name, linear in linears.items():
        for letter in ("lora_A", "lora_B"):
            tensor = shards.whole(getattr(linear, letter), torch.float32, keep)
            tensors[f"base_model.model.{name}.{letter}.weight"] = tensor.cpu() if keep else None
    one = next(iter(linears.values()))
    hub_id = None if os.path.isdir(base) else MODEL_ID.fullmatch(base)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_id[1] if hub_id else base,
        "revision": hub_id and hub_id[2],
        "r": len(one.lora_A),
        "lora_alpha": one.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
        "inference_mode": True,
    }

    def write():
        disk.need_space(os.path.dirname(directory), sum(tensor.nbytes for tensor in tensors.values()), directory)
        with disk.whole(directory) as part:
            os.mkdir(part)
            Path(part, "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
            Path(part, "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    on_rank_0(write)
