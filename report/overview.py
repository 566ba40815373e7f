"""Several studies side by side: how far each pattern is from full attention, on each dataset."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from report import figures, plots, table, text
from report.comparison import AgainstFull, Study
from report.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_PER_ROW = 3
PANEL = (2.6, 0.3)  # inches: the width of a panel, the height of one of its lines
NAMES = 1.3  # inches beside the panels
COLUMNS = 30  # of text, in the title of a panel
XLABEL = (
    "accuracy minus that of full attention, in points: to the right, local attention is better\n"
    "(each panel has a scale of its own)"
)

SHAPES = {
    "1d_cardinal": "1D window",
    "1d_all_neighbors": "1D window",
    "2d_cardinal": "plus",
    "2d_all_neighbors": "square",
}


def label_of(study: Study) -> str:
    """The data, as tables and pictures name it."""
    return text.one_line(study.rows[0].runs[0].config["data"]["label"])


def setting_of(study: Study) -> str:
    """How its runs were trained, as far as studies of the same data may differ."""
    settings = study.rows[0].runs[0].settings
    facts = [str(settings.optimization.budget)]
    if settings.model.pool == "cls":
        facts.append("class token")
    if settings.augmentation.mix:
        facts.append("mixed images")
    return ", ".join(facts)


def name_of(row: Row) -> str:
    """A pattern in words: a 1D window has one name here, whichever 2D shape it is as large as."""
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
    """Accuracy minus that of full attention: a panel per study.

    Bars are 95 % intervals, dots single seeds, and markers full where Holm's p is at most 0.05.
    """
    patterns = patterns_in(studies)
    num_columns = min(len(studies), PANELS_PER_ROW)
    num_rows = math.ceil(len(studies) / PANELS_PER_ROW)
    size = (NAMES + PANEL[0] * num_columns, (1.0 + PANEL[1] * len(patterns)) * num_rows)
    figure = figures.new_figure(*size)
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flat

    for axes, study in itertools.zip_longest(panels, studies):
        if study is None:
            axes.remove()
        else:
            _draw_panel(axes, study, patterns)
    panels[0].set_yticks(range(len(patterns)), patterns)
    panels[0].invert_yaxis()  # the first pattern on top
    figure.supxlabel(XLABEL, fontsize=9)
    return figure


def _draw_panel(axes: Axes, study: Study, patterns: list[str]) -> None:
    title = "\n".join(text.label(label_of(study), COLUMNS).splitlines())
    seeds = plots.describe_n(found.seeds for found in study.against_full.values())
    facts = f"{setting_of(study)}, {seeds.removesuffix(' per pattern')}"
    figures.style_axes(axes, title=f"{title}\n{facts}")
    axes.title.set_fontsize(9)
    axes.axvline(0, color="0.4", linewidth=1, linestyle="--")

    for height, pattern in enumerate(patterns):
        found = compared(study, pattern)
        if found is not None:
            _draw_line(axes, found, height)


def _draw_line(axes: Axes, found: AgainstFull, height: int) -> None:
    """A pattern: each seed, the interval, the mean."""
    is_window = found.row.mask.mask_type.startswith("1d_")  # one pattern under two names
    style = figures.style_of("1d_all_neighbors" if is_window else found.row.mask.mask_type)
    color, accuracies = style["color"], found.accuracies

    seeds = accuracies.differences
    if accuracies.interval is not None:
        axes.plot(accuracies.interval[:2], [height, height], color=color, linewidth=2, zorder=1)
    axes.plot(seeds, [height] * len(seeds), ".", color="0.2", markersize=4, zorder=2)
    fill = color if found.is_significant else "white"
    mean = {"color": color, "markerfacecolor": fill, "markersize": 7, "zorder": 3}
    axes.plot(accuracies.mean, height, style["marker"], **mean)


def format_differences(studies: Sequence[Study]) -> str:
    """The same as a Markdown table: a column per study; bold where Holm's p is at most 0.05."""
    lines = []
    for pattern in patterns_in(studies):
        found = [compared(study, pattern) for study in studies]
        lines.append([text.markdown(pattern), *map(_cell, found)])
    columns = [text.markdown(f"{label_of(study)}, {setting_of(study)}") for study in studies]
    return text.markdown_table(["mask", *columns], lines)


def _cell(found: AgainstFull | None) -> str:
    if found is None:
        return table.MISSING
    cell = table.format_difference(found.accuracies)
    return f"**{cell}**" if found.is_significant else cell
