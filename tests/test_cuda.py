"""The CUDA branches without a card: on tensors that have a device, a type and a shape, and no values; and how many
graphs torch.compile makes of a block. `python benchmarks/gpu.py --part correctness` checks the values on a card."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import model
from kernels import attention as attention_kernels

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 90,
}
KINDS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "windowed": {"architectures": ["MistralForCausalLM"], "sliding_window": 6},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8},
}


def packs(numbers):
    rng = np.random.RandomState(0)
    ids = lambda: rng.randint(0, 90, rng.randint(1, 30)).astype(np.int32)
    for n in numbers:
        yield data.collate([data.Pair(ids(), ids(), ids(), "") for _ in range(n)])


@pytest.fixture
def on_cuda():
    """A context in which tensors on a CUDA device need no card."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            net = torch.nn.Linear(2, 2, device="cuda")
            net(torch.arange(1, 3, device="cuda").float()).sum().backward()
    except (RuntimeError, AssertionError) as error:
        pytest.skip(f"this torch computes nothing on CUDA, even without values: {error}")
    return mode


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["llama", "tied", "windowed", "qwen3"])
def test_the_cuda_branches_run_forward_and_backward(kind, recompute, on_cuda):
    """In bfloat16, as a card computes. Float32 and caps go by the loop, whose lengths are values."""
    (pack,) = packs([3])
    config = model.parse_config(CONFIG | KINDS[kind])
    with on_cuda:
        with torch.device("cuda"):
            net = model.CausalLM(config).to(torch.bfloat16)
        for layer in net.model.layers:
            layer.recompute = recompute
        pack = pack._make(torch.empty_like(x, device="cuda") if torch.is_tensor(x) else x for x in pack)
        logp = net(pack.tokens, pack)
        assert logp.device.type == "cuda" and logp.dtype == torch.float32
        logp.sum().backward()
        assert all(p.grad.shape == p.shape and p.grad.dtype == torch.bfloat16 for p in net.parameters())


@pytest.mark.parametrize("grouped", ["named", "as they are"])
@pytest.mark.parametrize("kind", ["llama", "windowed", "qwen3"])
def test_the_kernel_is_asked_for_what_the_loop_computes(kind, grouped, monkeypatch):
    """varlen_attn replaced by a softmax a segment, under its own signature and, without enable_gqa, torch 2.11's."""
    config = model.parse_config(CONFIG | KINDS[kind])
    config = dataclasses.replace(config, query_pre_attn_scalar=11.0)  # another scale than 1/sqrt(head_dim)
    net, (pack,) = model.random_model(config, std=0.5), packs([4])
    parameters = [p for p in net.parameters() if p.requires_grad]
    expected = net(pack.tokens, pack)
    gradients = torch.autograd.grad(expected.sum(), parameters)
    signature = inspect.signature(attention_kernels.varlen.varlen_attn)
    if grouped != "named":
        left = [p for name, p in signature.parameters.items() if name != "enable_gqa"]
        signature = signature.replace(parameters=left)
    calls = []

    def kernel(*given, **named):
        asked = signature.bind(*given, **named).arguments
        calls.append(asked)
        q, k, v, begins = *given[:3], zip(*(given[i].tolist() for i in (3, 4)))
        assert asked["max_q"] == given[3].diff().max() and asked["max_k"] == given[4].diff().max()
        assert asked.get("enable_gqa", True)
        k, v, out, begins = *(x.repeat_interleave(2, 1) for x in (k, v)), [], list(begins)
        left, right = asked["window_size"]
        assert right == 0
        for (q0, k0), (q1, k1) in zip(begins, begins[1:]):
            scores = torch.einsum("nhd,mhd->hnm", q[q0:q1], k[k0:k1]) * asked["scale"]
            place = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
            hidden = (place < 0) | ((place > left) if left >= 0 else False)
            out.append(torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[k0:k1]))
        return torch.cat(out)

    monkeypatch.setattr(attention_kernels, "_one_kernel", lambda q, cap: cap is None)
    monkeypatch.setattr(attention_kernels, "NAMES_GROUPS", grouped == "named")
    monkeypatch.setattr(attention_kernels.varlen, "varlen_attn", kernel)
    found = net(pack.tokens, pack)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), parameters), gradients):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert len(calls) == config.num_hidden_layers


@pytest.mark.parametrize("dtype, masked", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_keys_are_repeated_where_no_kernel_groups_them(dtype, masked, on_cuda):
    with on_cuda:
        q, k = (torch.empty(1, heads, 7, 8, dtype=dtype, device="cuda") for heads in (4, 2))
        mask = torch.ones(7, 7, dtype=torch.bool, device="cuda") if masked else None
        assert [x.shape[1] for x in attention_kernels._alike(q, k, k, mask)] == [4, 4]
        assert [x.shape[1] for x in attention_kernels._alike(q.bfloat16(), k.bfloat16(), k.bfloat16())] == [2, 2]
        assert attention_kernels.attention(q, k, k, window=3 if masked else None).shape == q.shape


@pytest.mark.parametrize("recompute", [(False, False), (True, True), (False, True)], ids=("none", "full", "selective"))
def test_packs_of_many_shapes_need_two_graphs_a_kind_of_block(recompute, monkeypatch):
    def attention(q, k, v, segments, *_):
        """What the one kernel reads, without its values: the loop on a CPU would be no graph."""
        ids = (segments.keys, segments.first, segments.shared, segments.second)
        k, v = (attention_kernels._GatherKeys.apply(x, *ids) for x in (k, v))
        return q * k.mean() + v.mean() * segments.max_q / segments.max_k

    monkeypatch.setattr(model, "packed_attention", attention)
    torch._dynamo.reset()
    net, counter = model.random_model(model.parse_config(CONFIG)), CompileCounter()
    for layer, again in zip(net.model.layers, recompute):
        layer.recompute = again
        layer.compile(backend=counter)
    for pack in packs((2, 3, 5, 4, 7, 6, 9, 8)):
        net(pack.tokens, pack).sum().backward()
    torch._dynamo.reset()
    assert counter.frame_count <= 2 * len(set(recompute))
