"""What the bundled example knows of a trained model and no other run does: the true reward of its replies."""

import numpy as np
import torch

import data
import model
from examples.tiny.language import gold_reward
from runtime.sampling import generate


@torch.no_grad()
def gold_figures(inputs, directories, longest):
    """{model: {gold, wins, kl}} of the bundled example, whose true reward is known: of two replies that each model
    draws to each prompt, their gold reward, how often it is above the reference's (a tie is half), and log pi/pi_ref.
    directories: {ref, guide (or None), policy -> the model's}; longest: a reply, in tokens."""
    stop, pairs = set(inputs.tokenizer.end_ids), inputs.eval_pairs or inputs.pairs[:256]
    nets = {name: model.load_model(directory) for name, directory in directories.items() if directory}
    asked, golds, figures = [pair.prompt.tolist() for pair in pairs for _ in range(2)], {}, {}
    for name, net in nets.items():
        drawn = generate(net, asked, longest, stop, 1.0, torch.Generator().manual_seed(0))
        texts = (inputs.tokenizer.decode([i for i in ids if i not in stop]) for ids in drawn)
        golds[name] = gold = np.array([gold_reward(text) for text in texts])
        replies = [np.array(ids, np.int32) for ids in drawn]
        pack = data.collate([p._replace(chosen=a, rejected=b) for p, a, b in zip(pairs, replies[::2], replies[1::2])])
        moved = net(pack.tokens, pack).sum() - nets["ref"](pack.tokens, pack).sum()
        wins = (np.sign(gold - golds["ref"]) + 1).mean() / 2
        figures[name] = {"gold": gold.mean().item(), "wins": wins.item(), "kl": moved.item() / len(drawn)}
    return figures
