"""Rows compared with full attention, paired by seed.

A run is compared with the run of full attention that has its seed and all of its settings but the
mask. Rows with the same mask on this grid count once. Imports neither torch nor matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from report import statistics, text
from report.logs import Run
from report.results import Row, is_grid
from report.statistics import Interval

SIGNIFICANT = 0.05


@dataclass(frozen=True, eq=False)
class AgainstFull:
    """A row against full attention: accuracies are paired by seed, row minus full, in percent."""

    row: Row
    seeds: tuple[int, ...]
    accuracies: statistics.Comparison
    p_holm: float | None  # the p of the t test, corrected for the number of masks
    # (its images/s, those of full attention) for each seed; empty where they are not comparable
    rates: tuple[tuple[float, float], ...]

    @property
    def speed(self) -> float | None:
        """The mean of its images/s over that of full attention; None if not comparable."""
        if not self.rates:
            return None
        local, full = zip(*self.rates, strict=True)
        return math.fsum(local) / math.fsum(full)

    @property
    def speeds(self) -> list[float]:
        """The same for each seed."""
        return [local / full for local, full in self.rates]

    @property
    def is_significant(self) -> bool:
        return self.p_holm is not None and self.p_holm <= SIGNIFICANT


@dataclass(frozen=True, eq=False)
class Study:
    """All rows of a table, and what follows from them."""

    rows: list[Row]
    same_as: dict[Row, Row]  # a row -> the row before it that stands for the same mask
    against_full: dict[Row, AgainstFull]

    @property
    def distinct(self) -> list[Row]:
        """One row per mask."""
        return [row for row in self.rows if row not in self.same_as]


def study(rows: list[Row]) -> Study:
    """Compare the rows of one table, as made by `results.group_by_pattern`."""
    same_as = find_same_masks(rows)
    pairs = {}
    for row in rows:
        if row.mask.mask_type != "full" and row not in same_as:
            found = _pair_with_full(row, rows)
            if found:
                pairs[row] = found

    compared = {}
    for row, found in pairs.items():
        local, full = zip(*found, strict=True)
        accuracies = ([run.eval_accuracy for run in runs] for runs in (local, full))
        compared[row] = statistics.compare_paired(*accuracies)

    corrected = statistics.holm([comparison.p for comparison in compared.values()])
    p_holm = dict(zip(compared, corrected, strict=True))

    against_full = {}
    for row, found in pairs.items():
        against_full[row] = AgainstFull(
            row=row,
            seeds=tuple(run.seed for run, _ in found),
            accuracies=compared[row],
            p_holm=p_holm[row],
            rates=_comparable_rates(found),
        )
    return Study(rows, same_as, against_full)


def all_together(results: Study) -> statistics.Comparison | None:
    """The mean of all local patterns minus full attention, over the seeds that all have.

    One question, so that nothing has to be corrected for. None for a single pattern, for patterns
    of several settings, and where there is no measure of chance.
    """
    compared = results.against_full
    settings = {repr(row.runs[0].compared_settings) for row in compared}
    if len(compared) < 2 or len(settings) > 1:
        return None

    by_seed = [
        dict(zip(found.seeds, found.accuracies.differences, strict=True))
        for found in compared.values()
    ]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    if len(seeds) < 2:
        return None
    means = [math.fsum(found[seed] for found in by_seed) / len(by_seed) for seed in seeds]
    found = statistics.compare_paired(means, [0.0] * len(means))
    return None if found.interval is None else found


def find_same_masks(rows: Iterable[Row]) -> dict[Row, Row]:
    """Rows whose mask on the grid equals that of another row, which stands for both.

    That is full attention if it has results, so that it is never compared with itself under another
    name; else the row with the most results. Runs with a name of their own are left out: somebody
    wanted them apart.
    """
    groups = {}
    for row in rows:
        first = row.runs[0]
        grid = first.config["attention"].get("grid")
        if row.is_named_by_default and row.mask.is_known and is_grid(grid):
            key = (row.mask.identity(*grid), tuple(grid), repr(first.compared_settings))
            groups.setdefault(key, []).append(row)

    same_as = {}
    for members in groups.values():
        chosen = max(members, key=_standing)  # the first of several
        same_as |= {row: chosen for row in members if row is not chosen}
    return same_as


def _standing(row: Row) -> tuple[bool, int]:
    """Full attention, if there is a result of it, must stay what the others are compared with."""
    return row.mask.mask_type == "full" and bool(row.done), len(row.done)


def _pair_with_full(row: Row, rows: list[Row]) -> list[tuple[Run, Run]]:
    """The finished runs of a row, each with its counterpart of full attention."""
    counterparts = {}
    for other in rows:
        if other.mask.mask_type == "full":
            for run in other.done:
                key = (run.seed, repr(run.compared_settings))
                # Of several, those under the default name.
                if key not in counterparts or other.is_named_by_default:
                    counterparts[key] = run

    pairs = []
    for run in row.done:
        full = counterparts.get((run.seed, repr(run.compared_settings)))
        if full is not None and None not in (run.eval_accuracy, full.eval_accuracy):
            pairs.append((run, full))
    return pairs


def _comparable_rates(pairs: list[tuple[Run, Run]]) -> tuple[tuple[float, float], ...]:
    """The images/s of each pair; () unless all were measured under the same conditions."""
    conditions = [run.speed_conditions for pair in pairs for run in pair]
    rates = tuple((local.images_per_second, full.images_per_second) for local, full in pairs)
    are_alike = all(other == conditions[0] for other in conditions)
    return rates if are_alike and all(map(all, rates)) else ()


# -------------------------------------------------------------------------------------------------
# Words and numbers


def name_of(row: Row) -> str:
    return text.one_line(row.label)


def describe_difference(found: statistics.Comparison) -> str:
    """`+1.20 points`."""
    return f"{found.mean:+.2f} points"


def format_interval(interval: Interval) -> str:
    return f"{interval.low:+.2f} to {interval.high:+.2f}"


def format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_ratio(ratio: float) -> str:
    return f"{ratio:.2f} times"
