"""The report's curves, distributions and table, as data: statistics of what the run recorded.

A chart is a dict {title, xlabel, x, series, …} that page.js hands to uPlot; see `chart`. A pair is report.py's
Pair: its formulas were evaluated in the run, and nothing here evaluates one again.
"""

import collections
import math
import unicodedata

import numpy as np

from report.text import percent, signed, visible

MOST_POINTS = 800  # of a curve
SIDES = ("chosen", "rejected")
SIDE_COLOURS = (("chosen", "blue"), ("rejected", "orange"))
NAMES = {"dpo": "DPO", "simpo": "SimPO", "tgdpo": "TGDPO"}
KINDS = ("end token", "punctuation", "white space", "other")  # of tokens


def number_of(value):
    """value as a float where it is a finite number, else None."""
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond float's range
        return None


def plain_numbers(values):
    """Numbers for JSON, six significant digits; None where they are not finite."""
    return [float(f"{v:.6g}") if v is not None and np.isfinite(v) else None for v in values]


def chart(title, xlabel, series, **more):
    """A chart of several series on one list of x, None where a series has no value.

    series: dicts of name, colour (of page.css), style (line, dots, bars, points), x, y and, where wanted, smooth
    (drawn over a pale y), low and high (a band), dash. more: zero (the y axis holds 0), range (what the y axis holds),
    small, note.
    """
    places = sorted({at for each in series for at in each["x"]})
    for each in series:
        for key in {"y", "smooth", "low", "high"} & set(each):
            each[key] = plain_numbers(map(dict(zip(each["x"], each[key])).get, places))
    series = [{key: value for key, value in each.items() if key != "x"} for each in series]
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


def points_of(rows, key, held_out):
    """[N, 2 or 4] of the rows that have a finite `key`: step, value, and of a mean its least and greatest."""
    keys = ["step", key] + [key.replace("mean", end) for end in ("min", "max") if key.endswith("_mean")]
    points = [[number_of(row.get(k)) for k in keys] for row in rows if bool(row.get("eval")) == held_out]
    return np.array([point for point in points if None not in point], np.float64).reshape(-1, len(keys))


def curve(points, held_out=False, smooth=True, **look):
    """The series of points_of: training as a line, smoothed over the raw one, held-out figures as joined dots."""
    x, y, *band = points.T
    keep = thinned(y)
    more = {name: values[keep] for name, values in zip(("low", "high"), band)}
    more |= {"smooth": smoothed(y)[keep]} if smooth and not held_out else {}
    return {"x": x[keep].tolist(), "y": y[keep], "style": "dots" if held_out else "line", **look, **more}


def together(lines, rest=False):
    """What is known of several trainings, on one axis against steps: charts of plain accuracy, margin and log-ratios.

    lines: [(name, rows of metrics.jsonl)]; rest: the other charts instead. Held-out figures where there are ENOUGH of
    them, else training's too."""
    first, charts = list(CURVES)[:4], []
    if not any(key in row for _, rows in lines for row in rows for key in first):  # SimPO knows no reference
        first = ["accuracy", "margin"]
    for key in [key for key in CURVES if key not in first] if rest else first:
        series = []
        for i, (name, rows) in enumerate(lines):
            look = {"colour": COLOURS[i % len(COLOURS)], "dash": i >= len(COLOURS)}
            held_out, training = points_of(rows, key, True)[:, :2], points_of(rows, key, False)[:, :2]
            if len(held_out) < ENOUGH and len(training):
                series.append(curve(training, smooth=key != "lr", name=f"{name}, training", **look))
            if len(held_out):
                series.append(curve(held_out, True, name=name, **look))
        if series:
            charts.append(chart(CURVES[key][0], "step", series, zero=CURVES[key][1], small=rest))
    return charts


