"""The report page of a run, finished or still running: one HTML file that needs no network.

    python report/report.py OUT [--to FILE]                the page of a run, OUT/report.html
    python report/report.py OUT1 OUT2 … [--to FILE]        several runs on the same axes, compare.html

It shows what there is of a run's metrics.jsonl, config.toml, tokens.jsonl, samples.json, samples.jsonl, dropped.jsonl
and run.json: each may be missing or half written. Here stands what the page says, in answer.py what it says first, in
figures.py its charts; page.html, page.css and page.js are how it looks. What a model or a stranger wrote travels as
JSON and reaches the page as text nodes, its unseen characters spelled out (text.py).
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

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # as a command: the folder above is where `report` is found
from report import answer
from report.figures import NAMES, SIDES, curves, gathered, moved_section, number_of, stages_of, together, with_recorded
from report.text import clipped, visible, written

# What the page carries at most, so that it opens on a phone; its statistics are over everything.
MOST_TOKENS, MOST_SAMPLES = 200_000, 40
# What tokens.jsonl holds of a token: log-probabilities, r̂ with a guide, else the policy's implicit reward, the weight,
# log π/π_ref of the policy. The run evaluated them; the page draws and counts them.
NUMBERS = ("ref", "guide", "policy", "reward", "f", "moved")
SYMBOLS = {"tgdpo": "r̂", "dpo": "β log π/π_ref", "simpo": "β/|y| log π"}
MEANINGS = {
    "tgdpo": "r̂ is the guide's token reward; the weight f is 1 + α r̂ in the chosen response, 1 − α r̂ in the rejected.",
    "dpo": "Without a guide every weight is 1; shown is the policy's implicit reward.",
    "simpo": "Shown is each token's part of SimPO's reward; SimPO has no reference and no weights.",
}
COUNTS = {"rows": "rows read", "kept": "pairs kept", "cut": "responses cut at their end", "dropped": "rows dropped"}
COUNTS["boundary"] = "responses tokenised apart from the prompt"

# A row of tokens.jsonl: its line from 1; of each response the tokens, T strings, and of NUMBERS what is recorded, [T]
# float32; the summed reward, chosen less rejected; the policy's plain and its optimised margin. None: not recorded.
Pair = collections.namedtuple("Pair", "number source prompt chosen rejected margin dpo_margin phi")
# Its name, the line under it, config.toml, run.json, the loss, of MEANINGS, stages_of, unread lines of metrics.jsonl.
Run = collections.namedtuple("Run", "name about config run loss meaning stages unread")


def content(path):
    """The bytes of a file; none where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def parsed(text, kind=dict):
    """What the JSON text holds if it is a `kind` (dict or list), else an empty one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def read_rows(path):
    """The objects of a .jsonl file and the number of lines that hold none. Missing: ([], 0)."""
    lines = [line for line in content(path).split(b"\n") if line.strip()]
    rows = [row for row in map(parsed, lines) if row]
    return rows, len(lines) - len(rows)


def read_config(path):
    """config.toml as a flat dict, dashes as underscores; of a half-written file what precedes the cut."""
    lines = content(path).decode(errors="replace").splitlines()
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


def read_pair(number, row):
    """A row of tokens.jsonl -> Pair. ValueError, KeyError or TypeError where the row is not whole."""
    sides = []
    for tokens, record in ((row[side]["tokens"], row[side]) for side in SIDES):
        numbers = {name: np.array(record[name], np.float64) for name in NUMBERS if record.get(name) is not None}
        whole = all(values.shape == (len(tokens),) and (abs(values) < 1e6).all() for values in numbers.values())
        if not tokens or not whole or not all(isinstance(token, str) for token in tokens):
            raise ValueError("tokens must be strings, with a finite number each")
        sides.append({"tokens": list(tokens)} | {name: values.astype(np.float32) for name, values in numbers.items()})
    texts = (str(row.get(key, "")) for key in ("source", "prompt"))
    totals = (number_of(row.get(key)) for key in ("margin", "dpo_margin", "phi"))
    return Pair(number, *texts, *sides, *totals)


def embedded_pairs(pairs, classes):
    """(pieces, pairs) for the page: tokens as places in a list of distinct pieces, these and the numbers in base64,
    exact and half as long as digits. Pairs of the first two classes come first when MOST_TOKENS has no room for all."""
    packed = lambda values: base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
    listed = {number for each in classes[:2] for number in each["pairs"]}
    room, pieces, records = MOST_TOKENS, {}, []
    for pair in sorted(pairs, key=lambda pair: pair.number not in listed):
        if (length := len(pair.chosen["tokens"]) + len(pair.rejected["tokens"])) > room:
            continue
        room -= length
        record = {key: getattr(pair, key) for key in ("number", "margin", "dpo_margin", "phi")}
        record |= {"source": clipped(pair.source, 300), "prompt": clipped(pair.prompt)}
        for side in SIDES:
            response = getattr(pair, side)
            places = [pieces.setdefault(visible(token), len(pieces)) for token in response["tokens"]]
            record[side] = {name: packed(values) for name, values in (response | {"tokens": places}).items()}
        records.append(record)
    return list(pieces), sorted(records, key=lambda record: record["number"])


def colours_of(pairs, symbol):
    """What the tokens may be coloured by, of what is recorded: list of {key, name, middle, scale}. scale: the 98 %
    quantile of the distance from the middle, over all tokens; 1 where there is none."""
    colours = []
    for key, name, middle in (("reward", symbol, 0), ("f", "weight f", 1), ("moved", "log π/π_ref", 0)):
        if values := gathered(with_recorded(pairs, key), key):
            scale = float(np.quantile(abs(np.concatenate(values) - middle), 0.98))
            colours.append({"key": key, "name": name, "middle": middle, "scale": scale or 1.0})
    return colours


def table(name, title, columns, rows, opened=True):
    """[a table of text for the page], or [] where it has no rows."""
    columns, rows = [visible(str(c)) for c in columns], [[written(cell) for cell in row] for row in rows]
    return [{"id": name, "title": title, "open": opened, "columns": columns, "rows": rows}] if rows else []


def final_table(named):
    """[the table of final figures] of {name: run.json}, or []. Several runs: a column of names first."""
    rows = []
    for name, run in named.items():
        found = run["table"] if isinstance(run.get("table"), list) else []
        rows += [{"run": name} | row if len(named) > 1 else row for row in found if isinstance(row, dict)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in map(row.get, columns)] for row in rows]
    return table("evaluation", "Final evaluation", [c.replace("_", " ") for c in columns], cells)


def run_tables(name, run, config, dropped):
    """The tables of what the run was: final figures, data, machine, settings, as far as they are known."""
    part = lambda key: run[key] if isinstance(run.get(key), dict) else {}
    counts = {name: flatten(value) for name, value in part("data").items() if isinstance(value, dict)}
    keys = dict.fromkeys(key for value in counts.values() for key in value)
    data = [[COUNTS.get(key, key.replace("_", " ")), *(c.get(key) for c in counts.values())] for key in keys]
    # "prompt too long: 3004 tokens, at most 1800": what stands before the colon is the kind
    reasons = collections.Counter(str(row.get("reason", "?")).split(":")[0] for row in dropped).most_common()
    machine = [*flatten(part("machine")).items(), *flatten(part("versions")).items()]
    tables = final_table({name: run}) + table("data", "Data", ["", *counts], data)
    tables += table("reasons", "Dropped rows, by reason (dropped.jsonl has each)", ["", ""], reasons)
    tables += table("machine", "Machine and versions", ["", ""], machine)
    return tables + table("settings", "Settings", ["", ""], config.items(), opened=False)


def read_run(out):
    """The Run of a directory. FileNotFoundError where it is none."""
    if not out.is_dir():
        raise FileNotFoundError(f"{out} is no directory; give a run's output directory")
    rows, unread = read_rows(out / "metrics.jsonl")
    config, run = read_config(out / "config.toml"), parsed(content(out / "run.json"))
    loss = str(config.get("loss") or (rows and rows[-1].get("stage")))
    loss = loss if loss in NAMES else "tgdpo"
    stages, meaning = stages_of(rows, loss), MEANINGS[loss]
    centred, parts = config.get("centre_guidance") is True, config.get("with")
    parts = [clipped(part) for part in parts if isinstance(part, str)] if isinstance(parts, list) else []
    if loss == "tgdpo" and centred:
        meaning = meaning.replace("token reward;", "token reward less its mean under the reference at that state;")
    if loss == "tgdpo" and "clip" in [part.partition("=")[0] for part in parts]:
        meaning += " In f, but not in the r̂ shown, log π_guide/π_ref is clamped (clip)."
    settings = [f"{sign} {written(config[key])}" for key, sign in (("beta", "β"), ("alpha", "α")) if key in config]
    settings += [f"parts {' '.join(parts)}"] * bool(parts) + ["centred guidance"] * centred
    settings += [f"adapters of rank {written(config['lora_rank'])}"] if config.get("lora_rank") else []
    about = [" with ".join([NAMES[loss], *[", ".join(settings)] * bool(settings)])]
    about += [f"from {clipped(str(config['model']), 120)}"] if config.get("model") else []
    if stages:
        about.append(f"{stages[-1]['title']}, step {stages[-1]['rows'][-1]['step']:g}")
        stamp = time.gmtime((out / "metrics.jsonl").stat().st_mtime)
        about.append("last written " + time.strftime("%Y-%m-%d %H:%M UTC", stamp))
    return Run(visible(out.resolve().name), " · ".join(about), config, run, loss, meaning, stages, unread)


def gather(out):
    """Everything the page says of a run directory, as one JSON-ready dict."""
    name, about, config, run, loss, meaning, stages, unread_metrics = read_run(out)
    token_rows, unread_tokens = read_rows(out / "tokens.jsonl")
    pairs = []
    for number, row in enumerate(token_rows, 1):
        try:
            pairs.append(read_pair(number, row))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            unread_tokens += 1
    classes, symbol = answer.classes_of(pairs, loss == "tgdpo"), SYMBOLS[loss]
    moved, (pieces, records) = moved_section(pairs, symbol), embedded_pairs(pairs, classes)
    unread = {"metrics.jsonl": unread_metrics, "tokens.jsonl": unread_tokens}
    notes = [f"{n} line(s) of {file} could not be read and are left out." for file, n in unread.items() if n]
    if pairs and not moved:
        notes.append("tokens.jsonl holds no rewards, so the page shows no colours and nothing of what moved.")
    if len(records) < len(pairs):
        held = f"Token by token the page holds {len(records)} of the {len(pairs)} pairs"
        notes.append(held + "; its statistics are over all of them.")
    rows = [row for row in parsed(content(out / "samples.json"), list)[:MOST_SAMPLES] if isinstance(row, dict)]
    first = {"name": name, "about": about, "notes": notes, "answer": answer.answer(run, config, loss, stages, classes)}
    tokens = {"symbol": symbol, "meaning": meaning, "colours": colours_of(pairs, symbol), "pieces": pieces}
    tokens |= {"pairs": records, "classes": classes, "moved": moved, "curves": curves(stages)}
    last = {"samples": [{clipped(k, 60): clipped(v) for k, v in row.items() if isinstance(v, str)} for row in rows]}
    last |= {"growth": growth(out), "tables": run_tables(name, run, config, read_rows(out / "dropped.jsonl")[0])}
    return first | tokens | last | {"command": clipped(run["command"]) if isinstance(run.get("command"), str) else ""}


def growth(out):
    """samples.jsonl by prompt: [{prompt, answers: [[step, answer]]}]. A resumed run answers again: the last counts."""
    found = {}
    for row in read_rows(out / "samples.jsonl")[0]:
        prompt, text, step = map(row.get, ("prompt", "answer", "step"))
        if isinstance(prompt, str) and isinstance(text, str) and number_of(step) is not None:
            found.setdefault(prompt, {})[step] = clipped(text)
    return [{"prompt": clipped(p), "answers": sorted(by.items())} for p, by in list(found.items())[:MOST_SAMPLES]]


def compared(outs):
    """What the page says of several run directories, as of one: the last stage of each on the same axes."""
    runs = [read_run(out) for out in outs]
    twice = len({run.name for run in runs}) < len(runs)
    names = {visible(str(out)) if twice else run.name: run for out, run in zip(outs, runs)}
    lines = [(name, run.stages[-1]["rows"]) for name, run in names.items() if run.stages]
    settings = {key: [run.config.get(key) for run in names.values()] for run in runs for key in run.config}
    rows = [[key, *values] for key, values in settings.items() if any(value != values[0] for value in values)]
    tables = final_table({name: run.run for name, run in names.items()})
    tables += table("settings", "Settings that differ", ["", *names], rows)
    first = {"title": "The runs", "picture": "The last stage of each, against steps", "charts": together(lines)}
    first["words"] = [(f"{name}:", run.about) for name, run in names.items()]
    more = {"answer": first, "curves": together(lines, rest=True), "tables": tables}
    empty = {"notes": [], "pairs": [], "samples": [], "growth": []}
    return {"name": f"{len(names)} runs compared", "about": ""} | more | empty


def page(data):
    """The HTML of the report. Its own script and style are the only ones its content policy lets run."""
    read = lambda *names: "".join((HERE / name).read_text(encoding="utf-8") for name in names)
    parts = {"STYLE": read("uPlot.min.css", "page.css"), "SCRIPT": read("uPlot.iife.min.js", "page.js")}
    hashed = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    parts |= {f"{key}_HASH": hashed(text) for key, text in parts.items()}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII, and below no character that HTML reads
    parts["DATA"] = re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)
    parts["TITLE"] = html.escape(data["name"])
    return re.sub(r"\{\{([A-Z_]+)\}\}", lambda match: parts[match[1]], read("page.html"))


def write(*outs, to=None):
    """Makes the page of a run directory, OUT/report.html, or of several, compare.html, or at `to`; returns its path.
    Renamed when it is whole, so that a browser never sees half of it. OSError where it cannot be written, of it
    FileNotFoundError where there is no such directory."""
    outs = [pathlib.Path(out) for out in outs]
    text = page(gather(outs[0]) if len(outs) == 1 else compared(outs))
    output = pathlib.Path(to or (outs[0] / "report.html" if len(outs) == 1 else "compare.html"))
    part = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, output)
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
        print(write(*options.out, to=options.to))
    except OSError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
