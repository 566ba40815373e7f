"""The sentences of README and experiments/README.md that quote the study, against its logs.

The tables that scripts fill are in test_readme.py. Here the numbers are taken from summary.json and
metrics.jsonl as plainly as can be, and each has to be in the text as it is rounded there.
"""

import re
import statistics

import pytest
import scipy.stats

import utils

LOGS = utils.REPOSITORY / "experiments" / "logs"
README, EXPERIMENTS = (
    (utils.REPOSITORY / name).read_text(encoding="utf-8")
    for name in ("README.md", "experiments/README.md")
)

DIGITS, CIFAR, FASHION, TINY = "digits", "cifar10-jpeg", "fashion_mnist", "tiny-imagenet-20"
PATTERNS = {
    "full attention": "full",
    "1D window of 9": "1d_all_neighbors_expansion_1",
    "plus of 9": "2d_cardinal_expansion_2",
    "square of 9": "2d_all_neighbors_expansion_1",
    "1D window of 25": "1d_all_neighbors_expansion_2",
    "square of 25": "2d_all_neighbors_expansion_2",
}
IN_2D = ("plus of 9", "square of 9", "square of 25")


def says(text, sentence):
    """Whether a text has these words, wherever its lines end and its links lead."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
    return sentence in plain


def summaries(folder, pattern):
    """The summary of each seed."""
    name = PATTERNS[pattern]
    if folder == DIGITS and pattern == "1D window of 9":
        name = "1d_cardinal_expansion_2"  # the same mask
    seeds = sorted((LOGS / folder / name).glob("seed_*"))
    return [utils.read_json(seed / utils.SUMMARY) for seed in seeds]


def accuracies(folder, pattern):
    """Of the final epoch, by seed."""
    return [summary["final"]["eval_accuracy"] for summary in summaries(folder, pattern)]


def differences(folder, pattern, other="full attention"):
    """In points, for each seed."""
    pairs = zip(accuracies(folder, pattern), accuracies(folder, other), strict=True)
    return [ours - theirs for ours, theirs in pairs]


def local_patterns(folder):
    return [name for name in PATTERNS if name != "full attention" and summaries(folder, name)]


def test_the_first_paragraph():
    gaps = [gap for pattern in IN_2D for gap in differences(TINY, pattern)]
    low, high = min(gaps), max(gaps)
    assert says(README, f"2D neighborhoods end {low:.0f} to {high:.0f} points ahead")

    low, high = sorted(differences(TINY, "square of 9"))
    assert says(README, f"ends {low:.1f} and {high:.1f} points above")
    rates = zip(summaries(TINY, "square of 9"), summaries(TINY, "full attention"), strict=True)
    key = "train_images_per_second"
    low, high = sorted(ours[key] / theirs[key] for ours, theirs in rates)
    assert says(README, f"trains {low:.1f} to {high:.1f} times as fast")

    gaps = [gap for pattern in local_patterns(FASHION) for gap in differences(FASHION, pattern)]
    assert len(gaps) == 2 * 5
    assert says(README, f"five patterns end {min(gaps):.1f} to {max(gaps):.1f} points above")


def test_the_patterns_with_64_patches():
    """Those of 5 neighbors too, which only these parts have."""
    means = {}
    for folder in (CIFAR, DIGITS):
        reference = accuracies(folder, "full attention")
        means[folder] = [
            statistics.fmean(final_accuracies(run)) - statistics.fmean(reference)
            for run in (LOGS / folder).glob("*_expansion_*")
        ]
        assert len(means[folder]) == 7
    low, high = min(means[CIFAR]), max(means[CIFAR])
    assert says(README, f"from {-low:.1f} points below to {high:.1f} above on CIFAR images")
    assert says(README, f"{min(means[DIGITS]):.1f} to {max(means[DIGITS]):.1f} above on digits")


def final_accuracies(folder):
    files = folder.glob(f"seed_*/{utils.SUMMARY}")
    return [utils.read_json(file)["final"]["eval_accuracy"] for file in files]


@pytest.mark.parametrize("folder", [CIFAR, FASHION, TINY])
def test_the_accuracy_of_full_attention(folder):
    values = accuracies(folder, "full attention")
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    mean, (low, high) = statistics.fmean(values), interval
    assert says(README, f"{mean:.2f} % ({low:.2f} to {high:.2f})")


def test_the_gap_at_equal_training_accuracy():
    """At the first epoch that reaches it."""
    gaps = []
    for index in range(2):
        for accuracy in range(75, 82):
            full = at_training_accuracy("full attention", index, accuracy)
            gaps += [at_training_accuracy(name, index, accuracy) - full for name in IN_2D]
    said = f"{min(gaps):.1f} to {max(gaps):.1f} points"
    assert says(README, f"is {said} behind the 2D patterns")
    assert says(EXPERIMENTS, f"by {said} in the first epochs that reach 75, 76, ... 81 %")


def at_training_accuracy(pattern, seed, accuracy):
    rows = utils.read_json_lines(LOGS / TINY / PATTERNS[pattern] / f"seed_{seed}" / utils.METRICS)
    return next(row["eval_accuracy"] for row in rows if row["train_accuracy"] >= accuracy)


# --------------------------------------------------------------------------------------------------
# Tables of experiments/README.md


def table_under(heading):
    """The cells of the first table of a section, without its header."""
    section = EXPERIMENTS.split(f"### {heading}\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(
    ("heading", "folder", "decimals"),
    [("Fashion-MNIST", FASHION, 2), ("Equal time on natural images", TINY, 1)],
)
def test_the_accuracies_of_both_seeds(heading, folder, decimals):
    rows = table_under(heading)
    assert [row[0] for row in rows] == ["full attention", *local_patterns(folder)]
    for pattern, *seeds, _ in rows:
        assert seeds == [f"{value:.{decimals}f} %" for value in accuracies(folder, pattern)]


def test_the_training_accuracies_of_fashion_mnist():
    for pattern, *_, cell in table_under("Fashion-MNIST"):
        reached = [row["final"]["train_accuracy"] for row in summaries(FASHION, pattern)]
        assert cell == ", ".join(f"{value:.1f}" for value in reached) + " %"


def test_the_rates_of_tiny_imagenet():
    def rates(pattern):
        return [summary["train_images_per_second"] for summary in summaries(TINY, pattern)]

    (_, *_, cell), *rows = table_under("Equal time on natural images")
    full = rates("full attention")
    assert cell == "1 ({:.0f} and {:.0f} images/s)".format(*full)
    for pattern, *_, cell in rows:
        ratios = [ours / theirs for ours, theirs in zip(rates(pattern), full, strict=True)]
        assert cell == ", ".join(f"{ratio:.2f}" for ratio in ratios)


def test_the_plus_against_its_window():
    gaps = []
    folders = (DIGITS, CIFAR, FASHION, TINY)
    for folder, row in zip(folders, table_under("Does the shape matter?"), strict=True):
        data, grid, neighbors, cell, mean = row
        found = differences(folder, "plus of 9", "1D window of 9")
        assert cell == ", ".join(f"{gap:.2f}" for gap in found), data
        assert mean == f"{statistics.fmean(found):.2f}"
        assert (grid, neighbors) == budget_of(folder)
        gaps.append(found)

    means = [statistics.fmean(found) for found in gaps]
    gaps = [gap for found in gaps for gap in found]
    ahead, level = sum(gap > 0 for gap in gaps), sum(gap == 0 for gap in gaps)
    assert (ahead, level, len(gaps)) == (11, 1, 12)
    assert says(EXPERIMENTS, "ahead in 11 of 12 pairs and level in one")
    assert says(README, "12 pairs of runs on four datasets")
    assert says(README, "beats the 1D window of 9 in 11 and ties in one")
    assert says(README, f"by {min(means):.1f} to {max(means):.1f} points on average")


def budget_of(folder):
    """(grid, mean numbers of neighbors of the plus and the window) as the table has them."""
    name = "1d_cardinal_expansion_2" if folder == DIGITS else PATTERNS["1D window of 9"]
    runs = [LOGS / folder / run / "seed_0" for run in (PATTERNS["plus of 9"], name)]
    attention = [utils.read_json(run / utils.CONFIG)["attention"] for run in runs]
    numbers = ", ".join(f"{entry['num_neighbors_mean']:.1f}" for entry in attention)
    return "{}×{}".format(*attention[0]["grid"]), numbers
