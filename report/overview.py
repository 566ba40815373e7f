"""Several studies side by side: how far each pattern is from full attention, on each dataset."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from masks import MaskSpec
from report import comparison, figures, plots, table, text
from report.comparison import SIGNIFICANT, Study
from report.results import Row
from report.statistics import Comparison
from training.settings import AugmentationSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_PER_ROW = 3
PANEL = (2.6, 0.3)  # inches: the width of a panel, the height of one of its lines
NAMES = 1.3  # inches beside the panels
TOGETHER = "mean of all patterns"
COLUMNS = 36  # of text, in each line of a panel's title
XLABEL = (
    "accuracy minus that of full attention, in points: to the right, local attention is better\n"
    "dots: seeds; bars: 95 % intervals; filled: p ≤ 0.05 after Holm's correction\n"
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
    facts.append(" and ".join(kinds_of_mixing(settings.augmentation)))
    return ", ".join(filter(None, facts))


def kinds_of_mixing(augmentation: AugmentationSettings) -> list[str]:
    """How training images are mixed; empty if they are not."""
    alphas = {"MixUp": augmentation.mixup_alpha, "CutMix": augmentation.cutmix_alpha}
    return [name for name, alpha in alphas.items() if alpha and augmentation.mix]


def name_of(row: Row) -> str:
    """A pattern in words: a 1D window has one name here, whichever 2D shape it is as large as."""
    is_plain = row.mask == MaskSpec(row.mask.mask_type, row.mask.expansion_step)
    is_plain &= row.is_named_by_default and not row.num_registers
    if not is_plain or row.mask.mask_type not in SHAPES:
        return row.label
    return f"{SHAPES[row.mask.mask_type]} of {row.num_neighbors_nominal}"


@dataclass(frozen=True)
class Line:
    """A pattern of a study, or all of them together, against full attention."""

    accuracies: Comparison
    p: float | None  # corrected by Holm's method; of all together there is nothing to correct
    style: dict

    @property
    def is_significant(self) -> bool:
        return self.p is not None and self.p <= SIGNIFICANT


def lines_of(study: Study) -> dict[str, Line]:
    """By name: the mean of all patterns first, then by budget and by name."""
    lines = {}
    together = comparison.all_together(study)
    if together is not None:
        lines[TOGETHER] = Line(together, together.p, {"color": "black", "marker": "o"})

    def order(row: Row) -> tuple[int, str]:
        return row.num_neighbors_nominal, name_of(row)

    for row in sorted(study.against_full, key=order):
        found = study.against_full[row]
        is_window = row.mask.mask_type.startswith("1d_")  # one pattern under two names
        style = figures.style_of("1d_all_neighbors" if is_window else row.mask.mask_type)
        lines.setdefault(name_of(row), Line(found.accuracies, found.p_holm, style))
    return lines


def names_in(studies: Sequence[Study], at_least: int = 1) -> list[str]:
    """The names of the lines that so many of the studies have, in their order."""
    order = {TOGETHER: (0, "")}
    for study in studies:
        for row in study.against_full:
            order[name_of(row)] = (row.num_neighbors_nominal, name_of(row))

    times = Counter(name for study in studies for name in lines_of(study))
    return sorted((name for name in times if times[name] >= at_least), key=order.get)


@figures.drawing()
def draw_differences(studies: Sequence[Study], names: Sequence[str]) -> Figure:
    """Accuracy minus that of full attention: a panel per study, with the lines of these names.

    Bars are 95 % intervals, dots single seeds, and markers full where p is at most 0.05, after
    Holm's correction for the number of patterns of the study.
    """
    num_columns = min(len(studies), PANELS_PER_ROW)
    num_rows = math.ceil(len(studies) / PANELS_PER_ROW)
    size = (NAMES + PANEL[0] * num_columns, (1.0 + PANEL[1] * len(names)) * num_rows)
    figure = figures.new_figure(*size)
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flat

    for axes, study in itertools.zip_longest(panels, studies):
        if study is None:
            axes.remove()
        else:
            _draw_panel(axes, study, names)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)  # the first pattern on top
    figure.supxlabel(XLABEL, fontsize=9)
    return figure


def _draw_panel(axes: Axes, study: Study, names: Sequence[str]) -> None:
    title = textwrap.fill(label_of(study), COLUMNS, max_lines=2, placeholder="…")
    seeds = plots.describe_n(found.seeds for found in study.against_full.values())
    facts = f"{setting_of(study)}, {seeds.removesuffix(' per pattern')}"
    figures.style_axes(axes, title=f"{title}\n{facts}")
    axes.title.set_fontsize(9)
    axes.axvline(0, color="0.4", linewidth=1, linestyle="--")

    lines = lines_of(study)
    for height, name in enumerate(names):
        if name in lines:
            _draw_line(axes, lines[name], height)


def _draw_line(axes: Axes, line: Line, height: int) -> None:
    """Each seed, the interval, the mean."""
    color, accuracies = line.style["color"], line.accuracies

    seeds = accuracies.differences
    if accuracies.interval is not None:
        axes.plot(accuracies.interval[:2], [height, height], color=color, linewidth=2, zorder=1)
    axes.plot(seeds, [height] * len(seeds), ".", color="0.2", markersize=4, zorder=2)
    fill = color if line.is_significant else "white"
    mean = {"color": color, "markerfacecolor": fill, "markersize": 7, "zorder": 3}
    axes.plot(accuracies.mean, height, line.style["marker"], **mean)


def format_differences(studies: Sequence[Study], names: Sequence[str]) -> str:
    """The same as a Markdown table: a column per study; bold where p is at most 0.05."""
    by_study = [lines_of(study) for study in studies]
    lines = []
    for name in names:
        found = [of_study.get(name) for of_study in by_study]
        lines.append([text.markdown(name), *map(_cell, found)])
    columns = [text.markdown(f"{label_of(study)}, {setting_of(study)}") for study in studies]
    return text.markdown_table(["mask", *columns], lines)


def _cell(line: Line | None) -> str:
    if line is None:
        return table.MISSING
    cell = table.format_difference(line.accuracies)
    return f"**{cell}**" if line.is_significant else cell
