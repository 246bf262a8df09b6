"""The report page of a run, finished or still running: one HTML file that needs no network.

    python report/report.py OUT [--to FILE]                the page of a run, OUT/report.html
    python report/report.py OUT1 OUT2 … [--to FILE]        several runs on the same axes, compare.html

It reads metrics.jsonl, config.toml, tokens.jsonl, samples.json, samples.jsonl, dropped.jsonl and run.json of the run
directory OUT and shows what there is: each may be missing or half written. Here stands what the page says, in
answer.py what it says first; page.html, page.css and page.js beside this file are how it looks. Everything that a
model or a stranger wrote travels as JSON and reaches the page as text nodes, its unseen characters spelled out
(text.py).

What tokens.jsonl holds of a token, NUMBERS: ref, guide, policy (log-probabilities), reward (r̂ with a guide, else the
policy's implicit reward), f (the weight), moved (log π/π_ref of the policy). The run evaluated them; the page draws and
counts them.
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
from report import answer
from report.figures import NAMES, SIDES, curves, gathered, moved_section, number_of, stages_of, together, with_recorded
from report.text import clipped, right_to_left, visible, written

# What the page carries at most, so that it opens on a phone; its statistics are over everything.
MOST_TOKENS, MOST_SAMPLES = 200_000, 40
NUMBERS = ("ref", "guide", "policy", "reward", "f", "moved")
SYMBOLS = {"tgdpo": "r̂", "dpo": "β log π/π_ref", "simpo": "β/|y| log π"}
MEANINGS = {
    "tgdpo": "r̂ is the guide's token reward; the weight f is 1 + α r̂ in the chosen response, 1 − α r̂ in the rejected.",
    "dpo": "Without a guide every weight is 1; shown is the policy's implicit reward.",
    "simpo": "Shown is each token's part of SimPO's reward; SimPO has no reference and no weights.",
}


class Pair(NamedTuple):
    """A row of tokens.jsonl, as the run recorded it; None or absent where it did not."""

    number: int  # from 1, its line
    source: str
    prompt: str
    chosen: dict  # tokens: T strings; of NUMBERS what is recorded: [T] float32
    rejected: dict
    margin: float | None  # summed reward, chosen less rejected
    dpo_margin: float | None  # of the policy
    phi: float | None  # the policy's optimised margin


def read_rows(path):
    """The objects of a .jsonl file and the number of lines that hold none. Missing: ([], 0)."""
    try:
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except OSError:
        return [], 0
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    rows = [row for row in rows if isinstance(row, dict)]
    return rows, len(lines) - len(rows)


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
            return {k.replace("-", "_"): v for k, v in flatten(tomllib.loads("\n".join(lines))).items()}
        except (tomllib.TOMLDecodeError, RecursionError):
            lines.pop()
    return {}


def flatten(table, prefix=""):
    """Nested dicts as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_response(record):
    """One side of a tokens.jsonl row, checked. ValueError where it is not whole."""
    tokens = record["tokens"]
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokens must be strings")
    response = {"tokens": list(tokens)}
    for name in NUMBERS:
        if record.get(name) is not None:
            values = np.array(record[name], np.float64)
            if values.shape != (len(tokens),) or not (abs(values) < 1e6).all():
                raise ValueError(f"{name} does not match the tokens or is not finite")
            response[name] = values.astype(np.float32)
    return response


def read_pair(number, row):
    """A row of tokens.jsonl -> Pair. ValueError, KeyError or TypeError where the row is not whole."""
    texts = (str(row.get(key, "")) for key in ("source", "prompt"))
    totals = (number_of(row.get(key)) for key in ("margin", "dpo_margin", "phi"))
    return Pair(number, *texts, *(read_response(row[side]) for side in SIDES), *totals)


