"""--lora-rank: adapters against the merged weights, finite differences, a plain loop over transformers' model whose
weights are W + scale · B A, and peft; what a checkpoint holds, what is refused, what is exported."""

import json
import os
import pathlib
import shutil
import signal

import launcher
import pytest
import torch
from safetensors.torch import load_file
from test_train import SETTINGS, load, metrics, plain_training, run, same, tokens_of
from tiny_world import KINDS, make_checkpoint, make_pairs
from torch import nn
from torch.nn.utils import parametrize

import data
import model
import train
from files.config import ARCHITECTURES
from runtime import lora, options, sampling

RANK, ALPHA = 3, 12.0
RECIPES = pathlib.Path(__file__).parent.parent / "recipes"
WHOLE = lambda parameter: (parameter.data, 0)  # the local part of a parameter that is not sharded


def adapted(directory, dtype=torch.float32, seed=0):
    """The model of a directory with adapters, not sharded: as train.sharded makes it."""
    net = model.load_model(directory, dtype).requires_grad_(False)
    lora.add(net, RANK, ALPHA)
    lora.start(net, seed, WHOLE)
    return net.to(dtype)


def a_pack(net):
    """One pack of two pairs of random tokens."""
    ids = lambda n: torch.randint(net.config.vocab_size, (n,)).numpy()
    return data.collate([data.Pair(ids(5), ids(4), ids(3), "a:1"), data.Pair(ids(2), ids(3), ids(6), "a:2")])


