"""Fill the tables of results in README.md and experiments/README.md from the reports they name.

    python docs/result_tables.py

Each such table follows a link to a Markdown file in experiments/logs, "](... .md):". Its header
names the columns to take from the first table there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# The repository, wherever this is called from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils

DOCUMENTS = (utils.REPOSITORY / "README.md", utils.REPOSITORY / "experiments" / "README.md")
TABLE = re.compile(
    r"\]\((?:experiments/)?(?P<report>logs/[^)]*\.md)\):\n\n(?P<header>\| mask .*\n)"
    r"(?P<line>\|[-:|]+\|\n)(?P<rows>(?:\|.*\n)+)"
)


def fill_tables(text: str) -> str:
    """The text of a document, its tables with the numbers of their reports."""
    return TABLE.sub(_fill_table, text)


def _fill_table(found: re.Match) -> str:
    report = utils.REPOSITORY / "experiments" / found["report"]
    header, _, *rows = read_table(report.read_text(encoding="utf-8"))
    columns = [header.index(name) for name in cells_of(found["header"])]

    lines = [f"| {' | '.join(row[column] for column in columns)} |\n" for row in rows]
    return found[0].removesuffix(found["rows"]) + "".join(lines)


def read_table(text: str) -> list[list[str]]:
    """The cells of the first table in a text, line by line."""
    lines = text[text.index("| mask ") :].split("\n\n")[0].splitlines()
    return [cells_of(line) for line in lines]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


if __name__ == "__main__":
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        utils.write_text(document, fill_tables(text))
