"""How the models of a run answer: samples on the way and at its end."""

from runtime import sampling
from runtime.shards import let_go
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
        new = sampling.generate(
            net, asked, run.options.sample_tokens, set(tokenizer.end_ids), stop_early=run.world == 1
        )  # ranks that round otherwise would not all stop
        answers += [
            (tokenizer.decode(prompt), tokenizer.decode([i for i in ids if i not in tokenizer.end_ids]))
            for prompt, ids in zip(asked, new)
        ]
        heed(run)
    let_go(net)
    return answers


def write_samples(run, loss, step, answers):
    """A line an answer, numbered from 1."""
    for number, (prompt, text) in enumerate(answers, 1):
        run.samples.write({"stage": loss, "step": step, "sample": number, "prompt": prompt, "answer": text})
