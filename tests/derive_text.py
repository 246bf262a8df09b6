"""derive.md as the tests read it: its text by label, and a check that a number stands in it as computed."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "derive.md").read_text(encoding="utf-8")


def sections():
    """{label: heading and text of the step}, in the order of the page. A step ends at the next heading."""
    steps = re.split(r"^(?=#)", TEXT, flags=re.MULTILINE)
    return {m[1]: step for step in steps if (m := re.match(r"#+ (D\d+)\. ", step))}


def quoted(label, value, digits=4):
    """The step's text gives this value, rounded to so many digits; returns the value."""
    number = f"{float(value):.{digits}f}"
    found = re.search(rf"(?<![\d.-]){re.escape(number)}(?!\d)", sections()[label])
    assert found, f"{label} does not say {number}"
    return value
