"""The transformer against transformers' own, packs against whole sequences, the chunked log-probs against autograd."""

import dataclasses
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
import rerun
import torch

import data
import model
from files.config import ARCHITECTURES
from files.export import save_model
from kernels import attention as attention_kernels
from kernels import log_probs as log_prob_kernels
from runtime import sampling

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
GEMMA2 = {  # with caps, a scale and a window that show in 40 tokens
    "pad_token_id": None,  # of which transformers keeps the embedding as it is
    "head_dim": 10,
    "query_pre_attn_scalar": 3,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 7,
    "tie_word_embeddings": True,
}
KINDS = {
    "llama": ("Llama", {}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("Mistral", {"head_dim": 12, "sliding_window": None}),
    "window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA2),
}


def oracle(kind, directory, **save):
    """A random model of transformers, saved to the directory."""
    family, changes = KINDS[kind]
    config = getattr(transformers, family + "Config")(**BASE | changes, attn_implementation="eager")
    torch.manual_seed(0)
    net = getattr(transformers, family + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    net.save_pretrained(directory, **save)
    return net


def random_pairs(lengths, vocab=101, seed=0):
    rng = np.random.default_rng(seed)
    return [
        data.Pair(*(rng.integers(0, vocab, n).astype(np.int32) for n in row), f"x:{i}") for i, row in enumerate(lengths)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind, tmp_path):
    theirs = oracle(kind, tmp_path, **({"max_shard_size": "20KB"} if kind == "llama3 rope" else {}))
    ours = model.load_model(tmp_path)
    tokens = torch.randint(0, 101, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
        last = torch.tensor([3, 39, 0])
        cache = sampling.Cache(last + 1, 40)
        torch.testing.assert_close(ours(tokens, cache=cache), ours(tokens)[torch.arange(3), last], atol=1e-5, rtol=0)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if kind != "llama3 rope" else 5)


def test_gemma_in_bfloat16_and_from_nothing(tmp_path):
    """Embeddings times √C as bfloat16 has it, which is 5.65625 and not 5.6569; norms that begin at 1 + 0."""
    theirs, tokens, seen = oracle("gemma2", tmp_path).bfloat16(), torch.arange(101)[None], []
    ours = model.load_model(tmp_path, torch.bfloat16)
    ours.model.layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    with torch.no_grad():
        ours(tokens)
        assert torch.equal(seen[0], theirs(tokens, output_hidden_states=True).hidden_states[0])
    fresh = model.random_model(model.read_config(tmp_path))
    assert all(not p.any() for name, p in fresh.named_parameters() if "norm" in name)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_rope_give_the_same_config(spelling, tmp_path):
    oracle("llama3 rope", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    if spelling == "rope_scaling":
        raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    else:
        raw["rope_parameters"] = rope
    config = model.parse_config(raw)
    assert config.rope_theta == 500.0
    assert config.rope_scaling == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}


@pytest.mark.parametrize("name, known", ARCHITECTURES.items())
def test_a_field_that_is_missing_means_what_it_means_to_transformers(name, known):
    """A config.json of the sizes alone, without a list of architectures, and all that transformers makes of it."""
    sizes = {field: BASE[field] for field in list(BASE)[:7]} | {"num_hidden_layers": 40}
    theirs = getattr(transformers, name.removesuffix("ForCausalLM") + "Config")(**sizes).to_dict()
    found = model.parse_config(sizes | {"model_type": known.model_type})
    assert found == model.parse_config(theirs | {"architectures": [name], "model_type": "of no account"})
    raw = sizes | {"architectures": [name], "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}
    theirs = getattr(transformers, name.removesuffix("ForCausalLM") + "Config")(**raw).to_dict()
    assert model.parse_config(raw) == model.parse_config(theirs | {"architectures": [name]})


def test_llama3_rope_frequencies_by_hand():
    """Factor 4 over an original context of 16: a pair that turns at least 4 times in it is kept, one that turns at
    most once is divided by 4, one that turns 2 times is blended with weight (2 - 1) / (4 - 1)."""
    turning = lambda turns: turns * 2 * math.pi / 16
    config = dataclasses.make_dataclass("C", ["head_dim", "rope_theta", "rope_scaling"])
    for turns, expected in ((2.0, turning(2) * (1 / 3 + 2 / 3 / 4)), (0.5, turning(0.5) / 4)):
        # the second pair of a head of 4 has the frequency theta ** -0.5
        found = model.rope_frequencies(config(4, turning(turns) ** -2, LLAMA3))
        assert found[1].item() == pytest.approx(expected, rel=1e-5)
    assert model.rope_frequencies(config(4, turning(4.5) ** -2, LLAMA3))[1].item() == pytest.approx(
        turning(4.5), rel=1e-5
    )


LENGTHS = [[(5, 7, 3)], [(1, 1, 1)], [(1, 9, 2), (12, 1, 1), (3, 4, 25), (30, 2, 8)]]


CASES = list(itertools.product(["llama", "window"], LENGTHS, [True, False]))
CASES += [(kind, LENGTHS[2], True) for kind in ("qwen2", "qwen3", "gemma2")]


@pytest.mark.parametrize("kind, lengths, share_prompt", CASES, ids=str)
def test_a_pack_equals_whole_sequences(kind, lengths, share_prompt, tmp_path):
    """Log-probs and all gradients of a pack equal those of transformers run on each prompt + response by itself."""
    theirs = oracle(kind, tmp_path)
    ours = model.load_model(tmp_path)
    pairs = random_pairs(lengths)
    expected = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, response])).long()
            logp = theirs(ids[None]).logits[0].log_softmax(-1)
            expected += [logp[t - 1, ids[t]] for t in range(len(pair.prompt), len(ids))]
    expected = torch.stack(expected)
    pack = data.collate(pairs, share_prompt=share_prompt)
    found = ours(pack.tokens, pack)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    weights = torch.linspace(-1, 1, len(expected))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("window, scale, cap", [(None, None, None), (4, None, None), (None, 0.7, 1.5), (4, 0.7, 1.5)])
