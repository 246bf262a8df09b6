"""The tables: printed, and kept in RESULTS.md, a section a benchmark."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

PATH = Path(__file__).parent / "RESULTS.md"
PACKAGES = ("torch", "transformers", "trl")


def machine(device="cpu"):
    """The processor, the cores and the versions, in one line; no names of hosts or paths."""
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{_processor()}, {os.cpu_count()} cores"
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return f"{processor}; " + ", ".join(versions)


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(head, rows):
    """A Markdown table. Numbers are given as text already."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def write(section, text, path=PATH):
    """Prints `text` and puts it in place of the section between <!-- section --> and <!-- /section --> of the file."""
    print(text)
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    block = f"{begin}\n{text}\n{end}"
    path = Path(path)
    before = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    after = found.sub(lambda _: block, before) if found.search(before) else f"{before.rstrip()}\n\n{block}\n"
    path.write_text(after, encoding="utf-8")
