"""The report page of a run, finished or still running: one HTML file that needs no network.

    python report/report.py OUT [--output FILE]

It reads metrics.jsonl, config.toml, tokens.jsonl, samples.json, dropped.jsonl and run.json of the run
directory OUT and shows what there is: each may be missing or half written. Here stands what the page says;
page.html, page.css and page.js beside this file are how it looks. Everything that a model or a stranger wrote
travels as JSON and reaches the page as text nodes, its unseen characters spelled out (text.py).

Per token t of a response, all from the log-probabilities of the three models:
    r_hat = guide_beta * (guide - ref)      f_w = 1 + alpha * r_hat      f_l = 1 - alpha * r_hat
    moved = policy - ref                    share = |f_t| / sum |f| over its response
Without a guide, the policy's implicit reward stands in r_hat's place: beta * (policy - ref) in a dpo run,
beta * policy / T in a simpo run, which has no reference. Letters: T tokens of one response.
"""

import argparse
import base64
import collections
import hashlib
import html
import json
import os
import pathlib
import re
import sys
import time
import tomllib
from typing import NamedTuple

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # as a command: the folder above is where `report` is found
from report.figures import NAMES, SIDES, moved_section, number_of, plain_numbers, stage_charts, stages_of
from report.text import clipped, percent, right_to_left, visible, written

# What the page carries at most, so that it opens on a phone; its statistics are over everything.
MOST_TOKENS, MOST_SAMPLES, MOST_DROPPED = 200_000, 40, 200
DEFAULTS = {"loss": "tgdpo", "beta": 0.1, "alpha": 0.5}  # train.py's, where config.toml does not say
SYMBOLS = {"tgdpo": "r̂", "dpo": "β log π/π_ref", "simpo": "β/|y| log π"}


class Response(NamedTuple):
    """One scored response of tokens.jsonl; log-probabilities in nats."""

    tokens: list  # T strings
    ref: np.ndarray | None  # [T] float32, None in a simpo run
    guide: np.ndarray | None  # [T], None where the run has no guide
    policy: np.ndarray | None  # [T], None while there is no trained policy


class Scored(NamedTuple):
    """A pair with what the page says of it. Arrays come as (chosen, rejected)."""

    number: int  # from 1, its line in tokens.jsonl
    source: str
    prompt: str
    responses: tuple
    reward: tuple | None  # two [T]: r_hat, or the policy's implicit reward
    weight: tuple  # two [T]: f_w and f_l, ones without a guide
    moved: tuple | None  # two [T]: log pi/pi_ref of the policy
    margin: float | None  # summed reward, chosen less rejected
    plain: float | None  # plain DPO margin of the policy
    phi: float | None  # optimised margin of the policy


# --- reading --------------------------------------------------------------------------------------


def read_rows(path):
    """The objects of a .jsonl file and the number of lines that hold none. Missing: ([], 0)."""
    rows, unread = [], 0
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            unread += 1
    return rows, unread


def read_json(path, kind):
    """What the JSON file holds if it is a `kind` (dict or list), else an empty one."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def read_config(path):
    """config.toml as a flat dict, dashes as underscores; of a half-written file what precedes the cut."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    while lines:
        try:
            return flatten(tomllib.loads("\n".join(lines)), lambda key: key.replace("-", "_"))
        except (tomllib.TOMLDecodeError, RecursionError):
            lines.pop()
    return {}


