"""Intervals and tests for accuracies on the same test images."""

from __future__ import annotations

from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A confidence interval; in percent, or percentage points for differences."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class McNemar:
    """Two models on the same images: how many only one of them gets right, and what that means."""

    only_first: int
    only_second: int
    num_images: int
    difference: float  # of the accuracies, first minus second, in percentage points
    interval: Interval  # of the difference, in percentage points
    p: float  # exact, two-sided


def proportion_interval(num_correct: int, num_images: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of an accuracy, in percent (Wilson 1927, JASA 22:209)."""
    from scipy import stats  # deferred: takes longer than a script's --help

    found = stats.binomtest(num_correct, num_images).proportion_ci(level, method="wilson")
    return Interval(100 * float(found.low), 100 * float(found.high), level)


def mcnemar(only_a: int, only_b: int, num_images: int) -> McNemar:
    """McNemar's exact test of whether two models are right equally often on the same images.

    `only_a` images only the first model gets right, `only_b` only the second. The interval of the
    difference is Tango's score interval for paired proportions (Tango 1998, Statistics in Medicine
    17:891), as given by Fagerland et al. (2014, section 5.5).
    """
    from scipy import stats

    discordant = only_a + only_b
    p = stats.binomtest(only_a, discordant).pvalue if discordant else 1.0
    difference = 100 * (only_a - only_b) / num_images
    low, high = _tango_interval(only_a, only_b, num_images, LEVEL)
    interval = Interval(100 * low, 100 * high, LEVEL)
    return McNemar(only_a, only_b, num_images, difference, interval, float(p))


def _tango_interval(only_a: int, only_b: int, n: int, level: float) -> tuple[float, float]:
    """The differences that a score test does not reject, as fractions."""
    from scipy import optimize, stats

    z = stats.norm.ppf((1 + level) / 2)
    estimate = (only_a - only_b) / n

    def excess(delta: float, side: int) -> float:
        """Of the score over z; negative within the interval."""
        variance = _score_variance(only_a, only_b, n, delta)
        return side * n * (delta - estimate) - z * variance**0.5

    def bound(side: int) -> float:
        start = estimate + side * 1e-9  # at the estimate itself, the variance may be 0
        if side * start >= 1:
            return float(side)
        return optimize.brentq(excess, start, side, args=(side,), xtol=1e-9)

    return bound(-1), bound(1)


def _score_variance(only_a: int, only_b: int, n: int, delta: float) -> float:
    """Of only_a - only_b - n * delta, at the likeliest proportions with difference `delta`."""
    linear = -only_a - only_b + (2 * n - only_a + only_b) * delta
    constant = -only_b * delta * (1 - delta)
    root = max(0.0, linear**2 - 8 * n * constant) ** 0.5
    share_of_b = (root - linear) / (4 * n)
    return max(0.0, n * (2 * share_of_b + delta * (1 - delta)))
