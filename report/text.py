"""Make text that users chose (names of runs and datasets) safe for a line, a plot or Markdown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence


def one_line(text: str) -> str:
    """Escape (as in `\\n`) every character that would break the line or be invisible.

    These are line breaks, tabs and other control characters, marks that change the direction of
    writing, and the undecodable bytes of a file name.
    """
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":  # spaces of other widths
        return " "
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


# -------------------------------------------------------------------------------------------------
# Plots


def labels(texts: Sequence[str], width: int) -> list[str]:
    """The texts as plots show them: each on one line, shortened to `width` columns.

    The limit grows as far as needed to keep different texts apart.
    """
    texts = [one_line(text) for text in texts]
    while len({shorten(text, width) for text in texts}) < len(set(texts)):
        width += 8

    shown = []
    for text in texts:
        # matplotlib leaves labels that begin with an underscore out of the legend. A zero-width
        # space in front prevents that.
        prefix = "\u200b" if text.startswith("_") else ""
        shown.append(prefix + shorten(text, width))
    return shown


def label(text: str, width: int) -> str:
    return labels([text], width)[0]


def shorten(text: str, width: int) -> str:
    """The text, or its beginning and end joined by `…`; a Chinese character takes two columns."""
    if num_columns(text) <= width:
        return text

    start = text[: (width + 1) // 2]
    end = text[-(width // 2) :]
    while num_columns(start) + 1 + num_columns(end) > width:
        if num_columns(start) >= num_columns(end):
            start = start[:-1]
        else:
            end = end[1:]
    return f"{start}…{end}"


def num_columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


# -------------------------------------------------------------------------------------------------
# Markdown


def markdown(text: str) -> str:
    """The text on one line, escaped so that Markdown shows it literally, even in a table."""
    # An underscore between letters or digits needs no escape.
    special = r"[\\`*|<\[\]~&$]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, r"\\\g<0>", one_line(text))


def markdown_table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; names on the left, numbers aligned right."""
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [titles, rule, *lines])


def code(text: str) -> str:
    """The text on one line as Markdown code, fenced by more backticks than it has in a row."""
    text = one_line(text)
    longest_run = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest_run + 1)
    if longest_run == 0:
        return f"{fence}{text}{fence}"
    return f"{fence} {text} {fence}"
