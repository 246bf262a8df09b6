"""STUDY.md and its plots from the lines of study.jsonl: means over the seeds with 95 % confidence intervals."""

import json
import math

import numpy as np

# Two-sided 95 % points of Student's t by degrees of freedom (any statistics book).
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
KLS = (1, 2, 4, 8, 16)      # nats per reply
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#000000")


def interval(values):
    """(mean, half width of its 95 % confidence interval) of one value a seed."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), T95.get(len(values) - 1, 1.96) * float(values.std(ddof=1)) / math.sqrt(len(values))


def shown(values, digits=2):
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


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
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    y0, y1 = y0 - 0.06 * (y1 - y0 or 1), y1 + 0.06 * (y1 - y0 or 1)
    px = lambda x: left + (x - x0) / ((x1 - x0) or 1) * (width - left - right)
    py = lambda y: height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="20" font-size="14">{title}</text>']
    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        out.append(f'<text x="{px(x):.1f}" y="{height - 28}" text-anchor="middle">{x:.4g}</text>'
                   f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>'
                   f'<path d="M{left} {py(y):.1f}H{width - right}" stroke="#ddd"/>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{xlabel}</text>'
               f'<text transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle">{ylabel}</text>')
    for number, (name, (xs, ys, halves)) in enumerate(series.items()):
        colour, y = COLOURS[number % len(COLOURS)], top + 16 * number
        if halves is not None and not any(map(math.isnan, halves)):
            edge = [f"{px(x):.1f} {py(min(v + h, y1)):.1f}" for x, v, h in zip(xs, ys, halves)]
            edge += [f"{px(x):.1f} {py(max(v - h, y0)):.1f}" for x, v, h in reversed(list(zip(xs, ys, halves)))]
            out.append(f'<path d="M{" L".join(edge)}Z" fill="{colour}" opacity="0.13"/>')
        line = " L".join(f"{px(x):.1f} {py(v):.1f}" for x, v in zip(xs, ys))
        out.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{px(x):.1f}" cy="{py(v):.1f}" r="2.5" fill="{colour}"/>' for x, v in zip(xs, ys)]
        out.append(f'<rect x="{width - right + 16}" y="{y}" width="12" height="4" fill="{colour}"/>'
                   f'<text x="{width - right + 34}" y="{y + 8}">{name}</text>')
    path.write_text("\n".join(out) + "\n</svg>\n")


def curve(lines, x, y):
    """Means over the seeds at each measured point: (xs, ys, half widths)."""
    points = list(zip(*(line["curve"] for line in lines)))
    ys = [interval([p[y] for p in point]) for point in points]
    return ([float(np.mean([p[x] for p in point])) for point in points], [m for m, _ in ys], [h for _, h in ys])


def write(page, work, lines, plan):
    """Write the page and the plots from what is there."""
    start = json.loads((work / "start.json").read_text())
    lines = [line | {"start": start["gold"]} for line in lines if "failed" not in line]
    of = lambda method, pairs=plan["pairs"], alpha=1.0: [
        line for line in lines if (line["method"], line["pairs"], line["alpha"]) == (method, pairs, alpha)]
    steps = plan["points"][-1]
    methods = list(dict.fromkeys(line["method"] for line in lines))
    text = [f"""# The paper's claims on the tiny example

`python -m examples.tiny.study` made this page: {len(lines)} trainings over {plan['seeds']} seeds (each draws its own pairs
and its own order), {steps} steps of 32 pairs at a constant learning rate, so {steps * 32 / plan['pairs']:.0f}
epochs over {plan['pairs']} pairs: far past the point where a run would stop. β 0.1 (SimPO 2.5, γ 1.375), α 1 unless said.
Measured on {2 * plan['prompts']} samples for held-out prompts: the gold reward, which no method sees; the share of samples
that beat the reference's for the same prompt; the KL divergence from the reference per reply, in nats. ± is a 95 %
confidence interval over seeds. *Best* is the measured point with the highest gold reward, an oracle's choice.
The guide is DPO after {plan['guide_steps']} steps on the same pairs. Reference: gold reward {start['gold']:.2f}.

## Each method, {plan['pairs']} pairs