def embedded(data):
    """data as JSON that may stand inside a <script> element: ASCII, and no character that HTML reads."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(values, kind="<f4"):
    """An array as base64 of its little-endian bytes: exact, and half as long as digits."""
    return base64.b64encode(np.asarray(values).astype(kind).tobytes()).decode()


def embedded_pairs(pairs, classes):
    """(pieces, pairs) for the page: tokens as places in a list of distinct pieces, numbers packed.

    Pairs of the first two classes come first when MOST_TOKENS leaves no room for all.
    """
    listed = {number for each in classes[:2] for number in each["pairs"]}
    room, kept = MOST_TOKENS, []
    for pair in sorted(pairs, key=lambda pair: pair.number not in listed):
        length = len(pair.chosen["tokens"]) + len(pair.rejected["tokens"])
        if length <= room:
            room -= length
            kept.append(pair)
    pieces, records = {}, []
    for pair in sorted(kept, key=lambda pair: pair.number):
        record = {key: getattr(pair, key) for key in ("number", "margin", "dpo_margin", "phi")}
        record |= {"source": clipped(pair.source, 300), "prompt": clipped(pair.prompt)}
        for side in SIDES:
            response = getattr(pair, side)
            ids = [pieces.setdefault(visible(token), len(pieces)) for token in response["tokens"]]
            record[side] = {"ids": packed(ids, "<u4"), "rtl": right_to_left(response["tokens"])}
            record[side] |= {name: packed(response[name]) for name in NUMBERS if name in response}
        records.append(record)
    return list(pieces), records


def colours_of(pairs, symbol):
    """What the tokens may be coloured by: list of {key, name, middle, scale}, of what is recorded.

    scale: the 98 % quantile of the distance from the middle, over all tokens; 1 where there is none.
    """
    colours = []
    for key, name, middle in (("reward", symbol, 0), ("f", "weight f", 1), ("moved", "log π/π_ref", 0)):
        if with_recorded(pairs, key):
            values = gathered(with_recorded(pairs, key), key)
            scale = float(np.quantile(abs(np.concatenate(values) - middle), 0.98))
            colours.append({"key": key, "name": name, "middle": middle, "scale": scale or 1.0})
    return colours


def table(name, title, columns, rows, opened=True):
    """A table of text for the page."""
    columns, rows = [visible(str(c)) for c in columns], [[written(cell) for cell in row] for row in rows]
    return {"id": name, "title": title, "open": opened, "columns": columns, "rows": rows}


COUNTS = {"rows": "rows read", "kept": "pairs kept", "cut": "responses cut at their end", "dropped": "rows dropped"}
COUNTS["boundary"] = "responses tokenised apart from the prompt"


def final_table(named):
    """[the table of final figures] of {name: run.json}, or []. Several runs: a column of names first."""
    rows = []
    for name, run in named.items():
        found = run["table"] if isinstance(run.get("table"), list) else []
        rows += [{"run": name} | row if len(named) > 1 else row for row in found if isinstance(row, dict)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in map(row.get, columns)] for row in rows]
    return [table("evaluation", "Final evaluation", [c.replace("_", " ") for c in columns], cells)] if rows else []


def run_tables(name, run, config, dropped):
    """The tables of what the run was: final figures, data, machine, settings, as far as they are known."""
    tables = final_table({name: run})
    counts = run["data"] if isinstance(run.get("data"), dict) else {}
    if not all(isinstance(value, dict) for value in counts.values()):
        counts = {"": counts}  # one set of data; else train and eval
    counts = {name: flatten(value) for name, value in counts.items()}
    if keys := dict.fromkeys(key for value in counts.values() for key in value):
        rows = [[COUNTS.get(key, key.replace("_", " ")), *(c.get(key) for c in counts.values())] for key in keys]
        tables.append(table("data", "Data", ["", *counts], rows))
    if dropped:
        # "prompt too long: 3004 tokens, at most 1800": what stands before the colon is the kind
        reasons = collections.Counter(str(row.get("reason", "?")).split(":")[0] for row in dropped).most_common()
        tables.append(table("reasons", "Dropped rows, by reason (dropped.jsonl has each)", ["", ""], reasons))
    machine = [flatten(run[key]) for key in ("machine", "versions") if isinstance(run.get(key), dict)]
    if items := [item for part in machine for item in part.items()]:
        tables.append(table("machine", "Machine and versions", ["", ""], items))
    if config:
        tables.append(table("settings", "Settings", ["", ""], config.items(), opened=False))
    return tables


# Of a run: its name, the line under it, config.toml, run.json, the loss, stages_of, unread lines of metrics.jsonl.
Run = collections.namedtuple("Run", "name about config run loss stages unread")


def parts_of(config):
    """The parts of --with, as they were given."""
    parts = config.get("with")
    return [clipped(part) for part in parts if isinstance(part, str)] if isinstance(parts, list) else []


def read_run(out):
    """The Run of a directory. FileNotFoundError where it is none."""
    if not out.is_dir():
        raise FileNotFoundError(f"{out} is no directory; give a run's output directory")
    rows, unread = read_rows(out / "metrics.jsonl")
    config, run = read_config(out / "config.toml"), read_json(out / "run.json", dict)
    loss = str(config.get("loss") or (rows and rows[-1].get("stage")))
    loss = loss if loss in NAMES else "tgdpo"
    stages = stages_of(rows, loss)
    settings = [f"{sign} {written(config[key])}" for key, sign in (("beta", "β"), ("alpha", "α")) if key in config]
    settings += [f"parts {' '.join(parts)}"] if (parts := parts_of(config)) else []
    settings += ["centred guidance"] if config.get("centre_guidance") is True else []
    settings += [f"adapters of rank {written(config['lora_rank'])}"] if config.get("lora_rank") else []
    about = [" with ".join([NAMES[loss], *[", ".join(settings)] * bool(settings)])]
    if config.get("model"):
        about.append(f"from {clipped(str(config['model']), 120)}")
    if stages:
        about.append(f"{stages[-1]['title']}, step {stages[-1]['rows'][-1]['step']:g}")
        stamp = time.gmtime((out / "metrics.jsonl").stat().st_mtime)
        about.append("last written " + time.strftime("%Y-%m-%d %H:%M UTC", stamp))
    return Run(visible(out.resolve().name), " · ".join(about), config, run, loss, stages, unread)


def gather(out):
    """Everything the page says of a run directory, as one JSON-ready dict."""
    name, about, config, run, loss, stages, unread_metrics = read_run(out)
    token_rows, unread_tokens = read_rows(out / "tokens.jsonl")
    pairs = []
    for number, row in enumerate(token_rows, 1):
        try:
            pairs.append(read_pair(number, row))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            unread_tokens += 1

    classes, symbol = answer.classes_of(pairs, loss == "tgdpo"), SYMBOLS[loss]
    pieces, records = embedded_pairs(pairs, classes)
    notes = [
        f"{count} line(s) of {file} could not be read and are left out."
        for file, count in (("metrics.jsonl", unread_metrics), ("tokens.jsonl", unread_tokens))
        if count
    ]
    if pairs and not with_recorded(pairs, "reward"):
        notes.append("tokens.jsonl holds no rewards, so the page shows no colours and nothing of what moved.")
    if len(records) < len(pairs):
        held = f"Token by token the page holds {len(records)} of the {len(pairs)} pairs"
        notes.append(held + "; its statistics are over all of them.")
    samples = [
        {clipped(str(key), 60): clipped(value) for key, value in row.items() if isinstance(value, str)}
        for row in read_json(out / "samples.json", list)[:MOST_SAMPLES]
        if isinstance(row, dict)
    ]
    first = {"name": name, "about": about, "notes": notes, "answer": answer.answer(run, config, loss, stages, classes)}
    tokens = {
        "symbol": symbol,
        "meaning": meaning(loss, config),
        "colours": colours_of(pairs, symbol),
        "pieces": pieces,
    }
    tokens |= {"pairs": records, "classes": classes, "moved": moved_section(pairs, symbol)}
    last = {"samples": samples, "growth": growth(out)}
    last["tables"] = run_tables(name, run, config, read_rows(out / "dropped.jsonl")[0])
    last["command"] = clipped(run["command"]) if isinstance(run.get("command"), str) else ""
    return first | tokens | {"curves": curves(stages)} | last


def meaning(loss, config):
    """What the tokens' numbers are, of a run with these settings."""
    text, parts = MEANINGS[loss], [part.partition("=")[0] for part in parts_of(config)]
    if loss == "tgdpo" and config.get("centre_guidance") is True:
        text = text.replace("token reward;", "token reward less its mean under the reference at that state;")
    if loss == "tgdpo" and "clip" in parts:
        text += " In f, but not in the r̂ shown, log π_guide/π_ref is clamped (clip)."
    return text


