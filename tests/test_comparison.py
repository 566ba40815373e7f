"""Comparing rows with full attention, the answer in words, and the table in all its formats."""

import csv
import functools
import io
import json

import numpy as np
import pytest
from fake_runs import write_run
from scipy import stats

import masks
import utils
from report import answer, comparison, differences, logs, mask_grids, results, statistics, table


def study_of(path):
    return comparison.study(results.group_by_pattern(logs.load_runs(path)))


def write_pattern(root, mask_type, step, accuracies, **options):
    """One finished run per accuracy, with seeds 0, 1, ...; None leaves a seed out."""
    for seed, accuracy in enumerate(accuracies):
        if accuracy is not None:
            write_run(root, mask_type, step, seed, [accuracy], **options)


def by_label(study):
    return {found.row.label: found for found in study.against_full.values()}


# -------------------------------------------------------------------------------------------------
# Pairs


def test_runs_are_paired_by_seed(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 82, 83])
    write_pattern(tmp_path, "2d_cardinal", 1, [81, None, 84, 84.5])
    write_run(tmp_path, "2d_cardinal", 1, 7, [99])  # no counterpart
    write_run(tmp_path, "2d_cardinal", 1, 1, [50], finished=False)

    (found,) = study_of(tmp_path).against_full.values()
    assert found.seeds == (0, 2, 3)
    assert found.accuracies.differences == (1, 2, 1.5)
    assert found.p_holm == found.accuracies.p, "there is one pattern"


def test_runs_are_paired_by_the_weights_that_they_started_from(tmp_path):
    def start_from(folder, sha256):
        path = folder / utils.CONFIG
        about = {"file": "vit.pth", "sha256": sha256, "source": "timm"}
        utils.write_json(path, utils.read_json(path) | {"weights": about})

    write_run(tmp_path, "full", seed=0)
    start_from(write_run(tmp_path, "full", seed=1), "1" * 64)
    start_from(write_run(tmp_path, "full", seed=2), "1" * 64)
    for seed in range(3):
        start_from(write_run(tmp_path, "2d_cardinal", 1, seed), "1" * 64)
    start_from(write_run(tmp_path, "2d_all_neighbors", 1, 1), "2" * 64)

    (found,) = study_of(tmp_path).against_full.values()
    assert found.row.label == "2d_cardinal, step 1"
    assert found.seeds == (1, 2)


def test_runs_are_paired_by_settings(tmp_path):
    """A row with a name of its own is compared with full attention under its own settings."""
    write_pattern(tmp_path, "full", None, [80, 81])
    write_pattern(tmp_path, "full", None, [70, 72], run_name="full-mix", mix=0.5)
    write_pattern(tmp_path, "2d_cardinal", 1, [82, 82])
    write_pattern(tmp_path, "2d_cardinal", 1, [71, 74], run_name="plus-mix", mix=0.5)
    write_pattern(tmp_path, "2d_cardinal", 2, [99, 99], run_name="plus-long", lr=0.5)

    found = by_label(study_of(tmp_path))
    assert found["2d_cardinal, step 1"].accuracies.differences == (2, 1)
    assert found["plus-mix (2d_cardinal, step 1)"].accuracies.differences == (1, 2)
    assert len(found) == 2, "nothing is compared across settings"


def test_p_values_are_corrected_for_the_number_of_patterns(tmp_path):
    random = np.random.default_rng(0)
    accuracies = {"full": 80 + random.normal(size=4)}
    write_pattern(tmp_path, "full", None, accuracies["full"])
    for step in (1, 2):
        accuracies[step] = 80 + step + random.normal(size=4)
        write_pattern(tmp_path, "2d_cardinal", step, accuracies[step])

    raw = [statistics.compare_paired(accuracies[step], accuracies["full"]).p for step in (1, 2)]
    found = by_label(study_of(tmp_path))
    assert [found[f"2d_cardinal, step {step}"].p_holm for step in (1, 2)] == pytest.approx(
        statistics.holm(raw)
    )


def test_speed_is_compared_on_one_device_only(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81], images_per_second=100)
    write_pattern(tmp_path, "2d_cardinal", 1, [80, 81], images_per_second=150)
    write_pattern(tmp_path, "2d_cardinal", 2, [80, 81], images_per_second=900, device_name="Other")
    write_pattern(
        tmp_path, "2d_cardinal", 3, [80, 81], images_per_second=50, checkpoint_activations=True
    )
    found = by_label(study_of(tmp_path))
    assert found["2d_cardinal, step 3"].speed is None
    assert found["2d_cardinal, step 1"].speed == pytest.approx(1.5)
    assert found["2d_cardinal, step 2"].speed is None


