"""Plots of what `eval.py --analyze` measured; each takes analyses by row, see analyses.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from report import figures, text
from report.charts import MAX_COLUMNS, styles_of
from report.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from report.analyses import Analysis

PANEL = 1.9  # inches
PANELS_PER_ROW = 5
LOWEST = 1e-3  # of the largest gradient; what is below has the same color
COLORS = "viridis"
DOTTED = {"linewidth": 1, "linestyle": ":", "marker": ""}


def _labels(rows: list[Row], width: str = "legend") -> list[str]:
    return text.labels([row.label for row in rows], MAX_COLUMNS[width])


@figures.drawing()
def draw_layers(analyses: dict[Row, list[Analysis]], is_distance: bool) -> Figure:
    """Attention distance or entropy over the layers, mean over heads and seeds."""
    rows = list(analyses)
    figure = figures.new_figure(6.4, 4.1)
    axes = figure.subplots()

    for (row, style), label in zip(styles_of(rows).items(), _labels(rows), strict=True):
        numbers = [found.numbers for found in analyses[row]]
        key = "distance" if is_distance else "entropy"
        values = _mean([found[key] for found in numbers])  # [layers, heads]
        known = ~np.isnan(values).all(axis=1)
        layers = np.flatnonzero(known)
        values = values[known]
        axes.plot(layers, np.nanmean(values, axis=1), **style, label=label, markersize=5)
        low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
        axes.fill_between(layers, low, high, color=style["color"], alpha=0.12, linewidth=0)
        if is_distance:
            ceiling = _mean([ceiling_of(found) for found in numbers])  # [layers]
            axes.plot(np.arange(len(ceiling)), ceiling, color=style["color"], **DOTTED)

    ylabel = "mean attention distance (pixels)" if is_distance else "entropy, 1 = uniform"
    figures.style_axes(axes, xlabel="layer, counted from 0", ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    figures.add_legend_below(figure)
    return figure


def ceiling_of(numbers: dict) -> list[float]:
    """The largest mean distance that the mask of each layer allows."""
    num_layers = len(numbers["distance"])
    ceiling = numbers.get("distance_ceiling_by_layer")  # older analyses have one mask
    is_usable = isinstance(ceiling, list) and len(ceiling) == num_layers
    return ceiling if is_usable else [numbers["distance_ceiling"]] * num_layers


def _mean(values: list) -> np.ndarray:
    """The mean of equal lists of numbers, of those that are not None; nan where there are none."""
    known = np.ma.masked_invalid(np.array(values, dtype=float))
    return np.ma.filled(known.mean(axis=0), np.nan)


@figures.drawing()
def draw_receptive_fields(analyses: dict[Row, Analysis]) -> Figure:
    """One picture of the input per row."""
    from matplotlib.colors import LogNorm

    rows = list(analyses)
    figure, panels = _panels(len(rows))
    for axes, row, label in zip(panels, rows, _labels(rows, "point"), strict=True):
        field = analyses[row].arrays["receptive_field"].astype(float)  # [h, w]
        field = np.ma.masked_equal(field / max(field.max(), 1e-30), 0)
        image = axes.imshow(field, norm=LogNorm(LOWEST, 1), cmap=COLORS, interpolation="nearest")
        axes.set_title(_wrapped(label), fontsize=8)
    look = {"shrink": 0.8, "format": "{x:g}", "label": "gradient, relative"}
    figure.colorbar(image, ax=panels, **look).ax.tick_params(labelsize=8)
    return figure


@figures.drawing()
def draw_maps(analyses: dict[Row, Analysis]) -> Figure:
    """A column per image: the image, then the map of each row."""
    rows = list(analyses)
    first = next(iter(analyses.values()))
    images = first.arrays["images"]  # [n, h, w, C]
    class_names = text.labels(first.numbers["class_names"], 14)

    figure = figures.new_figure(1.15 * len(images) + 1.6, 1.3 * (1 + len(rows)) + 0.2)
    panels = figure.subplots(1 + len(rows), len(images), squeeze=False)
    for axes, pixels, about in zip(panels[0], images, first.numbers["images"], strict=True):
        gray = {"cmap": "gray", "vmin": 0, "vmax": 255} if pixels.shape[-1] == 1 else {}
        axes.imshow(pixels.squeeze(), **gray, interpolation="nearest")
        axes.set_xlabel(class_names[about["label"]], fontsize=7)

    for line, row, label in zip(panels[1:], rows, _labels(rows, "point"), strict=True):
        maps = analyses[row].arrays["maps"].astype(float)  # [n, layers, heads, gh, gw]
        shown = analyses[row].numbers["images"]
        for axes, image_map, about in zip(line, maps[:, -1].mean(1), shown, strict=True):
            axes.imshow(image_map, vmin=0, cmap=COLORS, interpolation="nearest")
            axes.set_xlabel(class_names[about["prediction"]], fontsize=7)
        line[0].set_ylabel(_wrapped(label), fontsize=7, rotation=0, ha="right", va="center")
    for axes in panels.flat:
        _remove_ticks(axes)
    return figure


@figures.drawing()
def draw_classes(analyses: dict[Row, list[Analysis]]) -> Figure:
    """A point per class and row, mean over seeds."""
    rows = list(analyses)
    class_names = next(iter(analyses.values()))[0].numbers["class_names"]
    positions = np.arange(len(class_names))
    figure = figures.new_figure(max(6.4, 0.55 * len(class_names) + 1.5), 4.1)
    axes = figure.subplots()

    shifts = np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else [0.0]
    for (row, style), label, shift in zip(
        styles_of(rows).items(), _labels(rows), shifts, strict=True
    ):
        values = _mean([found.numbers["per_class_accuracy"] for found in analyses[row]])
        style |= {"linestyle": ""}
        axes.plot(positions + shift, values, **style, label=label, markersize=5)
    axes.set_xticks(positions, text.labels(class_names, 14), rotation=30, ha="right")
    figures.style_axes(axes, xlabel="class", ylabel="accuracy (%)")
    figures.add_legend_below(figure)
    return figure


# -------------------------------------------------------------------------------------------------


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """Square panels without ticks, `PANELS_PER_ROW` in a row."""
    num_columns = min(number, PANELS_PER_ROW)
    num_lines = math.ceil(number / num_columns)
    figure = figures.new_figure(PANEL * num_columns + 1, (PANEL + 0.3) * num_lines)
    panels = list(figure.subplots(num_lines, num_columns, squeeze=False).flat)
    for axes in panels[number:]:
        axes.remove()
    for axes in panels[:number]:
        _remove_ticks(axes)
    return figure, panels[:number]


def _remove_ticks(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _wrapped(label: str) -> str:
    """`2d_cardinal, step 1` on two lines."""
    return label.replace(", ", ",\n", 1)
