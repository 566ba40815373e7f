"""The pictures of results: curves over epochs, accuracy against neighbors and against throughput.

Every function takes rows of `results.group_by_pattern`, at least one, and returns a figure. A mask type has the same
color, marker and line style in all of them (`figures.style_of`). Of more runs than can be told apart the most accurate
are named; the picture says of how many.
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

CROWDED = 6  # more curves than this in one panel cannot be told apart: each mask type gets panels of its own
MAX_NAMED = 16  # runs with a name and a style of their own, in one panel
MAX_FULL = 3  # runs of full attention that others are compared with
MAX_MARKED = 60  # points with the expansion step in them and deviations; more are plain small markers
PANELS_ABREAST = 4
PANEL_WIDTH = 2.5  # inches, or as wide as its legend
MARKERS_A_CURVE = 8
REFERENCE = "#999999"  # full attention, where it is behind the results of the others
NOT_NAMED = {"color": "#DDDDDD", "linewidth": 0.7, "zorder": 1}
MIDDLE_OF_MARKER = {"^": (0, -1.5), "v": (0, 1.5), "<": (1.5, 0), ">": (-1.5, 0)}  # of triangles, in points (x, y)
BESIDE_POINT = ((8, 5, "left"), (-8, 5, "right"), (8, -10, "left"), (-8, -10, "right"))  # in points (x, y), alignment
COLUMNS_OF_TEXT = {"legend": 100, "panel": 40, "point": 28}  # of a name, at most

SPLITS = {"eval": "test", "train": "training"}  # prefix of the metrics: what the pictures call it
UNITS = {"accuracy": "%", "loss": "nats"}
FINAL_ACCURACY = "test accuracy after the final epoch (%)"


def by_mask_type(rows: list[Row]) -> dict[str, list[Row]]:
    groups = {}
    for row in rows:
        groups.setdefault(row.mask.mask_type, []).append(row)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Curves


@figures.drawing()
def draw_curves(rows: list[Row], kind: str) -> Figure:
    """Test and training `accuracy` or `loss` against epochs: in one pair of panels, or a pair for each mask type."""
    groups = by_mask_type(rows)
    if len(rows) <= CROWDED or len(groups) == 1:
        return _draw_curves_together(rows, kind)
    return _draw_curves_by_mask_type(groups, kind)


def _draw_curves_together(rows: list[Row], kind: str) -> Figure:
    figure = figures.new_figure(8.4, 3.7)
    pair = figure.subplots(1, 2, sharex=True, sharey=True)
    named = most_accurate(rows, MAX_NAMED)
    names = text.labels([row.label for row in named], COLUMNS_OF_TEXT["legend"])
    _draw_rows_in_pair(pair, rows, kind, dict(zip(named, names, strict=True)))
    _dress_pair(pair, kind)
    figures.add_legend_below(figure, title=_what_is_named(named, rows))
    return figure


def _draw_curves_by_mask_type(groups: dict[str, list[Row]], kind: str) -> Figure:
    """With full attention in each pair of panels, to compare with."""
    full = groups.pop("full", [])
    shown_full = most_accurate(full, MAX_FULL)
    figure, pairs = _pairs_of_panels(len(groups))
    sizes = []  # of the legends
    for number, (pair, (mask_type, members)) in enumerate(zip(pairs, groups.items(), strict=True)):
        named = most_accurate(members, MAX_NAMED)
        names = text.labels([row.short_label for row in [*shown_full, *named]], COLUMNS_OF_TEXT["panel"])
        name_of = dict(zip([*shown_full, *named], names, strict=True))
        for row, style in styles_of(shown_full).items():
            _draw_in_pair(pair, row, kind, style | {"color": REFERENCE, "marker": ""}, name_of[row])
        _draw_rows_in_pair(pair, members, kind, {row: name_of[row] for row in named})

        _dress_pair(pair, kind)
        pair[0].set_title(text.label(mask_type, figures.WIDTHS["panel"]), fontsize=10)
        pair[0].set_xlabel("")
        pair[1].tick_params(labelbottom=True)  # also where there are panels of other mask types below
        if number % PANELS_ABREAST:
            pair[0].set_ylabel("")
            pair[1].set_ylabel("")

        notes = [_what_is_named(named, members)]
        if len(full) > MAX_FULL:
            notes.append(f"{MAX_FULL} of {len(full)} runs of full shown,\nthe most accurate")
        title = "\n".join(filter(None, notes))
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22)}
        sizes.append(figures.add_legend(pair[1], PANEL_WIDTH, columns=2, title=title, **below))
    _make_room(figure, sizes)
    return figure


def _pairs_of_panels(num_pairs: int) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Pairs of panels, one above the other, `PANELS_ABREAST` in a row, all with the same axes."""
    columns, blocks = min(num_pairs, PANELS_ABREAST), math.ceil(num_pairs / PANELS_ABREAST)
    figure = figures.new_figure(PANEL_WIDTH * columns + 0.5, 4.8 * blocks)
    panels = figure.subplots(2 * blocks, columns, sharex=True, sharey=True, squeeze=False)
    pairs = [pair for top in range(0, 2 * blocks, 2) for pair in zip(panels[top], panels[top + 1], strict=True)]
    for unused in pairs[num_pairs:]:
        for axes in unused:
            axes.remove()
    return figure, pairs[:num_pairs]


