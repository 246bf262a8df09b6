"""--centre-guidance: KL(ref || guide) at each state, in chunks, against whole logits and transformers; and in a run."""

import json
import shutil

import launcher
import pytest
import torch
from safetensors.torch import load_file
from test_train import SETTINGS, load, metrics, run, sequence, tokens_of
from tiny_world import make_checkpoint, make_pairs

import train
from kernels import log_probs as log_prob_kernels
from runtime import options

BETA = 0.3


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_divergences_are_those_of_whole_logits(most, monkeypatch):
    monkeypatch.setattr(log_prob_kernels, "chunk_tokens", lambda vocab, device: 2 * most)
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: 2 * torch.randn(*shape, generator=draw, dtype=torch.float64)
    for R in (0, 1, 7):
        p, q = (make(R, 5), make(11, 5), 2.0), (make(R, 3), make(11, 3), None)  # hidden, head, cap; another width
        ours = log_prob_kernels.token_divergences(*p, *q)
        log_p = (2.0 * torch.tanh(p[0] @ p[1].t() / 2.0)).log_softmax(-1)
        log_q = (q[0] @ q[1].t()).log_softmax(-1)
        expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert log_prob_kernels.token_divergences(*p, *p).abs().max() < 1e-12 if R else True
        half = log_prob_kernels.token_divergences(*(x.bfloat16() if torch.is_tensor(x) else x for x in (*p, *q)))
        assert half.dtype == torch.float32 and (half - expected).abs().max() < 0.3 * expected.max() if R else True


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    base = tmp_path_factory.mktemp("centre")
    start, guide = make_checkpoint(base / "start"), make_checkpoint(base / "guide", seed=1)
    path, held_out = make_pairs(base / "pairs.jsonl", 8), make_pairs(base / "held_out.jsonl", 3, seed=1)
    words = ["--model", start, "--guide", guide, "--data", path, "--eval-data", held_out]
    assert run("--out", base / "out", *words, "--centre-guidance", alpha=0.8, epochs=1) == 0
    return base, words, start, guide, path, held_out


def test_a_run_is_the_methods_with_the_mean_taken_away(world):
    """The whole vocabulary's logits from transformers, token by token; the policy's losses against a plain loop."""
    base, _, start, guide, path, held_out = world
    pairs, eval_pairs = tokens_of(start, path), tokens_of(start, held_out)
    ref, teacher = load(start), load(guide)

    def divergences(pair, response):
        ids = torch.tensor([*pair.prompt, *response]).long()
        log_p, log_q = (net(ids[None]).logits[0].double().log_softmax(-1) for net in (ref, teacher))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        return kl[len(pair.prompt) - 1 : -1]

    with torch.no_grad():
        expected = [divergences(p, r) for p in pairs + eval_pairs for r in (p.chosen, p.rejected)]
    (file,) = (base / "out/cache").glob("centre-*")
    found = load_file(file)["logp"]
    assert found.dtype == torch.float32 and len(list((base / "out/cache").iterdir())) == 3
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-4, atol=1e-4)
    # The first step's r_hat and f, and the last evaluation's loss, with the centred reward.
    kl, policy = iter(expected[2 * len(pairs) :]), load(base / "out/policy")
    losses, r_hats = [], []
    with torch.no_grad():
        for pair in eval_pairs:
            phi = 0.0
            for sign, response in ((1, pair.chosen), (-1, pair.rejected)):
                logps = (torch.stack(sequence(net, pair.prompt, response)) for net in (policy, ref, teacher))
                logp, ref_logp, guide_logp = logps
                r_hat = BETA * (guide_logp - ref_logp + next(kl))
                phi = phi + sign * BETA * ((1 + sign * 0.8 * r_hat) * (logp - ref_logp)).sum()
                r_hats.append(r_hat)
            losses.append(torch.nn.functional.softplus(-phi))
    row = metrics(base / "out", "tgdpo", evaluation=True)[-1]
    assert row["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)
    assert row["r_hat_mean"] == pytest.approx(torch.cat(r_hats).mean().item(), abs=1e-4)
    shown = [json.loads(line) for line in open(base / "out/tokens.jsonl")]
    for pair, row in enumerate(shown):
        for side, name in enumerate(("chosen", "rejected")):
            assert row[name]["reward"] == pytest.approx(r_hats[2 * pair + side].tolist(), abs=2e-4)


def test_without_it_the_run_is_another_and_a_checkpoint_must_agree(world, tmp_path, capfd):
    base, words, *_ = world
    assert run("--out", tmp_path / "plain", *words, alpha=0.8, epochs=1) == 0
    assert not list((tmp_path / "plain/cache").glob("centre-*"))
    ours, plain = (metrics(out, "tgdpo")[-1] for out in (base / "out", tmp_path / "plain"))
    assert ours["r_hat_mean"] > plain["r_hat_mean"] and ours["loss"] != plain["loss"]
    shutil.copytree(base / "out", tmp_path / "out")
    capfd.readouterr()
    assert run("--out", tmp_path / "out", *words, "--resume", alpha=0.8, epochs=1) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "centred guidance (True there, None here)" in error


def test_the_cache_knows_both_models(world, tmp_path, capfd):
    base, words, start, guide, *_ = world
    shutil.copytree(base / "out", tmp_path / "out")
    capfd.readouterr()
    again = ["--out", tmp_path / "out", "--centre-guidance", "--overwrite"]
    assert run(*again, *words, alpha=0.8, epochs=1) == 0
    assert "divergences of the reference from the guide are in the cache" in capfd.readouterr().out
    other = make_checkpoint(tmp_path / "other", seed=2)
    words = [other if word == guide else word for word in words]
    assert run(*again, *words, alpha=0.8, epochs=1) == 0
    assert "divergences of the reference from the guide are in the cache" not in capfd.readouterr().out


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_other_losses_refuse_it(loss, tmp_path, capfd):
    assert train.main(["--loss", loss, "--centre-guidance", "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert "--centre-guidance" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert options.resolve([]).centre_guidance is False


def test_another_number_of_embeddings_is_refused(world, tmp_path, capfd):
    _, words, start, guide, *_ = world
    wider = make_checkpoint(tmp_path / "wider", vocab_size=264)
    words = [wider if word == guide else word for word in words]
    capfd.readouterr()
    assert run("--out", tmp_path / "out", *words, "--centre-guidance", epochs=1) == 2
    error = capfd.readouterr().err
    assert "264 embeddings" in error and error.count("\n") == 1


def test_two_ranks_find_the_same(world, tmp_path):
    base, words, *_ = world
    more = [word for name, value in {**SETTINGS, "alpha": 0.8, "epochs": 1}.items() for word in (f"--{name}", value)]
    arguments = ["--out", tmp_path / "out", *words, "--centre-guidance", *more]
    assert launcher.run(2, arguments, tmp_path / "log")[0] == [0, 0]
    found, one = (load_file(next((out / "cache").glob("centre-*")))["logp"] for out in (tmp_path / "out", base / "out"))
    torch.testing.assert_close(found, one, rtol=0, atol=1e-5)
    assert metrics(tmp_path / "out")[-1]["loss"] == pytest.approx(metrics(base / "out")[-1]["loss"], abs=1e-5)