def flatten(table, rename=str, prefix=""):
    """Nested dicts as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, rename, f"{prefix}{rename(key)}.")
        else:
            flat[prefix + rename(key)] = value
    return flat


def read_response(record):
    """One side of a tokens.jsonl row. ValueError where it is not whole."""
    tokens = record["tokens"]
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokens must be strings")
    logps = []
    for key in ("ref", "guide", "policy"):
        values = record.get(key)
        if values is not None:
            values = np.array(values, np.float64)
            if values.shape != (len(tokens),) or not (abs(values) < 1e6).all():
                raise ValueError(f"{key} does not match the tokens or is not finite")
            values = values.astype(np.float32)
        logps.append(values)
    return Response(list(tokens), *logps)


def score(number, row, settings):
    """A row of tokens.jsonl -> Scored. ValueError, KeyError or TypeError where the row is not whole."""
    responses = tuple(read_response(row[side]) for side in SIDES)
    loss, beta, alpha, guide_beta = (settings[key] for key in ("loss", "beta", "alpha", "guide_beta"))
    has = {name for name in Response._fields if all(getattr(r, name) is not None for r in responses)}
    moved = tuple(r.policy - r.ref for r in responses) if {"policy", "ref"} <= has else None
    reward = margin = plain = phi = None
    weight = tuple(np.ones(len(r.tokens), np.float32) for r in responses)
    if loss == "tgdpo" and {"guide", "ref"} <= has:
        reward = tuple(np.float32(guide_beta) * (r.guide - r.ref) for r in responses)
        weight = (1 + np.float32(alpha) * reward[0], 1 - np.float32(alpha) * reward[1])
    elif loss == "dpo" and moved:
        reward = tuple(np.float32(beta) * m for m in moved)
    elif loss == "simpo" and "policy" in has:
        reward = tuple(np.float32(beta / len(r.tokens)) * r.policy for r in responses)
    if reward:
        margin = float(reward[0].sum() - reward[1].sum())
    if moved:
        plain = float(beta * (moved[0].sum() - moved[1].sum()))
        phi = float(beta * ((weight[0] * moved[0]).sum() - (weight[1] * moved[1]).sum()))
    return Scored(
        number,
        str(row.get("source", "")),
        str(row.get("prompt", "")),
        responses,
        reward,
        weight,
        moved,
        margin,
        plain,
        phi,
    )


def settings_of(config, rows):
    """The options the formulas need, out of config.toml, with train.py's defaults where it does not say."""
    loss = config.get("loss", rows[-1].get("stage") if rows else None)
    settings = {"loss": loss if loss in ("tgdpo", "dpo", "simpo") else DEFAULTS["loss"]}
    for key in ("beta", "alpha", "guide_beta"):
        value = number_of(config.get(key))
        known = value is not None and abs(value) < 1e6
        settings[key] = value if known else DEFAULTS.get(key, settings.get("beta"))
    needed = ("loss", "beta", "alpha") if settings["loss"] == "tgdpo" else ("loss", "beta")
    settings["assumed"] = [key for key in needed if config.get(key) != settings[key]]
    return settings


