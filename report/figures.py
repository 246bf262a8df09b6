"""The report's curves, distributions and tables, as data: pure functions of metric rows and scored pairs.

A chart is a dict {title, xlabel, series, …} that page.js draws; see `line` for a series.
Letters: P pairs, N tokens of all responses.
"""

import collections
import math
import unicodedata
from typing import NamedTuple

import numpy as np

from report.text import percent, signed, visible

MOST_POINTS = 800  # of a curve
SIDES = ("chosen", "rejected")
NAMES = {"dpo": "DPO", "simpo": "SimPO", "tgdpo": "TGDPO"}


def number_of(value):
    """value as a float where it is a finite number, else None."""
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond float's range
        return None


def plain_numbers(values):
    """Numbers for JSON, six significant digits; None where they are not finite."""
    return [float(f"{v:.6g}") if v is not None and np.isfinite(v) else None for v in values]


# --- curves ---------------------------------------------------------------------------------------


def line(name, colour, x, y, style="line", **more):
    """A series of a chart. style: line, dash, dots, step (a histogram's outline), points, band (lo to hi).

    colour: of page.css, blue for chosen and orange for rejected; labels: the names of points.
    """
    extra = {key: plain_numbers(value) if key in ("lo", "hi") else value for key, value in more.items()}
    points = {"x": plain_numbers(x), "y": plain_numbers(y)}
    return {"name": name, "colour": colour, "style": style} | points | extra


