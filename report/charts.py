"""Plots of results: curves over epochs, accuracy against neighbors and against throughput.

Every function takes rows from `results.group_by_pattern`, at least one, and returns a figure. A
mask type has the same color, marker and line style in all of them (`figures.style_of`). If there
are more runs than a reader can tell apart, the most accurate are named and the figure says how many
there are in total.
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

CROWDED = 6  # with more curves than this, each mask type gets panels of its own
MAX_NAMED = 16  # runs per panel with a name and a style of their own
MAX_FULL = 3  # runs of full attention that the others are compared with
MAX_MARKED = 60  # with more points than this, markers are small, without steps and deviations
PANELS_PER_ROW = 4
PANEL_WIDTH = 2.5  # inches, or as wide as its legend
MARKERS_PER_CURVE = 8

REFERENCE = "#999999"  # full attention where it is the background of other results
NOT_NAMED = {"color": "#DDDDDD", "linewidth": 0.7, "zorder": 1}

# All offsets are (x, y) in points. A triangle's visual center is not the center of its box.
MIDDLE_OF_MARKER = {"^": (0, -1.5), "v": (0, 1.5), "<": (1.5, 0), ">": (-1.5, 0)}
BESIDE_POINT = ((8, 5, "left"), (-8, 5, "right"), (8, -10, "left"), (-8, -10, "right"))

MAX_COLUMNS = {"legend": 100, "panel": 40, "point": 28}  # of text, for one name

SPLITS = ("eval", "train")  # prefixes of the metrics
EVALUATED_ON = {"test": "test", "holdout": "held-out"}  # display name of the `eval` metrics
UNITS = {"accuracy": "%", "loss": "nats"}


def name_of_split(split: str, rows: list[Row]) -> str:
    """How the metrics with the prefix `split` are called, as in `test accuracy`."""
    return "training" if split == "train" else EVALUATED_ON[rows[0].eval_split]


def final_accuracy(rows: list[Row]) -> str:
    return f"{name_of_split('eval', rows)} accuracy after the final epoch (%)"


def by_mask_type(rows: list[Row]) -> dict[str, list[Row]]:
    groups = {}
    for row in rows:
        groups.setdefault(row.mask.mask_type, []).append(row)
    return groups


def most_accurate(rows: list[Row], number: int) -> list[Row]:
    """The `number` rows with the highest latest accuracy, in their original order."""
    if len(rows) <= number:
        return rows

    def latest_accuracy(row: Row) -> float:
        points = row.curve("eval_accuracy")
        return points[-1][1] if points else -math.inf

    best = set(sorted(rows, key=latest_accuracy, reverse=True)[:number])
    return [row for row in rows if row in best]


# -------------------------------------------------------------------------------------------------
# Curves


@figures.drawing()
def draw_curves(rows: list[Row], kind: str) -> Figure:
    """Test and training `accuracy` or `loss` over epochs.

    Few runs share one pair of panels; otherwise each mask type gets its own pair.
    """
    groups = by_mask_type(rows)
    if len(rows) <= CROWDED or len(groups) == 1:
        return _draw_curves_together(rows, kind)
    return _draw_curves_by_mask_type(groups, kind)


def _draw_curves_together(rows: list[Row], kind: str) -> Figure:
    figure = figures.new_figure(8.4, 3.7)
    pair = figure.subplots(1, 2, sharex=True, sharey=True)

    named = most_accurate(rows, MAX_NAMED)
    names = text.labels([row.label for row in named], MAX_COLUMNS["legend"])
    _draw_rows(pair, rows, kind, dict(zip(named, names, strict=True)))

    _style_pair(pair, rows, kind)
    figures.add_legend_below(figure, title=_note_on_names(named, rows))
    return figure


def _draw_curves_by_mask_type(groups: dict[str, list[Row]], kind: str) -> Figure:
    """Full attention is in each pair of panels, for comparison."""
    full = groups.pop("full", [])
    figure, pairs = _pairs_of_panels(len(groups))

    legends = []
    for number, (mask_type, rows) in enumerate(groups.items()):
        pair = pairs[number]
        title = _draw_mask_type(pair, rows, full, kind)

        _style_pair(pair, rows, kind)
        pair[0].set_title(text.label(mask_type, figures.WIDTHS["panel"]), fontsize=10)
        pair[0].set_xlabel("")
        pair[1].tick_params(labelbottom=True)  # even if other panels follow below
        if number % PANELS_PER_ROW:
            pair[0].set_ylabel("")
            pair[1].set_ylabel("")

        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22)}
        legends.append(figures.add_legend(pair[1], PANEL_WIDTH, columns=2, title=title, **below))
    _grow_by_legends(figure, legends)
    return figure


def _draw_mask_type(pair: tuple[Axes, Axes], rows: list[Row], full: list[Row], kind: str) -> str:
    """Draw the rows of one mask type in front of full attention; returns notes for the legend."""
    reference = most_accurate(full, MAX_FULL)
    named = most_accurate(rows, MAX_NAMED)
    short_labels = [row.short_label for row in [*reference, *named]]
    names = text.labels(short_labels, MAX_COLUMNS["panel"])
    name_of = dict(zip([*reference, *named], names, strict=True))

    for row, style in styles_of(reference).items():
        style |= {"color": REFERENCE, "marker": ""}
        _draw_row(pair, row, kind, style, name_of[row])
    _draw_rows(pair, rows, kind, {row: name_of[row] for row in named})

    notes = [_note_on_names(named, rows)]
    if len(full) > MAX_FULL:
        notes.append(f"{MAX_FULL} of {len(full)} runs of full shown,\nthe most accurate")
    return "\n".join(filter(None, notes))


def _pairs_of_panels(num_pairs: int) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Pairs of panels, one above the other, `PANELS_PER_ROW` pairs in a row, with shared axes."""
    num_columns = min(num_pairs, PANELS_PER_ROW)
    num_blocks = math.ceil(num_pairs / PANELS_PER_ROW)
    figure = figures.new_figure(PANEL_WIDTH * num_columns + 0.5, 4.8 * num_blocks)
    shape = (2 * num_blocks, num_columns)
    panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)

    pairs = []
    for top in range(0, 2 * num_blocks, 2):
        pairs += zip(panels[top], panels[top + 1], strict=True)
    for unused in pairs[num_pairs:]:
        for axes in unused:
            axes.remove()
    return figure, pairs[:num_pairs]


