"""results.html: the answer, sortable tables, the plots, and the masks to play with, in one file.

The page needs no network and no other file. Imports neither torch nor matplotlib.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path

from report import (
    answer,
    comparison,
    document,
    figures,
    mask_grids,
    plots,
    shapes,
    statistics,
    table,
    text,
)
from report.comparison import AgainstFull, Study
from report.results import Row

MAX_SHEETS = 2  # contact sheets in the page; all of them are beside the runs
MAX_SHEET_BYTES = 2**20

FOLDER = Path(__file__).parent
# What becomes a dash in the address of a section.
NOT_IN_AN_ID = re.compile(r"[^a-z0-9]+")
XML_HEADER = re.compile(r"^.*?(?=<svg)", re.DOTALL)
XML_COMMENT = re.compile(r"<!--.*?-->\s*", re.DOTALL)
XML_METADATA = re.compile(r"<metadata>.*?</metadata>\s*", re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """A plot that has been drawn."""

    name: str
    title: str
    caption: str
    svg: str  # markup, as `inline` gives it


@dataclass
class Section:
    title: str
    pictures: list[Picture] = field(default_factory=list)
    seconds_to: dict | None = None  # as `time_to_reach` gives it
    disagreements: dict | None = None  # as `disagreements` gives it

    @property
    def id(self) -> str:
        return NOT_IN_AN_ID.sub("-", self.title.lower()).strip("-")


def format_page(
    results: Study,
    sections: list[Section],
    differences: list[str],
    command: str,
) -> str:
    """The text of results.html."""
    masks = mask_grids.describe(results)
    rows = results.rows
    contents = [("table", "Results")]
    if results.against_full:
        contents.append(("against-full", "Seed by seed"))
    against_windows = shapes.against_windows(results)
    if against_windows:
        contents.append(("against-windows", "Shapes"))
    contents += [(section.id, section.title) for section in sections]
    if masks is not None:
        contents.append(("masks", "Masks"))

    environment = _make_environment()
    return environment.get_template("page.html").render(
        title=document.title(rows),
        sentences=answer.sentences(results),
        setup=document.describe_setup(rows),
        contents=[*contents, ("notes", "Notes")],
        columns=_columns(rows),
        rows=[_cells(row, number, results) for number, row in enumerate(rows)],
        csv=as_data_link(table.format_csv(results)),
        comparisons=[_seed_by_seed(found) for found in results.against_full.values()],
        comparison_titles=COMPARISONS,
        comparison_note=COMPARISON_NOTE,
        shapes=[
            {"color": color_of(found.row), "cells": shapes.cells(found)}
            for found in against_windows
        ],
        shape_titles=shapes.TITLES,
        shape_heading=shapes.TITLE,
        shape_note=shapes.NOTE,
        sections=sections,
        masks=masks,
        differences=[*differences, *document.findings(results)],
        notes=document.reading_notes(rows),
        provenance=document.describe_provenance(rows),
        command=text.one_line(command),
        css=_trusted("page.css"),
        script=_trusted("page.js"),
    )


def _make_environment():
    import jinja2  # deferred: only the page needs it
    from markupsafe import Markup, escape

    def code(words: str) -> Markup:
        """Escape, and show what stands between backticks as code."""
        return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(words))))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["code"] = code
    return environment


def _trusted(name: str):
    from markupsafe import Markup

    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def as_data_link(csv: str) -> str:
    """A link that holds the text itself; the mark in front tells spreadsheets that it is UTF-8."""
    encoded = base64.b64encode(("\ufeff" + csv).encode("utf-8", "backslashreplace"))
    return f"data:text/csv;charset=utf-8;base64,{encoded.decode()}"


def inline(svg: str):
    """The picture as markup within the page, without what only a file of its own needs.

    matplotlib writes names as outlines of their letters; comments, which repeat them, go.
    """
    from markupsafe import Markup

    svg = XML_HEADER.sub("", svg, count=1)
    return Markup(XML_METADATA.sub("", XML_COMMENT.sub("", svg)))


# -------------------------------------------------------------------------------------------------
# Tables

COMPARISONS = (
    *("mask", "seeds", "differences, points", "mean", "95 % interval, t", "bootstrap"),
    *("p, t test", "p, Holm", "p, permutation", "images/s, × full"),
)
DISAGREEMENTS = (
    *("A", "B", "A, %", "B, %", "A − B, points (95 % interval)", "p, McNemar"),
    *("only A right", "only B right", "same answer, %", "images"),
)
COMPARISON_NOTE = (
    "Each difference is a local run minus the run of full attention with the same seed and the "
    "same settings. The t test takes them as normally distributed. The permutation test assumes "
    "nothing but symmetry and flips their signs, so with n seeds its p is at least 2 / 2ⁿ: 0.25 "
    "with three. Of the three p, only Holm's is corrected for the number of patterns. The "
    "bootstrap interval needs at least "
    f"{statistics.MIN_FOR_BOOTSTRAP} seeds."
)


def color_of(row: Row) -> str:
    return figures.style_of(row.mask.mask_type, family=row.place)["color"]


def _columns(rows: list[Row]) -> list[dict]:
    titles = table.titles(rows, table.COLUMNS)
    return [
        {"title": title, "is_text": column.is_text}
        for title, column in zip(titles, table.COLUMNS, strict=True)
    ]


def _cells(row: Row, number: int, results: Study) -> dict:
    cells = []
    for column in table.COLUMNS:
        cell = column.cell(row, results)
        value = cell.values[0]
        sort = "" if value is None else value
        cells.append({"text": text.one_line(cell.text), "sort": sort, "is_text": column.is_text})
    cells[0]["sort"] = number  # masks are in their natural order, which is not that of letters
    return {"color": color_of(row), "cells": cells}


def _seed_by_seed(found: AgainstFull) -> dict:
    accuracies = found.accuracies

    def interval(value: statistics.Interval | None) -> str:
        return table.MISSING if value is None else comparison.format_interval(value)

    cells = [
        comparison.name_of(found.row),
        ", ".join(map(str, found.seeds)),
        ", ".join(f"{difference:+.2f}" for difference in accuracies.differences),
        f"{accuracies.mean:+.2f}",
        interval(accuracies.interval),
        interval(accuracies.bootstrap),
        table.format_p(accuracies.p),
        table.format_p(found.p_holm),
        table.format_p(accuracies.p_permutation),
        table.MISSING if found.speed is None else f"{found.speed:.2f}",
    ]
    return {"color": color_of(found.row), "cells": cells}


def time_to_reach(rows: list[Row], targets: list[float]) -> dict | None:
    """The table of seconds until an accuracy is reached; None without times or targets."""
    timed = [row for row in rows if row.done and any(run.clock for run in row.done)]
    if not timed or not targets:
        return None

    lines = []
    for row in timed:
        cells = [comparison.name_of(row)]
        for target in targets:
            seconds = row.seconds_to(target)
            if seconds is None:
                cells.append("not reached")
                continue
            some = "" if seconds.n == len(row.done) else f" ({seconds.n} of {len(row.done)} seeds)"
            cells.append(f"{table.format_seconds(seconds).text}{some}")
        lines.append({"color": color_of(row), "cells": cells})
    n = plots.describe_n(row.done for row in timed)
    note = (
        "Training time until the end of the first epoch of at least this accuracy, without "
        f"evaluations, mean over the finished seeds that get there ({n}). Accuracy moves up and "
        "down between epochs, so this is a time at which it was reached, not for good."
    )
    titles = ["mask", *(f"{target:g} %" for target in targets)]
    return {"titles": titles, "rows": lines, "note": note}


def choose_targets(rows: list[Row]) -> list[float]:
    """Up to four round accuracies below the best final one, in percent, ascending."""
    final = [row.accuracy.mean for row in rows if row.accuracy is not None]
    if not final:
        return []
    best, step = max(final), 5
    if best - min(final) < step:
        step = 1 if best - min(final) < 1 else 2
    highest = int(best // step) * step
    return [float(target) for target in range(highest - 3 * step, highest + 1, step) if target > 0]


def disagreements(compared: list[dict]) -> dict:
    """The table of pairs of models, and the first contact sheets as links that hold the picture."""
    sheets = []
    for found in compared:
        path = found["sheet"]
        is_small = path is not None and path.is_file() and path.stat().st_size <= MAX_SHEET_BYTES
        if is_small and len(sheets) < MAX_SHEETS:
            encoded = base64.b64encode(path.read_bytes()).decode()
            title = f"{found['cells'][0]} against {found['cells'][1]}"
            sheets.append({"title": title, "source": f"data:image/png;base64,{encoded}"})
    rows = [{"color": None, "cells": found["cells"]} for found in compared]
    return {"titles": DISAGREEMENTS, "rows": rows, "sheets": sheets}
