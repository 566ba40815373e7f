"""Curves of training: accuracy and loss over epochs or seconds, and the generalization gap.

Like `charts`, every function takes at least one row and returns a figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from report import figures, text
from report.charts import (
    MAX_COLUMNS,
    MAX_FULL,
    MAX_NAMED,
    REFERENCE,
    SPLITS,
    are_full,
    by_family,
    most_accurate,
    name_of_split,
    styles_of,
)
from report.logs import GAPS
from report.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CROWDED = 6  # with more curves than this, each family of masks gets panels of its own
PANELS_PER_ROW = 4
PANEL_WIDTH = 2.5  # inches, or as wide as its legend
MARKERS_PER_CURVE = 8
NOT_NAMED = {"color": "#DDDDDD", "linewidth": 0.7, "zorder": 1}

UNITS = {"accuracy": "%", "loss": "nats"}
X_LABELS = {"epoch": "epoch", "seconds": "training time (s)"}


@dataclass(frozen=True)
class Subject:
    """What a pair of panels shows: a metric in each, over `epoch` or `seconds`."""

    metrics: tuple[str, str]
    ylabels: tuple[str, str]
    over: str = "epoch"
    shares_y: bool = True

    def style(self, pair: tuple[Axes, Axes]) -> None:
        for axes, ylabel in zip(pair, self.ylabels, strict=True):
            figures.style_axes(axes, xlabel=X_LABELS[self.over], ylabel=ylabel)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlim(left=0)


@figures.drawing()
def draw_curves(rows: list[Row], kind: str, over: str = "epoch") -> Figure:
    """Test and training `accuracy` or `loss` over each `epoch`, or over the `seconds` passed."""
    metrics = tuple(f"{split}_{kind}" for split in SPLITS)
    ylabels = tuple(f"{name_of_split(split, rows)} {kind} ({UNITS[kind]})" for split in SPLITS)
    return _draw(rows, Subject(metrics, ylabels, over))


@figures.drawing()
def draw_gap(rows: list[Row]) -> Figure:
    """How much better a model is on the images that it trains on, over epochs."""
    test = name_of_split("eval", rows)
    ylabels = (f"training − {test} accuracy (points)", f"{test} − training loss (nats)")
    return _draw(rows, Subject(GAPS, ylabels, shares_y=False))


def _draw(rows: list[Row], subject: Subject) -> Figure:
    """Few runs share one pair of panels; otherwise each family of masks gets its own pair."""
    groups = by_family(rows)
    if len(rows) <= CROWDED or len(groups) == 1 or all(map(are_full, groups.values())):
        return _draw_curves_together(rows, subject)
    return _draw_curves_by_family(groups, subject)


def _draw_curves_together(rows: list[Row], subject: Subject) -> Figure:
    figure = figures.new_figure(8.4, 3.7)
    pair = figure.subplots(1, 2, sharex=True, sharey=subject.shares_y)

    named = most_accurate(rows, MAX_NAMED)
    names = text.labels([row.label for row in named], MAX_COLUMNS["legend"])
    _draw_rows(pair, rows, subject, dict(zip(named, names, strict=True)))

    subject.style(pair)
    figures.add_legend_below(figure, title=_note_on_names(named, rows))
    return figure


def _draw_curves_by_family(groups: dict[str, list[Row]], subject: Subject) -> Figure:
    """Full attention is in each pair of panels, for comparison."""
    full = [row for rows in groups.values() if are_full(rows) for row in rows]
    groups = {family: rows for family, rows in groups.items() if not are_full(rows)}
    figure, pairs = _pairs_of_panels(len(groups), subject.shares_y)

    legends = []
    for number, (family, rows) in enumerate(groups.items()):
        pair = pairs[number]
        title = _draw_family(pair, rows, full, subject)

        subject.style(pair)
        pair[0].set_title(text.label(family, figures.WIDTHS["panel"]), fontsize=10)
        pair[0].set_xlabel("")
        pair[1].tick_params(labelbottom=True)  # even if other panels follow below
        if number % PANELS_PER_ROW:
            pair[0].set_ylabel("")
            pair[1].set_ylabel("")

        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22)}
        legends.append(figures.add_legend(pair[1], PANEL_WIDTH, columns=2, title=title, **below))
    _grow_by_legends(figure, legends)
    return figure


def _draw_family(
    pair: tuple[Axes, Axes], rows: list[Row], full: list[Row], subject: Subject
) -> str:
    """Draw the rows of one family in front of full attention; returns notes for the legend."""
    reference = most_accurate(full, MAX_FULL)
    named = most_accurate(rows, MAX_NAMED)
    short_labels = [row.short_label for row in [*reference, *named]]
    names = text.labels(short_labels, MAX_COLUMNS["panel"])
    name_of = dict(zip([*reference, *named], names, strict=True))

    for row, style in styles_of(reference).items():
        style |= {"color": REFERENCE, "marker": ""}
        _draw_row(pair, row, subject, style, name_of[row])
    _draw_rows(pair, rows, subject, {row: name_of[row] for row in named})

    notes = [_note_on_names(named, rows)]
    if len(full) > MAX_FULL:
        notes.append(f"{MAX_FULL} of {len(full)} runs of full shown,\nthe most accurate")
    return "\n".join(filter(None, notes))


def _pairs_of_panels(num_pairs: int, shares_y: bool) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Pairs of panels, one above the other, `PANELS_PER_ROW` pairs in a row, with shared axes."""
    num_columns = min(num_pairs, PANELS_PER_ROW)
    num_blocks = math.ceil(num_pairs / PANELS_PER_ROW)
    figure = figures.new_figure(PANEL_WIDTH * num_columns + 0.5, 4.8 * num_blocks)
    shape = (2 * num_blocks, num_columns)
    # Within a line of panels at least, so that patterns can be compared.
    sharey = True if shares_y else "row"
    panels = figure.subplots(*shape, sharex=True, sharey=sharey, squeeze=False)

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


def _draw_rows(
    pair: tuple[Axes, Axes], rows: list[Row], subject: Subject, names: dict[Row, str]
) -> None:
    """Draw rows that have a name in a style of their own, the others in gray behind them."""
    styles = styles_of(list(names))
    for number, (row, name) in enumerate(names.items()):
        _draw_row(pair, row, subject, styles[row], name, number)

    for row in rows:
        if row not in names:
            for axes, metric in zip(pair, subject.metrics, strict=True):
                points = row.curve(metric, subject.over)
                epochs = [point[0] for point in points]
                means = [point[1] for point in points]
                axes.plot(epochs, means, **NOT_NAMED)


def _draw_row(
    pair: tuple[Axes, Axes], row: Row, subject: Subject, style: dict, label: str, number: int = 0
) -> None:
    """Draw a row's mean over seeds, and a band from the lowest seed to the highest.

    The `number` of a row shifts its markers so that those of several rows don't coincide.
    """
    for axes, metric in zip(pair, subject.metrics, strict=True):
        points = row.curve(metric, subject.over)
        epochs, means, lows, highs = zip(*points, strict=True) if points else ([], [], [], [])
        stride = max(1, math.ceil(len(points) / MARKERS_PER_CURVE))
        look = {"linewidth": 1.5, "markersize": 4.5, "markevery": (number % stride, stride)}
        axes.plot(epochs, means, **style, **look, label=label)
        if lows != highs:
            axes.fill_between(epochs, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
