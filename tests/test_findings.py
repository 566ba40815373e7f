"""What README and experiments/README.md say about the study in words, against its logs.

The tables that scripts fill are in test_readme.py. Here the main findings are computed from
summary.json and metrics.jsonl as plainly as can be, and have to be in the text as rounded there.
"""

import itertools
import re
from statistics import fmean

import pytest
import scipy.stats

import utils

LOGS = utils.REPOSITORY / "experiments" / "logs"
README, EXPERIMENTS = (
    (utils.REPOSITORY / name).read_text(encoding="utf-8")
    for name in ("README.md", "experiments/README.md")
)

DIGITS, CIFAR, FASHION, TINY = "digits", "cifar10-jpeg", "fashion_mnist", "tiny-imagenet-20"
PIXELS = "cifar10-jpeg-pixels"
FOLDERS = {  # by the names in the tables
    "digits": DIGITS,
    "CIFAR images": CIFAR,
    "Fashion-MNIST": FASHION,
    "Tiny ImageNet": TINY,
}
PATTERNS = {
    "full attention": "full",
    "1D window of 5": "1d_cardinal_expansion_1",
    "plus of 5": "2d_cardinal_expansion_1",
    "1D window of 9": "1d_all_neighbors_expansion_1",
    "plus of 9": "2d_cardinal_expansion_2",
    "square of 9": "2d_all_neighbors_expansion_1",
    "1D window of 25": "1d_all_neighbors_expansion_2",
    "square of 25": "2d_all_neighbors_expansion_2",
}
SAME_WINDOW = "1d_cardinal_expansion_2"  # another name of the 1D window of 9
IN_2D = ("plus of 9", "square of 9", "square of 25")


def says(text, sentence):
    """Whether a text has these words, wherever its lines end and its links lead."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
    return sentence in plain


def runs(folder, pattern):
    """The folder of each seed's run, by seed; none if the pattern was not trained there."""
    root = LOGS / folder / PATTERNS[pattern]
    if pattern == "1D window of 9" and not root.exists():
        root = LOGS / folder / SAME_WINDOW
    return {path.name: path for path in sorted(root.glob("seed_*"))}


def finals(folder, pattern, key="eval_accuracy"):
    """Of the final epoch, by seed."""
    found = runs(folder, pattern).items()
    return {seed: utils.read_json(run / utils.SUMMARY)["final"][key] for seed, run in found}


def differences(folder, pattern, other="full attention"):
    """In points, seed by seed; none if one of the two was not trained there."""
    ours, theirs = finals(folder, pattern), finals(folder, other)
    if not ours or not theirs:
        return []
    assert ours.keys() <= theirs.keys()
    # Accuracies have a few decimals: without the dust of floats, halves round as on the pages.
    return [round(ours[seed] - theirs[seed], 9) for seed in ours]


def local_patterns(folder):
    return [name for name in PATTERNS if name != "full attention" and runs(folder, name)]


def speedups(folder, pattern):
    """Images per second, times those of full attention with the same seed."""
    full, key = runs(folder, "full attention"), "train_images_per_second"
    return [
        utils.read_json(run / utils.SUMMARY)[key] / utils.read_json(full[seed] / utils.SUMMARY)[key]
        for seed, run in runs(folder, pattern).items()
    ]


def mean_of_all(folder):
    """The mean over local patterns of their differences to full attention, seed by seed."""
    of_patterns = [differences(folder, name) for name in local_patterns(folder)]
    return [fmean(of_seed) for of_seed in zip(*of_patterns, strict=True)]


# --------------------------------------------------------------------------------------------------
# README


def test_how_many_runs_there_are():
    counts = {folder: len(local_patterns(folder)) for folder in FOLDERS.values()}
    assert counts == {DIGITS: 7, CIFAR: 7, FASHION: 5, TINY: 4}
    seeds = {folder: len(runs(folder, "full attention")) for folder in FOLDERS.values()}
    assert seeds == {DIGITS: 5, CIFAR: 3, FASHION: 2, TINY: 2}


def test_the_answer():
    folders = [*FOLDERS.values(), PIXELS]
    means = {folder: fmean(mean_of_all(folder)) for folder in folders}
    behind = -means.pop(CIFAR)
    low, high = min(means.values()), max(means.values())
    assert says(README, f"ahead on average in four of five comparisons, by {low:.1f} to {high:.1f}")
    assert says(README, f"{behind:.1f} behind on CIFAR images in 64 patches")
    p = [scipy.stats.ttest_1samp(mean_of_all(folder), 0).pvalue for folder in folders]
    assert says(README, f"none is settled (p = {min(p):.2f} to {max(p):.2f}, uncorrected)")


def test_equal_time_on_tiny_imagenet():
    gaps = [gap for pattern in IN_2D for gap in differences(TINY, pattern)]
    rates = [rate for pattern in IN_2D for rate in speedups(TINY, pattern)]
    said = f"2D neighborhoods end {min(gaps):.0f} to {max(gaps):.0f} points ahead in both seeds"
    assert says(README, f"{said} and train {min(rates):.1f} to {max(rates):.1f} times as fast")