def test_every_architecture_is_tried_here():
    assert {f"{family}ForCausalLM" for family, _, _ in KINDS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_of_every_architecture(kind, tmp_path, monkeypatch):
    """All linear layers of the blocks and nothing else; no change at first; then what the merged weights compute, in
    packs, in sampling and as logits; gradients by finite differences, of A and B alone."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # norms and RoPE, too, in the type of the rest
    directory = make_checkpoint(tmp_path / "start", kind)
    plain, net = model.load_model(directory, torch.float64), adapted(directory, torch.float64)
    linears = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert (
        set(trained) == {f"{name}.{letter}" for name in linears for letter in ("lora_A", "lora_B")} == lora.names(net)
    )
    assert all(".layers." in name for name in linears) and len(linears) == 7 * plain.config.num_hidden_layers
    pack = a_pack(net)
    assert torch.equal(net(pack.tokens, pack), plain(pack.tokens, pack))

    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0, 0.3)
        for name in linears:
            A, B = trained[f"{name}.lora_A"], trained[f"{name}.lora_B"]
            plain.get_submodule(name).weight += ALPHA / RANK * torch.einsum("or,ri->oi", B, A)
    logp = net(pack.tokens, pack)
    assert (logp - plain(pack.tokens, pack)).abs().max() < 1e-9
    assert (logp - model.load_model(directory, torch.float64)(pack.tokens, pack)).abs().max() > 1e-2
    prompts = [[5, 6, 7], [8, 9]]
    assert sampling.generate(net, prompts, 6, {1}) == sampling.generate(plain, prompts, 6, {1})

    weights = torch.randn(len(logp), dtype=torch.float64)
    (weights @ logp).backward()
    assert all((parameter.grad is None) == (name not in trained) for name, parameter in net.named_parameters())
    for name, parameter in trained.items():
        direction, eps = torch.randn_like(parameter), 1e-6
        with torch.no_grad():
            ahead, behind = (
                weights @ (parameter.add_(x * direction), net(pack.tokens, pack))[1] for x in (eps, -2 * eps)
            )
            parameter.add_(eps * direction)
        slope = (ahead - behind) / (2 * eps)
        assert abs(slope - (parameter.grad * direction).sum()) < 1e-5 * (1 + abs(slope)), name


def test_A_is_drawn_as_peft_draws_it_and_from_the_seed_alone(tmp_path):
    """Kaiming-uniform with a = √5, which is U(-1/√in, 1/√in); B is 0; a rank with a part of the rows has these rows."""
    directory = make_checkpoint(tmp_path / "start", hidden_size=64, intermediate_size=96)
    net, again, other = adapted(directory), adapted(directory), adapted(directory, seed=1)
    half = adapted(directory)
    lora.start(half, 0, lambda p: (p.data[len(p) // 2 :], len(p) // 2))
    drawn = []
    for name, A in net.named_parameters():
        if name.endswith("lora_A"):
            bound = nn.init.calculate_gain("leaky_relu", 5**0.5) * (3 / A.shape[1]) ** 0.5
            assert A.abs().max() <= bound
            drawn.append(A.detach().flatten() / bound)
            assert torch.equal(A, again.get_parameter(name)) and not torch.equal(A, other.get_parameter(name))
            assert torch.equal(A[1:], half.get_parameter(name)[1:])
        elif name.endswith("lora_B"):
            assert A.count_nonzero() == 0
    drawn = torch.cat(drawn)
    assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 3**-0.5) < 0.02 and drawn.abs().max() > 0.98
    assert len(set(x.item() for x in drawn)) > 0.99 * len(drawn)  # no layer repeats another's


# --------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A start, 10 pairs, and a run of both stages with adapters."""
    directory = tmp_path_factory.mktemp("world")
    make_checkpoint(directory / "start")
    make_pairs(directory / "pairs.jsonl", 10)
    assert run(*arguments(directory, directory / "out"), samples=1) == 0
    return directory


def arguments(world, out, *more, rank=RANK):
    lora_options = ("--lora-rank", rank, "--lora-alpha", ALPHA) if rank else ()
    return "--out", out, "--model", world / "start", "--data", world / "pairs.jsonl", *lora_options, *more


def drawn(world):
    """The A of each linear layer at the start."""
    return {name: A for name, A in adapted(world / "start").named_parameters() if name.endswith("lora_A")}


class Sum(nn.Module):
    """W -> W + scale · B A, for torch's parametrize."""

    def __init__(self, A, rows):
        super().__init__()
        self.A, self.B = nn.Parameter(A.detach().clone()), nn.Parameter(torch.zeros(rows, len(A)))

    def forward(self, W):
        return W + ALPHA / RANK * self.B @ self.A


def summed(world):
    """-> what gives transformers' model the weights W + scale · B A, of which A and B alone train."""

    def adapt(policy):
        policy.requires_grad_(False)
        for name, A in drawn(world).items():
            linear = policy.get_submodule(name.removesuffix(".lora_A"))
            parametrize.register_parametrization(linear, "weight", Sum(A, linear.out_features))
        return policy

    return adapt


def by_peft(world):
    peft = pytest.importorskip("peft")

    def adapt(policy):
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        policy = peft.get_peft_model(policy, config)
        with torch.no_grad():
            for name, A in drawn(world).items():
                policy.get_parameter(f"base_model.model.{name}.default.weight").copy_(A)
        return policy.eval()

    return adapt


@pytest.mark.parametrize("oracle", [summed, by_peft])
def test_both_stages_are_a_plain_loop_with_adapters(oracle, world):
    out, pairs = world / "out", tokens_of(world / "start", world / "pairs.jsonl")
    dpo, _ = plain_training(world / "start", pairs, "dpo", adapt=oracle(world))
    same([row["loss"] for row in metrics(out, "dpo")], dpo)
    tgdpo, policy = plain_training(world / "start", pairs, "tgdpo", guide=out / "guide", adapt=oracle(world))
    same([row["loss"] for row in metrics(out, "tgdpo")], tgdpo)
    assert all(abs(metrics(out, stage)[0]["loss"] - torch.tensor(2.0).log()) < 1e-6 for stage in ("dpo", "tgdpo"))
    assert dpo[0] - dpo[-1] > 0.01  # it has learned
    tokens = torch.randint(0, 260, (2, 40))
    with torch.no_grad():
        assert (load(out / "policy")(tokens).logits - policy(tokens).logits).abs().max() < 1e-3


def test_the_policy_is_merged_and_the_adapter_lies_beside_it(world):
    """policy/ − base is scale · B A of adapter/, of rank 3 at most; nothing else has moved. So is guide/."""
    base = load_file(world / "start/model.safetensors")
    policy, guide = (load_file(world / "out" / name / "model.safetensors") for name in ("policy", "guide"))
    adapter = load_file(world / "out/adapter/adapter_model.safetensors")
    assert policy.keys() == guide.keys() == base.keys() and len(adapter) == 28
    for name, W in base.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in adapter:
            A, B = (adapter.pop(f"{stem}.{letter}.weight") for letter in ("lora_A", "lora_B"))
            assert A.dtype == B.dtype == torch.float32
            torch.testing.assert_close(policy[name], W + ALPHA / RANK * B @ A, rtol=0, atol=1e-6)
            for moved in (policy[name] - W, guide[name] - W):
                values = torch.linalg.svdvals(moved.double())
                assert values[0] > 1e-3 and values[RANK] < 1e-5 * values[0]
        else:
            assert torch.equal(policy[name], W) and torch.equal(guide[name], W)
    assert not adapter
    config = json.loads((world / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world / "start") and config["revision"] is None
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, ALPHA, "LORA")
    assert [path.name for path in sorted((world / "out").glob("*.tmp"))] == []


def test_adapters_are_no_model(world, tmp_path, capfd):
    """policy/ beside them is named, or else their base."""
    out = tmp_path / "out"
    shutil.copytree(world / "out/adapter", tmp_path / "alone")
    for directory, mend in (
        (world / "out/adapter", f"give {world}/out/policy, which has them merged"),
        (tmp_path / "alone", f"merge them into their base, {world}/start"),
    ):
        for more in (["--model", directory], ["--model", world / "start", "--guide", directory, "--dry-run"]):
            given = [*more, "--data", world / "pairs.jsonl", "--out", out]
            assert train.main(list(map(str, given))) == 2
            assert capfd.readouterr().err == f"train.py: error: {directory}: holds adapters, not a model; {mend}\n"


def test_peft_loads_the_adapter_onto_the_base(world):
    peft = pytest.importorskip("peft")
    tokens = torch.randint(0, 260, (2, 40))
    with torch.no_grad():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(world / "out/adapter").eval()(tokens).logits
        assert (theirs - load(world / "out/policy")(tokens).logits).abs().max() < 1e-4
        assert (theirs - load(world / "start")(tokens).logits).abs().max() > 1e-2


# ------------------------------------------------------------------------------------ ranks, checkpoints, refusals


def several_ranks(world, count, out, *more):
    settings = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    statuses, printed = launcher.run(count, [*arguments(world, out), *settings, *more], f"{out}.log")
    assert statuses == [0] * count, printed


@pytest.mark.parametrize("count, more", [(2, ("--activation-checkpointing", "full")), (4, ())])
def test_any_number_of_ranks_trains_the_same_adapters(count, more, world, tmp_path):
    """Of rank 3: one of four processes holds no row of any A."""
    several_ranks(world, count, tmp_path / "out", *more)
    for stage in ("dpo", "tgdpo"):
        for a, b in zip(metrics(world / "out", stage), metrics(tmp_path / "out", stage), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"])
    for file in ("policy/model.safetensors", "guide/model.safetensors", "adapter/adapter_model.safetensors"):
        torch.testing.assert_close(load_file(tmp_path / "out" / file), load_file(world / "out" / file))


def test_bfloat16_freezes_the_base_in_it_and_keeps_float32_adapters(world, tmp_path):
    several_ranks(world, 2, tmp_path / "out", "--dtype", "bfloat16", "--loss", "dpo")
    assert abs(metrics(tmp_path / "out")[0]["loss"] - torch.tensor(2.0).log()) < 1e-3
    base, policy = load_file(world / "start/model.safetensors"), load_file(tmp_path / "out/policy/model.safetensors")
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    A, B = (adapter[f"base_model.model.{name}.{letter}.weight"] for letter in ("lora_A", "lora_B"))
    assert A.dtype == torch.float32 and not torch.equal(A.bfloat16().float(), A)
    W = base[f"{name}.weight"].bfloat16().float()
    assert torch.equal(policy[f"{name}.weight"], (W + ALPHA / RANK * B @ A).bfloat16())


def stopped(world, out, stage, step):
    """A run that is told to stop after a step of a stage."""
    plain, stages = train.optimiser_step, []

    def stopping(run, net, optimiser, where, batch):
        row = plain(run, net, optimiser, where, batch)
        stages.append(where.loss)
        if stages.count(stage) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "optimiser_step", stopping)
        return run(*arguments(world, out), samples=1)


def test_stopped_and_resumed_bit_for_bit_from_the_adapters_alone(world, tmp_path):
    out = tmp_path / "out"
    assert stopped(world, out, "tgdpo", 3) == 143
    (checkpoint,) = (out / "checkpoints").iterdir()
    held = json.loads((checkpoint / "state.json").read_text())["tensors"]
    names = {name.partition(".")[2] for name in held}
    assert len(held) == 3 * 28 and all(name.endswith(("lora_A", "lora_B")) for name in names)
    assert run(*arguments(world, out, "--resume"), samples=1) == 0
    for stage in ("dpo", "tgdpo"):
        losses = [[row["loss"] for row in metrics(directory, stage)] for directory in (out, world / "out")]
        assert losses[0] == losses[1]
    for file in ("policy/model.safetensors", "guide/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / file).read_bytes() == (world / "out" / file).read_bytes()


def test_a_full_run_and_one_of_adapters_do_not_resume_each_other(world, tmp_path, capfd):
    """By what run.json says, and where that is gone by what the checkpoint says. A run that begins anew in the same
    place leaves no adapter of the old one."""
    short = {"max_steps": 1, "loss": "dpo"}
    for rank, other, words in (
        (RANK, 0, "lora rank (3 there, None here)"),
        (0, RANK, "lora rank (None there, 3 here)"),
    ):
        out = tmp_path / f"rank {rank}"
        assert run(*arguments(world, out, rank=rank), **short) == 0
        for _ in range(2):
            assert run(*arguments(world, out, "--resume", rank=other), **short) == 2
            assert words in capfd.readouterr().err
            (out / "run.json").unlink(missing_ok=True)
    out = tmp_path / f"rank {RANK}"
    assert (out / "adapter").is_dir()
    assert run(*arguments(world, out, "--overwrite", rank=0), **short) == 0
    assert not (out / "adapter").exists()


def test_a_dry_run_says_how_many_parameters_are_trained(world, capsys):
    assert run(*arguments(world, world / "dry", "--dry-run")) == 0
    net = adapted(world / "start")
    adapters = sum(net.get_parameter(name).numel() for name in lora.names(net))
    whole = sum(parameter.numel() for parameter in net.parameters()) - adapters
    assert f"{adapters:,} of {whole:,} parameters are trained" in capsys.readouterr().out
    assert run(*arguments(world, world / "dry", "--dry-run", rank=0)) == 0
    assert f"{whole:,} of {whole:,} parameters are trained" in capsys.readouterr().out


def test_the_recipe_is_the_papers_at_ten_times_its_learning_rate():
    recipe, full = (options.read_toml(RECIPES / f"llama-3-8b-{name}.toml") for name in ("lora", "instruct"))
    assert recipe.pop("lr") == pytest.approx(10 * full.pop("lr"))
    assert (recipe.pop("lora_rank"), recipe.pop("lora_alpha"), recipe.pop("micro_tokens")) == (64, 64, 4096)
    assert recipe == full
