"""How cost grows: with tokens, sequence length, vocabulary and ranks. CPU time, one thread a rank, gloo.

    python benchmarks/scale.py              about eight minutes
    python benchmarks/scale.py --small      a few seconds on a tiny model, to see that it runs

A step is a whole optimiser step of train.py with float32 weights. Times are CPU time, the least of the repeats, so
that other work on the machine does not show.
"""

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import contest
import ours
import results
import workload

import data
import model as transformer
import train as trainer
from runtime import flops


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model and short sequences")
    parser.add_argument("--out", default=results.PATH, help="the Markdown file whose section is written")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.config = workload.LLAMA_TINY if options.small else workload.LLAMA_256
    options.tokens = 64 if options.small else 326  # of a pair
    with tempfile.TemporaryDirectory() as directory:
        parts = [part(options, Path(directory)) for part in (batch, length, vocabulary, ranks)]
    title = f"## How cost grows\n\n`python benchmarks/scale.py{' --small' * options.small}` on {results.machine()}."
    results.write("scale", "\n\n".join([title, *parts]), options.out)


def equal_pairs(count, tokens, vocab):
    """Pairs of `tokens` tokens each: a fifth of them prompt, the rest two responses of one length."""
    response = tokens * 2 // 5
    random = np.random.RandomState(0)
    return [
        workload.Pair(
            *(random.randint(2, vocab, size).astype(np.int32) for size in (tokens - 2 * response, response, response)),
            f"equal:{row}",
        )
        for row in range(1, count + 1)
    ]


def step_seconds(directory, batches, repeats, **settings):
    """CPU seconds of an optimiser step on each of `batches` (lists of pairs): the least of the repeats, in turn."""
    with ours.a_run(directory, [pair for pairs in batches for pair in pairs], **settings) as run:
        net, optimiser = ours.policy(run, directory)
        least = [float("inf")] * len(batches)
        for _ in range(repeats + 1):
            for place, pairs in enumerate(batches):
                zeros = [torch.zeros(pair.scored) for pair in pairs]
                stage = trainer.Stage("tgdpo", pairs, [], zeros, zeros)
                began = time.process_time()
                trainer.optimiser_step(run, net, optimiser, stage, range(len(pairs)))
                least[place] = min(least[place], time.process_time() - began)
    return least


def straight(sizes, seconds):
    """How well a straight line fits (sizes, seconds), in words."""
    slope, start = np.polyfit(sizes, seconds, 1)
    rest = np.array(seconds) - (slope * np.array(sizes) + start)
    r2 = 1 - (rest**2).sum() / ((seconds - np.mean(seconds)) ** 2).sum()
    return f"A straight line fits with R² = {r2:.4f}."


def batch(options, directory):
    """Pairs a step: cost is linear in tokens."""
    policy = workload.write_model(directory / "batch", options.config, 0)
    counts = (2, 4, 8) if options.small else (2, 4, 8, 16, 32)
    batches = [equal_pairs(count, options.tokens, options.config["vocab_size"]) for count in counts]
    seconds = step_seconds(policy, batches, options.repeats, micro_tokens=2 * options.tokens)
    sizes = [count * options.tokens for count in counts]
    rows = [
        [str(count), str(size), f"{taken:.2f}", f"{1000 * taken / size:.3f}"]
        for count, size, taken in zip(counts, sizes, seconds)
    ]
    head = ["pairs a step", "tokens", "seconds", "ms a token"]
    ratio = seconds[-1] / sizes[-1] / (seconds[0] / sizes[0])
    note = f"{straight(sizes, seconds)} The last row's tokens cost {ratio:.2f} times what the first row's do."
    return f"### Batch\n\n{results.table(head, rows)}\n\n{note}"