def embedded(data):
    """data as JSON that may stand inside a <script> element: ASCII, and no character that HTML reads."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(values, kind="<f4"):
    """An array as base64 of its little-endian bytes: exact, and half as long as digits."""
    return base64.b64encode(np.asarray(values).astype(kind).tobytes()).decode()


# --- pairs ----------------------------------------------------------------------------------------


def classes_of(pairs, guided):
    """The filters of the token view: list of {name, note, pairs: numbers}.

    With guide and policy, what the guidance gave a pair is phi less the plain DPO margin of the same policy:
    what the weights f add to the margin. Without a policy yet, or without a guide, the reward margin ranks.
    """
    ranked = [pair for pair in pairs if pair.margin is not None]
    if not ranked:
        return []
    who = "guide" if guided else "policy"
    if guided and all(pair.phi is not None for pair in ranked):
        value = lambda pair: pair.phi - pair.plain
        what = "φ less the plain DPO margin: what the weights f add to the pair's margin after training"
        names = ("helped most", "helped least")
    else:
        value = lambda pair: pair.margin
        what = f"reward margin of the {who}: its summed reward, chosen less rejected"
        names = ("largest margin", "smallest margin")
    ranked.sort(key=value)
    count = min(20, len(ranked) // 2, max(3, len(ranked) // 10))
    wrong = [pair.number for pair in ranked if pair.margin <= 0]
    return [
        {
            "name": names[0],
            "note": f"The {count} pairs with the largest {what}.",
            "pairs": [pair.number for pair in ranked[::-1][:count]],
        },
        {
            "name": names[1],
            "note": f"The {count} pairs with the smallest {what}.",
            "pairs": [pair.number for pair in ranked[:count]],
        },
        {
            "name": f"{who} got wrong",
            "pairs": wrong,
            "note": "Pairs whose rejected response has the larger summed reward, the widest gap first.",
        },
    ]


def embedded_pairs(pairs, classes):
    """(pieces, pairs) for the page: tokens as places in a list of distinct pieces, numbers packed.

    Pairs of a class come first when MOST_TOKENS leaves no room for all.
    """
    listed = {number for each in classes for number in each["pairs"]}
    room, kept = MOST_TOKENS, []
    for pair in sorted(pairs, key=lambda pair: pair.number not in listed):
        length = sum(len(r.tokens) for r in pair.responses)
        if length <= room:
            room -= length
            kept.append(pair)
    pieces = {}
    records = []
    for pair in sorted(kept, key=lambda pair: pair.number):
        record = {
            "n": pair.number,
            "source": clipped(pair.source, 300),
            "prompt": clipped(pair.prompt),
            "margins": plain_numbers([pair.margin, pair.plain, pair.phi]),
        }
        for side, response in zip(SIDES, pair.responses):
            ids = [pieces.setdefault(visible(token), len(pieces)) for token in response.tokens]
            record[side] = {"ids": packed(ids, "<u4"), "rtl": right_to_left(response.tokens)} | {
                name: packed(getattr(response, name))
                for name in ("ref", "guide", "policy")
                if getattr(response, name) is not None
            }
        records.append(record)
    return list(pieces), records


def spread(pairs, name):
    """The 98 % quantile of |values| over all tokens, the scale of the colours; 1 where there is none."""
    values = [abs(part) for pair in pairs if getattr(pair, name) for part in getattr(pair, name)]
    largest = float(np.quantile(np.concatenate(values), 0.98)) if values else 0.0
    return largest if np.isfinite(largest) and largest > 0 else 1.0


# --- the page -------------------------------------------------------------------------------------


def table(name, title, columns, rows, opened=True):
    """A table of text for the page."""
    return {
        "id": name,
        "title": title,
        "open": opened,
        "columns": [visible(str(c)) for c in columns],
        "rows": [[written(cell) for cell in row] for row in rows],
    }


MEANINGS = {
    "rows": "rows read",
    "kept": "pairs kept",
    "cut": "responses cut at their end",
    "boundary": "responses tokenised apart from the prompt",
    "dropped": "rows dropped",
}


def run_tables(run, config, dropped):
    """The tables of what the run was: final figures, data, machine, settings, as far as they are known."""
    tables = []
    figures = run.get("table")
    if isinstance(figures, list) and figures and all(isinstance(row, dict) for row in figures):
        columns = list(dict.fromkeys(key for row in figures for key in row))
        tables.append(
            table(
                "evaluation",
                "Final evaluation",
                [c.replace("_", " ") for c in columns],
                [
                    [f"{value:.4g}" if isinstance(value, float) else value for value in map(row.get, columns)]
                    for row in figures
                ],
            )
        )
    counts = run["data"] if isinstance(run.get("data"), dict) else {}
    if not all(isinstance(value, dict) for value in counts.values()):
        counts = {"": counts}  # one set of data; else train and eval
    counts = {name: flatten(value) for name, value in counts.items()}
    keys = dict.fromkeys(key for value in counts.values() for key in value)
    rows = [[MEANINGS.get(key, key.replace("_", " ")), *(value.get(key) for value in counts.values())] for key in keys]
    if rows:
        tables.append(table("data", "Data", ["", *counts], rows))
    if dropped:
        # "prompt too long: 3004 tokens, at most 1800": what stands before the colon is the kind
        reasons = collections.Counter(str(row.get("reason", "?")).split(":")[0] for row in dropped)
        tables.append(table("reasons", "Dropped, by reason", ["", ""], reasons.most_common()))
        columns = ("file", "row", "reason")
        tables.append(
            table(
                "dropped",
                f"Dropped rows ({len(dropped)})",
                columns,
                [[row.get(c) for c in columns] for row in dropped[:MOST_DROPPED]],
                opened=False,
            )
        )
        if len(dropped) > MOST_DROPPED:
            tables[-1]["note"] = f"The first {MOST_DROPPED}; all of them are in dropped.jsonl."
    machine = [
        item for key in ("machine", "versions") if isinstance(run.get(key), dict) for item in flatten(run[key]).items()
    ]
    for name, title, items in (("machine", "Machine and versions", machine), ("settings", "Settings", config.items())):
        if items:
            tables.append(table(name, title, ["", ""], items, opened=name == "machine"))
    return tables


def gather(out_dir):
    """Everything the page says of a run directory, as one JSON-ready dict."""
    rows, unread_metrics = read_rows(out_dir / "metrics.jsonl")
    token_rows, unread_tokens = read_rows(out_dir / "tokens.jsonl")
    dropped, _ = read_rows(out_dir / "dropped.jsonl")
    config, run = read_config(out_dir / "config.toml"), read_json(out_dir / "run.json", dict)
    settings = settings_of(config, rows)
    pairs = []
    for number, row in enumerate(token_rows, 1):
        try:
            pairs.append(score(number, row, settings))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            unread_tokens += 1

    guided, symbol = settings["loss"] == "tgdpo", SYMBOLS[settings["loss"]]
    stages, classes = stages_of(rows, settings["loss"]), classes_of(pairs, guided)
    pieces, records = embedded_pairs(pairs, classes)
    notes = [
        f"{count} line(s) of {name} could not be read and are left out."
        for name, count in (("metrics.jsonl", unread_metrics), ("tokens.jsonl", unread_tokens))
        if count
    ]
    if settings["assumed"] and pairs:
        notes.append(
            f"config.toml does not give {', '.join(settings['assumed'])}; assumed: "
            + ", ".join(f"{key} {settings[key]}" for key in settings["assumed"])
            + "."
        )
    if len(records) < len(pairs):
        notes.append(
            f"Token by token the page holds {len(records)} of the {len(pairs)} pairs; its "
            "statistics are over all of them."
        )
    samples = [
        {clipped(str(key), 60): clipped(value) for key, value in row.items() if isinstance(value, str)}
        for row in read_json(out_dir / "samples.json", list)[:MOST_SAMPLES]
        if isinstance(row, dict)
    ]
    return {
        "name": visible(out_dir.resolve().name),
        "about": about(config, settings, stages, out_dir),
        "notes": notes,
        "tiles": tiles(stages, pairs, guided),
        "stages": [{"title": title, "charts": stage_charts(part)} for title, part in stages],
        "settings": {key: settings[key] for key in ("loss", "beta", "alpha", "guide_beta")},
        "guided": guided,
        "symbol": symbol,
        "reward_scale": spread(pairs, "reward"),
        "moved_scale": spread(pairs, "moved"),
        "pieces": pieces,
        "pairs": records,
        "classes": classes,
        "moved": moved_section(pairs, guided, symbol),
        "samples": samples,
        "tables": run_tables(run, config, dropped),
        "command": clipped(run["command"]) if isinstance(run.get("command"), str) else "",
    }


def about(config, settings, stages, out_dir):
    """The line under the page's title."""
    alpha = f", α {settings['alpha']:g}" if settings["loss"] == "tgdpo" else ""
    parts = [f"{NAMES[settings['loss']]} with β {settings['beta']:g}{alpha}"]
    if config.get("model"):
        parts.append(f"from {clipped(str(config['model']), 120)}")
    if stages:
        title, rows = stages[-1]
        stamp = (out_dir / "metrics.jsonl").stat().st_mtime
        parts += [
            f"{title}, step {rows[-1]['step']:g}",
            "last written " + time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(stamp)),
        ]
    return " · ".join(parts)


