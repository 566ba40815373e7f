"""Plots of results with one point per row: accuracy against neighbors and against throughput.

Every function takes rows from `results.group_by_pattern`, at least one, and returns a figure. A
family of masks, those that differ in the expansion step only, has the same color, marker and line
style in all of them (`figures.style_of`). If there are more runs than a reader can tell apart, the
most accurate are named and the figure says how many there are in total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from report import figures, text
from report.results import Row, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMED = 16  # runs per panel with a name and a style of their own
MAX_FULL = 3  # runs of full attention that the others are compared with
MAX_MARKED = 60  # with more points than this, markers are small, without steps and deviations

REFERENCE = "#999999"  # full attention where it is the background of other results
FRONT = "#DDDDDD"

# All offsets are (x, y) in points. A triangle's visual center is not the center of its box.
MIDDLE_OF_MARKER = {"^": (0, -1.5), "v": (0, 1.5), "<": (1.5, 0), ">": (-1.5, 0)}
BESIDE_POINT = ((8, 5, "left"), (-8, 5, "right"), (8, -10, "left"), (-8, -10, "right"))

MAX_COLUMNS = {"legend": 100, "panel": 40, "point": 28}  # of text, for one name

SPLITS = ("eval", "train")  # prefixes of the metrics
EVALUATED_ON = {"test": "test", "holdout": "held-out"}  # display name of the `eval` metrics


def name_of_split(split: str, rows: list[Row]) -> str:
    """How the metrics with the prefix `split` are called, as in `test accuracy`."""
    return "training" if split == "train" else EVALUATED_ON[rows[0].eval_split]


def final_accuracy(rows: list[Row]) -> str:
    return f"{name_of_split('eval', rows)} accuracy after the final epoch (%)"


def by_family(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows that differ in the expansion step only, by what they have in common."""
    groups = {}
    for row in rows:
        groups.setdefault(row.family, []).append(row)
    return groups


def are_full(rows: list[Row]) -> bool:
    """Whether the rows of a family are full attention."""
    return rows[0].mask.mask_type == "full"


def most_accurate(rows: list[Row], number: int) -> list[Row]:
    """The `number` rows with the highest latest accuracy, in their original order."""
    if len(rows) <= number:
        return rows

    def latest_accuracy(row: Row) -> float:
        points = row.curve("eval_accuracy")
        return points[-1][1] if points else -math.inf

    best = set(sorted(rows, key=latest_accuracy, reverse=True)[:number])
    return [row for row in rows if row in best]


def styles_of(rows: list[Row]) -> dict[Row, dict]:
    """A row looks the same in every figure of a report, whichever rows are beside it."""
    return {
        row: figures.style_of(row.mask.mask_type, row.variant, row.num_variants, row.place)
        for row in rows
    }


# -------------------------------------------------------------------------------------------------
# Comparisons: one point per row


@figures.drawing()
def draw_accuracy_vs_neighbors(rows: list[Row], nominal: bool = False) -> Figure:
    """Final accuracy against the number of neighbors, on a logarithmic axis.

    The number is the true mean over the grid, or the nominal one, by which shapes are matched.
    """

    def neighbors_of(row: Row) -> Spread:
        number = row.num_neighbors_nominal if nominal else row.num_neighbors_mean
        return Spread(number, None, 1)

    figure, axes = _draw_comparison(rows, neighbors_of)
    counted = "nominal" if nominal else "mean over the grid"
    xlabel = f"neighbors of a patch, itself included ({counted})"
    figures.style_axes(axes, xlabel=xlabel, ylabel=final_accuracy(rows))

    axes.set_xscale("log")
    ticks = list(_round_numbers(*axes.get_xlim()))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    _finish_comparison(figure, axes, rows, neighbors_of)
    return figure