# -------------------------------------------------------------------------------------------------
# Masks that are one and the same


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 9), (14, 14)])
def test_masks_are_the_same_exactly_if_all_their_pairs_are(grid):
    specs = [masks.MaskSpec(kind, step) for kind in masks.MASK_TYPES for step in (0, 1, 2, 3, 12)]
    specs += [
        masks.MaskSpec("2d_circle", 1, dilation=2),
        masks.MaskSpec("2d_circle", 1, edge="shift"),
    ]
    specs += [masks.MaskSpec(kind, 1, global_layers=(1,)) for kind in ("2d_cardinal", "2d_circle")]
    identities = [spec.identity(*grid) for spec in specs]
    for spec, identity in zip(specs, identities, strict=True):
        masks_of_layers = pairs_of(spec, grid)
        for other, other_identity in zip(specs, identities, strict=True):
            equal = masks_of_layers == pairs_of(other, grid)
            assert (identity == other_identity) == equal, (spec, other)


@functools.cache
def pairs_of(spec, grid):
    """Who may attend to whom in two layers, as bytes."""
    all_pairs = np.ones((grid[0] * grid[1],) * 2, dtype=bool)
    arrays = spec.build_layer_arrays(*grid, 2)
    return b"".join((all_pairs if array is None else array).tobytes() for array in arrays)


def test_on_a_large_grid_windows_are_compared_by_their_width():
    identity = {
        (kind, step): masks.MaskSpec(kind, step).identity(100, 100)
        for kind in masks.STUDIED[1:]
        for step in (1, 2)
    }
    assert identity["1d_cardinal", 2] == identity["1d_all_neighbors", 1]
    assert len(set(identity.values())) == len(identity) - 1


def test_one_mask_under_two_names_counts_once(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 83])
    write_pattern(tmp_path, "1d_cardinal", 2, [81, 82])
    write_pattern(tmp_path, "1d_all_neighbors", 1, [81, 82, 85])
    write_pattern(tmp_path, "2d_all_neighbors", 4, [80, 81, 83])  # the whole grid of 4 x 4
    write_pattern(tmp_path, "1d_all_neighbors", 1, [10, 10], run_name="mine")

    study = study_of(tmp_path)
    same = {row.label: other.label for row, other in study.same_as.items()}
    assert same == {
        "1d_cardinal, step 2": "1d_all_neighbors, step 1",  # which has more seeds
        "2d_all_neighbors, step 4": "full",
    }
    assert list(by_label(study)) == ["1d_all_neighbors, step 1", "mine (1d_all_neighbors, step 1)"]
    assert "1d_cardinal, step 2 (same mask as 1d_all_neighbors, step 1)" in table.format_table(
        study
    )


def test_full_attention_stands_for_its_mask_even_with_fewer_seeds(tmp_path):
    """Else the mask of full attention would be compared with itself."""
    write_pattern(tmp_path, "full", None, [80, 81])
    write_pattern(tmp_path, "2d_all_neighbors", 4, [82, 84, 85])  # the whole grid of 4 x 4
    study = study_of(tmp_path)
    assert {row.label: other.label for row, other in study.same_as.items()} == {
        "2d_all_neighbors, step 4": "full"
    }
    assert study.against_full == {}


# -------------------------------------------------------------------------------------------------
# The answer


def test_a_clear_gain(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 80.5, 80.2], images_per_second=100)
    accuracies = [81, 82.1, 81.4, 81.3]
    write_pattern(tmp_path, "2d_cardinal", 1, accuracies, images_per_second=130)
    first, speed, limit = answer.sentences(study_of(tmp_path))
    assert first.startswith("2d_cardinal, step 1 gains 1.03 points against full attention")
    assert "n = 4 seeds" in first
    assert speed == "It trains at 1.30 times the images/s of full attention."
    assert limit.startswith("What this cannot show")


def test_speeds_that_scatter_say_so(tmp_path):
    for seed, rate in enumerate([100, 200]):
        write_run(tmp_path, "full", None, seed, [80 + seed], images_per_second=rate)
        write_run(tmp_path, "2d_cardinal", 1, seed, [80], images_per_second=300)
    speed = answer.sentences(study_of(tmp_path))[1]
    assert speed == (
        "It trains at 2.00 times the images/s of full attention (1.50 to 3.00 from seed to seed)."
    )


def test_a_clear_loss(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 80.5])
    write_pattern(tmp_path, "2d_cardinal", 1, [75, 76.1, 75.4])
    assert "2d_cardinal, step 1 loses 5.00 points" in answer.sentences(study_of(tmp_path))[0]


