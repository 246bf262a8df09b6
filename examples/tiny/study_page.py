"""STUDY.md and its plot from the lines of study.jsonl: means over the seeds, differences of the same seeds."""

import math

import numpy as np

KLS = (0.5, 1, 2, 4, 8)  # nats per reply
RIVAL = "DPO, two epochs"  # as many steps as a guide and a policy
CONTRASTS = (  # (what, less what): read together, so their intervals are widened for their number
    ("TGDPO, α 1", "DPO"),
    ("TGDPO, α 4", "DPO"),
    ("centred, α 1", "TGDPO, α 1"),
    ("centred, α 4", "TGDPO, α 4"),
    ("TGDPO, α 4, random labels", "DPO, random labels"),
    ("centred, α 4, random labels", "DPO, random labels"),
    ("TGDPO, α 4", "TGDPO, α 4, random labels"),
    ("TGDPO, α 4", RIVAL),
    ("centred, α 4", RIVAL),
    ("β 0.3: TGDPO, α 4", "β 0.3: DPO, two epochs"),
    ("β 0.3: centred, α 4", "β 0.3: DPO, two epochs"),
)
PLOTTED = ("DPO", RIVAL, "TGDPO, α 1", "TGDPO, α 4", "centred, α 1", "centred, α 4")
PLOTTED += ("DPO, random labels", "TGDPO, α 4, random labels", "centred, α 4, random labels", "ExPO")
PLOTTED += ("β 0.3: DPO, two epochs", "β 0.3: TGDPO, α 4")
COLOURS = ("#000000", "#777777", "#56b4e9", "#0072b2", "#e69f00", "#d55e00", "#000000", "#0072b2", "#d55e00", "#009e73")
COLOURS += ("#aaaaaa", "#cc79a7")


def student(df, tail):
    """The x that Student's t with df degrees of freedom exceeds with this chance, by bisection on the integral."""
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2

    def beyond(x):  # by u = 1/t the tail has a finite range
        u = (np.arange(4000) + 0.5) / 4000 / x
        return float(np.exp(log_c - (df + 1) / 2 * np.log1p(1 / (df * u**2)) - 2 * np.log(u)).mean() / x)

    low, high = 0.5, 1e4
    while high - low > 1e-6 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if beyond(middle) > tail else (low, middle)
    return low


def interval(values, tests=1):
    """(mean, half width of its 95 % interval, corrected for the number of tests by Bonferroni) of one value a seed."""
    values = np.asarray(values, float)
    if len(values) < 3:  # of two it would be as wide as the plot
        return float(values.mean()), math.nan
    spread = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()), student(len(values) - 1, 0.025 / tests) * spread


def shown(values, digits=2, tests=1, sign=""):
    """Mean and interval in words, a dash where there are no values."""
    if not len(values):
        return "–"
    mean, half = interval(values, tests)
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def at_kl(line, kl):
    """The gold reward that the training has to show for this KL: along its points of which none has more reward for
    less KL, from its start on, interpolated in the square root of KL; None before the start and beyond the last."""
    before = (math.sqrt(line["start"]["kl"]), line["start"]["gold"])
    if kl < line["start"]["kl"]:
        return None
    later = [point for point in line["curve"] if point["kl"] > line["start"]["kl"]]
    for point in sorted((math.sqrt(point["kl"]), point["gold"]) for point in later):
        if point[1] > before[1]:
            if point[0] ** 2 >= kl:
                share = (math.sqrt(kl) - before[0]) / (point[0] - before[0])
                return before[1] + share * (point[1] - before[1])
            before = point
    return None


def end(key):
    return lambda line: line["curve"][-1][key]


def of_seeds(lines, value):
    """{seed: value(line)} of the lines that have one."""
    return {line["seed"]: v for line in lines if (v := value(line)) is not None}


def differences(lines, others, value):
    """value less that of the other's line of the same seed, a number a common seed."""
    own, theirs = of_seeds(lines, value), of_seeds(others, value)
    return [own[seed] - theirs[seed] for seed in own if seed in theirs]


