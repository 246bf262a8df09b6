"""Sampling of many replies at once: model.generate with a cache of keys and values, which costs a tenth of the time.

It reads the weights of a model.CausalLM (full attention, no sliding window) and gives the same ids; a test compares.
Letters: B rows, n new positions of a row, T positions of the cache, H heads, K key-value heads, D head size.
"""

import torch
import torch.nn.functional as F

from model import rope_frequencies, rotate


@torch.no_grad()
def sample(network, prompts, max_new, stop, temperature=1.0, generator=None):
    """Continues each prompt: a list of id lists -> a list of lists of new ids, ended by an id of `stop` (included)
    or after max_new. Temperature 0 takes the likeliest token, otherwise `generator` draws."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rows = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, n]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)  # [B, n]
    cache = _empty_cache(network, *tokens.shape, max_new)
    logits = _logits(network, tokens, positions, lengths - 1, cache)  # [B, V]
    stops, drawn, ended = torch.tensor(sorted(stop)), [], torch.zeros(len(rows), dtype=torch.bool)
    for step in range(max_new):
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)  # [B, 1]
        else:
            chosen = logits.argmax(-1, keepdim=True)
        drawn.append(chosen)
        ended = ended | torch.isin(chosen[:, 0], stops)
        if bool(ended.all()) or step == max_new - 1:
            break
        logits = _logits(network, chosen, (lengths + step)[:, None], torch.zeros_like(lengths), cache)
    replies = []
    for row in torch.cat(drawn, 1).tolist():
        end = next((index for index, token in enumerate(row) if token in stop), len(row))
        replies.append(row[: end + 1])
    return replies


def _empty_cache(network, rows, longest, max_new):
    """For each layer its keys and its values, [B, K, T, D]."""
    config = network.config
    shape = (2, rows, config.num_key_value_heads, longest + max_new, config.head_dim)
    return [torch.zeros(shape) for _ in network.model.layers]


def _logits(network, tokens, positions, last, cache):
    """Runs new tokens [B, n] at their positions [B, n] through the model and puts their keys and values into the
    cache; -> logits [B, V] of column `last` [B] of each row. A row's padding is written behind what its queries
    see, and is overwritten before they come to see it."""
    B, n = tokens.shape
    T = int(positions.max()) + 1
    angles = positions.reshape(-1, 1).float() * rope_frequencies(network.config)  # [B n, D/2]
    cos, sin = angles.cos(), angles.sin()
    sees = (torch.arange(T) <= positions[:, :, None])[:, None]  # [B, 1, n, T]
    row = torch.arange(B)[:, None]  # [B, 1]
    x = network.model.embed_tokens(tokens)  # [B, n, C]
    for block, (keys, values) in zip(network.model.layers, cache):
        attention, h = block.self_attn, block.input_layernorm(x)
        q = rotate(attention.q_proj(h).view(1, B * n, attention.heads, -1), cos, sin)
        k = rotate(attention.k_proj(h).view(1, B * n, attention.kv_heads, -1), cos, sin)
        keys[row, :, positions] = k.view(B, n, attention.kv_heads, -1)
        values[row, :, positions] = attention.v_proj(h).view(B, n, attention.kv_heads, -1)
        q = q.view(B, n, attention.heads, -1).transpose(1, 2)  # [B, H, n, D]
        y = F.scaled_dot_product_attention(q, keys[:, :, :T], values[:, :, :T], attn_mask=sees, enable_gqa=True)
        x = x + attention.o_proj(y.transpose(1, 2).reshape(B, n, -1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    x = network.model.norm(x)[torch.arange(B), last]  # [B, C]
    return F.linear(x, network.head)
