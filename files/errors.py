"""What is wrong with what the program was given: one exception, and words that fit a line."""

import contextlib


class BadInput(ValueError):
    """Input that cannot be used: what, where and the mend in one line (bad rows: a line each). Exit status 2."""


class BadRow(BadInput):
    """A row that cannot be read: "kind: detail". File and row are added where they are known."""


@contextlib.contextmanager
def naming(path):
    """An OSError of the block, such as a full disk's, names the file that it was about."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def brief(text):
    """What strangers wrote, as one printable line of 200 characters at most."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[:1000]).split())
    return line if len(line) <= 200 else line[:197] + "..."


def some(names):
    """The first five of a list in words."""
    words = [brief(name) for name in list(names)[:5]]
    if len(names) > 5:
        words[-1] += f" and {len(names) - 5} more"
    return ", ".join(words) or "none"
