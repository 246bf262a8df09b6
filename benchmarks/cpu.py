"""Time and memory on one CPU thread: this project, the authors' design, and TRL's DPOTrainer.

    python benchmarks/cpu.py                the table, about ten minutes
    python benchmarks/cpu.py --search       every setting of the contenders first, and the table with the fastest
    python benchmarks/cpu.py --small        a few seconds on a tiny model, to see that it runs

Each contender runs in a process of its own with one thread, and its CPU time is counted, not the time of day. They
train on the same pairs from the same start and take their steps in turn; a ratio is the median of the steps' ratios.
Losses are compared first. Memory is each process's peak above what stood after its imports.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import contest
import results
import workload

AUTHORS_BEST = {"per_device": 1, "checkpointing": False}  # what --search found
TRL_BEST = {"per_device": 1, "checkpointing": False}
EQUAL = 1e-5


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps of each contender; the first warms up")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--micro-tokens", type=int, help="train.py's option of that name; without, its default")
    parser.add_argument("--search", action="store_true", help="try the contenders' settings first")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--small", action="store_true", help="a tiny model and two pairs a step")
    parser.add_argument("--out", default=results.PATH, help="the Markdown file whose section is written")
    options = parser.parse_args(argv)
    config, divisor = (workload.LLAMA_TINY, 16) if options.small else (workload.LLAMA_256, 3)
    if options.small:
        options.batch, options.steps = 4, 3
    pairs = workload.make_pairs(options.batch * options.steps, config["vocab_size"], divisor, longest=2048 // divisor)
    with tempfile.TemporaryDirectory() as directory:
        models = [workload.write_model(f"{directory}/{name}", config, seed) for seed, name in enumerate("pg")]
        text = report(models, pairs, options)
    results.write("cpu", text, options.out)


def report(models, pairs, options):
    """The section's text."""

    def contender(module, **settings):
        return contest.Contender(module, *models, pairs, options.batch, **settings)

    mine = {"micro_tokens": options.micro_tokens} if options.micro_tokens else {}
    searched, best = "", {"authors": AUTHORS_BEST, "trl_contender": TRL_BEST}
    if options.search:
        searched, best = search(models, pairs, options)
    contenders = {
        "ours": contender("ours", **mine),
        "ours, DPO": contender("ours", **mine, loss="dpo"),
        "authors' design, a pair at a time, checkpointing": contender("authors", per_device=1, checkpointing=True),
        "authors' design, its best setting": contender("authors", **best["authors"]),
        "authors' design, padded in fours, checkpointing": contender("authors", per_device=4, checkpointing=True),
    }
    if not options.no_trl:
        contenders["TRL's DPOTrainer, its best setting"] = contender("trl_contender", **best["trl_contender"])
    contest.take_turns(contenders.values(), options.steps)
    ours, ours_dpo, single, fastest, fours, *trl = contenders.values()
    lines = [f"## CPU, one thread\n\n`python benchmarks/cpu.py` on {results.machine()}.", ""]
    shape = workload.lengths(pairs)
    lines += [
        f"{len(pairs)} pairs in steps of {options.batch}; tokens on average {shape[:, 0].mean():.0f} prompt, "
        f"{shape[:, 1].mean():.0f} chosen, {shape[:, 2].mean():.0f} rejected.",
        "",
    ]

    furthest = max(difference(ours, other) for other in (single, fastest, fours))
    lines += [
        f"Losses of three steps: {', '.join(f'{loss:.6f}' for loss in ours.losses[:3])}; the authors' design is "
        f"within {furthest:.0e}" + (f", TRL within {difference(ours_dpo, trl[0]):.0e} of our DPO" if trl else "") + "."
    ]
    for other in [single, fastest, fours, *trl]:
        if (found := difference(ours_dpo if other in trl else ours, other)) > EQUAL:
            lines += [f"**The losses differ by {found:.1e}: what follows compares different things.**"]

    def cold(contestant):
        return contestant.setup + sum(contestant.seconds)

    rows = [
        [
            "tokens/s against the authors' design, a pair at a time, checkpointing",
            f"{contest.ratio(single, ours):.2f}",
            "3.2",
        ],
        ["the same, its best setting", f"{contest.ratio(fastest, ours):.2f}", "2.85"],
    ]
    if trl:
        rows += [
            [
                "tokens/s of our DPO against TRL's DPOTrainer, reference precomputed, its best setting",
                f"{contest.ratio(trl[0], ours_dpo):.2f}",
                "2.55",
            ]
        ]
    rows += [
        [
            "cold cache, one epoch, against the authors' design, a pair at a time, checkpointing",
            f"{cold(single) / cold(ours):.2f}",
            "2.0",
        ],
        ["peak memory against the authors' design, a pair at a time", f"{ours.peak / single.peak:.2f}", "0.8"],
        ["peak memory against the authors' design, padded in fours", f"{ours.peak / fours.peak:.2f}", "0.35"],
    ]
    lines += ["", results.table(["", "measured", "reach"], rows), ""]

    per_step = workload.workload_tokens(pairs) / options.steps
    rows = [
        [
            name,
            f"{options.batch / statistics.median(each.seconds[1:]):.2f}",
            f"{per_step / statistics.median(each.seconds[1:]):.0f}",
            f"{each.setup:.1f}",
            f"{each.peak / 1e6:.0f}",
        ]
        for name, each in contenders.items()
    ]
    lines += [results.table(["", "pairs/s", "tokens/s", "set-up, s", "peak, MB"], rows)]
    lines += [
        "",
        "tokens/s counts 2·prompt + chosen + rejected for all. Set-up is loading, and the passes of the frozen "
        f"models where they come first. Settings: ours {mine or 'the default options'}; "
        + "; ".join(f"{name} {settings}" for name, settings in best.items() if not (options.no_trl and "trl" in name))
        + "."
        + searched,
    ]
    return "\n".join(lines)


def difference(a, b):
    """The largest difference of the losses of the first three steps."""
    return max(abs(x - y) for x, y in zip(a.losses[:3], b.losses[:3]))


def search(models, pairs, options):
    """Every setting of the contenders over two steps -> (the table as text, the fastest setting of each)."""
    rows, best = [], {}
    for module in ["authors"] + ["trl_contender"] * (not options.no_trl):
        found = []
        for per_device, checkpointing in itertools.product((1, 2, 4), (False, True)):
            settings = {"per_device": per_device, "checkpointing": checkpointing}
            each = contest.Contender(module, *models, pairs[: 2 * options.batch], options.batch, **settings)
            contest.take_turns([each], 2)
            found.append((sum(each.seconds), per_device, checkpointing))
            rows.append(
                [
                    module,
                    str(per_device),
                    "on" if checkpointing else "off",
                    f"{sum(each.seconds):.1f}",
                    f"{each.peak / 1e6:.0f}",
                ]
            )
        _, per_device, checkpointing = min(found)
        best[module] = {"per_device": per_device, "checkpointing": checkpointing}
    head = ["", "pairs at a time", "checkpointing", "two steps, s", "peak, MB"]
    return "\n\nSettings tried:\n\n" + results.table(head, rows), best


if __name__ == "__main__":
    main()