def _make_room(figure: Figure, legends: list[tuple[float, float]]) -> None:
    """Let the figure grow by its legends (width, height in inches, one for each pair of panels)."""
    widths, heights = zip(*legends, strict=True)
    panel_width = max(PANEL_WIDTH, max(widths) + figures.MARGIN)
    blocks = [heights[first : first + PANELS_ABREAST] for first in range(0, len(heights), PANELS_ABREAST)]
    figure.set_size_inches(
        panel_width * len(blocks[0]) + 0.5, figure.get_figheight() + sum(max(block) for block in blocks)
    )


def most_accurate(rows: list[Row], number: int) -> list[Row]:
    """So many of the rows, those with the highest test accuracy after their latest epoch, in the order of `rows`."""

    def accuracy(row: Row) -> float:
        points = row.curve("eval_accuracy")
        return points[-1][1] if points else -math.inf

    best = set(sorted(rows, key=accuracy, reverse=True)[:number]) if len(rows) > number else rows
    return [row for row in rows if row in best]


def _what_is_named(named: list[Row], rows: list[Row]) -> str:
    if len(named) == len(rows):
        return ""
    return f"{len(named)} of {len(rows)} runs named,\nthe most accurate; the others gray"


def styles_of(rows: list[Row]) -> dict[Row, dict]:
    return {
        row: figures.style_of(mask_type, variant, len(members))
        for mask_type, members in by_mask_type(rows).items()
        for variant, row in enumerate(members)
    }


def _draw_rows_in_pair(pair: tuple[Axes, Axes], rows: list[Row], kind: str, names: dict[Row, str]) -> None:
    """The rows that have a name with a style of their own, the others in gray behind them."""
    styles = styles_of(list(names))
    for turn, (row, name) in enumerate(names.items()):
        _draw_in_pair(pair, row, kind, styles[row], name, turn)
    for row in rows:
        if row not in names:
            for axes, split in zip(pair, SPLITS, strict=True):
                axes.plot(*_means(row.curve(f"{split}_{kind}")), **NOT_NAMED)


