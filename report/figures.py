"""The report's curves, distributions and table, as data: statistics of what the run recorded.

A chart is a dict {title, xlabel, x, series, …} that page.js hands to uPlot; see `chart`. A pair is report.py's Pair:
its formulas were evaluated in the run, and nothing here evaluates one again.
"""

import collections
import math
import unicodedata

import numpy as np

from report.text import signed, visible

MOST_POINTS = 800  # of a curve
SIDES = ("chosen", "rejected")
NAMES = {"dpo": "DPO", "simpo": "SimPO", "tgdpo": "TGDPO"}
KINDS = ("end token", "punctuation", "white space", "other")  # of tokens


def number_of(value):
    """value as a float where it is a number within float's range, else None."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else None


def plain_numbers(values):
    """Numbers for JSON, six significant digits; None where they are not finite."""
    return [float(f"{v:.6g}") if v is not None and np.isfinite(v) else None for v in values]


def chart(title, xlabel, series, **more):
    """A chart of several series on one list of x, None where a series has no value.
    series: dicts of name, colour (of page.css), style (line, dots, bars, points), x, y and, where wanted, smooth (drawn
    over a pale y), low and high (a band), dash. more: zero (the y axis holds 0), range (what it holds), small, note."""
    places = sorted({at for each in series for at in each["x"]})
    for each in series:
        for key in {"y", "smooth", "low", "high"} & set(each):
            each[key] = plain_numbers(map(dict(zip(each["x"], each[key])).get, places))
        del each["x"]
    return {"title": title, "xlabel": xlabel, "x": plain_numbers(places), "series": series, **more}


def thinned(values):
    """Places of about MOST_POINTS of a long curve: of each stretch the lowest and the highest, so spikes stay."""
    if len(values) <= MOST_POINTS:
        return list(range(len(values)))
    keep, heights = {0, len(values) - 1}, np.array(values)
    for part in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        keep |= {int(part[heights[part].argmin()]), int(part[heights[part].argmax()])}
    return sorted(keep)


def smoothed(values):
    """The mean of each value with its neighbours, about a twentieth of the curve."""
    window, ones = np.ones(min(len(values), len(values) // 20 + 1)), np.ones(len(values))
    return np.convolve(values, window, "same") / np.convolve(ones, window, "same")


# key of metrics.jsonl: its title, and whether its axis holds 0. The first four are told of guide and policy together.
CURVES = {
    "dpo_accuracy": ("Plain DPO accuracy", False),
    "dpo_margin": ("Plain DPO margin", True),
    "logratio_chosen": ("log π/π_ref of the chosen response", True),
    "logratio_rejected": ("log π/π_ref of the rejected response", True),
    "loss": ("Loss", False),
    "grad_norm": ("Gradient norm", True),
    "lr": ("Learning rate", True),
    "tokens_per_second": ("Tokens per second", True),
    "accuracy": ("Accuracy by φ, the optimised margin", False),
    "margin": ("φ, the optimised margin", True),
    "r_hat_mean": ("r̂: mean, least and greatest", True),
    "f_mean": ("f: mean, least and greatest", True),
    "f_nonpositive": ("Share of tokens with f ≤ 0", True),
}
TRAINING_ONLY = ("grad_norm", "lr", "tokens_per_second", "r_hat_mean", "f_mean", "f_nonpositive")
COLOURS = ("green", "purple", "orange", "blue", "accent")  # of lines on one axis
ENOUGH = 3  # evaluations that make a curve


def curve(rows, key, held_out, band=False, **look):
    """[one series] of the rows that have a finite `key`, or []: training as a line, smoothed over the raw one; held-out
    figures as joined dots. band: of a mean also its least and greatest."""
    keys = ["step", key] + [key.replace("mean", end) for end in ("min", "max") if key.endswith("_mean")]
    points = [[number_of(row.get(k)) for k in keys] for row in rows if bool(row.get("eval")) == held_out]
    points = np.array([point for point in points if None not in point], np.float64).reshape(-1, len(keys))
    keep = thinned(points[:, 1])
    each = dict(zip(("x", "y", "low", "high") if band else "xy", points[keep].T))
    smooth = {"smooth": smoothed(points[:, 1])[keep]} if len(keep) and key != "lr" and not held_out else {}
    return [each | smooth | {"style": "dots" if held_out else "line"} | look] if len(keep) else []


def together(lines, rest=False):
    """What is known of several trainings, on one axis against steps: charts of plain accuracy, margin and log-ratios.
    lines: [(name, rows of metrics.jsonl)]; rest: the other charts instead. Held-out figures where there are ENOUGH of
    them, else training's too."""
    first, charts = list(CURVES)[:4], []
    if not any(key in row for _, rows in lines for row in rows for key in first):  # SimPO knows no reference
        first = ["accuracy", "margin"]
    for key in [key for key in CURVES if (key in first) != rest]:
        series = []
        for i, (name, rows) in enumerate(lines):
            look = {"colour": COLOURS[i % len(COLOURS)], "dash": i >= len(COLOURS)}
            held_out = curve(rows, key, True, name=name, **look)
            if not held_out or len(held_out[0]["x"]) < ENOUGH:
                series += curve(rows, key, False, name=f"{name}, training", **look)
            series += held_out
        if series:
            charts.append(chart(CURVES[key][0], "step", series, zero=CURVES[key][1], small=rest))
    return charts


