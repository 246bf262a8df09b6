"""The parts of neighbouring losses that --with composes, one row each: what options, --help and the step must know.

A part on paper becomes its function in neighbours/parts.py, a row here and its tests. Nothing here needs torch.
"""

import difflib
import math
from typing import NamedTuple

from files.errors import BadInput
from runtime.losses import LOSSES


class Part(NamedTuple):
    """A part as neighbours.parts.composed calls it: function(*takes, number), without the number where it has none."""

    kind: str  # link, divergence, token weight, offset or term
    function: str  # its name in neighbours/parts.py
    takes: tuple[str, ...]  # by the names in composed
    default: float | None = None  # None: the part has no number
    range: str = ""  # of the number, as mathematics writes an interval
    tgdpo_only: bool = False  # it needs a guide


PARTS = {
    "cdpo": Part("link", "cautious", ("z",), 0.1, "[0, 0.5)"),
    "robust": Part("link", "robust", ("z",), 0.1, "[0, 0.5)"),
    "ipo": Part("link", "identity_link", ("z", "beta")),
    "hinge": Part("link", "hinge", ("z",)),
    "exo": Part("link", "exact_optimisation", ("z",), 0.001, "(0, 0.5)"),
    "alpha-div": Part("divergence", "alpha_divergence", ("total",), 0.5, "(0, 1]"),
    "js": Part("divergence", "jensen_shannon", ("total",)),
    "ld": Part("token weight", "desensitised", ("tokens",), 0.5, "[0, 1]"),
    "decay": Part("token weight", "decayed", ("tokens",), 0.98, "(0, 1]"),
    "norm": Part("token weight", "normalised", ("tokens",)),
    "shift": Part("token weight", "shifted", ("tokens",), 0.95, "(0, 1]"),
    "clip": Part("token weight", "clipped", ("x", "alpha", "guide_beta"), 1.5, "(0, inf)", tgdpo_only=True),
    "select": Part("token weight", "selected", ("x", "tokens"), 0.3, "(0, 1]", tgdpo_only=True),
    "length": Part("offset", "length_offset", ("tokens",), 0.01, "[0, inf)"),
    "dpop": Part("offset", "positive_offset", ("logratio", "beta"), 50.0, "[0, inf)"),
    "target": Part("offset", "target_offset", (), 0.5, "[0, inf)"),
    "nll": Part("term", "likelihood_term", ("policy", "tokens"), 0.2, "[0, inf)"),
}


def read(words, where="--with"):
    """("ld=0.5", "robust") -> {"ld": 0.5, "robust": 0.1}, defaults filled in; None for a part without a number.

    where: what the error begins with. Raises BadInput, which names the parts and the number as typed."""
    found = {}
    for word in words or ():
        name, equals, text = word.partition("=")
        if name not in PARTS:
            near = difflib.get_close_matches(name, list(PARTS), n=1, cutoff=0.0)[0]
            raise BadInput(f"{where}: there is no part {name!r}; the nearest is {near}")
        part = PARTS[name]
        if name in found:
            raise BadInput(f"{where}: {name} is given twice; give it once")
        if equals and part.default is None:
            raise BadInput(f"{where}: {word!r}: {name} takes no number; write {name} alone")
        found[name] = number_of(word, text, part, where) if equals else part.default
    for kind in ("link", "divergence"):
        same = [name for name in found if PARTS[name].kind == kind]
        if len(same) > 1:
            raise BadInput(f"{where}: {' and '.join(same)} are both a {kind}; give one")
    return found


def number_of(word, text, part, where):
    """The number of a part, within its range."""
    try:
        number = float(text)
    except ValueError:
        raise BadInput(f"{where}: {word!r}: {text!r} is no number; it must lie in {part.range}") from None
    low, high = map(float, part.range[1:-1].split(","))
    above = number >= low if part.range[0] == "[" else number > low
    below = number <= high if part.range[-1] == "]" else number < high
    if not math.isfinite(number) or not above or not below:
        raise BadInput(f"{where}: {word!r}: {text} is out of range; it must be a finite number in {part.range}")
    return number


def refuse_without_guide(words, loss, where="--with"):
    """Raises BadInput where a loss without a guide is to have a part that needs one."""
    if "guide" not in LOSSES[loss].tensors and (
        needy := [name for name in read(words, where) if PARTS[name].tgdpo_only]
    ):
        raise BadInput(f"{where}: {' and '.join(needy)}: --loss {loss} has no guide for it; leave it out")