TILES = (
    ("Accuracy", "accuracy", "{:.1%}"),
    ("Optimised margin φ", "margin", "{:.3g}"),
    ("Plain DPO margin", "dpo_margin", "{:.3g}"),
    ("Loss", "loss", "{:.4g}"),
    ("Tokens with f ≤ 0", "f_nonpositive", "{:.1%}"),
)


def tiles(stages, pairs, guided):
    """The figures at the top: list of [label, value, note], out of the newest rows of the last stage."""
    if not stages:
        return []
    rows, found = stages[-1][1], {}
    for where, part in (
        ("held out", [row for row in rows if row.get("eval")]),
        ("training", [row for row in rows if not row.get("eval")]),
    ):
        for label, key, form in TILES:
            value = number_of(part[-1].get(key)) if part else None
            if value is not None and label not in found:
                found[label] = [label, form.format(value), f"{where}, step {part[-1]['step']:g}"]
    judged = [pair.margin > 0 for pair in pairs if pair.margin is not None]
    if judged and guided:
        right = sum(judged)
        found["guide"] = ["Guide accuracy", percent(right, len(judged)), f"{right} of {len(judged)} pairs"]
    return list(found.values())


def page(data):
    """The HTML of the report. Its own script and style are the only ones its content policy lets run."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed[0]}'; style-src 'sha256-{allowed[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(data["name"]),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": embedded(data),
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match.group(1)], template)


def write(out_dir, output=None):
    """Makes the page of the run directory out_dir at `output` (default OUT/report.html); returns its path.

    Written beside its place and renamed, so that a browser never sees half of it. FileNotFoundError where
    out_dir is no directory, OSError where the page cannot be written.
    """
    out_dir = pathlib.Path(out_dir)
    if not out_dir.is_dir():
        raise FileNotFoundError(f"{out_dir} is no directory; give a run's output directory")
    output = pathlib.Path(output) if output else out_dir / "report.html"
    text = page(gather(out_dir))
    part = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    return output


def main(argv=None):
    """The command. Exit status 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="report.py", description="Makes the report page of a run.")
    parser.add_argument("out", help="the run's output directory")
    parser.add_argument("--output", help="where to write the page (default OUT/report.html)")
    options = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be text
    try:
        print(write(options.out, options.output))
    except OSError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
