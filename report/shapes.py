"""2D shapes compared with 1D windows of as many neighbors, paired by seed.

A 2D shape and the 1D window with the same nominal number of neighbors do not have the same number
on average: the border takes more away from the shape. So the shape is also compared with a window
of its own average size. There is hardly ever a run of that, so its accuracy is read off the line
from the next smaller to the next larger window, over the logarithm of the number of neighbors.

Imports neither torch nor matplotlib.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

from report import statistics, table, text
from report.comparison import Study
from report.logs import Run
from report.results import Row
from report.statistics import Comparison

TITLE = "2D shapes against 1D windows"
TITLES = (
    *("shape", "neighbors, nominal", "neighbors, mean"),
    *("difference at the same nominal number, points", "p"),
    *("difference at the same mean number, points", "p"),
)
NOTE = (
    "Accuracy of the shape minus that of a 1D window with the same seed. First the window with the "
    "same nominal number of neighbors. Then a window with the same mean number, whose accuracy is "
    "interpolated, linearly in the logarithm of the number, between the next smaller and the next "
    "larger window; the interval does not cover the error of that. Mean and 95 % interval over n "
    "seeds; p of the paired t test, corrected by Holm's method within its column. A dash: no such "
    "windows have been trained, or too few seeds."
)


@dataclass(frozen=True, eq=False)
class AgainstWindows:
    """A 2D shape against 1D windows: accuracies, shape minus window, in percent."""

    row: Row
    at_nominal: Comparison | None
    at_mean: Comparison | None
    p_nominal: float | None  # both corrected for the number of shapes
    p_mean: float | None


def against_windows(results: Study) -> list[AgainstWindows]:
    """One for each 2D shape that has a window to be compared with."""
    finished = [row for row in results.distinct if row.done and row.num_neighbors_mean > 0]
    windows = [row for row in finished if row.mask.mask_type.startswith("1d_")]
    shapes = [row for row in finished if row.mask.mask_type.startswith("2d_")]

    at_nominal, at_mean = [], []
    for shape in shapes:
        alike = _comparable_windows(shape, windows)
        same = [row for row in alike if row.num_neighbors_nominal == shape.num_neighbors_nominal]
        at_nominal.append(_compare(shape, {row: 1.0 for row in same[:1]}))
        at_mean.append(_compare(shape, interpolation(shape.num_neighbors_mean, alike)))

    p_values = ([one.p if one else None for one in found] for found in (at_nominal, at_mean))
    p_nominal, p_mean = map(statistics.holm, p_values)
    found = map(AgainstWindows, shapes, at_nominal, at_mean, p_nominal, p_mean)
    return [shape for shape in found if shape.at_nominal or shape.at_mean]


def _comparable_windows(shape: Row, windows: list[Row]) -> list[Row]:
    """Windows that differ from the shape in nothing else, with as many common seeds as any."""
    given = operator.attrgetter("dilation", "edge", "global_layers")
    ours = _by_run(shape.done).keys()
    common = {
        window: len(ours & _by_run(window.done).keys())
        for window in windows
        if given(shape.mask) == given(window.mask)
    }
    most = max(common.values(), default=0)
    return [window for window, number in common.items() if number == most > 0]


def interpolation(number: float, windows: Iterable[Row]) -> dict[Row, float]:
    """The share of each window in one with `number` neighbors on average.

    {} if none is as small, or none as large.
    """
    windows = sorted(windows, key=lambda row: row.num_neighbors_mean)
    smaller = [row for row in windows if row.num_neighbors_mean <= number]
    larger = [row for row in windows if row.num_neighbors_mean >= number]
    if not smaller or not larger:
        return {}

    below, above = smaller[-1], larger[0]
    low, high = math.log(below.num_neighbors_mean), math.log(above.num_neighbors_mean)
    if low == high:
        return {below: 1.0}
    share = (math.log(number) - low) / (high - low)
    return {below: 1 - share, above: share}


def _compare(shape: Row, shares: dict[Row, float]) -> Comparison | None:
    """Over the seeds that the shape and all windows have under the same settings."""
    ours = _by_run(shape.done)
    theirs = [(_by_run(window.done), share) for window, share in shares.items()]
    keys = [key for key in ours if theirs and all(key in accuracies for accuracies, _ in theirs)]
    if not keys:
        return None

    expected = [math.fsum(share * accuracies[key] for accuracies, share in theirs) for key in keys]
    return statistics.compare_paired([ours[key] for key in keys], expected)


def _by_run(runs: Iterable[Run]) -> dict[tuple[int, str], float]:
    """(seed, settings) -> accuracy."""
    accuracies = {(run.seed, repr(run.compared_settings)): run.eval_accuracy for run in runs}
    return {key: value for key, value in accuracies.items() if value is not None}


# -------------------------------------------------------------------------------------------------
# As a table


def cells(found: AgainstWindows) -> list[str]:
    """A line of the table with the titles TITLES."""
    row = found.row
    return [
        text.one_line(row.label),
        f"{row.num_neighbors_nominal:.0f}",
        f"{row.num_neighbors_mean:.1f}",
        _difference(found.at_nominal),
        table.format_p(found.p_nominal),
        _difference(found.at_mean),
        table.format_p(found.p_mean),
    ]


def _difference(found: Comparison | None) -> str:
    written = table.format_difference(found)
    return written if found is None or found.interval is None else f"{written}, n = {found.n}"
