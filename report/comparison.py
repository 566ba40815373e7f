"""Rows compared with full attention, and the answer in a few sentences.

A run is compared with the run of full attention that has its seed and all of its settings but the
mask. Rows with the same mask on this grid count once. Imports neither torch nor matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from report import statistics, text
from report.results import Row, Run, is_grid
from report.statistics import Interval

SIGNIFICANT = 0.05
POWER = 0.8  # of the differences that are called detectable


@dataclass(frozen=True, eq=False)
class AgainstFull:
    """A row against full attention: accuracies are paired by seed, row minus full, in percent."""

    row: Row
    seeds: tuple[int, ...]
    accuracies: statistics.Comparison
    p_holm: float | None  # the p of the t test, corrected for the number of masks
    speed: float | None  # images/s over those of full attention, on the same device

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

    tested = [row for row, comparison in compared.items() if comparison.p is not None]
    corrected = statistics.holm([compared[row].p for row in tested])
    p_holm = dict(zip(tested, corrected, strict=True))

    against_full = {}
    for row, found in pairs.items():
        against_full[row] = AgainstFull(
            row=row,
            seeds=tuple(run.seed for run, _ in found),
            accuracies=compared[row],
            p_holm=p_holm.get(row),
            speed=_relative_speed(found),
        )
    return Study(rows, same_as, against_full)


def find_same_masks(rows: Iterable[Row]) -> dict[Row, Row]:
    """Rows whose mask on the grid equals that of another row, which has at least as many results.

    Runs with a name of their own are left out: somebody wanted them apart.
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


def _relative_speed(pairs: list[tuple[Run, Run]]) -> float | None:
    """The mean throughput over that of full attention; None if it is not comparable."""
    places = {
        (run.config["provenance"].get("device"), run.settings.machine.grad_accumulation)
        for pair in pairs
        for run in pair
    }
    local, full = zip(*pairs, strict=True)
    rates = [[run.images_per_second for run in runs] for runs in (local, full)]
    if len(places) > 1 or any(not rate for rate in (*rates[0], *rates[1])):
        return None
    return math.fsum(rates[0]) / math.fsum(rates[1])


# -------------------------------------------------------------------------------------------------
# The answer


def answer(results: Study) -> list[str]:
    """What the runs say, in a few sentences; "cannot tell" where that is the truth."""
    if not results.against_full:
        return [_why_no_answer(results.rows)]

    compared = list(results.against_full.values())
    best = max(compared, key=lambda found: found.accuracies.mean)
    sentences = [_accuracy_sentence(best, len(compared))]
    if best.speed is not None:
        sentences.append(_speed_sentence(best))

    fastest = max((found for found in compared if found.speed), key=lambda x: x.speed, default=None)
    if fastest is not None and fastest.speed > (best.speed or 0.0):
        sentences.append(
            f"The fastest is {name_of(fastest.row)}: {format_ratio(fastest.speed)} the images/s of "
            f"full attention, at {describe_difference(fastest.accuracies)}."
        )

    limit = limit_of(results)
    if limit is not None:
        sentences.append(limit)
    return sentences


def _why_no_answer(rows: list[Row]) -> str:
    full = [row for row in rows if row.mask.mask_type == "full"]
    if not any(row.done for row in full):
        return "No answer yet: there is no finished run of full attention to compare with."
    if not any(row.done for row in rows if row not in full):
        return "No answer yet: there is no finished run of a local pattern to compare."
    return (
        "Cannot tell: no finished run of a local pattern has the seed and the settings of a "
        "finished run of full attention."
    )


def _accuracy_sentence(best: AgainstFull, num_compared: int) -> str:
    found = best.accuracies
    who = name_of(best.row)
    if num_compared > 1:
        who += f", the most accurate of {num_compared} local patterns,"
    if found.n == 1:
        return (
            f"Cannot tell: with one seed there is no measure of chance. {who} is at "
            f"{describe_difference(found)} from full attention.{_chance_of_images(best)}"
        )
    if found.interval is None:
        return (
            f"Cannot tell: {who} is at {describe_difference(found)} from full attention for each "
            f"of {found.n} seeds, which leaves no measure of chance."
        )

    interval = format_interval(found.interval)
    corrected = f", p = {format_p(best.p_holm)}"
    if num_compared > 1:
        corrected += " after Holm's correction"
    evidence = f"95% interval {interval}, n = {found.n} seeds{corrected}"
    if not best.is_significant:
        return (
            f"Cannot tell whether local attention is more or less accurate than full attention: "
            f"{who} differs by {describe_difference(found)} ({evidence})."
        )
    verb = "gains" if found.mean > 0 else "loses"
    return f"{who} {verb} {abs(found.mean):.2f} points against full attention ({evidence})."


def _chance_of_images(found: AgainstFull) -> str:
    """How far one run's accuracy is uncertain because of its images, which is not the seed's."""
    (run,) = (run for run in found.row.done if run.seed == found.seeds[0])
    accuracy, num_images = run.eval_accuracy, found.row.num_images_evaluated
    if not isinstance(num_images, int) or num_images < 1 or not 0 <= accuracy <= 100:
        return ""
    num_correct = round(accuracy * num_images / 100)
    low, high, _ = statistics.proportion_interval(num_correct, num_images)
    return (
        f" Of its accuracy, {accuracy:.1f} %, the {num_images:,} images alone leave {low:.1f} to "
        f"{high:.1f} % open (95 %, binomial), and another seed would give another model."
    )


def _speed_sentence(best: AgainstFull) -> str:
    return f"It trains at {format_ratio(best.speed)} the images/s of full attention."


def limit_of(results: Study) -> str | None:
    """Which differences so few seeds cannot show; None where there is no measure of chance."""
    variances, sizes = [], []
    for found in results.against_full.values():
        if found.accuracies.interval is not None:
            mean, n = found.accuracies.mean, found.accuracies.n
            squares = [(x - mean) ** 2 for x in found.accuracies.differences]
            variances.append(math.fsum(squares) / (n - 1))
            sizes.append(n)
    if not variances:
        return None

    n = max(sizes)
    std = math.sqrt(math.fsum(variances) / len(variances))
    smallest = statistics.detectable_difference(std, n, POWER)
    return (
        f"What this cannot show: paired differences scatter by {std:.2f} points between seeds, so "
        f"{n} seeds would overlook a true difference below {smallest:.1f} points more often than "
        "one time in five."
    )


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