def _grow_by_legends(figure: Figure, legends: list[tuple[float, float]]) -> None:
    """Make room for legends (width, height in inches), one for each pair of panels."""
    widths, heights = zip(*legends, strict=True)
    panel_width = max(PANEL_WIDTH, max(widths) + figures.MARGIN)
    width = panel_width * min(len(legends), PANELS_PER_ROW) + 0.5

    firsts = range(0, len(heights), PANELS_PER_ROW)
    tallest = [max(heights[first : first + PANELS_PER_ROW]) for first in firsts]
    figure.set_size_inches(width, figure.get_figheight() + sum(tallest))


def _note_on_names(named: list[Row], rows: list[Row]) -> str:
    if len(named) == len(rows):
        return ""
    return f"{len(named)} of {len(rows)} runs named,\nthe most accurate; the others gray"


def styles_of(rows: list[Row]) -> dict[Row, dict]:
    styles = {}
    for mask_type, members in by_mask_type(rows).items():
        for variant, row in enumerate(members):
            styles[row] = figures.style_of(mask_type, variant, len(members))
    return styles


def _draw_rows(pair: tuple[Axes, Axes], rows: list[Row], kind: str, names: dict[Row, str]) -> None:
    """Draw rows that have a name in a style of their own, the others in gray behind them."""
    styles = styles_of(list(names))
    for number, (row, name) in enumerate(names.items()):
        _draw_row(pair, row, kind, styles[row], name, number)

    for row in rows:
        if row not in names:
            for axes, split in zip(pair, SPLITS, strict=True):
                points = row.curve(f"{split}_{kind}")
                epochs = [point[0] for point in points]
                means = [point[1] for point in points]
                axes.plot(epochs, means, **NOT_NAMED)