def curves(stages):
    """All charts of metrics.jsonl, one a quantity and stage, the stages of a quantity on the same scale."""
    charts = []
    for key, (title, zero) in CURVES.items():
        row = []
        for stage in stages:
            rows, name = stage["rows"], f"{title}: {stage['role']}" if len(stages) > 1 else title
            if all(f"dpo_{key}" in each and each[f"dpo_{key}"] == each.get(key) for each in rows):
                continue  # a DPO stage optimises the plain margin
            series = curve(rows, key, False, band=True, name="training", colour="blue")
            series += [] if key in TRAINING_ONLY else curve(rows, key, True, name="held out", colour="orange")
            if key == "loss" and series and rows[0].get("stage") != "simpo":  # where training begins
                ends, look = series[0]["x"][[0, -1]], {"colour": "muted", "style": "line", "dash": True}
                series.append({"name": "log 2", "x": ends, "y": [math.log(2)] * 2, **look})
            row += [chart(name, "step", series, zero=zero, small=True)] if series else []
        seen = [y for each in row for one in each["series"] for name in ("y", "low", "high") for y in one.get(name, ())]
        seen = [y for y in seen if y is not None]
        charts += [each | {"range": [min(seen), max(seen) if max(seen) > min(seen) else min(seen) + 1]} for each in row]
    return charts


def stages_of(rows, loss):
    """metrics.jsonl's rows by stage, in the order of the run: dicts of title, role and rows, sorted by step. Of a step
    that a resumed run has written again, the last row counts."""
    newest = {}
    for row in rows:
        stage, step = row.get("stage"), row.get("step")
        if isinstance(stage, str) and number_of(step) is not None:
            newest.setdefault(stage, {})[bool(row.get("eval")), step] = row
    stages = []
    for stage, part in newest.items():
        title, role = NAMES.get(stage, visible(stage)), {"dpo": "guide", loss: "policy"}.get(stage, visible(stage))
        if loss == "tgdpo":
            title = f"Stage 2: {title}" if role == "policy" else f"Stage 1: the guide, trained with {title}"
        stages.append({"title": title, "role": role, "rows": sorted(part.values(), key=lambda row: row["step"])})
    return stages


def gathered(pairs, name):
    """`name` of all tokens as (chosen, rejected), each [N] in float64; None unless it is recorded of all of them."""
    if not pairs or any(name not in getattr(pair, side) for pair in pairs for side in SIDES):
        return None
    return tuple(np.concatenate([getattr(pair, side)[name] for pair in pairs]).astype(np.float64) for side in SIDES)


def with_recorded(pairs, name):
    """The pairs of which `name` is recorded on both sides."""
    return [pair for pair in pairs if name in pair.chosen and name in pair.rejected]


def kind_of(token):
    """ "white space", "punctuation" (and symbols) or "other", for the table of what carries the reward."""
    if token.isspace():
        return "white space"
    return "punctuation" if token and all(unicodedata.category(c)[0] in "PS" for c in token.strip()) else "other"


def correlation(x, y):
    """Pearson's, or None for fewer than three points or a constant."""
    return np.corrcoef(x, y)[0, 1] if len(x) > 2 and np.ptp(x) and np.ptp(y) else None


def by_side(style, points):
    """Series of the two sides. points: (x, y) of each."""
    sides = zip(SIDES, ("blue", "orange"), points)
    return [{"name": side, "colour": colour, "style": style, "x": x, "y": y} for side, colour, (x, y) in sides]


