"""The benchmarks at their smallest: the contenders' losses are ours, and the tables say what they were made with.
Nothing here asks how long anything took."""

import pathlib
import sys

import numpy as np
import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def in_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def forked(monkeypatch):
    """The benchmarks' processes start as copies of this one, which has imported everything."""
    import contest

    if not torch.cuda.is_available() and sys.platform == "linux":
        monkeypatch.setattr(contest, "START", "fork")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """-> a start, a guide and 12 pairs."""
    import workload

    directory = tmp_path_factory.mktemp("models")
    models = [
        str(workload.write_model(directory / name, workload.LLAMA_TINY, seed))
        for seed, name in enumerate(("start", "guide"))
    ]
    return *models, workload.make_pairs(12, workload.LLAMA_TINY["vocab_size"], 16)


def losses(train, world, **settings):
    found = []
    train(*world, 4, found.append, **settings)
    assert found[0] is None
    return np.array(found[1:])


def test_the_authors_design_trains_to_our_losses(world):
    import authors
    import ours

    mine = losses(ours.train, world, micro_tokens=150, alpha=20)
    assert abs(mine[0] - np.log(2)) < 1e-6 and np.ptp(mine) > 1e-5
    for settings in ({"per_device": 1, "checkpointing": True}, {"per_device": 4, "checkpointing": False}):
        np.testing.assert_allclose(losses(authors.train, world, alpha=20, **settings), mine, atol=1e-5, rtol=0)
    dpo = losses(ours.train, world, loss="dpo")
    assert np.abs(dpo - mine).max() > 1e-4
    np.testing.assert_allclose(losses(authors.train, world, alpha=0), dpo, atol=1e-5, rtol=0)


def test_trl_trains_to_our_dpo_losses(world):
    pytest.importorskip("trl")
    import ours
    import trl_contender

    dpo = losses(ours.train, world, loss="dpo")
    for settings in ({"per_device": 1, "by_length": False}, {"per_device": 2}):
        np.testing.assert_allclose(losses(trl_contender.train, world, **settings), dpo, atol=1e-5, rtol=0)


def test_lengths_are_ultrafeedbacks():
    import workload

    P, C, R = workload.lengths(workload.make_pairs(8192, 1000)).T
    assert abs(np.median(P) / 110 - 1) < 0.05 and abs(P.mean() / 178 - 1) < 0.05
    assert abs((P + C + R).mean() / 978 - 1) < 0.03
    longer = P + np.maximum(C, R)
    assert abs(2 * longer.mean() / 1298 - 1) < 0.03
    assert abs(2 * longer.reshape(-1, 4).max(1).mean() / 1947 - 1) < 0.03


def test_cpu_prints_its_table_with_versions(forked, tmp_path, capsys):
    import cpu

    out = tmp_path / "RESULTS.md"
    out.write_text("# Results\n\n<!-- cpu -->\nold\n<!-- /cpu -->\n\n<!-- gpu -->\nkept\n<!-- /gpu -->\n")
    cpu.main(["--small", "--no-trl", "--out", str(out)])
    text = out.read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in text
    assert "old\n" not in text and "kept" in text
    assert f"torch {torch.__version__}" in text and "transformers" in text and "cores" in text
    assert "The losses differ" not in text and str(pathlib.Path.home()) not in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| peak memory")]
    assert len(rows) == 2 and all(float(row[2]) > 0 for row in rows)


def test_a_contender_that_fails_says_why(forked, world):
    import contest

    contender = contest.Contender("authors", world[0], world[1] + "-missing", world[2], 4)
    with pytest.raises(RuntimeError, match="-missing"):
        contender.turn()


def test_scale_prints_its_tables(forked, tmp_path, capsys):
    import scale

    scale.main(["--small", "--repeats", "1", "--out", str(tmp_path / "RESULTS.md")])
    text = capsys.readouterr().out
    assert all(f"### {part}" in text for part in ("Batch", "Sequence length", "Vocabulary", "Ranks"))
    assert f"torch {torch.__version__}" in text and text.count("R² =") == 2


def test_a_straight_line_is_told_from_a_curve():
    import scale

    assert "R² = 1.0000" in scale.straight([1, 2, 3], [5, 7, 9])
    assert "R² = 1.0000" not in scale.straight([1, 2, 3, 4], [1, 4, 9, 16])


def test_gpu_checks_and_measures_without_a_gpu(world):
    import gpu

    found, limit = gpu.check_attention("cpu")
    assert found <= limit
    result = gpu.measure("cpu", world[0], world[2], 4)
    assert result["seconds"] > 0 and result["forward"] > 0 and result["mfu"] is None