def plot(path, arms, start):
    """Left gold reward against KL, means at the measured points; right its end by arm, a dot a seed."""
    width, height, top, bottom, left, middle, right = 1100, 470, 40, 50, 60, 480, 730
    shown_arms = [name for name in PLOTTED if arms.get(name)]
    means = {
        name: [[float(np.mean([p[key] for p in point])) for key in ("kl", "gold")]
               for point in zip(*(line["curve"] for line in arms[name]))]
        for name in shown_arms
    }  # fmt: skip
    means = {name: [point for point in points if point[0] <= 16] for name, points in means.items()}
    golds = [g for points in means.values() for _, g in points] + [end("gold")(x) for n in shown_arms for x in arms[n]]
    far = math.sqrt(max(kl for points in means.values() for kl, _ in points) + 0.1)
    y0, y1 = min(*golds, start["gold"]) - 0.2, max(golds) + 0.2
    px = lambda kl: left + math.sqrt(kl) / far * (middle - left)
    qx = lambda gold: right + (gold - y0) / (y1 - y0) * (width - 40 - right)
    py = lambda gold: height - bottom - (gold - y0) / (y1 - y0) * (height - top - bottom)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">Gold reward against KL, up to 16 (dashed: labels by a coin)</text>',
        f'<text x="{right - 190}" y="22" font-size="14">Gold reward at the end of one epoch, a dot a seed</text>',
        f'<text x="{(left + middle) / 2}" y="{height - 8}" text-anchor="middle">KL per reply, nats (square-root scale)</text>',
    ]
    for kl in (0, 0.5, 1, 2, 4, 8, 16, 32):
        if math.sqrt(kl) <= far:
            out.append(f'<text x="{px(kl):.0f}" y="{height - 30}" text-anchor="middle">{kl:g}</text>')
    for gold in range(math.ceil(y0), math.floor(y1) + 1):
        out.append(f'<path d="M{left} {py(gold):.1f}H{middle}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{py(gold) + 4:.1f}" text-anchor="end">{gold}</text>')
        out.append(f'<path d="M{qx(gold):.1f} {top}V{height - bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{qx(gold):.1f}" y="{height - 30}" text-anchor="middle">{gold}</text>')
    for number, name in enumerate(shown_arms):
        colour = COLOURS[PLOTTED.index(name)]
        dash = ' stroke-dasharray="5 4"' if "random" in name else ""
        points = means[name] if name == "ExPO" else [[0.0, start["gold"]], *means[name]]
        line = " L".join(f"{px(kl):.1f} {py(gold):.1f}" for kl, gold in points)
        out.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{px(k):.1f}" cy="{py(g):.1f}" r="2.5" fill="{colour}"/>' for k, g in points]
        y = top + 18 + number * (height - top - bottom - 20) / len(shown_arms)
        out.append(f'<path d="M{right - 225} {y:.0f}h22" stroke="{colour}" stroke-width="3"{dash}/>')
        out.append(f'<text x="{right - 196}" y="{y + 4:.0f}">{name}</text>')
        if name != "ExPO":
            ends = [end("gold")(x) for x in arms[name]]
            out += [f'<circle cx="{qx(g):.1f}" cy="{y:.0f}" r="3" fill="{colour}" opacity="0.5"/>' for g in ends]
            out.append(f'<path d="M{qx(np.mean(ends)):.1f} {y - 8:.0f}v16" stroke="{colour}" stroke-width="3"/>')
    path.write_text("\n".join(out) + "\n</svg>\n", encoding="utf-8")


