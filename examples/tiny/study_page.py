"""STUDY.md and its plots from the lines of study.jsonl: means over the seeds with 95 % confidence intervals."""

import math

import numpy as np

# Two-sided 95 % points of Student's t by degrees of freedom (any statistics book).
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
KLS = (1, 2, 4, 8, 16)  # nats per reply
EQUAL_STEPS = (16, 32, 64, 128, 256)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#000000", "#882255", "#117733")
MAIN = ("DPO", "SimPO", "TGDPO", "TGDPO, gold guide", "TGDPO, shuffled guide")  # the rest are learned guides
NEAR = (0.05, 0.5, 1, 2, 4, 8, 12, 16, 24, 32)  # nats: the points of the frontier's plot


def interval(values):
    """(mean, half width of its 95 % confidence interval) of one value a seed."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), T95.get(len(values) - 1, 1.96) * float(values.std(ddof=1)) / math.sqrt(len(values))


def shown(values, digits=2):
    """Mean and interval in words, a dash where there are no values."""
    if not len(values):
        return "–"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def beside(rows, others, value):
    """The rows' mean of value(row) and, in brackets, by how much it exceeds that of the others' row of the same seed:
    mean difference and its interval. value: row -> number or None where the training has none; these are left out."""
    own, theirs = ({row["seed"]: value(row) for row in group} for group in (rows, others))
    found = [v for v in own.values() if v is not None]
    if not found:
        return "–"
    if rows == others:
        return shown(found)
    pairs = [(v, theirs[seed]) for seed, v in own.items() if v is not None and theirs.get(seed) is not None]
    mean, half = interval([a - b for a, b in pairs]) if pairs else (math.nan, math.nan)
    return f"{np.mean(found):.2f}" + ("" if math.isnan(half) else f" ({mean:+.2f} ± {half:.2f})")


def steps_to(line, gold):
    """The step at which the training first has the gold reward, interpolated; None where it never has."""
    before = {"step": 0, "gold": min(line["start"], gold)}
    for point in line["curve"]:
        if point["gold"] > gold:
            share = (gold - before["gold"]) / (point["gold"] - before["gold"])
            return before["step"] + share * (point["step"] - before["step"])
        before = point
    return None


def best(line):
    """The checkpoint with the highest gold reward: an oracle's choice, which no user could make."""
    return max(line["curve"], key=lambda point: point["gold"])


def at_kl(line, kl):
    """The gold reward where the training passes the given KL for the first time, interpolated; None where it never
    does. Training starts at the reference: KL 0."""
    before = {"kl": 0.0, "gold": line["start"]}
    for point in line["curve"]:
        if point["kl"] >= kl:
            share = (kl - before["kl"]) / (point["kl"] - before["kl"])
            return before["gold"] + share * (point["gold"] - before["gold"])
        before = point
    return None


def svg(path, title, xlabel, ylabel, series):
    """A plot as a hand-written SVG. series: name -> (xs, ys, half widths or None)."""
    width, height, left, right, top, bottom = 760, 420, 60, 230, 36, 48
    points = [(x, y) for xs, ys, _ in series.values() for x, y in zip(xs, ys)]
    x0, x1 = 0, max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    y0, y1 = y0 - 0.06 * (y1 - y0 or 1), y1 + 0.06 * (y1 - y0 or 1)
    px = lambda x: left + (x - x0) / ((x1 - x0) or 1) * (width - left - right)
    py = lambda y: height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="20" font-size="14">{title}</text>',
    ]
    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        out.append(
            f'<text x="{px(x):.1f}" y="{height - 28}" text-anchor="middle">{x:.4g}</text>'
            f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>'
            f'<path d="M{left} {py(y):.1f}H{width - right}" stroke="#ddd"/>'
        )
    out.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{xlabel}</text>'
        f'<text transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle">{ylabel}</text>'
    )
    for number, (name, (xs, ys, halves)) in enumerate(series.items()):
        colour, y = COLOURS[number % len(COLOURS)], top + 16 * number
        if halves is not None and not any(map(math.isnan, halves)):
            edge = [f"{px(x):.1f} {py(min(v + h, y1)):.1f}" for x, v, h in zip(xs, ys, halves)]
            edge += [f"{px(x):.1f} {py(max(v - h, y0)):.1f}" for x, v, h in reversed(list(zip(xs, ys, halves)))]
            out.append(f'<path d="M{" L".join(edge)}Z" fill="{colour}" opacity="0.13"/>')
        line = " L".join(f"{px(x):.1f} {py(v):.1f}" for x, v in zip(xs, ys))
        out.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{px(x):.1f}" cy="{py(v):.1f}" r="2.5" fill="{colour}"/>' for x, v in zip(xs, ys)]
        out.append(
            f'<rect x="{width - right + 16}" y="{y}" width="12" height="4" fill="{colour}"/>'
            f'<text x="{width - right + 34}" y="{y + 8}">{name}</text>'
        )
    path.write_text("\n".join(out) + "\n</svg>\n")