def thinned(x, y):
    """About MOST_POINTS of a long curve: of each stretch the lowest and the highest point, so spikes stay."""
    if len(x) <= MOST_POINTS:
        return x, y
    keep, heights = {0, len(x) - 1}, np.array(y)
    for part in np.array_split(np.arange(len(x)), MOST_POINTS // 2):
        keep |= {part[heights[part].argmin()], part[heights[part].argmax()]}
    keep = sorted(keep)
    return [x[i] for i in keep], [y[i] for i in keep]


def curve(rows, key):
    """(steps, values) of the rows that have a finite `key`."""
    points = [(row["step"], number_of(row.get(key))) for row in rows]
    points = [(step, value) for step, value in points if value is not None]
    return thinned([step for step, _ in points], [value for _, value in points])


CURVES = (  # title, ((name, key of metrics.jsonl, colour), …), more of the chart
    ("Loss", (("loss", "loss", "blue"),), {"marks": [[float(np.log(2)), "log 2"]]}),
    ("Reward margin", (("optimised φ", "margin", "blue"), ("plain DPO", "dpo_margin", "orange")), {"zero": True}),
    ("Accuracy (pairs with margin > 0)", (("accuracy", "accuracy", "blue"),), {"range": [0, 1]}),
    (
        "Log-ratio to the reference, summed",
        (("chosen", "logratio_chosen", "blue"), ("rejected", "logratio_rejected", "orange")),
        {"zero": True},
    ),
    ("Share of tokens with f ≤ 0", (("f ≤ 0", "f_nonpositive", "purple"),), {"zero": True}),
    ("Gradient norm", (("before clipping", "grad_norm", "green"),), {"zero": True}),
    ("Learning rate", (("learning rate", "lr", "green"),), {"zero": True}),
    ("Tokens per second", (("tokens/s", "tokens_per_second", "green"),), {"zero": True}),
)


def stage_charts(rows):
    """The curves of one stage's rows: a list of charts, without those that have no point."""
    train, held_out = [r for r in rows if not r.get("eval")], [r for r in rows if r.get("eval")]
    plain = all(row.get("margin") == row.get("dpo_margin") for row in rows)  # a DPO stage optimises it
    charts = []
    for title, quantities, more in CURVES:
        series = []
        if title == "Reward margin" and plain:
            quantities = (("DPO margin", "margin", "blue"),)
        if title == "Loss" and rows[0].get("stage") == "simpo":
            more = {}  # with its target margin, SimPO's loss does not begin at log 2
        for name, key, colour in quantities:
            for label, part, style in (("training", train, "line"), ("held out", held_out, "dots")):
                x, y = curve(part, key)
                if x:
                    label = f"{name}, {label}" if len(quantities) > 1 else label
                    series.append(line(label, colour, x, y, style))
        if series:
            charts.append({"title": title, "xlabel": "step", "series": series, **more})
    for title, key in (("Token reward r̂ in the batch", "r_hat"), ("Weight f in the batch", "f")):
        keys = [f"{key}_{kind}" for kind in ("mean", "std", "min", "max")]
        part = [row for row in train if all(number_of(row.get(key)) is not None for key in keys)]
        if part:
            x, mean = curve(part, keys[0])
            std = {row["step"]: row[keys[1]] for row in part}
            low = [m - std[step] for step, m in zip(x, mean)]
            high = [m + std[step] for step, m in zip(x, mean)]
            charts.append(
                {
                    "title": title,
                    "xlabel": "step",
                    "series": [
                        line("mean", "blue", x, mean),
                        line("± one standard deviation", "blue", x, mean, "band", lo=low, hi=high),
                        line("least", "purple", *curve(part, keys[2]), "dash"),
                        line("greatest", "green", *curve(part, keys[3]), "dash"),
                    ],
                }
            )
    return charts


def stages_of(rows, loss):
    """metrics.jsonl's rows by stage, in the order of the run: list of (title, rows sorted by step).

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
        stages.append((title, part))
    return stages


# --- what moved -----------------------------------------------------------------------------------


def end_token(pairs):
    """The commonest last token of the responses: the end-of-turn token, unless most of them were cut."""
    last = collections.Counter(r.tokens[-1] for pair in pairs for r in pair.responses)
    return last.most_common(1)[0][0]


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


class Tokens(NamedTuple):
    """All tokens of all pairs, one side: arrays [N]."""

    reward: np.ndarray
    weight: np.ndarray
    moved: np.ndarray | None
    position: np.ndarray  # in its response: 0 the first, towards 1 the last
    kind: np.ndarray  # 0 other, 1 punctuation, 2 white space, 3 the end token
    text: list
    pair: np.ndarray  # the pair's number


KINDS = ("other", "punctuation", "white space", "end token")


def side_tokens(pairs, side, end):
    """The tokens of all pairs' chosen (side 0) or rejected (1) responses, as Tokens."""
    kinds = {}
    text, kind = [], []
    for pair in pairs:
        tokens = pair.responses[side].tokens
        for token in tokens:
            if token not in kinds:
                kinds[token] = KINDS.index(kind_of(token))
        text += tokens
        kind += [kinds[token] for token in tokens]
        if tokens[-1] == end:
            kind[-1] = KINDS.index("end token")
    lengths = [len(pair.responses[side].tokens) for pair in pairs]
    join = lambda arrays: np.concatenate(arrays).astype(np.float64)
    return Tokens(
        join([p.reward[side] for p in pairs]),
        join([p.weight[side] for p in pairs]),
        join([p.moved[side] for p in pairs]) if all(p.moved for p in pairs) else None,
        join([np.arange(length) / length for length in lengths]),
        np.array(kind),
        text,
        np.repeat([pair.number for pair in pairs], lengths),
    )


def histogram(title, xlabel, values):
    """values: (chosen, rejected), each [N]. The outermost half per cent falls into the end bins."""
    low, high = np.quantile(np.concatenate(values), [0.005, 0.995])
    if high <= low:
        low, high = low - 0.5, low + 0.5
    edges = np.linspace(low, high, 41)
    series = []
    for side, colour, part in zip(SIDES, ("blue", "orange"), values):
        share = np.histogram(np.clip(part, low, high), edges)[0] / len(part)
        series.append(line(side, colour, (edges[1:] + edges[:-1]) / 2, share, "step"))
    return {"title": title, "xlabel": xlabel, "ylabel": "share of its tokens", "series": series, "zero": True}


def by_bin(where, values, edges):
    """Bin for bin of `where`, empty ones left out: mean of where; mean, 10 % and 90 % quantile of values."""
    index = np.clip(np.searchsorted(edges, where, "right") - 1, 0, len(edges) - 2)
    order = np.argsort(index, kind="stable")
    parts = np.split(order, np.searchsorted(index[order], np.arange(1, len(edges) - 1)))
    bins = ((where[p].mean(), values[p].mean(), *np.quantile(values[p], [0.1, 0.9])) for p in parts if len(p))
    return tuple(zip(*bins))


def position_chart(title, sides, values):
    """Mean of values by place in the response, with a band from the 10 % to the 90 % quantile."""
    bins = int(np.clip(min(len(v) for v in values) // 20, 4, 20))
    series = []
    for side, colour, tokens, value in zip(SIDES, ("blue", "orange"), sides, values):
        x, mean, low, high = by_bin(tokens.position, value, np.linspace(0, 1, bins + 1))
        x = [100 * v for v in x]
        series += [
            line(f"{side}, mean", colour, x, mean, "line" if side == "chosen" else "dash"),
            line(f"{side}, 10 to 90 %", colour, x, mean, "band", lo=low, hi=high),
        ]
    return {"title": title, "xlabel": "place in the response, %", "series": series}


def scatter(sides):
    """Change of each token's log-ratio against f: a sample of points, and the mean of all in bins of f."""
    series = []
    for side, colour, tokens in zip(SIDES, ("blue", "orange"), sides):
        pick = np.unique(np.linspace(0, len(tokens.text) - 1, 1200).astype(int))
        series.append(
            line(
                side,
                colour,
                tokens.weight[pick],
                tokens.moved[pick],
                "points",
                labels=[f"{visible(tokens.text[i])}  (pair {tokens.pair[i]})" for i in pick],
            )
        )
    for side, colour, tokens in zip(SIDES, ("blue", "orange"), sides):
        edges = np.unique(np.quantile(tokens.weight, np.linspace(0, 1, 13)))
        if len(edges) > 2:
            x, mean, _, _ = by_bin(tokens.weight, tokens.moved, edges)
            series.append(line(f"{side}, mean", colour, x, mean, "line" if side == "chosen" else "dash"))
    return {
        "title": "Change of a token's log-ratio against its weight f",
        "xlabel": "weight f",
        "ylabel": "log π/π_ref after training",
        "series": series,
        "zero": True,
        "wide": True,
    }


def moved_section(pairs, guided, symbol):
    """Charts, figures (label, value, note) and the table of what carries the reward; None without rewards."""
    pairs = [pair for pair in pairs if pair.reward]
    if not pairs:
        return None
    sides = tuple(side_tokens(pairs, s, end_token(pairs)) for s in (0, 1))
    who = "Guide" if guided else "Policy"

    right = sum(pair.margin > 0 for pair in pairs)
    totals = np.array([[r.sum() for r in pair.reward] for pair in pairs], np.float64)  # [P, 2]
    lengths = np.array([[len(r.tokens) for r in pair.responses] for pair in pairs], np.float64)  # [P, 2]
    figures = [
        [
            f"{who} accuracy",
            percent(right, len(pairs)),
            f"{right} of {len(pairs)} pairs: the chosen response has the larger Σ {symbol}",
        ]
    ]
    if all(pair.moved for pair in pairs):
        margins = [("Plain DPO margin > 0", "plain")] + [("Optimised margin φ > 0", "phi")] * guided
        for label, name in margins:
            above = sum(getattr(pair, name) > 0 for pair in pairs)
            figures.append([label, percent(above, len(pairs)), f"{above} of {len(pairs)} pairs, trained"])
    longer, larger = (-np.diff(part)[:, 0] for part in (lengths, totals))  # [P], chosen less rejected
    figures += [
        [
            "Summed reward with length",
            signed(correlation(lengths.ravel(), totals.ravel())),
            f"Pearson correlation, {lengths.size} responses",
        ],
        [
            "Margin with extra length",
            signed(correlation(longer, larger)),
            "Pearson correlation of the differences, chosen less rejected",
        ],
    ]
    for side, tokens in zip(SIDES, sides):
        figures.append(
            [
                f"Mean {symbol}, {side}",
                signed(tokens.reward.mean()),
                f"standard deviation {tokens.reward.std():.3g}, {len(tokens.text):,} tokens",
            ]
        )
    if guided:
        for side, tokens in zip(SIDES, sides):
            flipped = (tokens.weight <= 0).sum()
            reach = f"f from {tokens.weight.min():.3g} to {tokens.weight.max():.3g}".replace("-", "−")
            figures.append([f"Tokens with f ≤ 0, {side}", percent(flipped, len(tokens.text)), reach])

    columns = ["", "", "tokens", "of its tokens", f"of Σ|{symbol}|", f"mean {symbol}"] + ["of Σ|f|"] * guided
    table = []
    for kind in (3, 1, 2, 0):
        for side, t in zip(SIDES, sides):
            mine = t.kind == kind
            table.append(
                [
                    KINDS[kind],
                    side,
                    f"{mine.sum():,}",
                    percent(mine.sum(), len(mine)),
                    percent(abs(t.reward[mine]).sum(), abs(t.reward).sum()),
                    signed(t.reward[mine].mean() if mine.any() else None),
                    percent(abs(t.weight[mine]).sum(), abs(t.weight).sum()),
                ][: len(columns)]
            )

    rewards, weights = tuple(t.reward for t in sides), tuple(t.weight for t in sides)
    charts = [
        histogram(f"Distribution of {symbol}", symbol, rewards),
        position_chart(f"{symbol} by position", sides, rewards),
    ]
    if guided:
        charts += [histogram("Distribution of f", "weight f", weights), position_chart("f by position", sides, weights)]
        if all(t.moved is not None for t in sides):
            charts.insert(0, scatter(sides))
    charts.append(
        {
            "title": "Summed reward against length",
            "xlabel": "tokens",
            "ylabel": f"Σ {symbol}",
            "zero": True,
            "series": [
                line(
                    side,
                    colour,
                    lengths[:, s],
                    totals[:, s],
                    "points",
                    labels=[f"pair {pair.number}, {side}" for pair in pairs],
                )
                for s, (side, colour) in enumerate(zip(SIDES, ("blue", "orange")))
            ],
        }
    )
    return {"charts": charts, "figures": figures, "columns": columns, "table": table, "end": visible(end_token(pairs))}
