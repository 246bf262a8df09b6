"""Every part of --with through train.py, and against TRL's own loss: `python -m pytest -q tests/long/parts.py`.

The comparison with TRL (1.16 was tried) is skipped where it is not installed. TRL's `ipo` averages over the tokens,
which is `ipo norm` here; its alpha divergence has the exponent 1 - a.
"""

import contextlib
import sys
import types
import unittest.mock
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent.parent)]

import test_neighbours as short

from runtime.parts import PARTS

GUIDED = [("tgdpo", name) for name in PARTS]
PLAIN = [("dpo", name) for name in PARTS if not PARTS[name].tgdpo_only]


@pytest.mark.parametrize("name, part", GUIDED + PLAIN)
def test_a_run_with_the_part_is_a_plain_loops(name, part, tmp_path, capfd):
    short.test_a_run_with_parts_is_a_plain_loops(name, f"{part} {'norm' if part != 'norm' else 'ld'}", tmp_path, capfd)


@pytest.mark.parametrize(
    "words, settings",
    [
        ("robust=0.2", {"loss_type": "robust", "label_smoothing": 0.2}),
        ("hinge", {"loss_type": "hinge"}),
        ("exo=0.01", {"loss_type": "exo_pair", "label_smoothing": 0.01}),
        ("ld=0.3", {"ld_alpha": 0.3}),
        ("norm", {"loss_type": "sigmoid_norm"}),
        ("ipo norm", {"loss_type": "ipo"}),
        ("js", {"f_divergence_type": "js_divergence"}),
        ("alpha-div=0.3", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}),
        ("alpha-div=1", {"f_divergence_type": "forward_kl"}),
        ("exo=0.1 js", {"loss_type": "exo_pair", "label_smoothing": 0.1, "f_divergence_type": "js_divergence"}),
    ],
)
def test_the_loss_is_trls(words, settings):
    trl = pytest.importorskip("trl")
    policy, ref, _ = short.models(torch.float32)
    longest = max(side.shape[1] for side in policy)
    stacked = lambda model: torch.cat([torch.nn.functional.pad(side, (0, longest - side.shape[1])) for side in model])
    lengths = torch.tensor(short.LENGTHS[0] + short.LENGTHS[1])
    mask = torch.arange(longest) < lengths[:, None]  # [2B, T], of response tokens
    first = torch.zeros(len(lengths), 1)  # the prompt's one token

    def answers(model):
        zeros = torch.zeros(mask.shape)
        output = types.SimpleNamespace(log_probs=stacked(model), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        return lambda **_: output

    trainer = unittest.mock.MagicMock(
        beta=short.BETA,
        ref_model=answers(ref),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        use_weighting=False,
        loss_weights=[1.0],
        loss_types=[settings.get("loss_type", "sigmoid")],
        **{"ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0}
        | {key: value for key, value in settings.items() if key != "loss_type"},
    )
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics = lambda x: x
    inputs = {"input_ids": torch.zeros(len(lengths), longest + 1, dtype=torch.long)}
    inputs["completion_mask"] = torch.cat([first, mask], 1).long()
    inputs["attention_mask"] = torch.ones_like(inputs["completion_mask"])
    module = sys.modules[trl.DPOTrainer.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext())
        patch.setattr(module, "is_peft_model", lambda _: False)
        found = trl.DPOTrainer._compute_loss(trainer, answers(policy), inputs, False)
    ours = short.loss(words.split(), policy, ref).losses.mean()
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-6)