@figures.drawing()
def draw_accuracy_vs_throughput(rows: list[Row]) -> Figure:
    """Final accuracy against training images per second.

    A gray line joins the rows that no other row beats in both: the Pareto front.
    """

    def throughput_of(row: Row) -> Spread:
        return row.throughput

    figure, axes = _draw_comparison(rows, throughput_of)
    front = pareto_front([(row.throughput.mean, row.accuracy.mean) for row in rows])
    axes.plot(*zip(*front, strict=True), color=FRONT, linewidth=5, zorder=0.5, label="Pareto front")
    xlabel = "training throughput (images/s)"
    figures.style_axes(axes, xlabel=xlabel, ylabel=final_accuracy(rows))
    _finish_comparison(figure, axes, rows, throughput_of)
    return figure


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (x, y) that no other point equals or exceeds in both, by ascending x."""
    front = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _draw_comparison(rows: list[Row], x_of: Callable[[Row], Spread]) -> tuple[Figure, Axes]:
    """Draw one point per row, and a line through the expansion steps of each family."""
    figure = figures.new_figure(6.4, 4.1)
    axes = figure.subplots()
    are_few = len(rows) <= MAX_MARKED

    for zorder, (family, members) in enumerate(by_family(rows).items(), start=3):
        if are_full(members):
            for row in most_accurate(members, MAX_FULL):
                look = {"color": REFERENCE, "linestyle": "--", "linewidth": 1, "zorder": 1}
                axes.axhline(row.accuracy.mean, **look)
        _draw_points(axes, family, members, x_of, are_few, zorder)
    return figure, axes


def _draw_points(
    axes: Axes,
    family: str,
    rows: list[Row],
    x_of: Callable[[Row], Spread],
    are_few: bool,
    zorder: int,
) -> None:
    """Draw the points of one family.

    A few get error bars of one standard deviation and their expansion step inside the marker.
    """
    is_full = are_full(rows)
    style = figures.style_of(rows[0].mask.mask_type, family=rows[0].place)
    num_steps = len({row.mask.expansion_step for row in rows})
    if is_full or num_steps < len(rows):
        style["linestyle"] = ""  # a line through several runs of one step would mean nothing

    x = [x_of(row) for row in rows]
    y = [row.accuracy for row in rows]
    x_means = [spread.mean for spread in x]
    y_means = [spread.mean for spread in y]
    if are_few:
        bars = {
            "xerr": [spread.std or 0 for spread in x],
            "yerr": [spread.std or 0 for spread in y],
        }
        look = {"fmt": "none", "ecolor": style["color"], "elinewidth": 1.2}
        axes.errorbar(x_means, y_means, **bars, **look, zorder=zorder)

    size = 16 if is_full else 12
    axes.plot(
        x_means,
        y_means,
        **style,
        label=text.label(family, MAX_COLUMNS["panel"]),
        linewidth=1.2,
        markersize=size if are_few else size / 2,
        markeredgecolor="white",
        zorder=zorder,
    )
    if are_few and rows[0].mask.expansion_step is not None:
        for row, point in zip(rows, zip(x_means, y_means, strict=True), strict=True):
            _write_step(axes, row, point, style, zorder + 0.5)


def _write_step(
    axes: Axes, row: Row, point: tuple[float, float], style: dict, zorder: float
) -> None:
    """Write the expansion step inside the marker."""
    axes.annotate(
        str(row.mask.expansion_step),
        point,
        xytext=MIDDLE_OF_MARKER.get(style["marker"], (0, 0)),
        textcoords="offset points",
        fontsize=7,
        color=figures.text_color_on(style["color"]),
        ha="center",
        va="center_baseline",
        zorder=zorder,
    )


def _finish_comparison(
    figure: Figure, axes: Axes, rows: list[Row], x_of: Callable[[Row], Spread]
) -> None:
    """Add the legend, and custom run names beside their points as far as there is room."""
    custom = [row for row in rows if not row.is_named_by_default]
    num_named = _write_names(figure, axes, custom, x_of) if custom else 0

    notes = []
    if num_named < len(custom):
        notes.append(
            f"{num_named} of {len(custom)} runs named: of the most accurate as many as there is "
            "room for"
        )
    num_full = sum(row.mask.mask_type == "full" for row in rows)
    if num_full > MAX_FULL:
        notes.append(f"dashed lines: the {MAX_FULL} most accurate of {num_full} runs of full")
    if len(rows) > MAX_MARKED:
        notes.append(f"{len(rows)} points: drawn small, without expansion steps and deviations")

    look = {"markerscale": 0.7} if len(rows) <= MAX_MARKED else {}
    figures.add_legend_below(figure, title="\n".join(notes), **look)


def _write_names(figure: Figure, axes: Axes, rows: list[Row], x_of: Callable[[Row], Spread]) -> int:
    """Write the names of the most accurate rows; returns how many there was room for."""
    names = text.labels([row.run_name for row in rows], MAX_COLUMNS["point"])
    name_of = dict(zip(rows, names, strict=True))
    figure.draw_without_rendering()  # fixes the positions of the points

    boxes = []
    for row in most_accurate(rows, MAX_NAMED):
        point = (x_of(row).mean, row.accuracy.mean)
        _write_name(figure, axes, name_of[row], point, boxes)
    return len(boxes)


def _write_name(
    figure: Figure, axes: Axes, name: str, point: tuple[float, float], taken: list
) -> None:
    """Write a name where it covers none of the boxes in `taken`, and add its own box to them.

    If there is no such place, the name is left out.
    """
    for x, y, alignment in BESIDE_POINT:
        offset = {"xytext": (x, y), "textcoords": "offset points"}
        written = axes.annotate(name, point, **offset, fontsize=7, ha=alignment, zorder=100)
        box = written.get_window_extent(figure.canvas.get_renderer())

        inside_width = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        inside_height = box.y0 >= 0 and box.y1 <= figure.bbox.y1
        if inside_width and inside_height and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return
        written.remove()


def _round_numbers(low: float, high: float) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ... from `low` to `high`."""
    for exponent in range(math.ceil(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            number = digit * 10**exponent
            if low <= number <= high:
                yield number