def curve(lines, x, y):
    """Means over the seeds at each measured point: (xs, ys, half widths)."""
    points = list(zip(*(line["curve"] for line in lines)))
    ys = [interval([p[y] for p in point]) for point in points]
    return ([float(np.mean([p[x] for p in point])) for point in points], [m for m, _ in ys], [h for _, h in ys])


def write(page, work, lines, plan):
    """Write the page and the plots from what is there. plan: the object of start.json."""
    lines = [line | {"start": plan["gold"]} for line in lines if "failed" not in line]

    def of(method, pairs=plan["pairs"], alpha=1.0):
        return [line for line in lines if (line["method"], line["pairs"], line["alpha"]) == (method, pairs, alpha)]

    def table(head, rows):
        text.append(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        text.extend(f"| {' | '.join(row)} |" for row in rows)

    def end(key):
        return lambda row: row["curve"][-1][key]

    def plot(name, title, xlabel, series):
        svg(work / f"{name}.svg", title, xlabel, "gold reward", series)
        text.append(f"\n![{title}](study/{name}.svg)")

    steps, epochs = plan["points"][-1], plan["points"][-1] * plan["batch"] / plan["pairs"]
    methods = {m: of(m) for m in sorted({line["method"] for line in lines}, key=lambda m: (m not in MAIN, m)) if of(m)}
    dpo, sizes = methods["DPO"], sorted({plan["pairs"], *plan["sizes"]})
    alphas = {a: of("TGDPO", alpha=a) for a in plan["alphas"] if of("TGDPO", alpha=a)}
    claims = page.parent / "CLAIMS.md"
    text = [
        f"""# The paper's claims on the tiny example

`python -m examples.tiny.study` made this page: {len(lines)} trainings over {plan["seeds"]} seeds, each of which draws its
own pairs and their order. {steps} steps of {plan["batch"]} pairs are {epochs:.0f} epochs over {plan["pairs"]} pairs, far past the point where
a run would stop; AdamW at {plan["lr"]}, constant after a short warm-up. β {plan["beta"]} (SimPO {plan["simpo"]["beta"]}, γ {plan["simpo"]["gamma"]}), α 1
unless said. The guide is DPO after {plan["guide_steps"]} steps on the same pairs. All other guides' r̂ (SimPO's, of another β, of half
the pairs, gold, shuffled over the tokens, cross-fitted: each half of the pairs judged by a guide from the other) are
scaled to the spread of that guide's, so that only their direction differs.

Measured on {2 * plan["prompts"]} samples for held-out prompts: the gold reward, which no method sees (the reference has
{plan["gold"]:.2f}); the share of samples that beat the reference's for the same prompt; the KL divergence from the
reference per reply, in nats. ± is a 95 % confidence interval over seeds; in brackets the difference to DPO with
the same seed. *Best* is the measured point with the highest gold reward, an oracle's choice. The responses of a
held-out pair have {plan["shared"]:.0%} of their tokens in common, in the same order.
"""
    ]
    if claims.exists() and page.parent == work.parent:
        text.append(claims.read_text().strip() + "\n")
    text.append(f"## Each method, {plan['pairs']} pairs")
    table(
        ("method", "gold, best", "KL there", "gold, end", "win rate, end", "KL, end", "loss, end"),
        [
            (
                m,
                beside(rows, dpo, lambda row: best(row)["gold"]),
                shown([best(r)["kl"] for r in rows], 0),
                beside(rows, dpo, end("gold")),
                shown([100 * end("win")(r) for r in rows], 0) + " %",
                shown([end("kl")(r) for r in rows], 0),
                shown([end("loss")(r) for r in rows], 3),
            )
            for m, rows in methods.items()
        ],
    )
    learned = [m for m in methods if m not in MAIN]
    for name, title, some in (
        ("methods", "Gold reward of samples over training", MAIN),
        ("guides", "The same with other learned guides", ("DPO", "TGDPO", *learned)),
    ):
        plot(name, title, "step", {m: curve(methods[m], "step", "gold") for m in some if m in methods})
    frontier = {
        m: [(kl, np.mean(found)) for kl in NEAR if (found := [v for row in rows if (v := at_kl(row, kl)) is not None])]
        for m, rows in methods.items()
    }
    plot(
        "frontier",
        "Gold reward against KL from the reference",
        "KL per reply, nats",
        {m: ([kl for kl, _ in points], [gold for _, gold in points], None) for m, points in frontier.items() if points},
    )

    text.append("\n## Gold reward at equal steps")
    places = [k for k, step in enumerate(plan["points"]) if step in EQUAL_STEPS] or range(len(plan["points"]))
    table(
        ("method", *(f"step {plan['points'][k]}" for k in places)),
        [(m, *(beside(rows, dpo, lambda row: row["curve"][k]["gold"]) for k in places)) for m, rows in methods.items()],
    )
    text.append("\n## Gold reward at equal KL\n\nWhere a training first passes the KL, interpolated.")
    table(
        ("method", *(f"KL {kl}" for kl in KLS)),
        [(m, *(beside(rows, dpo, lambda row: at_kl(row, kl)) for kl in KLS)) for m, rows in methods.items()],
    )
    text.append(
        "\n## Against the shuffled guide\n\nThe same, in brackets the difference to the DPO guide's r̂ dealt to "
        "the tokens at random: what the direction of r̂ is worth."
    )
    random = methods["TGDPO, shuffled guide"]
    table(
        ("method", *(f"step {plan['points'][k]}" for k in places[:2]), *(f"KL {kl}" for kl in KLS)),
        [
            (
                m,
                *(beside(rows, random, lambda row: row["curve"][k]["gold"]) for k in places[:2]),
                *(beside(rows, random, lambda row: at_kl(row, kl)) for kl in KLS),
            )
            for m, rows in methods.items()
            if m.startswith("TGDPO")
        ],
    )

    half = np.mean([best(row)["gold"] for row in dpo]) / 2
    text.append(
        f"\n## α and the speed\n\nDPO needs {shown([s for r in dpo if (s := steps_to(r, half))], 0)} steps to half of "
        f"its best gold reward, {half:.2f}."
    )
    table(
        (
            "α",
            "steps to that",
            *(f"gold, step {plan['points'][k]}" for k in places[:2]),
            "gold, best",
            "gold, end",
            "KL, end",
            "tokens with f ≤ 0",
            "at most",
        ),
        [
            (
                f"{a}",
                shown([s for r in rows if (s := steps_to(r, half))], 0),
                *(beside(rows, dpo, lambda row: row["curve"][k]["gold"]) for k in places[:2]),
                beside(rows, dpo, lambda row: best(row)["gold"]),
                beside(rows, dpo, end("gold")),
                shown([end("kl")(r) for r in rows], 0),
                shown([100 * r["f_nonpositive"] for r in rows]) + " %",
                f"{max(100 * r['f_nonpositive'] for r in rows):.2f} %",
            )
            for a, rows in alphas.items()
        ],
    )
    plot(
        "alpha",
        "TGDPO: gold reward over training by α",
        "step",
        {"DPO": curve(dpo, "step", "gold")} | {f"α {a}": curve(rows, "step", "gold") for a, rows in alphas.items()},
    )

    text.append(
        f"\n## How many pairs\n\nAll sizes train for {steps} steps, so the fewer pairs the more epochs: "
        + ", ".join(f"{size} pairs {steps * plan['batch'] / size:.0f}" for size in sizes)
        + "."
    )
    table(
        ("pairs", "method", "gold, best", "gold, end", "KL, end", *(f"at KL {kl}" for kl in (4, 16))),
        [
            (
                f"{size}",
                m,
                beside(rows, of("DPO", size), lambda row: best(row)["gold"]),
                beside(rows, of("DPO", size), end("gold")),
                shown([end("kl")(r) for r in rows], 0),
                *(beside(rows, of("DPO", size), lambda row: at_kl(row, kl)) for kl in (4, 16)),
            )
            for size in sizes
            for m in ("DPO", "SimPO", "TGDPO")
            if (rows := of(m, size))
        ],
    )
    text.append("\n## How well r̂ finds the gold reward\n\nPearson's correlation per token over the held-out pairs.")
    table(
        ("guide", "pairs", "correlation"),
        [
            (m, f"{size}", shown(found, 3))
            for m in methods
            for size in sizes
            if (found := [r["correlation"] for r in of(m, size) if "correlation" in r])
        ],
    )
    page.write_text("\n".join(text) + "\n")