def test_fashion_mnist():
    gaps = [gap for pattern in local_patterns(FASHION) for gap in differences(FASHION, pattern)]
    said = f"{min(gaps):.1f} to {max(gaps):.1f} points"
    assert says(README, f"five patterns end {said} ahead after three epochs")
    assert says(EXPERIMENTS, f"All five local patterns are ahead in both seeds**, by {said}")


@pytest.mark.parametrize("folder", [FASHION, PIXELS])
def test_the_mean_of_all_patterns(folder):
    test = scipy.stats.ttest_1samp(mean_of_all(folder), 0)
    mean, (low, high) = fmean(mean_of_all(folder)), test.confidence_interval()
    interval = f"{mean:.2f} points above full attention ({low:+.2f} to {high:+.2f}"
    assert says(EXPERIMENTS, f"Their mean is {interval}, p = {test.pvalue:.2f})")


def test_pixels_as_tokens():
    gaps = [gap for pattern in local_patterns(PIXELS) for gap in differences(PIXELS, pattern)]
    assert says(README, f"squares end {min(gaps):.0f} to {max(gaps):.0f} points ahead")
    said = f"Both squares are ahead in both seeds, by {min(gaps):.2f} to {max(gaps):.2f} points"
    assert says(EXPERIMENTS, said)
    rates = [rate for pattern in local_patterns(PIXELS) for rate in speedups(PIXELS, pattern)]
    assert says(README, f"{min(rates):.1f} to {max(rates):.1f} times as often")


def test_the_patterns_with_64_patches():
    means = {
        folder: [fmean(differences(folder, name)) for name in local_patterns(folder)]
        for folder in (CIFAR, DIGITS)
    }
    low, high = min(means[CIFAR]), max(means[CIFAR])
    assert says(README, f"from {-low:.1f} points behind to {high:.1f} ahead on CIFAR images")
    assert says(README, f"{min(means[DIGITS]):.1f} to {max(means[DIGITS]):.1f} ahead on digits")


@pytest.mark.parametrize("folder", [CIFAR, FASHION, TINY])
def test_the_accuracy_of_full_attention(folder):
    values = list(finals(folder, "full attention").values())
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    assert says(README, f"{fmean(values):.2f} % ({low:.2f} to {high:.2f})")


def test_the_gap_at_equal_training_accuracy():
    """At the first epoch that reaches it."""
    gaps = {accuracy: gaps_at(accuracy) for accuracy in range(70, 82)}
    low, high = min(min(gaps.values(), key=min)), max(max(gaps.values(), key=max))
    assert says(EXPERIMENTS, f"by {low:.1f} to {high:.1f} points in the first epochs")
    later = min(min(gaps[accuracy]) for accuracy in range(75, 82))
    assert says(EXPERIMENTS, f"from 75 % on, by {later:.1f} or more")


def gaps_at(accuracy):
    """Of the 2D patterns to full attention, in points, when they reach a training accuracy."""
    return [
        accuracy_at(accuracy, name, seed) - accuracy_at(accuracy, "full attention", seed)
        for name, seed in itertools.product(IN_2D, runs(TINY, "full attention"))
    ]


def accuracy_at(accuracy, pattern, seed, folder=TINY):
    rows = utils.read_json_lines(runs(folder, pattern)[seed] / utils.METRICS)
    return next(row["eval_accuracy"] for row in rows if row["train_accuracy"] >= accuracy)


def folder_at(folder, rate):
    """With the runs at a learning rate; those of tiny are at 4e-3."""
    return TINY if (folder, rate) == (TINY, "4e-3") else f"{folder}-lr-{rate}"


def at_rate(folder, rate, pattern):
    """The accuracy of the one seed that was trained at several rates; None if not at this one."""
    return finals(folder_at(folder, rate), pattern).get("seed_1" if folder == TINY else "seed_0")


def test_each_at_its_best_learning_rate():
    rates = list(table_under("Other learning rates"))
    full, square = (
        max(filter(None, (at_rate(TINY, rate, pattern) for rate in rates)))
        for pattern in ("full attention", "square of 9")
    )
    lead = square - full
    said = f"each at the best learning rate tried, the square of 9 still leads by {lead:.1f}"
    assert says(README, said)
    assert says(EXPERIMENTS, f"the square {lead:.1f} on Tiny ImageNet")


def test_what_the_learning_rate_changes():
    def gap(folder, rate):
        return at_rate(folder, rate, "square of 9") - at_rate(folder, rate, "full attention")

    lead = f"from {gap(TINY, '4e-3'):.1f} to {gap(TINY, '8e-3'):.1f} points"
    assert says(
        README, f"than the square of 9. On Tiny ImageNet, twice the rate cuts its lead {lead}"
    )

    cifar = f"{gap(CIFAR, '2e-3') - gap(CIFAR, '8e-3'):.1f}"
    tiny = f"{gap(TINY, '4e-3') - gap(TINY, '8e-3'):.1f}"
    assert says(README, f"on CIFAR images, four times moves it by {cifar} (one seed each)")
    assert says(
        EXPERIMENTS, f"{cifar} points on CIFAR images (2e-3 to 8e-3), and by {tiny} on Tiny"
    )