| method | gold, best | KL there | gold, end | win rate, end | KL, end | loss, end |
|---|---|---|---|---|---|---|"""]
    for method in methods:
        rows = of(method)
        if rows:
            end = [row["curve"][-1] for row in rows]
            text.append(f"| {method} | {shown([best(r)['gold'] for r in rows])} | {shown([best(r)['kl'] for r in rows], 1)} | "
                        f"{shown([e['gold'] for e in end])} | {shown([100 * e['win'] for e in end], 0)} % | "
                        f"{shown([e['kl'] for e in end], 1)} | {shown([e['loss'] for e in end], 3)} |")
    svg(work / "methods.svg", "Gold reward of samples over training", "step", "gold reward",
        {m: curve(of(m), "step", "gold") for m in methods if of(m)})
    svg(work / "frontier.svg", "Gold reward against KL from the reference", "KL per reply, nats", "gold reward",
        {m: curve(of(m), "kl", "gold")[:2] + (None,) for m in methods if of(m)})
    text.append("\n![gold reward over training](study/methods.svg)\n\n![gold reward against KL](study/frontier.svg)\n")

    text.append("## Gold reward at equal KL\n\nWhere a training first passes the KL, interpolated; seeds that reach it.\n\n"
                "| method | " + " | ".join(f"KL {k}" for k in KLS) + " |\n|---" + "|---" * len(KLS) + "|")
    for method in methods:
        cells = [[v for v in (at_kl(row, k) for row in of(method)) if v is not None] for k in KLS]
        text.append(f"| {method} | " + " | ".join(f"{shown(c)} ({len(c)})" if c else "–" for c in cells) + " |")

    text.append("\n## α and the speed\n\n| α | steps to DPO's best gold reward | gold, best | gold, end | KL, end | tokens with f ≤ 0 |"
                "\n|---|---|---|---|---|---|")
    target = np.mean([best(row)["gold"] for row in of("DPO")]) if of("DPO") else math.inf
    for alpha in plan["alphas"]:
        rows = of("TGDPO", alpha=alpha)
        if rows:
            reached = [next((p["step"] for p in row["curve"] if p["gold"] >= target), None) for row in rows]
            hits = [s for s in reached if s is not None]
            text.append(f"| {alpha} | {shown(hits, 0) if hits else '–'} ({len(hits)} of {len(rows)} seeds) | "
                        f"{shown([best(r)['gold'] for r in rows])} | {shown([r['curve'][-1]['gold'] for r in rows])} | "
                        f"{shown([r['curve'][-1]['kl'] for r in rows], 1)} | {shown([100 * r['f_nonpositive'] for r in rows])} % |")
    svg(work / "alpha.svg", "TGDPO: gold reward over training by α", "step", "gold reward",
        {f"α {a}": curve(of("TGDPO", alpha=a), "step", "gold") for a in plan["alphas"] if of("TGDPO", alpha=a)})
    text.append("\n![gold reward by alpha](study/alpha.svg)\n")

    text.append("## How many pairs\n\n| pairs | method | gold, best | gold, end | KL, end | correlation of r̂ and gold, per token |"
                "\n|---|---|---|---|---|---|")
    for size in sorted({plan["pairs"], *plan["sizes"]}):
        for method in ("DPO", "SimPO", "TGDPO"):
            rows = of(method, size)
            if rows:
                found = [r["correlation"] for r in rows if "correlation" in r]
                text.append(f"| {size} | {method} | {shown([best(r)['gold'] for r in rows])} | "
                            f"{shown([r['curve'][-1]['gold'] for r in rows])} | {shown([r['curve'][-1]['kl'] for r in rows], 1)} | "
                            f"{shown(found, 3) if found else ''} |")
    text.append("\n## How well r̂ finds the gold reward\n\nPearson's correlation per token over the held-out pairs.\n\n"
                "| guide | pairs | correlation |\n|---|---|---|")
    for method in methods:
        for size in sorted({plan["pairs"], *plan["sizes"]}):
            found = [r["correlation"] for r in of(method, size) if "correlation" in r]
            if found:
                text.append(f"| {method} | {size} | {shown(found, 3)} |")
    claims = page.parent / "CLAIMS.md"
    if claims.exists():
        text.append("\n" + claims.read_text().strip())
    page.write_text("\n".join(text) + "\n")
