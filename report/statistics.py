"""Intervals and tests for comparing runs. Accuracies and their differences are in percent.

Two kinds of chance are kept apart. Training again with another seed gives another model: that is
what `mean_interval` and `compare_paired` are about, over seeds. Testing one model on other images
gives another accuracy: `proportion_interval` and `mcnemar`, over images.

scipy is imported when it is needed, as it takes longer than `plot_result.py --help`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
MIN_FOR_BOOTSTRAP = 8  # values; with fewer, a bootstrap interval covers far less than it says
NUM_RESAMPLES = 9_999


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float
    level: float = LEVEL

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


# -------------------------------------------------------------------------------------------------
# Over seeds


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Student's t interval for the mean of independent values.

    None for fewer than two values, and for values without any spread: as many equal accuracies are
    an accident of few test images, not a proof of no noise.
    """
    from scipy import stats

    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return Interval(float(values.mean() - half), float(values.mean() + half), level)


@dataclass(frozen=True)
class Comparison:
    """Paired differences, first minus second, one for each seed that both have."""

    differences: tuple[float, ...]
    interval: Interval | None  # of the mean, by Student's t
    p: float | None  # of Student's t test that the mean is 0
    p_permutation: float  # of the exact test that flips signs: at least 2 / 2^n
    bootstrap: Interval | None  # of the mean, bias-corrected; None for too few seeds

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float:
        return math.fsum(self.differences) / self.n


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare two settings, given their accuracies in the same order of seeds.

    With one pair there are no intervals and no `p`. Raises ValueError without pairs.
    """
    from scipy import stats

    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"expected pairs, got {len(first)} and {len(second)} values")

    # Accuracies are ratios of whole numbers. Rounding makes equal differences equal again.
    differences = np.subtract(first, second, dtype=float).round(9)
    interval = mean_interval(differences)
    p = None if interval is None else float(stats.ttest_1samp(differences, 0).pvalue)
    return Comparison(
        differences=tuple(differences.tolist()),
        interval=interval,
        p=p,
        p_permutation=_flip_signs(differences),
        bootstrap=_bootstrap(differences),
    )


def _flip_signs(differences: np.ndarray) -> float:
    """Two-sided p of the mean if each difference were as likely to have the other sign.

    Exact up to 13 pairs, else from random flips. (Fisher 1935, The Design of Experiments, §21.)
    """
    from scipy import stats

    if len(differences) == 1:  # both signs are equally far from 0
        return 1.0
    options = {"permutation_type": "samples", "n_resamples": NUM_RESAMPLES, "rng": 0}
    return float(stats.permutation_test((differences,), np.mean, **options).pvalue)


def _bootstrap(differences: np.ndarray) -> Interval | None:
    """The BCa interval of the mean (Efron 1987); None for too few values."""
    from scipy import stats

    if len(differences) < MIN_FOR_BOOTSTRAP or np.ptp(differences) == 0:
        return None
    options = {"n_resamples": NUM_RESAMPLES, "confidence_level": LEVEL, "rng": 0}
    found = stats.bootstrap((differences,), np.mean, **options).confidence_interval
    return Interval(float(found.low), float(found.high))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number, in the same order (Holm 1979).

    Rejecting those of at most 0.05 rejects any true hypothesis with at most 5 % probability. None
    stands for a test that could not be made: it stays, and counts like one with a large p.
    """
    made = [index for index, p in enumerate(p_values) if p is not None]
    made.sort(key=lambda index: p_values[index])

    corrected, largest = [None] * len(p_values), 0.0
    for rank, index in enumerate(made):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected


def detectable_difference(std: float, n: int, power: float = 0.8, level: float = LEVEL) -> float:
    """The smallest true mean that a two-sided t test finds with this probability.

    `std` is the standard deviation of the `n` >= 2 values. Solved with the noncentral t
    distribution (Cohen 1988, Statistical Power Analysis, chapter 2).
    """
    from scipy import optimize, stats

    critical = stats.t.ppf((1 + level) / 2, n - 1)

    def missing_power(shift: float) -> float:
        # The other tail, significant with the wrong sign, is negligible where this is zero.
        return stats.nct.sf(critical, n - 1, shift) - power

    shift = optimize.brentq(missing_power, 0, 10 * critical)
    return float(shift * std / math.sqrt(n))


# -------------------------------------------------------------------------------------------------
# Over images


def proportion_interval(num_correct: int, num_images: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval for the accuracy of one model on images like these, in percent."""
    from scipy import stats

    found = stats.binomtest(num_correct, num_images).proportion_ci(level, method="wilson")
    return Interval(100 * found.low, 100 * found.high, level)


@dataclass(frozen=True)
class McNemar:
    """Two models on the same images."""

    only_first: int  # images that only the first classifies correctly
    only_second: int
    num_images: int
    difference: float  # of the accuracies, first minus second, in percentage points
    interval: Interval  # of that difference
    p: float


def mcnemar(only_first: int, only_second: int, num_images: int, level: float = LEVEL) -> McNemar:
    """Whether two models differ in accuracy, from the images on which just one is right.

    The exact test of McNemar (1947): under equal accuracies these are a fair coin's tosses. The
    interval is the adjusted Wald interval of Bonett and Price (2012), which counts one image more
    on either side.
    """
    from scipy import stats

    num_differing = only_first + only_second
    p = stats.binomtest(only_first, num_differing).pvalue if num_differing else 1.0

    first, second = (only_first + 1) / (num_images + 2), (only_second + 1) / (num_images + 2)
    center = first - second
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(
        (first + second - center**2) / (num_images + 2)
    )
    low, high = max(-1.0, float(center - half)), min(1.0, float(center + half))
    return McNemar(
        only_first=only_first,
        only_second=only_second,
        num_images=num_images,
        difference=100 * (only_first - only_second) / num_images,
        interval=Interval(100 * low, 100 * high, level),
        p=float(p),
    )
