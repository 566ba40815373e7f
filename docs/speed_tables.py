"""Fill the tables of speed in README.md and docs/benchmarks.md from the reports that they name.

    python docs/speed_tables.py

Each such table follows a link to a report of benchmark.py, "](... .json):". Its rows say what to
look up: pattern, step and backend; its columns are grids.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# The repository, wherever this is called from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import masks
import utils

DOCUMENTS = (utils.REPOSITORY / "README.md", utils.REPOSITORY / "docs" / "benchmarks.md")
TABLE = re.compile(
    r"\]\((?P<report>[^)]*/benchmark/\w+\.json)\):\n\n"
    r"\| pattern \| step \| neighbors \| backend \| (?P<grids>.*) \|\n"
    r"\|[-|]+\|\n(?P<rows>(?:\|.*\n)+)"
)


def fill_tables(text: str) -> str:
    """The text of a document, its tables with the numbers of their reports."""
    return TABLE.sub(_fill_table, text)


def _fill_table(table: re.Match) -> str:
    report = utils.read_json(utils.REPOSITORY / table["report"].removeprefix("../"))
    measured = {
        (row["grid"], row["mask_type"], row["expansion_step"], row["backend"]): row["speedup"]
        for row in report["rows"]
    }
    grids = [int(grid.split("×")[0]) for grid in table["grids"].split(" | ")]

    rows = []
    for line in table["rows"].splitlines():
        pattern, step, _, backend, *_ = line.strip("| ").split(" | ")
        spec = masks.MaskSpec(pattern.strip("`"), None if step == "–" else int(step))
        neighbors = "all" if step == "–" else str(spec.num_neighbors(grids[0], grids[0]))
        key = (spec.mask_type, spec.expansion_step, backend)
        cells = [format_quartiles(measured[(grid, *key)]) for grid in grids]
        rows.append(f"| {' | '.join([pattern, step, neighbors, backend, *cells])} |\n")
    return table[0].removesuffix(table["rows"]) + "".join(rows)


def format_quartiles(values: dict[str, float]) -> str:
    """Three digits: 7.29 (7.25–7.33), 25.8 (23.7–28.1), 381 (325–407)."""

    def three_digits(value: float) -> str:
        decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
        return f"{value:.{decimals}f}"

    median, low, high = (three_digits(values[key]) for key in ("median", "q1", "q3"))
    return f"{median} ({low}–{high})"


if __name__ == "__main__":
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        utils.write_text(document, fill_tables(text))
