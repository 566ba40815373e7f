"""The pictures of results: curves over epochs, accuracy against neighbors and against throughput.

Every function takes rows of `results.group_by_pattern`, at least one, and returns a figure. A mask type has the same
color, marker and line style in all of them (`figures.style_of`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import figures
from results import Row, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CROWDED = 6  # more curves than this in one panel cannot be told apart: each mask type gets panels of its own
PANELS_ABREAST = 4
MARKERS_A_CURVE = 8
REFERENCE = "#999999"  # full attention, where it is behind the results of the others
MIDDLE_OF_MARKER = {"^": (0, -1.5), "v": (0, 1.5), "<": (1.5, 0), ">": (-1.5, 0)}  # of triangles, in points (x, y)
LEGEND = {"fontsize": 8, "frameon": False, "handlelength": 3.2}

SPLITS = {"eval": "test", "train": "training"}  # prefix of the metrics: what the pictures call it
UNITS = {"accuracy": "%", "loss": "nats"}
FINAL_ACCURACY = "test accuracy after the final epoch (%)"


def by_mask_type(rows: list[Row]) -> dict[str, list[Row]]:
    groups = {}
    for row in rows:
        groups.setdefault(row.mask_type, []).append(row)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def draw_curves(rows: list[Row], kind: str) -> Figure:
    """Test and training `accuracy` or `loss` against epochs: in one pair of panels, or a pair for each mask type."""
    groups = by_mask_type(rows)
    styles = {
        row: figures.style_of(mask_type, variant, len(members))
        for mask_type, members in groups.items()
        for variant, row in enumerate(members)
    }
    if len(rows) <= CROWDED or len(groups) == 1:
        figure = figures.new_figure(8.4, 4.2)
        pair = figure.subplots(1, 2, sharex=True, sharey=True)
        for turn, row in enumerate(rows):
            _draw_in_pair(pair, row, kind, styles[row], row.label, turn)
        _dress_pair(pair, kind)
        figure.legend(*pair[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, **LEGEND)
        return figure

    full = groups.pop("full", [])
    figure, pairs = _pairs_of_panels(len(groups))
    for number, (pair, (mask_type, members)) in enumerate(zip(pairs, groups.items(), strict=True)):
        for row in full:  # in each pair, to compare with
            _draw_in_pair(pair, row, kind, styles[row] | {"color": REFERENCE, "marker": ""}, row.short_label)
        for turn, row in enumerate(members):
            _draw_in_pair(pair, row, kind, styles[row], row.short_label, turn)
        _dress_pair(pair, kind)
        pair[0].set_title(mask_type, fontsize=10)
        pair[0].set_xlabel("")
        pair[1].tick_params(labelbottom=True)  # also where there are panels of other mask types below
        pair[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, **LEGEND)
        if number % PANELS_ABREAST:
            pair[0].set_ylabel("")
            pair[1].set_ylabel("")
    return figure


def _pairs_of_panels(num_pairs: int) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Pairs of panels, one above the other, `PANELS_ABREAST` in a row, all with the same axes."""
    columns, blocks = min(num_pairs, PANELS_ABREAST), math.ceil(num_pairs / PANELS_ABREAST)
    figure = figures.new_figure(2.5 * columns + 0.5, 5.2 * blocks)
    panels = figure.subplots(2 * blocks, columns, sharex=True, sharey=True, squeeze=False)
    pairs = [pair for top in range(0, 2 * blocks, 2) for pair in zip(panels[top], panels[top + 1], strict=True)]
    for unused in pairs[num_pairs:]:
        for axes in unused:
            axes.remove()
    return figure, pairs[:num_pairs]


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
        figures.dress(axes, xlabel="epoch", ylabel=f"{split} {kind} ({UNITS[kind]})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(left=0)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons: a point a row


def draw_accuracy_vs_neighbors(rows: list[Row]) -> Figure:
    """Final accuracy against the true mean number of neighbors, on a logarithmic axis."""
    figure, axes = _draw_comparison(rows, lambda row: Spread(row.num_neighbors_mean, None, 1))
    figures.dress(axes, xlabel="neighbors of a patch, itself included (mean over the grid)", ylabel=FINAL_ACCURACY)
    axes.set_xscale("log")
    axes.set_xticks(ticks := list(_round_numbers(*axes.get_xlim())), [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    return figure


def draw_accuracy_vs_throughput(rows: list[Row]) -> Figure:
    """Final accuracy against training images a second."""
    figure, axes = _draw_comparison(rows, lambda row: row.throughput)
    figures.dress(axes, xlabel="training throughput (images/s)", ylabel=FINAL_ACCURACY)
    return figure


def _draw_comparison(rows: list[Row], x_of: Callable[[Row], Spread]) -> tuple[Figure, Axes]:
    """A marker a row with its expansion step in it, a line through the rows of a mask type, bars of one deviation."""
    figure = figures.new_figure(6.4, 4.6)
    axes = figure.subplots()
    for zorder, (mask_type, members) in enumerate(by_mask_type(rows).items(), start=3):
        style = figures.style_of(mask_type)
        if mask_type == "full":
            style["linestyle"] = ""
            for row in members:
                axes.axhline(row.accuracy.mean, color=REFERENCE, linestyle="--", linewidth=1, zorder=1)
        x, y = [x_of(row) for row in members], [row.accuracy for row in members]
        x_means, y_means = [value.mean for value in x], [value.mean for value in y]
        deviations = {"xerr": [value.std or 0 for value in x], "yerr": [value.std or 0 for value in y]}
        axes.errorbar(x_means, y_means, **deviations, fmt="none", ecolor=style["color"], elinewidth=1.2, zorder=zorder)
        axes.plot(
            x_means,
            y_means,
            **style,
            label=mask_type,
            linewidth=1.2,
            markersize=16 if mask_type == "full" else 12,
            markeredgecolor="white",
            zorder=zorder,
        )
        for row, *point in zip(members, x_means, y_means, strict=True):
            _name_point(axes, row, point, style, zorder + 0.5)
    figure.legend(loc="outside lower center", ncols=3, markerscale=0.7, **LEGEND)
    return figure, axes


def _name_point(axes: Axes, row: Row, point: list[float], style: dict, zorder: float) -> None:
    """The expansion step in the marker; beside it a run name of one's own."""
    if row.expansion_step is not None:
        axes.annotate(
            str(row.expansion_step),
            point,
            xytext=MIDDLE_OF_MARKER.get(style["marker"], (0, 0)),
            textcoords="offset points",
            fontsize=7,
            color=figures.text_color_on(style["color"]),
            ha="center",
            va="center_baseline",
            zorder=zorder,
        )
    if not row.is_named_by_default:
        axes.annotate(row.run_name, point, xytext=(8, 5), textcoords="offset points", fontsize=7, zorder=zorder)


def _round_numbers(low: float, high: float) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ... from `low` to `high`."""
    for exponent in range(math.ceil(math.log10(high)) + 1):
        yield from (tick for digit in (1, 2, 5) if low <= (tick := digit * 10**exponent) <= high)