def write(page, work, lines, start):
    """Write the page and the plot from what is there. start: the object of start.json."""
    failed = [line for line in lines if "failed" in line]
    arms = {}
    for line in lines:
        if "failed" not in line:
            arms.setdefault(line["arm"], []).append(line | {"start": start["start"]})
    dpo, text = arms["DPO"], []
    guides = {line["seed"]: line["curve"][-1] for line in dpo}
    for line in arms.get("ExPO", []):  # each factor is a row
        for point in line["curve"]:
            arms.setdefault(f"ExPO, factor {point['step']:g}", []).append(line | {"curve": [point]})
    for name in ("ExPO", "DPO from the guide"):  # they set out from the guide, which is DPO of that seed
        arms[name] = [line | {"start": guides[line["seed"]]} for line in arms.get(name, [])]
    whole = {name: found for name, found in arms.items() if found and " with " not in name}
    seeds = lambda found: str(len({line["seed"] for line in found}))

    def table(title, words, head, rows):
        if rows := list(rows):
            text.append(f"\n## {title}\n\n{words}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
            text.extend(f"| {' | '.join(row)} |" for row in rows)

    claims = page.parent / "CLAIMS.md"
    text.append(
        f"""# What TGDPO adds to DPO, on the tiny example

`python -m examples.tiny.study` made this page; run again, it goes on where it was. {len(lines)} trainings, {len(dpo)} seeds of
the main arms; each table says how many seeds it has. Each seed has {start["pairs"]:,} fresh pairs of its own, sampled from the
reference. Guide and policy train one epoch each, AdamW at {start["lr"]}, cosine, 10 % warm-up, {start["batch"]} pairs a step, β {start["beta"]}, unless
the arm says otherwise. The guide is DPO on the seed's pairs with true labels, in every arm. *Random labels*: those of
stage 2 by a coin. *Centred*: `--centre-guidance`. *One f*: 1 + α r̂ on both sides. *DPO + KL to the guide*: D18's
right-hand side itself. *ExPO*: weights extrapolated from the reference through the guide; no second training.

Measured on {2 * start["prompts"]} samples at temperature 1 for held-out prompts, at the end; on half of them on the way. Gold reward:
the reference has {start["start"]["gold"]:.2f}, with {start["start"]["length"]:.1f} tokens a reply. KL from the reference per reply, in nats. *First {start["first"]}*: the gold
reward of a reply's first {start["first"]} tokens, which its length cannot change. *Cut*: replies without an end after {start["longest"]} tokens.
*Chosen*, *rejected*: log π/π_ref summed over a held-out response. ± is a 95 % interval over seeds (Student's t).
"""
    )
    if claims.exists() and page.parent == work.parent:
        text.append(claims.read_text(encoding="utf-8").strip() + "\n")
    plot(work / "study.svg", arms, start["start"])
    text.append("![Gold reward against KL, and at the end](study/study.svg)")
    table(
        "The end of the training",
        "In the fourth column the difference to DPO of the same seed.",
        ("arm", "seeds", "gold", "less DPO's", "KL", "tokens", "cut", f"first {start['first']}", "chosen", "rejected"),
        (
            (
                name,
                seeds(found),
                shown(list(of_seeds(found, end("gold")).values())),
                "" if found is dpo else shown(differences(found, dpo, end("gold")), sign="+"),
                *(f"{np.mean([end(key)(x) for x in found]):.1f}" for key in ("kl", "length")),
                f"{100 * np.mean([end('cut')(x) for x in found]):.1f} %",
                f"{np.mean([end('gold_first')(x) for x in found]):.2f}",
                *(f"{np.mean([end(key)(x) for x in found]):.1f}" for key in ("chosen", "rejected")),
            )
            for name, found in whole.items()
            if name != "ExPO"
        ),
    )
    read = [(a, b) for a, b in CONTRASTS if differences(arms.get(a, []), arms.get(b, []), end("gold"))]
    table(
        "What is compared with what",
        f"Differences of the same seed; intervals widened for {len(CONTRASTS)} of them (Bonferroni). In brackets in how many "
        "seeds the difference is above 0.",
        ("arm", "less", "gold", f"first {start['first']} tokens", "KL", "chosen"),
        (
            (a, b)
            + tuple(
                f"{shown(found, tests=len(CONTRASTS), sign='+')} ({sum(x > 0 for x in found)} of {len(found)})"
                for key in ("gold", "gold_first", "kl", "chosen")
                for found in [differences(arms[a], arms[b], end(key))]
            )
            for a, b in read
        ),
    )
    table(
        "Gold reward at equal KL",
        "Along a training's points of which none has more reward for less KL, interpolated: KL jumps up and down while the "
        f"rate is high. In brackets the difference to *{RIVAL}* of the same seeds, and how many there are. A dash: none gets "
        "more for so much.",
        ("arm", *(f"KL {kl:g}" for kl in KLS)),
        (
            (name, *(equal(found, arms.get(RIVAL, []), kl) for kl in KLS))
            for name, found in whole.items()
            if "factor" not in name
        ),
    )
    table(
        "On the way",
        "Gold reward / KL at each measured step, means. A curve that turns back stands in these rows.",
        ("arm", *(f"{share:.0%} of the steps" for share in start["points"])),
        (
            (name, *(" / ".join(f"{np.mean([p[k] for p in point]):.2f}" for k in ("gold", "kl")) for point in points))
            for name, found in whole.items()
            if "ExPO" not in name
            for points in [list(zip(*(line["curve"] for line in found)))]
            if len(points) == len(start["points"])
        ),
    )
    table(
        "How good and how strong the guides are",
        "r̂ against the advantage of tokens that the reference sampled, by rollouts, Pearson's correlation with the rollouts' "
        f"noise taken out, over {start['states']:,} tokens. The gold guide's correlation is that of the trained one.",
        ("arm", "seeds", "correlation", "std of α r̂", "f ≤ 0, end", "gold", "KL"),
        (
            (
                name,
                seeds(found),
                shown([x["correlation"] for x in found]),
                shown([x["spread"] for x in found], 3),
                f"{100 * np.mean([end('f_nonpositive')(x) for x in found]):.2f} %",
                shown([end("gold")(x) for x in found]),
                f"{np.mean([end('kl')(x) for x in found]):.1f}",
            )
            for name, found in whole.items()
            if all("correlation" in x for x in found) and not ("label" in name or "one f" in name)
        ),
    )
    names = dict.fromkeys(name.split(" with ")[1] for name in arms if " with " in name)
    tried = {line["seed"] for name, found in arms.items() if " with " in name for line in found}
    both = lambda part: [
        [line for line in arms.get(f"{base} with {part}" if part else base, []) if line["seed"] in tried]
        for base in ("DPO", "TGDPO, α 1")
    ]
    cells = lambda found: (
        (*(f"{np.mean([end(k)(x) for x in found]):.2f}" for k in ("gold", "kl")), equal(found, [], 1))
        if found
        else ("–",) * 3
    )
    table(
        "Parts of neighbouring losses, without and with the guide",
        "`--loss dpo --with PART` and `--loss tgdpo --alpha 1 --with PART`, each part with its default number, β "
        f"{start['beta']} and the same rate for all. Gold reward and KL at the end, gold reward at KL 1.",
        ("part", "seeds", "DPO: gold", "KL", "at KL 1", "TGDPO, α 1: gold", "KL", "at KL 1"),
        ((part or "none", seeds(both(part)[1] or both(part)[0]), *cells(both(part)[0]), *cells(both(part)[1]))
         for part in ([None, *names] if names else [])),
    )  # fmt: skip
    if failed:
        text.append("\n## Failed\n")
        text.extend(f"- {line['arm']}, seed {line['seed']}: {line['failed']}" for line in failed)
    page.write_text("\n".join(text) + "\n", encoding="utf-8")


def equal(found, others, kl):
    """A cell of the table at equal KL."""
    value = lambda line: at_kl(line, kl)
    own, apart = of_seeds(found, value), differences(found, others, value)
    if not own:
        return "–"
    mean = f"{np.mean(list(own.values())):.2f}"
    return mean + (f" ({np.mean(apart):+.2f}, {len(apart)})" if apart and found is not others else "")
