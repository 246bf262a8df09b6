"""What a run tells while it goes on: lines, and a progress bar where there is a terminal."""

import contextlib
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


def shown(row):
    """What of a row of metrics is shown while a run goes on: of margin and accuracy plain DPO's, where there is one."""
    names = ("loss", "margin", "accuracy", "tokens_per_second", "mfu")
    return {name: row.get(f"dpo_{name}", row[name]) for name in names if name in row}


def words(figures):
    """Figures of a step in words: {"loss": 0.69, "accuracy": 0.5} -> "loss 0.6900  accuracy 50.0%"."""
    spelled = {"accuracy": "accuracy {:.1%}", "mfu": "mfu {:.1%}", "tokens_per_second": "{:,.0f} tok/s"}
    return "  ".join(spelled.get(name, name + " {:.4f}").format(value) for name, value in figures.items())


class Progress:
    """Shows how far some work has come: as a bar where rank 0 has a terminal, else as a plain line now and then.

    total: the units of work. title: what stands before them. start: the units that an earlier run has done. side_job:
    such work (an evaluation) comes often and ends soon, so no plain line is printed in its first SHORT seconds."""

    def __init__(self, total, title, rank=0, start=0, side_job=False):
        self.total, self.title, self.rank, self.start, self.side_job = total, title, rank, start, side_job
        self.done, self.figures, self.bar = start, {}, None
        self.began = self.told = time.monotonic()  # told: when the last plain line was printed,
        self.told_at = None  # and what was done then
        if rank == 0 and sys.stderr is not None and sys.stderr.isatty():
            shape = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}"
            self.bar = tqdm.tqdm(
                total=total, desc=title, initial=start, dynamic_ncols=True, leave=not side_job, bar_format=shape
            )
            if self.bar.ncols is not None and self.bar.ncols < 1:  # a terminal that does not know its size
                self.bar.dynamic_ncols, self.bar.ncols, self.bar.nrows = None, 80, None

    def advance(self, count=1, **figures):
        """`count` more units are done. figures: shown beside them, {name: number} as in `words`."""
        count = min(count, self.total - self.done)
        self.done += count
        self.figures = figures or self.figures
        if self.bar is not None:
            self.bar.set_postfix_str(words(self.figures), refresh=False)
            self.bar.update(count)
        elif not self.side_job or time.monotonic() - self.began >= SHORT:
            waited = time.monotonic() - self.told
            far = waited >= OFTEN and self.done - (self.told_at or 0) >= TENTH * self.total
            if self.told_at is None or far or self.done == self.total or waited >= SELDOM:
                self._tell()

    def _tell(self):
        self.told, self.told_at, left = time.monotonic(), self.done, ""
        if self.start < self.done < self.total:
            seconds = round((self.told - self.began) / (self.done - self.start) * (self.total - self.done))
            left = f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        say(f"{self.title} {self.done}/{self.total}  {words(self.figures)}".rstrip() + left, self.rank)

    def close(self):
        """Ends the bar, or prints the last line where it is not yet printed."""
        if self.bar is not None:
            self.bar.close()
        elif self.told_at != self.done and not (self.side_job and self.told_at is None):
            self._tell()