def test_seed_noise_is_not_a_result(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 82])
    write_pattern(tmp_path, "2d_cardinal", 1, [82, 81, 81.5])
    write_pattern(tmp_path, "2d_cardinal", 2, [80, 80, 80])
    _, first, *_ = answer.sentences(study_of(tmp_path))
    assert first.startswith("Cannot tell whether 2d_cardinal, step 1, the most accurate of 2 local")
    assert "is more or less accurate than full attention" in first
    assert "for this pattern by itself" in first
    assert "after Holm's correction" in first


def test_one_lucky_seed_does_not_hide_what_several_have_measured(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 80.5, 80.2])
    write_pattern(tmp_path, "2d_cardinal", 1, [81, 82.1, 81.4, 81.3])
    write_pattern(tmp_path, "2d_cardinal", 2, [99])
    first, *_ = answer.sentences(study_of(tmp_path))
    assert first.startswith("2d_cardinal, step 1 gains 1.03 points")


def test_a_clear_result_is_told_beside_a_noisy_better_one(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 80.5, 80.2])
    write_pattern(tmp_path, "2d_cardinal", 1, [86, 79, 85, 79])  # more on average, but noise
    write_pattern(tmp_path, "2d_cardinal", 2, [81, 82.1, 81.4, 81.3])
    write_pattern(tmp_path, "2d_cardinal", 3, [70, 71.2, 70.4, 70.2])
    _, first, second, third, *_ = answer.sentences(study_of(tmp_path))
    assert first.startswith("Cannot tell whether 2d_cardinal, step 1")
    assert second.startswith("Clearer is 2d_cardinal, step 2: it gains 1.03 points")
    assert third.startswith("1 of 3 local patterns loses accuracy")


def test_the_fastest_is_named_if_it_is_another_one(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81], images_per_second=100)
    write_pattern(tmp_path, "2d_cardinal", 1, [70, 72], images_per_second=300)
    write_pattern(tmp_path, "2d_cardinal", 2, [80, 82], images_per_second=200)
    sentences = answer.sentences(study_of(tmp_path))
    assert sentences[3] == (
        "The fastest is 2d_cardinal, step 1: 3.00 times the images/s of full attention, at "
        "-9.50 points."
    )


def test_one_seed_has_the_chance_of_images_only(tmp_path):
    write_run(tmp_path, "full", None, 0, [80])
    write_run(tmp_path, "2d_cardinal", 1, 0, [85])
    first, *_ = answer.sentences(study_of(tmp_path))
    assert first.startswith("Cannot tell: with one seed there is no measure of chance")
    # 16 and 17 of the 20 test images of these runs.
    low, high, _ = statistics.proportion_interval(17, 20)
    assert f"{low:.1f} to {high:.1f}" in first
    assert "images alone" in first


@pytest.mark.parametrize(
    ("mask_types", "said"),
    [
        (["full"], "no finished run of a local pattern"),
        (["2d_cardinal"], "no finished run of full attention"),
    ],
)
def test_without_two_sides_there_is_no_answer(tmp_path, mask_types, said):
    for mask_type in mask_types:
        write_run(tmp_path, mask_type, None if mask_type == "full" else 1)
    (sentence,) = answer.sentences(study_of(tmp_path))
    assert said in sentence


def test_without_pairs_there_is_no_answer(tmp_path):
    write_run(tmp_path, "full", None, 0)
    write_run(tmp_path, "2d_cardinal", 1, 1)
    (sentence,) = answer.sentences(study_of(tmp_path))
    assert sentence.startswith("Cannot tell: no finished run of a local pattern has the seed")


# -------------------------------------------------------------------------------------------------
# The table


def test_the_csv_has_every_number(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 83])
    write_pattern(tmp_path, "2d_cardinal", 1, [81, 83, 83.5])
    write_run(tmp_path, "2d_cardinal", 2, 0, [50], finished=False, run_name="=HYPERLINK(1)")
    study = study_of(tmp_path)
    lines = list(csv.DictReader(io.StringIO(table.format_csv(study))))

    (found,) = study.against_full.values()
    full, plus, other = lines
    assert float(full["accuracy_percent"]) == pytest.approx(244 / 3)
    assert full["difference_points"] == full["p_holm"] == ""
    assert float(plus["difference_points"]) == pytest.approx(3.5 / 3)
    assert float(plus["difference_low"]) == pytest.approx(found.accuracies.interval.low)
    assert float(plus["p_holm"]) == pytest.approx(found.p_holm)
    assert float(plus["attention_flops"]) == 2_000_000
    assert float(plus["train_seconds"]) == pytest.approx(0.1)
    assert (plus["n"], plus["pairs"], plus["state"]) == ("3", "3", "done")
    assert other["run_name"] == "'=HYPERLINK(1)", "no formula for a spreadsheet"
    assert other["accuracy_percent"] == ""