def test_packed_attention_equals_one_dense_mask(window, scale, cap, monkeypatch):
    """Oracle: every token against every token under one mask that says who sees whom."""
    pairs = random_pairs([(4, 6, 3), (1, 2, 9), (7, 1, 1)])
    pack = data.collate(pairs)
    N, generator = len(pack.tokens), torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(N, heads, 8, dtype=torch.float64, generator=generator).requires_grad_() for heads in (4, 2, 2)
    )
    owner = [
        (p, side)
        for p, pair in enumerate(pairs)
        for side, part in enumerate((pair.prompt, pair.chosen[:-1], pair.rejected[:-1]))
        for _ in part
    ]
    sees = torch.zeros(N, N, dtype=torch.bool)
    for i, (p, side) in enumerate(owner):
        for j, (other, other_side) in enumerate(owner):
            if p == other and other_side in (0, side) and j <= i:
                distance = int(pack.positions[i] - pack.positions[j])
                sees[i, j] = window is None or distance < window
    monkeypatch.setattr(attention_kernels, "SCORES", 40)  # one query at a time, or few
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(2, 1)) * (scale or 8**-0.5)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    dense = torch.einsum("hnm,mhd->nhd", scores.masked_fill(~sees, -math.inf).softmax(-1), v.repeat_interleave(2, 1))
    packed = model.packed_attention(q, k, v, pack, window, scale, cap)
    torch.testing.assert_close(packed, dense)
    weights = torch.randn(dense.shape, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad((dense * weights).sum(), (q, k, v))
    for ours, theirs in zip(torch.autograd.grad((packed * weights).sum(), (q, k, v)), expected):
        torch.testing.assert_close(ours, theirs)


def test_recomputing_changes_nothing(tmp_path):
    oracle("window", tmp_path)
    pack = data.collate(random_pairs([(5, 7, 3), (2, 4, 4)]))
    grads = []
    for recompute in (False, True):
        net = model.load_model(tmp_path)
        for layer in net.model.layers:
            layer.recompute = recompute
        net(pack.tokens, pack).sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("keep", [0, 1, 4])
@pytest.mark.parametrize("most, cap", [(1, None), (4, None), (5, None), (100, None), (4, 1.5), (100, 0.5)])
def test_token_log_probs_gradcheck(most, cap, keep):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(13, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 13, (10,), generator=generator)
    apply = lambda h, w: log_prob_kernels._TokenLogProbs.apply(h, w, targets, most, False, cap, keep)
    assert torch.autograd.gradcheck(apply, (hidden, weight))
    logits = hidden @ weight.T if cap is None else cap * torch.tanh(hidden @ weight.T / cap)
    expected = logits.log_softmax(-1)[torch.arange(10), targets]
    torch.testing.assert_close(apply(hidden, weight), expected)


def test_token_log_probs_of_nothing_are_connected():
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.zeros(13, 6, requires_grad=True)
    log_prob_kernels.token_log_probs(hidden, weight, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert hidden.grad.shape == (0, 6) and torch.equal(weight.grad, torch.zeros(13, 6))


def test_token_log_probs_in_bfloat16_keep_float32_from_the_logits_on():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (20, 50))
    targets = torch.randint(0, 50, (20,), generator=generator)
    found = log_prob_kernels.token_log_probs(hidden, weight, targets)
    exact = (hidden @ weight.T).float().log_softmax(-1)[torch.arange(20), targets]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)
    found.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_chunks_are_near_equal_and_cover_all_tokens():
    for count in (0, 1, 7, 100, 1025):
        slices = attention_kernels.equal_slices(count, 64)
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(count))
        assert all(1 <= s.stop - s.start <= 64 for s in slices)
        assert len({s.stop - s.start for s in slices}) <= 2