def histogram(title, xlabel, values, more=""):
    """values: (chosen, rejected), each [N]; more: ends the note. The outermost half per cent is in the end bins."""
    ends = np.quantile(np.concatenate(values), [0.005, 0.995])
    bins = [np.histogram(part.clip(*ends), 40, ends) for part in values]
    series = by_side("bars", [((edges[1:] + edges[:-1]) / 2, count / count.sum()) for count, edges in bins])
    told = [f"{side} mean {signed(v.mean())}, standard deviation {v.std():.3g}" for side, v in zip(SIDES, values)]
    return chart(title, xlabel, series, zero=True, note=f"Shares of a side's tokens: {'; '.join(told)}.{more}")


def moved_by_weight(f, moved):
    """Mean change of the log-ratio against mean f, over tokens sorted by f; both (chosen, rejected), each [N]."""
    points = []
    for weights, changes in zip(f, moved):
        parts = np.array_split(weights.argsort(kind="stable"), min(12, len(weights)))
        points.append([[values[part].mean() for part in parts] for values in (weights, changes)])
    note = "Mean of log π/π_ref after training; each point is a twelfth of the side's tokens."
    return chart("Where the policy moved, by weight f", "weight f", by_side("line", points), zero=True, note=note)


def reward_by_length(pairs, symbol):
    """A point for each response: its summed reward against its length."""
    sums = [[(len(y["tokens"]), y["reward"].sum(dtype=float)) for y in (pair.chosen, pair.rejected)] for pair in pairs]
    lengths, totals = np.array(sums, np.float64).transpose(2, 0, 1)  # [P, 2] both
    apart = lengths + np.arange(lengths.size).reshape(lengths.shape) * 1e-9  # two points of one length stay two
    alone = correlation(lengths.ravel(), totals.ravel())
    differences = correlation(*(part[:, 0] - part[:, 1] for part in (lengths, totals)))
    note = f"Pearson correlation {signed(alone)}; of the differences, chosen less rejected, {signed(differences)}."
    series = by_side("points", zip(apart.T, totals.T))
    return chart(f"Σ {symbol} of a response by its length", "tokens", series, note=note)


def carriers(pairs, symbol, reward, f):
    """The table of what carries the reward: its columns, its rows, and the end token."""
    responses = [[getattr(pair, side)["tokens"] for pair in pairs] for side in SIDES]
    # the end-of-turn token, unless most responses were cut
    end = collections.Counter(tokens[-1] for side in responses for tokens in side).most_common(1)[0][0]
    final = lambda tokens: KINDS[0] if tokens[-1] == end else kind_of(tokens[-1])
    kinds = [np.array([kind for y in side for kind in (*map(kind_of, y[:-1]), final(y))]) for side in responses]
    share = lambda mine, values: f"{abs(values[mine]).sum() / abs(values).sum():.1%}" if values.any() else "–"
    rows = []
    for kind in KINDS:
        for s, side in enumerate(SIDES):
            mine = kinds[s] == kind
            shares = [share(mine, values[s]) for values in (reward, f) if values]
            shares.insert(1, signed(reward[s][mine].mean() if mine.any() else None))
            rows.append([kind, side, f"{mine.sum():,}", f"{mine.mean():.1%}", *shares])
    columns = ["", "side", "tokens", "of its tokens", f"of Σ|{symbol}|", f"mean {symbol}"] + ["of Σ|f|"] * bool(f)
    return {"columns": columns, "table": rows, "end": visible(end)}


def moved_section(pairs, symbol):
    """Charts and the table of what carries the reward; None where no pair has rewards."""
    pairs = with_recorded(pairs, "reward")
    if not pairs:
        return None
    reward, f, moved = (gathered(pairs, name) for name in ("reward", "f", "moved"))
    charts = [histogram(f"Distribution of {symbol}", symbol, reward)]
    if f:
        flipped = "f ≤ 0: {} of the chosen tokens, {} of the rejected.".format(*(f"{(x <= 0).mean():.1%}" for x in f))
        charts.append(histogram("Distribution of f", "weight f", f, f" {flipped}"))
    if f and moved:
        charts.append(moved_by_weight(f, moved))
    return {"charts": [*charts, reward_by_length(pairs, symbol)], **carriers(pairs, symbol, reward, f)}
