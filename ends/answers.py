"""How the models of a run answer: samples on the way and at its end, and the bundled example's true reward of them."""

import numpy as np
import torch

import data
import model
from runtime.training import stop_if_told


def after_export(run):
    """Follow a signal where all that counts is done."""
    stop_if_told(run, state="the policy is exported, the answers are not done")


def answer(run, net, inputs, heed=after_export):
    """The likeliest answers to the first --samples different prompts: [(prompt, answer)] as text. inputs: what has
    pairs and eval_pairs. heed: called with the run after each pack of prompts, to follow signals."""
    tokenizer, pairs = run.tokenizer, inputs.eval_pairs or inputs.pairs
    prompts = list(dict.fromkeys(tuple(pair.prompt.tolist()) for pair in pairs))[: run.options.samples]
    widest = max(map(len, prompts), default=0) + run.options.sample_tokens
    several, answers = max(1, run.plan.micro_tokens_forward // widest), []  # prompts at a time
    for asked in (prompts[k : k + several] for k in range(0, len(prompts), several)):
        new = model.generate(
            net, asked, run.options.sample_tokens, set(tokenizer.end_ids), stop_early=run.world == 1
        )  # ranks that round otherwise would not all stop
        answers += [
            (tokenizer.decode(prompt), tokenizer.decode([i for i in ids if i not in tokenizer.end_ids]))
            for prompt, ids in zip(asked, new)
        ]
        heed(run)
    net.reshard()
    return answers


def write_samples(run, loss, step, answers):
    """A line an answer, numbered from 1."""
    for number, (prompt, text) in enumerate(answers, 1):
        run.samples.write({"stage": loss, "step": step, "sample": number, "prompt": prompt, "answer": text})


@torch.no_grad()
def gold_figures(inputs, directories, longest):
    """{model: {gold, wins, kl}} of the bundled example, whose true reward is known: of two replies that each model
    draws to each prompt, their gold reward, how often it is above the reference's (a tie is half), and log pi/pi_ref.
    directories: {ref, guide (or None), policy -> the model's}; longest: a reply, in tokens."""
    try:
        from examples.tiny.language import gold_reward
    except ImportError:
        return {}
    stop, pairs = set(inputs.tokenizer.end_ids), inputs.eval_pairs or inputs.pairs[:256]
    nets = {name: model.load_model(directory) for name, directory in directories.items() if directory}
    asked, golds, figures = [pair.prompt.tolist() for pair in pairs for _ in range(2)], {}, {}
    for name, net in nets.items():
        drawn = model.generate(net, asked, longest, stop, 1.0, torch.Generator().manual_seed(0))
        texts = (inputs.tokenizer.decode([i for i in ids if i not in stop]) for ids in drawn)
        golds[name] = gold = np.array([gold_reward(text) for text in texts])
        replies = [np.array(ids, np.int32) for ids in drawn]
        pack = data.collate([p._replace(chosen=a, rejected=b) for p, a, b in zip(pairs, replies[::2], replies[1::2])])
        moved = net(pack.tokens, pack).sum() - nets["ref"](pack.tokens, pack).sum()
        wins = (np.sign(gold - golds["ref"]) + 1).mean() / 2
        figures[name] = {"gold": gold.mean().item(), "wins": wins.item(), "kl": moved.item() / len(drawn)}
    return figures
