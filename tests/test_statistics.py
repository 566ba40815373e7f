"""report/statistics.py against closed forms, tables and simulations."""

import itertools
import math

import numpy as np
import pytest

from report import statistics

# The coverage of 1,000 intervals scatters by 0.7 points around 95 %; these are four times that.
COVERAGE = (0.922, 0.978)


def test_the_t_interval_is_that_of_the_tables():
    # Mean 4, standard deviation 2, n = 3; t with 2 degrees of freedom at 97.5 % is 4.303.
    interval = statistics.mean_interval([2, 4, 6])
    half = 4.302653 * 2 / math.sqrt(3)
    assert interval == pytest.approx((4 - half, 4 + half, 0.95), rel=1e-6)
    assert 4 in interval
    assert 10 not in interval


@pytest.mark.parametrize("values", [[], [50], [50, 50, 50]])
def test_values_without_spread_have_no_interval(values):
    assert statistics.mean_interval(values) is None


@pytest.mark.parametrize("n", [3, 5, 20])
def test_the_t_interval_covers_the_mean(n):
    random = np.random.default_rng(n)
    samples = random.normal(80, 0.5, (1000, n))
    covered = [80 in statistics.mean_interval(sample) for sample in samples]
    assert COVERAGE[0] < np.mean(covered) < COVERAGE[1]


def test_the_bootstrap_interval_covers_the_mean():
    random = np.random.default_rng(0)
    samples = random.normal(1, 1, (80, 20))
    covered = [1 in statistics.compare_paired(x, 0 * x).bootstrap for x in samples]
    assert 0.83 < np.mean(covered) < 0.99  # of 80 intervals of about 93 %


def test_a_comparison_of_pairs():
    found = statistics.compare_paired([80.3, 81.0, 80.5], [80.0, 80.5, 80.4])
    assert found.differences == pytest.approx((0.3, 0.5, 0.1))
    assert found.mean == pytest.approx(0.3)
    assert found.n == 3
    assert found.interval == pytest.approx(statistics.mean_interval([0.3, 0.5, 0.1]))
    # t = 0.3 / (0.2 / sqrt 3) = 2.598 with 2 degrees of freedom: F(t) in closed form.
    t = 0.3 / (0.2 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(t**2 + 2), rel=1e-6)
    assert found.p_permutation == 0.25
    assert found.bootstrap is None


def test_one_pair_says_nothing_about_chance():
    found = statistics.compare_paired([81], [80])
    assert (found.mean, found.interval, found.p, found.p_permutation) == (1, None, None, 1)


def test_equal_differences_leave_no_measure_of_chance():
    # In floating point, 80.3 - 80.1 and 80.5 - 80.3 are not the same.
    found = statistics.compare_paired([80.3, 80.5], [80.1, 80.3])
    assert found.interval is None
    assert found.p is None


@pytest.mark.parametrize(("first", "second"), [([], []), ([1, 2], [1])])
def test_what_is_not_in_pairs_is_refused(first, second):
    with pytest.raises(ValueError, match="expected pairs"):
        statistics.compare_paired(first, second)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_permutation_test_counts_all_signs(n):
    differences = np.random.default_rng(n).normal(0.5, 1, n).round(9)
    found = statistics.compare_paired(differences, np.zeros(n))
    sums = [np.dot(signs, differences) for signs in itertools.product([1, -1], repeat=n)]
    extreme = [abs(total) >= abs(differences.sum()) - 1e-12 for total in sums]
    assert found.p_permutation == pytest.approx(np.mean(extreme))


def test_holm_by_hand():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.5; each at least the one before.
    assert statistics.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []
    assert statistics.holm([0.03, None, 0.01]) == pytest.approx([0.06, None, 0.03])


def test_there_are_no_false_winners_beyond_five_percent():
    """Several patterns that are no better than full attention, all paired with its runs."""
    random = np.random.default_rng(1)
    num_sweeps, num_patterns, num_seeds = 600, 6, 3
    false_alarms = 0
    for _ in range(num_sweeps):
        full = random.normal(80, 0.4, num_seeds)
        patterns = random.normal(80, 0.4, (num_patterns, num_seeds))
        p_values = [statistics.compare_paired(pattern, full).p for pattern in patterns]
        false_alarms += min(statistics.holm(p_values)) <= 0.05
    assert false_alarms / num_sweeps < 0.05 + 3 * math.sqrt(0.05 * 0.95 / num_sweeps)


def test_a_detectable_difference_is_detected_as_often_as_it_says():
    from scipy import stats

    std, n = 0.5, 5
    difference = statistics.detectable_difference(std, n, power=0.8)
    samples = np.random.default_rng(2).normal(difference, std, (4000, n))
    found = stats.ttest_1samp(samples, 0, axis=1).pvalue <= 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)
    assert statistics.detectable_difference(2 * std, n) == pytest.approx(2 * difference)


def test_the_interval_of_a_proportion_is_wilsons():
    z, n, k = 1.959964, 100, 80
    center = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    interval = statistics.proportion_interval(k, n)
    assert interval == pytest.approx((100 * (center - half), 100 * (center + half), 0.95))
    assert statistics.proportion_interval(n, n).high == 100


def test_the_interval_of_a_proportion_covers_it():
    correct = np.random.default_rng(3).binomial(200, 0.9, 1000)
    covered = [90 in statistics.proportion_interval(int(k), 200) for k in correct]
    assert COVERAGE[0] < np.mean(covered) < COVERAGE[1]


def test_mcnemar_is_a_fair_coin():
    found = statistics.mcnemar(8, 2, 100)
    # Eight or more heads of ten, or eight or more tails.
    assert found.p == pytest.approx(2 * sum(math.comb(10, k) for k in (8, 9, 10)) / 2**10)
    assert found.difference == 6
    assert found.interval.low < 6 < found.interval.high
    assert statistics.mcnemar(0, 0, 10).p == 1


def test_the_interval_of_mcnemar_covers_the_difference():
    random = np.random.default_rng(4)
    counts = random.multinomial(500, [0.06, 0.03, 0.91], size=1000)  # a true difference of 3 %
    covered = [3 in statistics.mcnemar(int(a), int(b), 500).interval for a, b, _ in counts]
    assert COVERAGE[0] < np.mean(covered) < COVERAGE[1]


def test_under_equal_accuracies_mcnemar_is_rarely_significant():
    counts = np.random.default_rng(5).multinomial(500, [0.04, 0.04, 0.92], size=1000)
    alarms = [statistics.mcnemar(int(a), int(b), 500).p <= 0.05 for a, b, _ in counts]
    assert np.mean(alarms) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
