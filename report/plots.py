"""Which plots there are, with their titles and captions. Imports no matplotlib."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from report import charts, curves
from report.comparison import Study
from report.logs import Run
from report.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRADE_OFF = "Speed and accuracy"
NEIGHBORS = "Accuracy and neighbors"
TRAINING = "Training"

CURVES = (
    "Line: mean over the seeds that have reached the epoch; band: from the lowest seed to the "
    "highest. Training values are averages over the epoch while the weights change, with "
    "augmentation, dropout and label smoothing if they are on; {split} values are measured without "
    "them after the epoch. {n}."
)
SECONDS = (
    "Against training time, without evaluations; comparable only between undisturbed runs on one "
    "device. Time and accuracy are means over the finished seeds, at equal shares of their "
    "training. Band: from the lowest seed to the highest. {n}."
)
GAP = (
    "Above zero, a model does better on the images that it trains on than on others; augmentation, "
    "dropout and label smoothing in training push it below. Band: from the lowest seed to the "
    "highest. {n}."
)
POINTS = (
    "The number in a marker is the expansion step; the dashed line is full attention. Bars: ± one "
    "sample standard deviation over finished seeds. {n_finished}."
)
BUDGET = "Patterns are matched by this number: those above one another have the same budget. "
MEAN = (
    "Over all patches of the grid and all layers. Truncated at the border, a 2D shape loses more "
    "than a 1D window. "
)
FRONT = (
    "The light line joins the patterns that no other beats in both, the Pareto front. Throughput "
    "counts training images, without the first epoch. "
)


@dataclass(frozen=True)
class Plot:
    section: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def choose(results: Study) -> dict[str, Plot]:
    """The plots for which there is data, by file name without suffix.

    Rows of one and the same mask are drawn once.
    """
    rows = results.distinct
    measured = [row for row in rows if row.accuracy is not None]
    timed = [row for row in measured if row.throughput is not None]
    fill = {
        "split": charts.name_of_split("eval", rows),
        "n": describe_n(started_runs(rows)),
        "n_finished": describe_n(row.done for row in measured),
    }
    plots = {}

    def add(name: str, section: str, title: str, caption: str, draw: Callable, *args) -> None:
        plots[name] = Plot(section, title, caption.format(**fill), functools.partial(draw, *args))

    if timed:
        draw = charts.draw_accuracy_vs_throughput
        caption = FRONT + POINTS
        add(
            "accuracy_vs_throughput", TRADE_OFF, "Accuracy against throughput", caption, draw, timed
        )
    if any(row.curve("eval_accuracy", "seconds") for row in rows):
        draw = functools.partial(curves.draw_curves, rows, "accuracy", "seconds")
        add("accuracy_over_time", TRADE_OFF, "Accuracy against training time", SECONDS, draw)

    if measured:
        draw = charts.draw_accuracy_vs_neighbors
        for name, title, caption, nominal in (
            ("accuracy_vs_budget", "Accuracy at matched budget", BUDGET, True),
            ("accuracy_vs_neighbors", "Accuracy against neighbors", MEAN, False),
        ):
            add(name, NEIGHBORS, title, caption + POINTS, draw, measured, nominal)

    for kind in curves.UNITS:
        if any(row.curve(f"{split}_{kind}") for row in rows for split in charts.SPLITS):
            title = f"{kind.capitalize()} during training"
            add(f"{kind}_curves", TRAINING, title, CURVES, curves.draw_curves, rows, kind)
    if any(row.curve("gap_accuracy") for row in rows):
        add("generalization_gap", TRAINING, "Generalization gap", GAP, curves.draw_gap, rows)
    return plots


def started_runs(rows: Iterable[Row]) -> list[Sequence[Run]]:
    """The runs of each row that have an epoch, finished or not."""
    started = [[run for run in row.runs if run.metrics] for row in rows]
    return [runs for runs in started if runs]


def describe_n(runs: Iterable[Sequence[Run]]) -> str:
    """`n = 3 seeds per pattern`, from the runs of each pattern."""
    numbers = sorted({len(members) for members in runs}) or [0]
    if numbers == [1]:
        return "n = 1 seed per pattern"
    is_range = len(numbers) > 1
    return f"n = {in_range(numbers)} seeds" + ("" if is_range else " per pattern")


def in_range(numbers: Iterable[int]) -> str:
    """`1 to 1,000`, or `3` if all are the same."""
    few, many = min(numbers), max(numbers)
    return f"{many:,}" if few == many else f"{few:,} to {many:,}"