def test_generate_takes_the_likeliest_token_and_stops(tmp_path):
    theirs = oracle("llama", tmp_path)
    ours = model.load_model(tmp_path)
    prompts = [[1, 5, 9, 4], [1, 7]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected.append(
            theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        )
    assert sampling.generate(ours, prompts, 8, stop=set()) == expected
    stop = expected[0][2]
    assert sampling.generate(ours, prompts[:1], 8, stop={stop}) == [expected[0][: expected[0].index(stop) + 1]]


RAGGED = [[1, 5, 9, 4, 8, 3, 2, 7, 6, 9, 9], [1, 7], [4], [3, 3, 3, 3, 3, 3]]


CASES = list(itertools.product(["llama", "window", "tied"], [0.0, 0.7], [RAGGED, [[4], [1], [7]]]))
CASES += [("qwen3", 0.0, RAGGED), ("gemma2", 0.7, RAGGED)]


@pytest.mark.parametrize("kind, temperature, prompts", CASES, ids=str)
def test_sampling_equals_running_all_again_each_step(kind, temperature, prompts, tmp_path):
    """With sequences longer than the window of 7, and stop tokens that end them at different steps."""
    oracle(kind, tmp_path)
    net = model.load_model(tmp_path)
    draw = lambda sampler, stop, **more: sampler(
        net, prompts, 12, stop, temperature, torch.Generator().manual_seed(5), **more
    )
    whole = draw(rerun.generate, set())
    assert draw(sampling.generate, set()) == whole and all(len(reply) == 12 for reply in whole)
    stop = {whole[0][4], whole[1][1]}
    expected = draw(rerun.generate, stop)
    assert len({len(reply) for reply in expected}) > 1
    assert draw(sampling.generate, stop) == draw(sampling.generate, stop, stop_early=False) == expected


def test_sampling_stops_when_all_have_ended_and_only_there(tmp_path):
    """Several processes that share a model's collectives ask for max_new steps, whatever they draw."""
    oracle("llama", tmp_path)
    net, steps = model.load_model(tmp_path), []
    net.register_forward_hook(lambda *_: steps.append(1))
    everything = set(range(101))
    assert [len(reply) for reply in sampling.generate(net, RAGGED, 5, everything)] == [1] * 4 and len(steps) == 1
    assert [len(reply) for reply in sampling.generate(net, RAGGED, 5, everything, stop_early=False)] == [1] * 4
    assert len(steps) == 6


@pytest.mark.parametrize("kind", ["tied", "llama3 rope"])
def test_export_loads_in_transformers(kind, tmp_path):
    oracle(kind, tmp_path / "in")
    net = model.load_model(tmp_path / "in")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01)
    (tmp_path / "note.txt").write_text("kept as it came")
    save_model(
        str(tmp_path / "out"),
        str(tmp_path / "in"),
        {n: tuple(p.shape) for n, p in net.named_parameters()},
        iter(net.named_parameters()),
        torch.float32,
        [(tmp_path / "note.txt", "note.txt")],
        shard_bytes=15000,
    )
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.randint(0, 101, (2, 30))
    with torch.no_grad():
        assert (net(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert (tmp_path / "out/note.txt").read_text() == "kept as it came"
    assert not (tmp_path / "out.tmp").exists()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in net.parameters())
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.stat().st_size < 15000 + 4000


def test_every_config_field_is_read_somewhere():
    root = pathlib.Path(model.__file__).parent
    text = "".join(p.read_text() for p in [*root.glob("*.py"), *root.glob("files/*.py"), *root.glob("runtime/*.py")])
    body = text.split("class Config:")[1]
    for field in dataclasses.fields(model.Config):
        assert f".{field.name}" in body, field.name
