"""model.generate the slow and clear way, without a cache: each step runs each sequence again, alone."""

import torch


@torch.no_grad()
def generate(network, prompts, max_new, stop, temperature=0.0, generator=None):
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(max_new):
        logits = torch.stack([network(torch.tensor([ids]))[0, -1] for ids in sequences])  # [B, V]
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
        else:
            chosen = logits.argmax(-1).tolist()
        for ids, token in zip(sequences, chosen):
            ids.append(token)
    replies = [ids[len(prompt) :] for ids, prompt in zip(sequences, prompts)]
    ends = [next((i + 1 for i, token in enumerate(ids) if token in stop), max_new) for ids in replies]
    return [ids[:end] for ids, end in zip(replies, ends)]