def test_the_gap_at_equal_training_accuracy_by_rate():
    def gaps(of_square, of_full, reached):
        """From the lowest to the highest, with the rates of the square and of full attention."""
        found = [
            accuracy_at(accuracy, "square of 9", "seed_1", folder_at(TINY, of_square))
            - accuracy_at(accuracy, "full attention", "seed_1", folder_at(TINY, of_full))
            for accuracy in reached
        ]
        return min(found), max(found)

    low, middle, high = (gaps(rate, rate, range(70, 82)) for rate in ("2e-3", "4e-3", "8e-3"))
    later, best = gaps("8e-3", "8e-3", range(82, 95)), gaps("4e-3", "16e-3", range(70, 88))
    for said in (
        f"is {low[0]:.1f} to {low[1]:.1f} points behind the square of 9 on test images at 2e-3",
        f"{middle[0]:.1f} to {middle[1]:.1f} at 4e-3",
        f"from {high[1]:.1f} behind to {-high[0]:.1f} ahead at 8e-3",
        f"from 82 to 94 %, it is {later[0]:.1f} to {later[1]:.1f} behind there",
        f"it is {best[0]:.1f} to {best[1]:.1f} behind from 70 to 87 %",
    ):
        assert says(EXPERIMENTS, said)


# --------------------------------------------------------------------------------------------------
# Tables of experiments/README.md


def table_under(heading):
    """The rows of the first table of a section: the first cell, and the others by column."""
    section = EXPERIMENTS.split(f"\n### {heading}\n")[1]
    lines = re.search(r"(^\|.*\n)+", section, flags=re.MULTILINE)[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize(
    ("heading", "folder", "decimals"),
    [
        ("Fashion-MNIST", FASHION, 2),
        ("Equal time on natural images", TINY, 1),
        ("Pixels as tokens", PIXELS, 2),
    ],
)
def test_the_accuracies_of_both_seeds(heading, folder, decimals):
    rows = table_under(heading)
    assert list(rows) == ["full attention", *local_patterns(folder)]
    for pattern, row in rows.items():
        cells = list(row.values())[:2]
        assert cells == [f"{value:.{decimals}f} %" for value in finals(folder, pattern).values()]


def test_the_training_accuracies_of_fashion_mnist():
    for pattern, row in table_under("Fashion-MNIST").items():
        reached = finals(FASHION, pattern, "train_accuracy").values()
        cell = ", ".join(f"{value:.1f}" for value in reached) + " %"
        assert row["training accuracy, last epoch"] == cell


@pytest.mark.parametrize(
    ("heading", "folder"), [("Equal time on natural images", TINY), ("Pixels as tokens", PIXELS)]
)
def test_the_rates_at_equal_time(heading, folder):
    rows = table_under(heading)
    column = "images/s, times those of full attention"
    del rows["full attention"]
    for pattern, row in rows.items():
        assert row[column] == ", ".join(f"{rate:.2f}" for rate in speedups(folder, pattern))


@pytest.mark.parametrize(
    ("name", "folder", "decimals"), [("CIFAR images", CIFAR, 2), ("Tiny ImageNet", TINY, 1)]
)
def test_the_learning_rates(name, folder, decimals):
    for rate, row in table_under("Other learning rates").items():
        full, square = at_rate(folder, rate, "full attention"), at_rate(folder, rate, "square of 9")
        gap = square - full if full and square else None
        for value, column, form in [
            (full, "full attention", f".{decimals}f"),
            (square, "square of 9", f".{decimals}f"),
            (gap, "difference", f"+.{decimals}f"),
        ]:
            unit = "" if column == "difference" else " %"
            cell = "–" if value is None else f"{value:{form}}{unit}"
            assert row[f"{name}: {column}"] == cell


def test_the_shapes_against_their_windows():
    *rows, (last, counts) = table_under("Does the shape matter?").items()
    assert [name.partition(",")[0] for name, _ in rows] == list(FOLDERS)
    assert last == "ahead of its window"

    everywhere = []
    for shape, count in counts.items():
        window = f"1D window of {shape.split()[-1]}"
        gaps = []
        for name, row in rows:
            found = differences(FOLDERS[name.partition(",")[0]], shape, window)
            assert row[shape] == (f"{fmean(found):+.2f}" if found else "–")
            gaps += found
        assert count == f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
        if shape == "plus of 9":
            assert min(gaps) == 0  # never behind
            assert says(README, f"the plus of 9 in {count}")
        everywhere += gaps

    count = f"{sum(gap > 0 for gap in everywhere)} of {len(everywhere)} pairs"
    assert says(README, f"ahead of the 1D window of their size in {count} of runs")
    assert says(EXPERIMENTS, f"The shape is ahead in {count}**")