def growth(out):
    """samples.jsonl by prompt: [{prompt, answers: [[step, answer]]}]. A resumed run answers again: the last counts."""
    found = {}
    for row in read_rows(out / "samples.jsonl")[0]:
        prompt, text, step = map(row.get, ("prompt", "answer", "step"))
        if isinstance(prompt, str) and isinstance(text, str) and number_of(step) is not None:
            found.setdefault(prompt, {})[step] = clipped(text)
    return [{"prompt": clipped(p), "answers": sorted(by.items())} for p, by in list(found.items())[:MOST_SAMPLES]]


def compared(outs):
    """Everything the page says of several run directories, alike: the last stage of each on the same axes."""
    runs = [read_run(out) for out in outs]
    twice = len({run.name for run in runs}) < len(runs)
    names = {visible(str(out)) if twice else run.name: run for out, run in zip(outs, runs)}
    lines = [(name, run.stages[-1]["rows"]) for name, run in names.items() if run.stages]
    settings = {key: [run.config.get(key) for run in names.values()] for run in runs for key in run.config}
    rows = [[key, *values] for key, values in settings.items() if any(value != values[0] for value in values)]
    tables = final_table({name: run.run for name, run in names.items()})
    tables += [table("settings", "Settings that differ", ["", *names], rows)] if rows else []
    words = [(f"{name}:", run.about) for name, run in names.items()]
    first = {"title": "The runs", "words": words, "picture": "The last stage of each, against steps"}
    more = {"answer": first | {"charts": together(lines)}, "curves": together(lines, rest=True), "tables": tables}
    return {"name": f"{len(names)} runs compared", "about": "", "notes": []} | more


