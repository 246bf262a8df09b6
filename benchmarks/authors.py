"""The authors' design, written anew from its description: what TGDPO costs when it is a branch of a DPO trainer.

Three full models are resident. A micro-batch's chosen and rejected rows, each with its own copy of the prompt, are
concatenated and padded to the longest; every model makes float32 logits of all their positions; the log-probs are
gathered from a log_softmax; a cross-entropy over the chosen rows is computed as well and used by nothing.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

IGNORED = -100


def train(
    policy_dir,
    guide_dir,
    pairs,
    batch,
    after_step,
    *,
    per_device=1,
    checkpointing=True,
    beta=0.1,
    alpha=0.5,
    lr=1e-4,
    device="cpu",
    attention="sdpa",
):
    """Trains on `pairs`, `batch` of them a step and `per_device` at a time; after_step(loss) after each step.

    after_step(None) comes once before the first, when the models stand. On CUDA the models' weights are bfloat16 but
    for the policy's, which are float32 under bfloat16 autocast.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in train.py: it builds a plan for every new shape
    autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
    frozen = torch.bfloat16 if device == "cuda" else torch.float32
    policy, ref, guide = (
        LlamaForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).to(device)
        for directory, dtype in ((policy_dir, torch.float32), (policy_dir, frozen), (guide_dir, frozen))
    )
    ref.eval().requires_grad_(False)
    guide.eval().requires_grad_(False)
    policy.train()
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, fused=True)
    after_step(None)
    for start in range(0, len(pairs), batch):
        step, total = pairs[start : start + batch], torch.zeros((), device=device)
        for first in range(0, len(step), per_device):
            tokens, mask, labels = (table.to(device) for table in concatenated(step[first : first + per_device]))
            with autocast:
                with torch.no_grad():
                    ref_logp, guide_logp = (log_probs(model, tokens, mask, labels) for model in (ref, guide))
                losses = tgdpo(log_probs(policy, tokens, mask, labels), ref_logp, guide_logp, beta, alpha)
            loss = losses.sum() / len(step)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step(total.item())


def concatenated(pairs):
    """The chosen rows above the rejected ones: tokens, attention mask and labels, each [2 B, T]."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    tokens, mask = (
        torch.zeros(len(rows), longest, dtype=torch.int64),
        torch.zeros(len(rows), longest, dtype=torch.int64),
    )
    labels = torch.full((len(rows), longest), IGNORED)
    for row, (prompt, response) in enumerate(rows):
        P, T = len(prompt), len(prompt) + len(response)
        tokens[row, :P], tokens[row, P:T] = torch.from_numpy(prompt), torch.from_numpy(response)
        labels[row, P:T] = tokens[row, P:T]
        mask[row, :T] = 1
    return tokens, mask, labels


def log_probs(model, tokens, mask, labels):
    """Per-token log-probs of the labels, [2 B, T - 1], 0 where there is none."""
    logits = model(tokens, attention_mask=mask, use_cache=False).logits.float()[:, :-1]  # [2 B, T - 1, V]
    labels = labels[:, 1:]
    chosen = len(labels) // 2
    F.cross_entropy(logits[:chosen].flatten(0, 1), labels[:chosen].flatten(), ignore_index=IGNORED)
    scored = labels != IGNORED
    logp = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return logp * scored


def tgdpo(logp, ref_logp, guide_logp, beta, alpha):
    """The paper's loss of each pair, [B]."""
    reward = beta * (guide_logp - ref_logp)
    chosen = len(logp) // 2
    weight = torch.cat([1 + alpha * reward[:chosen], 1 - alpha * reward[chosen:]])
    weighted = beta * (weight * (logp - ref_logp)).sum(1)
    return -F.logsigmoid(weighted[:chosen] - weighted[chosen:])
