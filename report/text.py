"""Text as the page shows it: nothing hidden, nothing endless."""

import json
import re
import unicodedata

MOST_TEXT = 4_000  # characters of a prompt or an answer that the page carries
# Printable by category, and yet nothing is seen of them: Unicode's Default_Ignorable_Code_Point, and a blank.
UNSEEN = {*map(ord, "\u2800\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")}
UNSEEN |= {*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}


def visible(text):
    """text with every character that cannot be seen or that turns the text around spelled as ⟨U+202E⟩.

    Spaces, line feeds and tabs stay (the page marks them). Controls, bidi marks, surrogates, unassigned and
    private characters, odd spaces and ignorable ones do not. A combining mark in front gets a dotted circle.
    """

    def spell(match):
        mark, before = match.group(), match.string[match.start() - 1 : match.start()]
        if mark == "\ufe0f" and before and unicodedata.category(before)[0] == "S":  # an emoji's colour: ❤️
            return mark
        return mark if mark.isprintable() and ord(mark) not in UNSEEN else f"⟨U+{ord(mark):04X}⟩"

    if not text.isascii() or not text.isprintable():
        text = re.sub(r"[^\n\t -~]", spell, text)
    return "◌" + text if text and unicodedata.category(text[0])[0] == "M" else text


def clipped(text, most=MOST_TEXT):
    """visible(text), without the middle of an over-long one: what a model answers stands at the end."""
    if len(text) > most:
        left = len(text) - most
        text = f"{text[: most // 2]}\n[… {left:,} characters left out …]\n{text[-(most - most // 2) :]}"
    return visible(text)


def written(value):
    """A setting or a count as text for a table cell."""
    text = "–" if value is None else f"{value:.6g}" if isinstance(value, float) else value
    return clipped(text if isinstance(text, str) else json.dumps(text, default=str, ensure_ascii=False))


def signed(value):
    """Three significant digits with the sign, or a dash."""
    return "–" if value is None else f"{value:+.3g}".replace("-", "−")