def test_all_patterns_together_are_their_mean_over_common_seeds(tmp_path):
    full, plus, square = [80, 81, 82, 83], [81, 81, 84, 84], [79, 84, 85, 86]
    write_pattern(tmp_path, "full", None, full)
    write_pattern(tmp_path, "2d_cardinal", 1, plus)
    assert comparison.all_together(study_of(tmp_path)) is None, "one pattern is no group"

    write_pattern(tmp_path, "2d_all_neighbors", 1, [*square[:3], None])
    found = comparison.all_together(study_of(tmp_path))
    expected = [(81 + 79) / 2 - 80, (81 + 84) / 2 - 81, (84 + 85) / 2 - 82]
    assert found.differences == pytest.approx(expected)
    assert found.p == pytest.approx(stats.ttest_1samp(expected, 0).pvalue)
    sentence = answer.sentences(study_of(tmp_path))[0]
    assert sentence.startswith("The mean of all 2 local patterns cannot be told from full")

    for seed in range(2):
        write_run(tmp_path, "full", None, seed, [70], run_name="full-mix", mix=0.5)
        write_run(tmp_path, "2d_cardinal", 1, seed, [71], run_name="plus-mix", mix=0.5)
    assert comparison.all_together(study_of(tmp_path)) is None, "trained in two ways"


def test_all_patterns_together_may_gain_or_lose(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 82])
    write_pattern(tmp_path, "2d_cardinal", 1, [78, 79, 80.1])
    write_pattern(tmp_path, "2d_all_neighbors", 1, [78, 79, 80])
    assert "local patterns loses 1.98 points" in answer.sentences(study_of(tmp_path))[0]


def test_runs_that_were_disturbed_have_no_times(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81], images_per_second=100)
    write_pattern(tmp_path, "2d_cardinal", 1, [80, 83], images_per_second=150)
    runs = differences.load_comparable(tmp_path, with_speed=False)
    study = comparison.study(results.group_by_pattern(runs))
    _, plus = study.rows
    assert plus.accuracy.mean == 81.5
    assert (plus.throughput, plus.train_seconds) == (None, None)
    assert plus.curve("eval_accuracy", "seconds") == []
    assert study.against_full[plus].speed is None
    assert not any("images/s" in sentence for sentence in answer.sentences(study))


def test_an_interval_is_that_of_the_seeds(tmp_path):
    write_pattern(tmp_path, "full", None, [80, 81, 83])
    (row,) = study_of(tmp_path).rows
    assert table.interval_of(row) == statistics.mean_interval([80, 81, 83])
    half = (statistics.mean_interval([80, 81, 83]).high - 244 / 3).__round__(2)
    assert table.format_accuracy(row) == f"81.33 ± {half} (n = 3)"


@pytest.mark.parametrize(
    ("seconds", "said"), [(12, "12 s"), (90, "90 s"), (720, "12.0 min"), (9000, "2.5 h")]
)
def test_times_are_in_units_for_people(seconds, said):
    assert table.format_seconds(results.Spread(seconds, None, 1)).text == said


def test_the_time_to_an_accuracy(tmp_path):
    write_run(tmp_path, "full", None, 0, [50, 70, 80], images_per_second=10)  # 10 s per epoch
    write_run(tmp_path, "full", None, 1, [50, 60, 70], images_per_second=20)  # 5 s
    (row,) = study_of(tmp_path).rows
    assert row.seconds_to(50) == results.Spread(7.5, pytest.approx(3.5355, rel=1e-4), 2)
    assert row.seconds_to(70).mean == (20 + 15) / 2
    assert row.seconds_to(75) == results.Spread(30, None, 1)
    assert row.seconds_to(90) is None


def test_curves_over_time_average_seeds_by_epoch(tmp_path):
    write_run(tmp_path, "full", None, 0, [50, 70, 80], images_per_second=10)  # 10 s per epoch
    write_run(tmp_path, "full", None, 1, [50, 60, 70], images_per_second=20)  # 5 s
    write_run(tmp_path, "full", None, 2, [10], finished=False, images_per_second=20, epochs=3)
    (row,) = study_of(tmp_path).rows
    points = row.curve("eval_accuracy", "seconds")
    assert points == [(7.5, 50, 50, 50), (15, 65, 60, 70), (22.5, 75, 70, 80)]


