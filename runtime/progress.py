"""What a run tells while it goes on: lines, a progress bar where there is a terminal, and metrics.jsonl."""

import contextlib
import json
import math
import os
import sys
import time

import tqdm

TENTH, OFTEN, SELDOM = 0.1, 1.0, 60.0  # a plain line every tenth of the way, 1 to 60 seconds after the last
SHORT = 5.0  # seconds that a side job may take without a plain line


def say(text, rank=0):
    """Prints a line (or several) on rank 0. Control, bidi and other invisible characters are written out, so
    that a stranger's text cannot steer the terminal. A stdout that is closed or full silences the run; it
    never ends it."""
    if rank or sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text = _printable(text).encode(encoding, "backslashreplace").decode(encoding)
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except (OSError, ValueError):
        # What comes later, the flush at exit included, goes nowhere instead of failing again.
        sys.stdout = open(os.devnull, "w")


def tell(text):
    """The same for standard error, on any rank."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be full, closed, or None
        sys.stderr.write(_printable(text).rstrip() + "\n")
        sys.stderr.flush()


def _printable(text):
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


def words(figures):
    """Figures of a step in words: {"loss": 0.69, "accuracy": 0.5} -> "loss 0.6900  accuracy 50.0%"."""
    spelled = {"accuracy": "accuracy {:.1%}", "mfu": "mfu {:.1%}", "tokens_per_second": "{:,.0f} tok/s"}
    return "  ".join(spelled.get(name, name + " {:.4f}").format(value) for name, value in figures.items())


class Progress:
    """How far a stage has come, of `total` units: a bar on rank 0's terminal, or plain lines without one; of a side
    job, which comes often and ends soon, only where it takes longer than SHORT."""

    def __init__(self, total, title, rank=0, start=0, side_job=False):
        self.total, self.title, self.rank, self.start, self.done = total, title, rank, start, start
        self.side_job = side_job
        self.began = self.told = time.monotonic()
        self.told_at, self.figures, self.bar = None, {}, None
        if rank == 0 and sys.stderr is not None and sys.stderr.isatty():
            self.bar = tqdm.tqdm(
                total=total,
                desc=title,
                initial=start,
                dynamic_ncols=True,
                leave=not side_job,
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}",
            )
            # A terminal that does not know its size would show an empty bar.
            if self.bar.ncols is not None and self.bar.ncols < 1:
                self.bar.dynamic_ncols, self.bar.ncols, self.bar.nrows = None, 80, None

    def advance(self, count=1, **figures):
        """`count` more are done; figures are shown beside: loss, margin, accuracy, tokens_per_second, mfu."""
        count = min(count, self.total - self.done)
        self.done += count
        self.figures = figures or self.figures
        if self.bar is not None:
            self.bar.set_postfix_str(words(self.figures), refresh=False)
            self.bar.update(count)
            return
        now = time.monotonic()
        if self.side_job and now - self.began < SHORT:
            return
        first = self.told_at is None
        far = not first and self.done - self.told_at >= TENTH * self.total and now - self.told >= OFTEN
        if first or far or self.done == self.total or now - self.told >= SELDOM:
            self._tell(now)

    def _tell(self, now):
        self.told, self.told_at = now, self.done
        left = ""
        if self.start < self.done < self.total:
            seconds = round((now - self.began) / (self.done - self.start) * (self.total - self.done))
            left = f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        say(f"{self.title} {self.done}/{self.total}  {words(self.figures)}".rstrip() + left, self.rank)

    def close(self):
        """Ends the bar, or prints the last line where it is not yet told."""
        if self.bar is not None:
            self.bar.close()
        elif self.told_at != self.done and not (self.side_job and self.told_at is None):
            self._tell(time.monotonic())


class Metrics:
    """metrics.jsonl: one JSON object a line, written by rank 0 alone."""

    def __init__(self, path, rank=0):
        self.path, self.rank = path, rank

    def write(self, row):
        """Appends {name: value}. A figure that is not finite becomes null: NaN and Infinity are no JSON."""
        if self.rank:
            return
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in plain.items()
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def keep_until(self, stage, step):
        """Before `stage` goes on after `step`: removes what an earlier run wrote beyond it, so that the file
        ends up as if the run had never stopped. The evaluation of `step` itself goes too, since it follows
        the checkpoint and is done again. The file is replaced in one move."""
        if self.rank or not os.path.exists(self.path):
            return
        kept, damaged = [], 0
        with open(self.path, "rb") as file:
            lines = file.readlines()
        for line in lines:
            row = _row(line)
            if row is None:
                damaged += line.endswith(b"\n")  # else a kill cut it short, as happens
            elif row["stage"] == stage and row["step"] >= step + (not row.get("eval")):
                break
            else:
                kept.append(line)
        if damaged:
            say(f"{self.path}: {damaged} damaged lines are left out")
        if kept == lines:
            return
        with open(f"{self.path}.tmp", "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{self.path}.tmp", self.path)


def _row(line):
    """The row of a line; None where a kill or a full disk cut it short."""
    try:
        row = json.loads(line)
        return row if line.endswith(b"\n") and isinstance(row["stage"], str) and isinstance(row["step"], int) else None
    except (ValueError, LookupError, TypeError):
        return None