def length(options, directory):
    """Longer pairs, as many tokens in all: only attention's share grows."""
    policy = workload.write_model(directory / "length", options.config, 0)
    total, lengths = (256, (64, 128, 256)) if options.small else (4096, (256, 512, 1024, 2048))
    batches = [equal_pairs(total // tokens, tokens, options.config["vocab_size"]) for tokens in lengths]
    seconds = step_seconds(policy, batches, options.repeats, micro_tokens=total // 2)
    config = transformer.read_config(str(policy))
    work = [sum(flops.pair_flops(config, *map(int, shape)) for shape in workload.lengths(pairs)) for pairs in batches]
    rows = [
        [str(tokens), f"{taken:.2f}", f"{taken / seconds[0]:.2f}", f"{done / work[0]:.2f}"]
        for tokens, taken, done in zip(lengths, seconds, work)
    ]
    head = ["tokens a pair", "seconds", "against the first", "FLOPs against the first"]
    return f"### Sequence length\n\n{total} tokens a step.\n\n{results.table(head, rows)}"


def vocabulary(options, directory):
    """Larger vocabularies: the head's share grows linearly."""
    sizes = (256, 512, 1024) if options.small else (4096, 8192, 16384, 32768, 65536)
    seconds, count = [], 4 if options.small else 8
    for size in sizes:
        config = options.config | {"vocab_size": size}
        policy = workload.write_model(directory / f"vocabulary {size}", config, 0)
        seconds += step_seconds(
            policy, [equal_pairs(count, options.tokens, size)], options.repeats, micro_tokens=2 * options.tokens
        )
    rows = [[str(size), f"{taken:.2f}", f"{taken / seconds[0]:.2f}"] for size, taken in zip(sizes, seconds)]
    table = results.table(["vocabulary", "seconds", "against the first"], rows)
    return f"### Vocabulary\n\n{count} pairs a step.\n\n{table}\n\n{straight(sizes, seconds)}"


def ranks(options, directory):
    """One step of one process and shared by two over gloo, and what makes the difference: the step of a process alone
    that shards all the same, and one on half of the pairs, which has all that is done once a step whatever the pairs.
    """
    policy = workload.write_model(directory / "ranks", options.config, 0)
    pairs = workload.make_pairs(
        8 if options.small else 16, options.config["vocab_size"], 16 if options.small else 3, longest=2048 // 3
    )
    half = [pairs[i] for part in data.deal([pair.packed for pair in pairs], 2, 2 * options.tokens)[0] for i in part]
    cases = {
        "1": (1, pairs, True),
        "1, sharded all the same": (1, pairs, False),
        "1, on rank 0's half of the pairs": (1, half, True),
        "1, on that half, sharded": (1, half, False),
        "2": (2, pairs, False),
    }
    found = [together(world, str(policy), some, alone, options) for world, some, alone in cases.values()]
    rows = []
    for (name, (world, some, _)), (cpu, wall) in zip(cases.items(), found):
        work = len(some) / len(pairs) / world  # of the first row's, a rank
        efficiency = [f"{work * one / taken:.2f}" for one, taken in zip(found[0], (cpu, wall))]
        rows.append([name, f"{cpu:.2f}", efficiency[0], f"{wall:.2f}", efficiency[1]])
    head = ["ranks", "CPU s of the busiest rank", "efficiency", "wall s", "efficiency by wall"]
    note = f"{len(pairs)} pairs a step, of different lengths. Wall time tells of the machine's other work too."
    return f"### Ranks\n\n{results.table(head, rows)}\n\n{note}"


def together(world, policy, pairs, alone, options):
    """A step on `world` ranks -> (CPU seconds of the busiest rank, wall seconds), the least of the repeats. alone:
    without fully_shard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context(contest.START)
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=one_rank, args=(rank, world, port, policy, pairs, alone, options, answers))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a rank ended with exit status {process.exitcode}")
    taken = np.array([answers.get() for _ in processes])  # [ranks, repeats, (CPU, wall)]
    return tuple(taken.max(0).min(0))


def one_rank(rank, world, port, policy, pairs, alone, options, answers):
    """The child: its times, [repeats] of (CPU, wall), go into `answers`."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with ours.a_run(policy, pairs, micro_tokens=2 * options.tokens) as run:
        run = run._replace(plan=run.plan._replace(alone=alone))
        net, optimiser = ours.policy(run, policy)
        zeros = [torch.zeros(pair.scored) for pair in pairs]
        stage, taken = trainer.Stage("tgdpo", pairs, [], zeros, zeros), []
        for _ in range(options.repeats + 1):
            cpu, wall = time.process_time(), time.perf_counter()
            trainer.optimiser_step(run, net, optimiser, stage, range(len(pairs)))
            taken.append((time.process_time() - cpu, time.perf_counter() - wall))
    answers.put(taken[1:])


if __name__ == "__main__":
    main()