def _means(points: list[tuple[int, float, float, float]]) -> tuple[list[int], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _draw_in_pair(pair: tuple[Axes, Axes], row: Row, kind: str, style: dict, label: str, turn: int = 0) -> None:
    """A row's mean over seeds, and the band from the lowest to the highest; `turn` sets the markers of rows apart."""
    for axes, split in zip(pair, SPLITS, strict=True):
        points = row.curve(f"{split}_{kind}")
        epochs, means, lows, highs = zip(*points, strict=True) if points else ([], [], [], [])
        stride = max(1, math.ceil(len(points) / MARKERS_A_CURVE))
        axes.plot(epochs, means, **style, label=label, linewidth=1.5, markersize=4.5, markevery=(turn % stride, stride))
        if lows != highs:
            axes.fill_between(epochs, lows, highs, color=style["color"], alpha=0.18, linewidth=0)


def _dress_pair(pair: tuple[Axes, Axes], kind: str) -> None:
    for axes, split in zip(pair, SPLITS.values(), strict=True):
        figures.style_axes(axes, xlabel="epoch", ylabel=f"{split} {kind} ({UNITS[kind]})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(left=0)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons: a point a row


@figures.drawing()
def draw_accuracy_vs_neighbors(rows: list[Row]) -> Figure:
    """Final accuracy against the true mean number of neighbors, on a logarithmic axis."""

    def x_of(row: Row) -> Spread:
        return Spread(row.num_neighbors_mean, None, 1)

    figure, axes = _draw_comparison(rows, x_of)
    figures.style_axes(axes, xlabel="neighbors of a patch, itself included (mean over the grid)", ylabel=FINAL_ACCURACY)
    axes.set_xscale("log")
    axes.set_xticks(ticks := list(_round_numbers(*axes.get_xlim())), [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    _finish_comparison(figure, axes, rows, x_of)
    return figure


@figures.drawing()
def draw_accuracy_vs_throughput(rows: list[Row]) -> Figure:
    """Final accuracy against training images a second."""

    def x_of(row: Row) -> Spread:
        return row.throughput

    figure, axes = _draw_comparison(rows, x_of)
    figures.style_axes(axes, xlabel="training throughput (images/s)", ylabel=FINAL_ACCURACY)
    _finish_comparison(figure, axes, rows, x_of)
    return figure


def _draw_comparison(rows: list[Row], x_of: Callable[[Row], Spread]) -> tuple[Figure, Axes]:
    """A marker for each row with its expansion step in it, a line through the steps of a mask type, bars of one
    deviation."""
    figure = figures.new_figure(6.4, 4.1)
    axes = figure.subplots()
    are_few = len(rows) <= MAX_MARKED
    for zorder, (mask_type, members) in enumerate(by_mask_type(rows).items(), start=3):
        style = figures.style_of(mask_type)
        if mask_type == "full":
            style["linestyle"] = ""
            for row in most_accurate(members, MAX_FULL):
                axes.axhline(row.accuracy.mean, color=REFERENCE, linestyle="--", linewidth=1, zorder=1)
        elif len({row.mask.expansion_step for row in members}) < len(members):
            style["linestyle"] = ""  # several runs of one step: a line through all would mean nothing
        x, y = [x_of(row) for row in members], [row.accuracy for row in members]
        x_means, y_means = [value.mean for value in x], [value.mean for value in y]
        if are_few:
            bars = {"xerr": [value.std or 0 for value in x], "yerr": [value.std or 0 for value in y]}
            axes.errorbar(x_means, y_means, **bars, fmt="none", ecolor=style["color"], elinewidth=1.2, zorder=zorder)
        axes.plot(
            x_means,
            y_means,
            **style,
            label=text.label(mask_type, COLUMNS_OF_TEXT["panel"]),
            linewidth=1.2,
            markersize=(16 if mask_type == "full" else 12) / (1 if are_few else 2),
            markeredgecolor="white",
            zorder=zorder,
        )
        if are_few and mask_type != "full":
            for row, *point in zip(members, x_means, y_means, strict=True):
                _number_point(axes, row, point, style, zorder + 0.5)
    return figure, axes


def _number_point(axes: Axes, row: Row, point: list[float], style: dict, zorder: float) -> None:
    """The expansion step in the marker."""
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


def _finish_comparison(figure: Figure, axes: Axes, rows: list[Row], x_of: Callable[[Row], Spread]) -> None:
    """The names of runs beside their points, as many as there is room for, and the legend below."""
    named = [row for row in rows if not row.is_named_by_default]
    names = text.labels([row.run_name for row in named], COLUMNS_OF_TEXT["point"])
    name_of = dict(zip(named, names, strict=True))
    num_shown = 0
    if named:
        figure.draw_without_rendering()  # to know where the points will be
        taken = []
        for row in most_accurate(named, MAX_NAMED):
            point = x_of(row).mean, row.accuracy.mean
            num_shown += _name_point(figure, axes, name_of[row], point, taken)
    notes = []
    if num_shown < len(named):
        notes.append(f"{num_shown} of {len(named)} runs named: of the most accurate as many as there is room for")
    num_full = sum(row.mask.mask_type == "full" for row in rows)
    if num_full > MAX_FULL:
        notes.append(f"dashed lines: the {MAX_FULL} most accurate of {num_full} runs of full")
    if len(rows) > MAX_MARKED:
        notes.append(f"{len(rows)} points: drawn small, without expansion steps and deviations")
    look = {"markerscale": 0.7} if len(rows) <= MAX_MARKED else {}
    figures.add_legend_below(figure, title="\n".join(notes), **look)


def _name_point(figure: Figure, axes: Axes, name: str, point: tuple[float, float], taken: list) -> bool:
    """Write the name where it covers none of the boxes in `taken`, and add its own; False where there is no room."""
    for x, y, alignment in BESIDE_POINT:
        written = axes.annotate(
            name, point, xytext=(x, y), textcoords="offset points", fontsize=7, ha=alignment, zorder=100
        )
        box = written.get_window_extent(figure.canvas.get_renderer())
        fits = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        if fits and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return True
        written.remove()
    return False


def _round_numbers(low: float, high: float) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ... from `low` to `high`."""
    for exponent in range(math.ceil(math.log10(high)) + 1):
        yield from (tick for digit in (1, 2, 5) if low <= (tick := digit * 10**exponent) <= high)