def curves(stages):
    """All charts of metrics.jsonl, one a quantity and stage, the stages of a quantity on the same scale."""
    charts = []
    for key, (title, zero) in CURVES.items():
        row = []
        for stage in stages:
            rows, training = stage["rows"], points_of(stage["rows"], key, False)
            if all(f"dpo_{key}" in each and each[f"dpo_{key}"] == each.get(key) for each in rows):
                continue  # a DPO stage optimises the plain margin
            held_out = () if key in TRAINING_ONLY else points_of(rows, key, True)
            series = [curve(training, smooth=key != "lr", name="training", colour="blue")] if len(training) else []
            series += [curve(held_out, True, name="held out", colour="orange")] if len(held_out) else []
            if key == "loss" and series and rows[0].get("stage") != "simpo":  # where training begins
                ends = [series[0]["x"][0], series[0]["x"][-1]]
                log_2 = {"x": ends, "y": [math.log(2)] * 2, "style": "line", "dash": True}
                series.append({"name": "log 2", "colour": "muted", **log_2})
            if series:
                name = f"{title}: {stage['role']}" if len(stages) > 1 else title
                row.append(chart(name, "step", series, zero=zero, small=True))
        seen = [y for each in row for one in each["series"] for name in ("y", "low", "high") for y in one.get(name, ())]
        seen = [y for y in seen if y is not None]
        charts += [each | {"range": [min(seen), max(seen) if max(seen) > min(seen) else min(seen) + 1]} for each in row]
    return charts


def stages_of(rows, loss):
    """metrics.jsonl's rows by stage, in the order of the run: dicts of title, role and rows, sorted by step.

    loss: the run's. A resumed run writes some steps again: the last row of a step counts.
    """
    newest = {}
    for row in rows:
        stage, step = row.get("stage"), row.get("step")
        if isinstance(stage, str) and number_of(step) is not None:
            newest[stage, bool(row.get("eval")), step] = row
    stages = []
    for stage in dict.fromkeys(key[0] for key in newest):
        part = sorted((row for key, row in newest.items() if key[0] == stage), key=lambda row: row["step"])
        title, role = NAMES.get(stage, visible(stage)), "policy"
        if loss == "tgdpo":
            title = f"Stage 2: {title}" if stage == "tgdpo" else f"Stage 1: the guide, trained with {title}"
            role = {"tgdpo": "policy", "dpo": "guide"}.get(stage, visible(stage))
        stages.append({"title": title, "role": role, "rows": part})
    return stages


def with_recorded(pairs, name):
    """The pairs of which `name` is recorded on both sides."""
    return [pair for pair in pairs if name in pair.chosen and name in pair.rejected]


def gathered(pairs, name):
    """`name` of all tokens as (chosen, rejected), each [N] in float64."""
    return tuple(np.concatenate([getattr(pair, side)[name] for pair in pairs]).astype(np.float64) for side in SIDES)


def kind_of(token):
    """ "white space", "punctuation" (and symbols) or "other", for the table of what carries the reward."""
    bare = token.strip()
    if not bare:
        return "white space" if token else "other"  # "" is a token that ends inside a character
    return "punctuation" if all(unicodedata.category(c)[0] in "PS" for c in bare) else "other"


