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
ROLES = {"dpo": "guide", "simpo": "guide", "tgdpo": "policy"}  # of a run's stages


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
    (drawn over a pale y), low and high (a band), dash, right (the scale on the right). more: zero (the y axis
    holds 0), note.
    """
    places = sorted({at for each in series for at in each["x"]})
    for each in series:
        for key in {"y", "smooth", "low", "high"} & set(each):
            each[key] = plain_numbers(map(dict(zip(each["x"], each[key])).get, places))
    series = [{key: value for key, value in each.items() if key != "x"} for each in series]
    return {"title": title, "xlabel": xlabel, "x": plain_numbers(places), "series": series, **more}


# --- curves ---------------------------------------------------------------------------------------


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


# title; key of metrics.jsonl: (name, colour, None for the stage's own); more of the chart
CURVES = (
    ("Accuracy: pairs with margin > 0", {"dpo_accuracy": ("plain DPO", None), "accuracy": ("optimised", "purple")}, {}),
    ("Reward margin", {"dpo_margin": ("plain DPO", None), "margin": ("optimised", "purple")}, {"zero": True}),
    (
        "Log-ratio to the reference, summed",
        {"logratio_chosen": ("chosen", "blue"), "logratio_rejected": ("rejected", "orange")},
        {"zero": True},
    ),
    ("Loss", {"loss": ("loss", None)}, {}),
    (
        "r̂ and f in the batch: mean, least and greatest",
        {"r_hat_mean": ("r̂", "blue"), "f_mean": ("f", "purple"), "f_nonpositive": ("share of f ≤ 0", "orange")},
        {"zero": True},
    ),
    ("Gradient norm, learning rate", {"grad_norm": ("gradient norm", None), "lr": ("learning rate", "orange")}, {}),
    ("Tokens per second", {"tokens_per_second": ("tokens/s", None)}, {"zero": True}),
)
TRAINING_ONLY = ("r_hat_mean", "f_mean", "f_nonpositive", "grad_norm", "lr", "tokens_per_second")


def curve(rows, key, style, **look):
    """The series of the rows that have a finite `key`, or None. Of a mean with extremes beside it, with a band."""
    keys = ["step", key]
    if key.endswith("_mean"):
        keys += [key.replace("mean", "min"), key.replace("mean", "max")]
    points = [[number_of(row.get(k)) for k in keys] for row in rows if bool(row.get("eval")) == (style == "dots")]
    points = [point for point in points if None not in point]
    if not points:
        return None
    x, y, *band = np.array(points, np.float64).T
    keep = thinned(y)
    smooth = {"smooth": smoothed(y)[keep]} if style == "line" and key != "lr" else {}
    band = {name: values[keep] for name, values in zip(("low", "high"), band)}
    return {"x": x[keep].tolist(), "y": y[keep], "style": style, **look, **smooth, **band}


def curves(stages):
    """Charts of metrics.jsonl, all stages on the same axes, those before the last one dashed."""
    charts = []
    for title, quantities, more in CURVES:
        series = []
        for stage in stages:
            rows, last = stage["rows"], stage is stages[-1]
            for key, (name, colour) in quantities.items():
                if all(f"dpo_{key}" in row and row[f"dpo_{key}"] == row.get(key) for row in rows):
                    continue  # a DPO stage optimises the plain margin
                for part, style in (("training", "line"), ("held out", "dots")):
                    words = [stage["role"]] * (len(stages) > 1) + [name] * (len(quantities) > 1)
                    label = " ".join(words) + f", {part}" * (key not in TRAINING_ONLY)
                    look = {"name": label.strip(", "), "colour": colour or ("blue" if last else "green")}
                    found = curve(rows, key, style, **look, dash=not last, right=key == "lr")
                    if found and (style == "line" or key not in TRAINING_ONLY):
                        series.append(found)
        if title == "Loss" and series and not any(row.get("stage") == "simpo" for row in stages[0]["rows"]):
            steps = [each["x"][end] for each in series for end in (0, -1)]
            look = {"colour": "muted", "style": "line", "dash": True}  # where training without a target margin begins
            series.append({"name": "log 2", **look, "x": [min(steps), max(steps)], "y": [math.log(2)] * 2})
        if series:
            charts.append(chart(title, "step", series, **more))
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
        title = NAMES.get(stage, visible(stage))
        if loss == "tgdpo":
            title = f"Stage 2: {title}" if stage == "tgdpo" else f"Stage 1: the guide, trained with {title}"
        stages.append({"title": title, "role": ROLES.get(stage, visible(stage)), "rows": part})
    return stages


# --- what moved -----------------------------------------------------------------------------------


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
    columns = ["", "", "tokens", "of its tokens", f"of Σ|{symbol}|", f"mean {symbol}"] + ["of Σ|f|"] * bool(f)
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
