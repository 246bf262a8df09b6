"""Answers of a model, token by token, with a cache of keys and values.

Letters: B sequences, T tokens of a sequence, n new tokens, K key-value heads, D head size, V vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class Cache:
    """The keys and values that generation keeps from step to step. lengths [B]: tokens of each prompt; most: tokens
    of the longest sequence with all that is to come, T."""

    def __init__(self, lengths: Tensor, most: int):
        self.last, self.most, self.layers = lengths - 1, most, None  # last: position of each one's last token, [B]

    def of_layers(self, config, x: Tensor) -> list["Layer"]:
        """Each layer's part, for a model.Config and hidden states x. Made at first, of x's type."""
        if self.layers is None:
            shape = (2, len(x), config.num_key_value_heads, self.most, config.head_dim)
            self.layers = [x.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        return [Layer(*kept, self.last.to(x.device)) for kept in self.layers]


class Layer(NamedTuple):
    """A layer's part of the cache."""

    keys: Tensor  # [B, K, T, D]
    values: Tensor  # [B, K, T, D]
    last: Tensor  # [B]

    def remember(self, k: Tensor, v: Tensor) -> tuple:
        """Write new tokens' k and v [B, K, n, D] -> what attention takes: keys, values, positions. Prompts (n > 1)
        begin at 0 and see themselves alone, their padding is overwritten before a token sees it; a single token stands
        at `last` and sees all before it."""
        n = k.shape[2]
        if n > 1:
            self.keys[:, :, :n], self.values[:, :, :n] = k, v
            return k, v, None
        sequences = torch.arange(len(self.last), device=k.device)
        self.keys[sequences, :, self.last], self.values[sequences, :, self.last] = k[:, :, 0], v[:, :, 0]  # [B, K, D]
        return self.keys, self.values, self.last[:, None]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    stop: Collection[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_early: bool = True,
) -> list[list[int]]:
    """Continue each prompt: lists of ids -> lists of new ids, ended by an id of `stop` (included) or after max_new.

    Temperature 0 takes the likeliest token, otherwise `generator` draws. stop_early: end when all have ended; without,
    every call makes max_new steps, so that several processes that share the model's collectives make as many."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = pad_sequence([torch.tensor(prompt, device=device) for prompt in prompts], batch_first=True)  # [B, T]
    cache, replies = Cache(lengths, tokens.shape[1] + max_new), [[] for _ in prompts]
    for _ in range(max_new):
        logits = model(tokens, cache=cache).float()  # [B, V]
        if temperature > 0:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)  # [B, 1]
        else:
            tokens = logits.argmax(-1, keepdim=True)  # [B, 1]
        cache.last = cache.last + 1
        for reply, token in zip(replies, tokens[:, 0].tolist()):
            if not reply or reply[-1] not in stop:
                reply.append(token)
        if stop_early and all(reply[-1] in stop for reply in replies):
            break
    return replies
