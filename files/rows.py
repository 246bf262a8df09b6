"""Rows out of the files that strangers made: .jsonl, .json and .parquet, with what is wrong with each in one line."""

import collections
import gzip
import json
import stat
import zlib

from files.errors import BadInput, BadRow, brief

BATCH = 512  # rows of a parquet file that are decoded at a time
LINE = 1 << 28  # bytes of the longest line that is read: a row of a quarter of a gigabyte
UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0[")  # how text that is not UTF-8 begins
OBJECT = 1 << 26  # bytes of a JSON object beside a model


def open_file(path, most=None):
    """Opens a regular file of bytes, of `most` bytes at most; BadInput says what else stands there."""
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
        regular = stat.S_ISREG(mode)
        file = open(path, "rb") if regular else None
        head = file.peek(64) if regular else b""
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadInput(f"{str(path)!r}: cannot be read: {getattr(error, 'strerror', error)}") from None
    for found, what in (
        (stat.S_ISDIR(mode), "is a directory; name the files in it"),
        (not regular, "is a pipe or a device, not a regular file"),
        (not head, "is empty"),
        (most and size > most, f"has {size / 1e6:.0f} MB, more than such a file ever has"),
        (head.startswith(b"\x1f\x8b") and path.suffix != ".gz", "is compressed with gzip; gunzip it first"),
        (path.suffix == ".gz" and not head.startswith(b"\x1f\x8b"), "is not compressed with gzip, as its name says"),
        (
            head.startswith(b"version https://git-lfs"),
            "is a Git LFS pointer, not the file itself; `git lfs pull` fetches it",
        ),
    ):
        if found:
            raise BadInput(f"{path}: {what}")
    return file


def object_of(members):
    """An object's members as a dict, or the BadRow among them: an unreadable part condemns its row."""
    value = dict(members)
    if len(value) < len(members):
        key, _ = collections.Counter(key for key, _ in members).most_common(1)[0]
        return BadRow(f"duplicate key: {brief(key)!r} stands twice in one object")
    for member in value.values():
        for part in member if isinstance(member, list) else [member]:
            if isinstance(part, BadRow):
                return part
    return value


STRICT = json.JSONDecoder(
    object_pairs_hook=object_of, parse_constant=lambda name: BadRow(f"{name}: is no JSON value; write null")
)


def parse(raw):
    """The value of JSON in UTF-8, or a BadRow that says why there is none."""
    try:
        return STRICT.decode(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return BadRow(f"broken JSON: {error.msg} at {line}column {error.colno}")
    except (RecursionError, ValueError) as error:  # a ValueError is an integer of more than 4300 digits
        return BadRow(f"broken JSON: {brief(error)}")


def read_rows(path):
    """Yields (row, value) of a .jsonl, .json (either with .gz) or .parquet file; the value is a BadRow where it cannot
    be read. Raises BadInput where the file as a whole cannot."""
    try:
        with open_file(path) as file:
            plain = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
            yield from rows_of(path, plain, gzip.open(file) if path.suffix == ".gz" and plain != ".parquet" else file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: is damaged or cut short: {brief(error)}; fetch it anew") from None


def rows_of(path, suffix, file):
    """read_rows of an open file of bytes, decompressed already, by the suffix of its name without .gz."""
    if path.suffix == ".parquet":
        rows = enumerate(parquet_rows(path), 1)
    elif suffix not in (".jsonl", ".json"):
        raise BadInput(f"{path}: unknown suffix {path.suffix!r}; .jsonl, .json and .parquet are read")
    elif file.peek(4).startswith(UTF_16):
        raise BadInput(f"{path}: is UTF-16 or UTF-32 text; save it as UTF-8")
    elif file.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        values = parse(file.read())
        if isinstance(values, BadRow):
            raise BadInput(f"{path}: {values}")
        rows = enumerate(values, 1)
    else:  # a file of bytes splits at newlines only, not at U+2028 as str.splitlines() does
        rows = ((row, line_value(line)) for row, line in enumerate(lines_of(file), 1) if not line or line.strip())
    first = next(rows, None)
    if first is None:
        raise BadInput(f"{path}: has no rows")
    yield first
    yield from rows


def lines_of(file):
    """The lines of a file of bytes; None for one that is longer than LINE, which is passed over."""
    while line := file.readline(LINE):
        if len(line) < LINE or line.endswith(b"\n"):
            yield line
            continue
        del line
        while (rest := file.readline(LINE)) and not rest.endswith(b"\n"):
            pass
        yield None


def line_value(line):
    """The value of a line, or a BadRow."""
    return BadRow(f"too long: the line has more than {LINE >> 20} MiB") if line is None else parse(line.rstrip())


def parquet_rows(path):
    """Yields the rows of a parquet file, for which pyarrow must be there."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path}: needs pyarrow; pip install pyarrow, or convert the file to .jsonl") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(BATCH):
            yield from batch.to_pylist()
    except Exception as error:  # whatever pyarrow raises: for a date beyond Python's it is an OverflowError
        raise BadInput(
            f"{path}: is no parquet file that pyarrow reads into rows: {brief(error)}; a column of another type may "
            "hold what Python has no value for: leave it out"
        ) from None


def read_object(path):
    """The object of a JSON file, or {} where there is no such file."""
    if not path.exists():
        return {}
    with open_file(path, OBJECT) as file:
        value = parse(file.read())
    if not isinstance(value, dict):
        raise BadInput(f"{path}: " + (str(value) if isinstance(value, BadRow) else "must be a JSON object"))
    return value
