"""metrics.jsonl and samples.jsonl: one JSON object a line, written by rank 0 alone."""

import json
import math
import os

from files.errors import naming
from runtime import outdir
from runtime.disk import fsync, stands, whole
from runtime.progress import say


class Metrics:
    """The file at `path`; sinks, where given, gets each row too."""

    def __init__(self, path, rank=0, sinks=None):
        self.path, self.rank, self.sinks = path, rank, sinks

    def write(self, row):
        """Appends {name: value}. A figure that is not finite becomes null: NaN and Infinity are no JSON."""
        if self.rank:
            return
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
        for name, value in plain.items():
            if isinstance(value, float) and not math.isfinite(value):
                plain[name] = None
        outdir.check(os.path.dirname(self.path))
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain, allow_nan=False) + "\n")
        if self.sinks:
            self.sinks.write(plain)

    def sync(self):
        """Waits until all rows are on the disk: before a checkpoint that they belong to."""
        if not self.rank and stands(self.path):
            fsync(self.path)
            fsync(os.path.dirname(os.path.abspath(self.path)))

    def keep_until(self, stage, step):
        """Before `stage` goes on after `step`: removes what an earlier run wrote beyond it, so that the file
        ends up as if the run had never stopped. The evaluation of `step` itself and its samples go too, since they
        follow the checkpoint and are done again."""
        if self.rank or not stands(self.path):
            return
        kept, damaged = [], 0
        with open(self.path, "rb") as file:
            lines = file.readlines()
        for line in lines:
            row = _row(line)
            if row is None:
                damaged += line.endswith(b"\n")  # else a kill cut it short, as happens
            elif row["stage"] == stage and row["step"] >= step + (not row.get("eval") and "answer" not in row):
                break
            else:
                kept.append(line)
        if damaged:
            say(f"{self.path}: {damaged} damaged lines are left out")
        if kept != lines:
            with whole(self.path) as unfinished, open(unfinished, "wb") as file:
                file.writelines(kept)


def rows_of(path):
    """The rows of such a file, [] where there is none."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        return [row for row in map(_row, file) if row is not None]


def _row(line):
    """The row of a line; None where a kill or a full disk cut it short."""
    try:
        row = json.loads(line)
        return row if line.endswith(b"\n") and isinstance(row["stage"], str) and isinstance(row["step"], int) else None
    except (ValueError, LookupError, TypeError):
        return None
