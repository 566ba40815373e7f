"""Several studies side by side: how far each pattern is from full attention, on each dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from report import figures, table, text
from report.comparison import AgainstFull, Study
from report.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (2.6, 0.34)  # inches: the width of a panel, the height of one of its lines
NAMES = 1.3  # inches beside the panels
COLUMNS = 30  # of text, in the title of a panel

SHAPES = {
    "1d_cardinal": "1D window",
    "1d_all_neighbors": "1D window",
    "2d_cardinal": "plus",
    "2d_all_neighbors": "square",
}


def label_of(study: Study) -> str:
    """The data, as tables and pictures name it."""
    return text.one_line(study.rows[0].runs[0].config["data"]["label"])


def name_of(row: Row) -> str:
    """A pattern in words: a 1D window has one name here, whichever 2D shape it is the twin of."""
    if not row.is_named_by_default or row.mask.mask_type not in SHAPES:
        return row.label
    return f"{SHAPES[row.mask.mask_type]} of {row.num_neighbors_nominal}"


def patterns_in(studies: Sequence[Study]) -> list[str]:
    """The names of all patterns that are compared with full attention, by budget, then by name."""
    found = {}
    for study in studies:
        for row in study.against_full:
            found.setdefault(name_of(row), (row.num_neighbors_nominal, name_of(row)))
    return sorted(found, key=found.get)


def compared(study: Study, pattern: str) -> AgainstFull | None:
    for row, found in study.against_full.items():
        if name_of(row) == pattern:
            return found
    return None


@figures.drawing()
def draw_differences(studies: Sequence[Study]) -> Figure:
    """Accuracy minus that of full attention, with 95 % intervals: a panel per study.

    Markers are full where Holm's p is at most 0.05.
    """
    patterns = patterns_in(studies)
    width = NAMES + PANEL[0] * len(studies)
    figure = figures.new_figure(width, 1.1 + PANEL[1] * len(patterns))
    panels = figure.subplots(1, len(studies), sharey=True, squeeze=False)[0]

    for study, axes in zip(studies, panels, strict=True):
        _draw_panel(axes, study, patterns)
    panels[0].set_yticks(range(len(patterns)), patterns)
    panels[0].invert_yaxis()  # the first pattern on top
    figure.supxlabel("accuracy minus that of full attention (points)", fontsize=9)
    return figure


def _draw_panel(axes: Axes, study: Study, patterns: list[str]) -> None:
    seeds = sorted(found.accuracies.n for found in study.against_full.values()) or [0]
    n = "–".join(str(number) for number in dict.fromkeys([seeds[0], seeds[-1]]))
    title = "\n".join(text.label(label_of(study), COLUMNS).splitlines())
    figures.style_axes(axes, title=f"{title}\n(n = {n} seeds)")
    axes.axvline(0, color="0.4", linewidth=1, linestyle="--")

    for height, pattern in enumerate(patterns):
        found = compared(study, pattern)
        if found is None:
            continue
        style = figures.style_of(found.row.mask.mask_type)
        interval, mean = found.accuracies.interval, found.accuracies.mean
        if interval is not None:
            axes.plot(interval[:2], [height, height], color=style["color"], linewidth=2)
        fill = style["color"] if found.is_significant else "white"
        axes.plot(
            mean, height, style["marker"], color=style["color"], markerfacecolor=fill, markersize=7
        )


def format_differences(studies: Sequence[Study]) -> str:
    """The same as a Markdown table: a column per study; bold where Holm's p is at most 0.05."""
    lines = []
    for pattern in patterns_in(studies):
        found = [compared(study, pattern) for study in studies]
        lines.append([text.markdown(pattern), *map(_cell, found)])
    return text.markdown_table(["mask", *map(label_of, studies)], lines)


def _cell(found: AgainstFull | None) -> str:
    if found is None:
        return table.MISSING
    cell = table.format_difference(found.accuracies)
    return f"**{cell}**" if found.is_significant else cell