def test_curves_over_time_average_seeds_by_the_clock(tmp_path):
    """Of 20 seconds, an epoch takes the first seed 10 and the second 5."""
    options = {"epochs": None, "minutes": 1 / 3}
    write_run(tmp_path, "full", None, 0, [50, 70], images_per_second=10, **options)
    write_run(tmp_path, "full", None, 1, [40, 60, 64, 74], images_per_second=20, **options)
    (row,) = study_of(tmp_path).rows
    points = row.curve("eval_accuracy", "seconds")
    assert points == [(10, 55, 50, 60), (15, 62, 60, 64), (20, 72, 70, 74)]


def test_logs_without_the_time_of_training_have_it_by_subtraction(tmp_path):
    """The 20 test images of an epoch of 11 s take one second of it."""
    folder = write_run(tmp_path, "full", None, 0, [50, 70], images_per_second=10)
    (row,) = study_of(tmp_path).rows
    assert row.runs[0].clock == {1: 10, 2: 20}

    rows = utils.read_json_lines(folder / utils.METRICS)
    utils.write_json_lines(folder / utils.METRICS, [row | {"train_seconds": None} for row in rows])
    (row,) = study_of(tmp_path).rows
    assert row.runs[0].clock == {1: 10, 2: 20}


def test_full_attention_stays_what_others_are_compared_with(tmp_path):
    """Even if the same mask has more results under the name of a local pattern."""
    write_pattern(tmp_path, "full", None, [80])
    write_pattern(tmp_path, "2d_all_neighbors", 4, [90, 91, 92])  # the whole grid of 4 x 4
    write_pattern(tmp_path, "2d_cardinal", 1, [81])
    study = study_of(tmp_path)
    assert [row.label for row in study.distinct] == ["full", "2d_cardinal, step 1"]
    assert by_label(study).keys() == {"2d_cardinal, step 1"}


@pytest.mark.parametrize("damage", [float("nan"), None])
def test_the_chance_of_images_is_that_of_the_run_that_is_compared(tmp_path, damage):
    write_pattern(tmp_path, "full", None, [80, 80])
    write_pattern(tmp_path, "2d_cardinal", 1, [10, 75])
    path = tmp_path / "digits" / "2d_cardinal_expansion_1" / "seed_0" / "summary.json"
    summary = utils.read_json(path)
    summary["final"]["eval_accuracy"] = damage
    path.write_text(json.dumps(summary))
    sentence = answer.sentences(study_of(tmp_path))[0]
    assert "with one seed" in sentence
    assert "Of its accuracy, 75.0 %" in sentence


def test_an_impossible_accuracy_has_no_interval(tmp_path):
    write_pattern(tmp_path, "full", None, [120])
    write_pattern(tmp_path, "2d_cardinal", 1, [120])
    assert "binomial" not in answer.sentences(study_of(tmp_path))[0]


@pytest.mark.parametrize(
    "grid", [[0, 0], [-2, -2], ["a", 3], [1, 2, 3], [[4], [4]], [4.0, 4.0], [10**9, 10**9]]
)
def test_a_damaged_grid_has_no_masks(tmp_path, grid):
    path = write_run(tmp_path) / utils.CONFIG
    config = utils.read_json(path)
    config["attention"]["grid"] = grid
    utils.write_json(path, config)
    study = study_of(tmp_path)
    assert study.same_as == {}
    assert mask_grids.describe(study) is None


@pytest.mark.parametrize("step", [None, -1])
def test_a_damaged_step_has_no_mask(tmp_path, step):
    write_run(tmp_path)
    path = write_run(tmp_path, "2d_cardinal", 1) / utils.CONFIG
    config = utils.read_json(path)
    config["settings"]["expansion_step"] = step
    utils.write_json(path, config)
    study = study_of(tmp_path)
    assert len(study.rows) == 2
    assert len(mask_grids.describe(study)["grids"]) == 1


def test_names_in_the_answer_are_on_one_line(tmp_path):
    write_pattern(tmp_path, "full", None, [80])
    write_pattern(tmp_path, "2d_cardinal", 1, [81], run_name="a\x1b[31m\nb")
    assert r"a\x1b[31m\nb (2d_cardinal, step 1) is at" in answer.sentences(study_of(tmp_path))[0]


def test_nobody_is_the_fastest_where_all_are_equally_fast(tmp_path):
    write_pattern(tmp_path, "full", None, [80])
    write_pattern(tmp_path, "2d_cardinal", 1, [81])
    write_pattern(tmp_path, "2d_all_neighbors", 1, [83])
    assert not any("fastest" in sentence for sentence in answer.sentences(study_of(tmp_path)))