def page(data):
    """The HTML of the report. Its own script and style are the only ones its content policy lets run."""
    read = lambda *names: "".join((HERE / name).read_text(encoding="utf-8") for name in names)
    style, script = read("uPlot.min.css", "page.css"), read("uPlot.iife.min.js", "page.js")
    allowed = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed[0]}'; style-src 'sha256-{allowed[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "TITLE": html.escape(data["name"]), "STYLE": style, "SCRIPT": script}
    parts["DATA"] = embedded(data)
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match.group(1)], read("page.html"))


def write(out, output=None):
    """Makes the page of the run directory `out` at `output` (default OUT/report.html); returns its path.

    FileNotFoundError where `out` is no directory, OSError where the page cannot be written."""
    return replace(output or pathlib.Path(out) / "report.html", page(gather(pathlib.Path(out))))


def replace(output, text):
    """Writes the text beside its place and renames it, so that a browser never sees half of it."""
    output = pathlib.Path(output)
    part = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, output)
    except OSError as error:
        error.filename = error.filename or str(output)  # which a full disk leaves out
        raise
    finally:
        part.unlink(missing_ok=True)
    return output


def main(argv=None):
    """The command. Exit status 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="report.py", description="Makes the report page of a run, or of several.")
    parser.add_argument("out", nargs="+", help="a run's output directory; of several, the page compares them")
    parser.add_argument("--to", "--output", metavar="FILE", help="where to write it [OUT/report.html or compare.html]")
    options = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be text
    try:
        if len(options.out) == 1:
            print(write(options.out[0], options.to))
        else:
            print(replace(options.to or "compare.html", page(compared([*map(pathlib.Path, options.out)]))))
    except OSError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
