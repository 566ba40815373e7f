"""The answer in a few sentences of plain text, made from the numbers."""

from __future__ import annotations

import math

from report import comparison, statistics
from report.comparison import (
    SIGNIFICANT,
    AgainstFull,
    Study,
    describe_difference,
    format_interval,
    format_p,
    format_ratio,
    name_of,
)
from report.logs import Run
from report.results import Row
from report.statistics import Interval

POWER = 0.8  # of the differences that are called detectable


def sentences(results: Study) -> list[str]:
    """What the runs say, in a few sentences; "cannot tell" where that is the truth."""
    if not results.against_full:
        return [_why_no_answer(results.rows)]

    compared = list(results.against_full.values())
    # A pattern with one lucky seed must not hide those that several seeds have measured.
    measured = [found for found in compared if found.accuracies.interval is not None] or compared
    best = max(measured, key=lambda found: found.accuracies.mean)
    which = "" if len(measured) == len(compared) else " with a measure of chance"
    together = comparison.all_together(results)
    said = [] if together is None else [_contrast_sentence(together, len(compared))]
    said.append(_accuracy_sentence(best, len(measured), which))
    if best.accuracies.interval is not None and not best.is_significant:
        said += _clearer_sentences(measured)
    if best.speed is not None:
        said.append(_speed_sentence(best))

    fastest = max((found for found in compared if found.speed), key=lambda x: x.speed, default=None)
    if fastest is not None and fastest.speed > (best.speed or 0.0):
        said.append(
            f"The fastest is {name_of(fastest.row)}: {format_ratio(fastest.speed)} the images/s of "
            f"full attention{_range_of_speeds(fastest)}, "
            f"at {describe_difference(fastest.accuracies)}."
        )

    limit = limit_of(results)
    if limit is not None:
        said.append(limit)
    return said


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


def _contrast_sentence(found: statistics.Comparison, num_patterns: int) -> str:
    who = f"The mean of all {num_patterns} local patterns"
    evidence = (
        f"95% interval {format_interval(found.interval)}, n = {found.n} seeds, "
        f"p = {format_p(found.p)}"
    )
    if found.p > SIGNIFICANT:
        return (
            f"{who} cannot be told from full attention: it differs by "
            f"{describe_difference(found)} ({evidence})."
        )
    verb = "gains" if found.mean > 0 else "loses"
    return f"{who} {verb} {abs(found.mean):.2f} points against full attention ({evidence})."


def _accuracy_sentence(best: AgainstFull, num_compared: int, which: str = "") -> str:
    """`which` says what the compared patterns have in common, if not all are among them."""
    found = best.accuracies
    who = name_of(best.row)
    if num_compared > 1:
        who += f", the most accurate of {num_compared} local patterns{which},"
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
    if num_compared > 1:  # the interval is not corrected, and may leave 0 out where p is large
        interval += " for this pattern by itself"
        corrected += " after Holm's correction"
    evidence = f"95% interval {interval}, n = {found.n} seeds{corrected}"
    if not best.is_significant:
        return (
            f"Cannot tell whether {who} is more or less accurate than full attention: it differs "
            f"by {describe_difference(found)} ({evidence})."
        )
    verb = "gains" if found.mean > 0 else "loses"
    return f"{who} {verb} {abs(found.mean):.2f} points against full attention ({evidence})."


def _clearer_sentences(compared: list[AgainstFull]) -> list[str]:
    """What can be told of other patterns where the most accurate one scatters too much."""
    clear = [found for found in compared if found.is_significant]
    gains = [found for found in clear if found.accuracies.mean > 0]
    num_losses = len(clear) - len(gains)

    sentences = []
    if gains:
        best = max(gains, key=lambda found: found.accuracies.mean)
        sentences.append(
            f"Clearer is {name_of(best.row)}: it gains {best.accuracies.mean:.2f} points "
            f"(n = {best.accuracies.n} seeds, p = {format_p(best.p_holm)} after Holm's correction)."
        )
    if num_losses:
        verb = "loses" if num_losses == 1 else "lose"
        sentences.append(
            f"{num_losses} of {len(compared)} local patterns {verb} accuracy against full "
            f"attention (p at most {SIGNIFICANT} after Holm's correction)."
        )
    return sentences


def _chance_of_images(single: AgainstFull) -> str:
    """How far one run's accuracy is uncertain because of its images, which is not the seed's."""
    row, (seed,) = single.row, single.seeds
    run = next(run for run in row.done if run.seed == seed)
    interval = interval_of_images(run, row.num_images_evaluated)
    if interval is None:
        return ""
    return (
        f" Of its accuracy, {run.eval_accuracy:.1f} %, the {row.num_images_evaluated:,} images "
        f"alone leave {interval.low:.1f} to {interval.high:.1f} % open (95 %, binomial), and "
        "another seed would give another model."
    )


def interval_of_images(run: Run, num_images: float | None) -> Interval | None:
    """The binomial interval of a run's accuracy, in percent; None if a number is missing."""
    accuracy = run.eval_accuracy
    if accuracy is None or not 0 <= accuracy <= 100:
        return None
    if not isinstance(num_images, int) or num_images < 1:
        return None
    return statistics.proportion_interval(round(accuracy * num_images / 100), num_images)


def _speed_sentence(best: AgainstFull) -> str:
    ratio = format_ratio(best.speed)
    return f"It trains at {ratio} the images/s of full attention{_range_of_speeds(best)}."


def _range_of_speeds(found: AgainstFull) -> str:
    low, high = f"{min(found.speeds):.2f}", f"{max(found.speeds):.2f}"
    return f" ({low} to {high} from seed to seed)" if low != high else ""


def limit_of(results: Study) -> str | None:
    """Which differences so few seeds cannot show; None where there is no measure of chance."""
    squares_of_all, sizes = [], []
    for found in results.against_full.values():
        if found.accuracies.interval is not None:
            mean, n = found.accuracies.mean, found.accuracies.n
            squares = [(x - mean) ** 2 for x in found.accuracies.differences]
            squares_of_all += squares
            sizes.append(n)
    if not sizes:
        return None

    n = min(sizes)
    std = math.sqrt(math.fsum(squares_of_all) / math.fsum(size - 1 for size in sizes))
    level = 1 - SIGNIFICANT / len(results.against_full)  # what Holm asks of the first
    smallest = statistics.detectable_difference(std, n, POWER, level)
    after = " after Holm's correction" if len(results.against_full) > 1 else ""
    return (
        f"What this cannot show: paired differences scatter by {std:.2f} points between seeds, so "
        f"{n} seeds would overlook a true difference of one pattern below {smallest:.1f} points "
        f"more often than one time in five{after}."
    )