def _draw_row(
    pair: tuple[Axes, Axes], row: Row, kind: str, style: dict, label: str, number: int = 0
) -> None:
    """Draw a row's mean over seeds, and a band from the lowest seed to the highest.

    The `number` of a row shifts its markers so that those of several rows don't coincide.
    """
    for axes, split in zip(pair, SPLITS, strict=True):
        points = row.curve(f"{split}_{kind}")
        epochs, means, lows, highs = zip(*points, strict=True) if points else ([], [], [], [])
        stride = max(1, math.ceil(len(points) / MARKERS_PER_CURVE))
        look = {"linewidth": 1.5, "markersize": 4.5, "markevery": (number % stride, stride)}
        axes.plot(epochs, means, **style, **look, label=label)
        if lows != highs:
            axes.fill_between(epochs, lows, highs, color=style["color"], alpha=0.18, linewidth=0)


def _style_pair(pair: tuple[Axes, Axes], rows: list[Row], kind: str) -> None:
    for axes, split in zip(pair, SPLITS, strict=True):
        ylabel = f"{name_of_split(split, rows)} {kind} ({UNITS[kind]})"
        figures.style_axes(axes, xlabel="epoch", ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(left=0)


# -------------------------------------------------------------------------------------------------
# Comparisons: one point per row


@figures.drawing()
def draw_accuracy_vs_neighbors(rows: list[Row]) -> Figure:
    """Final accuracy against the true mean number of neighbors, on a logarithmic axis."""

    def neighbors_of(row: Row) -> Spread:
        return Spread(row.num_neighbors_mean, None, 1)

    figure, axes = _draw_comparison(rows, neighbors_of)
    xlabel = "neighbors of a patch, itself included (mean over the grid)"
    figures.style_axes(axes, xlabel=xlabel, ylabel=final_accuracy(rows))

    axes.set_xscale("log")
    ticks = list(_round_numbers(*axes.get_xlim()))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    _finish_comparison(figure, axes, rows, neighbors_of)
    return figure


@figures.drawing()
def draw_accuracy_vs_throughput(rows: list[Row]) -> Figure:
    """Final accuracy against training images per second."""

    def throughput_of(row: Row) -> Spread:
        return row.throughput

    figure, axes = _draw_comparison(rows, throughput_of)
    xlabel = "training throughput (images/s)"
    figures.style_axes(axes, xlabel=xlabel, ylabel=final_accuracy(rows))
    _finish_comparison(figure, axes, rows, throughput_of)
    return figure


def _draw_comparison(rows: list[Row], x_of: Callable[[Row], Spread]) -> tuple[Figure, Axes]:
    """Draw one point per row, and a line through the expansion steps of each mask type."""
    figure = figures.new_figure(6.4, 4.1)
    axes = figure.subplots()
    are_few = len(rows) <= MAX_MARKED

    for zorder, (mask_type, members) in enumerate(by_mask_type(rows).items(), start=3):
        if mask_type == "full":
            for row in most_accurate(members, MAX_FULL):
                look = {"color": REFERENCE, "linestyle": "--", "linewidth": 1, "zorder": 1}
                axes.axhline(row.accuracy.mean, **look)
        _draw_points(axes, mask_type, members, x_of, are_few, zorder)
    return figure, axes


def _draw_points(
    axes: Axes,
    mask_type: str,
    rows: list[Row],
    x_of: Callable[[Row], Spread],
    are_few: bool,
    zorder: int,
) -> None:
    """Draw the points of one mask type.

    A few get error bars of one standard deviation and their expansion step inside the marker.
    """
    is_full = mask_type == "full"
    style = figures.style_of(mask_type)
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
        label=text.label(mask_type, MAX_COLUMNS["panel"]),
        linewidth=1.2,
        markersize=size if are_few else size / 2,
        markeredgecolor="white",
        zorder=zorder,
    )
    if are_few and not is_full:
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