def correlation(x, y):
    """Pearson's, or None for fewer than three points or a constant."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    value = np.corrcoef(x, y)[0, 1]
    return float(value) if np.isfinite(value) else None


def histogram(title, xlabel, values, more=""):
    """values: (chosen, rejected), each [N]; more: ends the note. The outermost half per cent is in the end bins."""
    low, high = np.quantile(np.concatenate(values), [0.005, 0.995])
    edges = np.linspace(low, high, 41) if high > low else np.linspace(low - 0.5, low + 0.5, 41)
    series = []
    for (side, colour), part in zip(SIDE_COLOURS, values):
        bars = {"x": (edges[1:] + edges[:-1]) / 2, "y": np.histogram(part.clip(low, high), edges)[0] / len(part)}
        series.append({"name": side, "colour": colour, "style": "bars", **bars})
    told = [
        f"{side} mean {signed(part.mean())}, standard deviation {part.std():.3g}" for side, part in zip(SIDES, values)
    ]
    return chart(title, xlabel, series, zero=True, note=f"Shares of a side's tokens: {'; '.join(told)}.{more}")


def moved_by_weight(f, moved):
    """Mean change of the log-ratio against mean f, over tokens sorted by f; both (chosen, rejected), each [N]."""
    series = []
    for s, (side, colour) in enumerate(SIDE_COLOURS):
        parts = np.array_split(f[s].argsort(kind="stable"), min(12, len(f[s])))
        means = {"x": [f[s][part].mean() for part in parts], "y": [moved[s][part].mean() for part in parts]}
        series.append({"name": side, "colour": colour, "style": "line", **means})
    note = "Mean of log π/π_ref after training; each point is a twelfth of the side's tokens."
    return chart("Where the policy moved, by weight f", "weight f", series, zero=True, note=note)


def reward_by_length(lengths, totals, symbol):
    """A point for each response: summed reward against length, both [P, 2]."""
    x, y = lengths.ravel(), totals.ravel()
    order = x.argsort(kind="stable")
    series = []
    for s, (side, colour) in enumerate(SIDE_COLOURS):
        mine = plain_numbers(np.where(order % 2 == s, y[order], np.nan))
        series.append({"name": side, "colour": colour, "style": "points", "y": mine})
    alone, differences = correlation(x, y), correlation(*(-np.diff(part)[:, 0] for part in (lengths, totals)))
    note = f"Pearson correlation {signed(alone)}; of the differences, chosen less rejected, {signed(differences)}."
    title = f"Σ {symbol} of a response by its length"
    return {"title": title, "xlabel": "tokens", "x": plain_numbers(x[order]), "series": series, "note": note}


def carriers(pairs, symbol, reward, f):
    """The table of what carries the reward: its columns, its rows, and the end token."""
    last = collections.Counter(getattr(pair, side)["tokens"][-1] for pair in pairs for side in SIDES)
    end = last.most_common(1)[0][0]  # the end-of-turn token, unless most responses were cut
    columns = ["", "side", "tokens", "of its tokens", f"of Σ|{symbol}|", f"mean {symbol}"] + ["of Σ|f|"] * bool(f)
    table = {}
    for s, side in enumerate(SIDES):
        responses = [getattr(pair, side)["tokens"] for pair in pairs]
        tokens = [(token, i == len(response)) for response in responses for i, token in enumerate(response, 1)]
        kinds = np.array(["end token" if final and token == end else kind_of(token) for token, final in tokens])
        for kind in KINDS:
            mine, part = kinds == kind, reward[s]
            shares = [percent(abs(values[s][mine]).sum(), abs(values[s]).sum()) for values in (reward, f) if values]
            mean = signed(part[mine].mean() if mine.any() else None)
            counts = [f"{mine.sum():,}", percent(mine.sum(), len(mine))]
            table[kind, side] = [kind, side, *counts, shares[0], mean, *shares[1:]]
    return columns, [table[kind, side] for kind in KINDS for side in SIDES], end


def moved_section(pairs, symbol):
    """Charts and the table of what carries the reward; None where no pair has rewards."""
    pairs = with_recorded(pairs, "reward")
    if not pairs:
        return None
    reward = gathered(pairs, "reward")
    f, moved = (
        gathered(pairs, name) if len(with_recorded(pairs, name)) == len(pairs) else None for name in ("f", "moved")
    )
    totals = np.array([[getattr(p, side)["reward"].sum() for side in SIDES] for p in pairs], np.float64)  # [P, 2]
    lengths = np.array([[len(getattr(p, side)["tokens"]) for side in SIDES] for p in pairs], np.float64)  # [P, 2]
    charts = [histogram(f"Distribution of {symbol}", symbol, reward)]
    if f:
        flipped = [percent((part <= 0).sum(), len(part)) for part in f]
        more = f" f ≤ 0: {flipped[0]} of the chosen tokens, {flipped[1]} of the rejected."
        charts.append(histogram("Distribution of f", "weight f", f, more))
    if f and moved:
        charts.append(moved_by_weight(f, moved))
    charts.append(reward_by_length(lengths, totals, symbol))
    columns, table, end = carriers(pairs, symbol, reward, f)
    return {"charts": charts, "columns": columns, "table": table, "end": visible(end)}
