"""A user's own text (the name of a run, of a dataset) made fit for a line, a picture or Markdown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def one_line(text: str) -> str:
    """The text with an escape, such as `\\n`, for each character that would break the line or not be seen.

    These are line breaks, tabs and other control characters, marks that turn the direction of writing, and bytes of a
    file name that are no text.
    """
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":  # spaces of other widths
        return " "
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def labels(texts: Sequence[str], width: int) -> list[str]:
    """The texts as pictures show them: on one line, of `width` columns at most, wider where two would look the same."""
    texts = [one_line(text) for text in texts]
    while len({shorten(text, width) for text in texts}) < len(set(texts)):
        width += 8
    # matplotlib leaves labels that begin with an underscore out of the legend: a space of no width goes before it.
    return ["\u200b" * text.startswith("_") + shorten(text, width) for text in texts]


def label(text: str, width: int) -> str:
    return labels([text], width)[0]


def shorten(text: str, width: int) -> str:
    """The text, or its beginning and end with `…` between; a Chinese character takes two columns."""
    if num_columns(text) <= width:
        return text
    start, end = text[: (width + 1) // 2], text[-(width // 2) :]
    while num_columns(start) + 1 + num_columns(end) > width:
        if num_columns(start) >= num_columns(end):
            start = start[:-1]
        else:
            end = end[1:]
    return f"{start}…{end}"


def num_columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(text: str) -> str:
    """The text on one line, escaped so that Markdown shows it as it is, in a table as well."""
    # An underscore between letters or digits is one already.
    return re.sub(r"[\\`*|<\[\]~&$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))


def code(text: str) -> str:
    """The text on one line as Markdown's code: between more backticks than it has in a row."""
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"
