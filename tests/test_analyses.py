"""Analyses and comparisons of runs, as the page shows them."""

import json

import numpy as np
import pytest
from fake_runs import write_run

import plot_result
import utils
from report import analyses, analysis_charts, analysis_plots, comparison, logs, results

CLASSES = ["cat", "dog", "<b>"]


def write_analysis(folder, epoch=2, pull=1.0, shown=(3, 5), **changes):
    """What eval.py --analyze writes, made up: 2 layers, 3 heads, a grid of 4 x 4."""
    numbers = {
        "format": 1,
        "epoch": epoch,
        "grid": [4, 4],
        "num_images": 20,
        "class_names": CLASSES,
        "distance": [[1.0 * pull, 2.0 * pull, 3.0 * pull], [2.0 * pull, 2.0 * pull, 5.0 * pull]],
        "distance_uniform": 4.0,
        "distance_ceiling": 9.0,
        "entropy": [[0.5, 0.6, 0.7], [None, None, None]],
        "per_class_accuracy": [50.0, None, 100.0],
        "images": [
            {"index": index, "label": 0, "prediction": 2, "probability": 0.5} for index in shown
        ],
        "maps_of": "patch",
        "arrays": "analysis_test.npz",
    } | changes
    utils.write_json(folder / "analysis_test.json", numbers)
    arrays = {
        "receptive_field": np.eye(16, dtype=np.float32),
        "maps": np.full((len(shown), 2, 3, 4, 4), pull, np.float16),
        "images": np.zeros((len(shown), 8, 8, 1), np.uint8),
    }
    np.savez_compressed(folder / "analysis_test.npz", **arrays)


def write_comparison(folder, name="compare_full_seed_0_test", **changes):
    report = {
        "format": 1,
        "first": {"name": "2d_cardinal, step 1, <seed> 0", "epoch": 2, "top1_accuracy": 60.0},
        "second": {"name": "full, seed 0", "top1_accuracy": 55.0},
        "difference": 5.0,
        "interval": {"low": -1.0, "high": 11.0, "level": 0.95},
        "p": 0.125,
        "only_first": 3,
        "only_second": 2,
        "agreement": 75.0,
        "num_images": 20,
        "split": "test",
        "picture": None,
    } | changes
    utils.write_json(folder / f"{name}.json", report)


def study_of(path):
    return comparison.study(results.group_by_pattern(logs.load_runs(path)))


def test_the_numbers_of_seeds_and_heads_are_averaged(tmp_path):
    for seed, pull in enumerate([1.0, 2.0]):
        write_analysis(write_run(tmp_path, seed=seed), pull=pull)
    found = analyses.load(study_of(tmp_path))
    assert analysis_plots.describe_n(found) == "n = 2 models per pattern, 20 images each"

    (axes,) = analysis_charts.draw_layers(found, True).axes
    line, ceiling = axes.lines
    assert list(line.get_xdata()) == [0, 1], "counted as --global_layers counts them"
    assert list(line.get_ydata()) == pytest.approx([1.5 * 2, 1.5 * 3])
    assert set(ceiling.get_ydata()) == {9.0}
    low, high = np.array(axes.collections[0].get_paths()[0].vertices)[:, 1].min(), 7.5
    assert low == pytest.approx(1.5)
    assert axes.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(high)


def test_layers_without_a_choice_have_no_entropy(tmp_path):
    write_analysis(write_run(tmp_path))
    (axes,) = analysis_charts.draw_layers(analyses.load(study_of(tmp_path)), False).axes
    assert list(axes.lines[0].get_xdata()) == [0]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.6])


def test_maps_are_shown_of_the_same_images_only(tmp_path):
    write_analysis(write_run(tmp_path, "full"))
    write_analysis(write_run(tmp_path, "2d_cardinal", 1))
    write_analysis(write_run(tmp_path, "2d_cardinal", 2), shown=(0, 1))
    found = analyses.load(study_of(tmp_path))
    firsts = {row: members[0] for row, members in found.items()}
    shared = analysis_plots.with_the_same_images(firsts)
    assert [row.label for row in shared] == ["full", "2d_cardinal, step 1"]
    assert len(analysis_charts.draw_maps(shared).axes) == 3 * 2


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: write_analysis(folder, epoch=1), "is of epoch 1, the run has 2"),
        (lambda folder: write_analysis(folder, data_as_trained=False), "is of other images than"),
        (lambda folder: write_analysis(folder, format=9), "no analysis that this version can"),
        (lambda folder: write_analysis(folder, distance=None), "no analysis that this version"),
        (lambda folder: (folder / "analysis_test.json").write_text("{"), "cannot read"),
    ],
)
def test_an_analysis_that_does_not_fit_is_left_out_with_a_warning(tmp_path, spoil, said, capsys):
    folder = write_run(tmp_path)
    write_analysis(folder)
    spoil(folder)
    assert analyses.load(study_of(tmp_path)) == {}
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert said in warning


def test_analyses_of_other_images_than_the_accuracy_are_not_shown(tmp_path):
    write_analysis(write_run(tmp_path, holdout=0.1))
    assert analyses.load(study_of(tmp_path)) == {}


def test_the_page_has_plots_and_disagreements(tmp_path):
    write_analysis(write_run(tmp_path, "full"))
    folder = write_run(tmp_path, "2d_cardinal", 1)
    write_analysis(folder)
    write_comparison(folder)
    assert plot_result.main(["--results_path", str(tmp_path)]) == 0

    page = (tmp_path / "results.html").read_text()
    for name in ("distance", "entropy", "maps"):
        assert f'id="attention_{name}"' in page
    assert 'id="receptive_field"' in page
    assert 'id="class_accuracy"' in page
    assert "2d_cardinal, step 1, &lt;seed&gt; 0" in page
    assert "+5.00 (-1.00 to +11.00)" in page
    assert "Attention distance" in (tmp_path / "results.md").read_text()


def test_without_arrays_the_other_plots_are_there(tmp_path, run_script):
    folder = write_run(tmp_path)
    write_analysis(folder)
    (folder / "analysis_test.npz").write_bytes(b"no zip")
    code, _, err = run_script(plot_result.main, "--results_path", str(tmp_path))
    assert code == 1
    assert err.count("\n") == 1
    assert "receptive_field (cannot read" in err
    page = (tmp_path / "results.html").read_text()
    assert 'id="attention_distance"' in page
    assert 'id="receptive_field"' not in page


def test_a_seed_or_a_limit_without_a_number_costs_no_other_seed(tmp_path):
    """All attention of a head may go to the class token, and a class may have no images."""
    write_analysis(write_run(tmp_path, seed=0), distance=[[None, 2.0, 3.0], [2.0, 2.0, 5.0]])
    write_analysis(write_run(tmp_path, seed=1), per_class_accuracy=[None, None, 50.0])
    found = analyses.load(study_of(tmp_path))
    (axes,) = analysis_charts.draw_layers(found, True).axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([2.0, 3.0])
    (axes,) = analysis_charts.draw_classes(found).axes
    drawn = np.ma.filled(np.ma.asarray(axes.lines[0].get_ydata(), dtype=float), np.nan)
    assert drawn == pytest.approx([50.0, np.nan, 75.0], nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "train"}, ""),
        ({"format": 9}, "that this version cannot read"),
        (
            {"first": {"name": "a", "top1_accuracy": 1.0, "epoch": 1}},
            "is of epoch 1, the run has 2",
        ),
    ],
)
def test_a_comparison_of_something_else_is_left_out(tmp_path, changes, said, capsys):
    write_comparison(write_run(tmp_path), **changes)
    assert analyses.load_comparisons(study_of(tmp_path)) == []
    assert said in capsys.readouterr().err


def test_a_comparison_that_cannot_be_read_is_left_out(tmp_path, capsys):
    folder = write_run(tmp_path)
    (folder / "compare_x.json").write_text(json.dumps({"first": 1}))
    assert analyses.load_comparisons(study_of(tmp_path)) == []
    assert "left out a comparison" in capsys.readouterr().err


@pytest.mark.parametrize("key", analyses.NUMBERS)
def test_an_analysis_without_a_key_that_the_plots_read_is_left_out(tmp_path, key, capsys):
    folder = write_run(tmp_path)
    write_analysis(folder, **{key: None})
    assert plot_result.main(["--results_path", str(tmp_path)]) == 0
    assert "no analysis that this version can read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": [1, 2, 3]},
        {"per_class_accuracy": [50.0]},
        {"images": ["cat"]},
        {"images": [{"index": 3, "label": 0, "prediction": 3}]},
    ],
)
def test_an_analysis_that_does_not_fit_together_is_left_out(tmp_path, changes, capsys):
    write_analysis(write_run(tmp_path), **changes)
    assert analyses.load(study_of(tmp_path)) == {}
    assert "left out an analysis" in capsys.readouterr().err


def test_comparisons_are_those_of_the_table(tmp_path, capsys):
    """Of its images, and of its models: a run may go on after it was compared."""
    folder = write_run(tmp_path)
    write_comparison(folder)
    write_comparison(folder, "compare_full_seed_0_train", split="train")
    first = {"name": "full", "epoch": 1, "top1_accuracy": 10.0}
    write_comparison(folder, "compare_old_test", first=first)
    assert len(analyses.load_comparisons(study_of(tmp_path))) == 1
    warning = capsys.readouterr().err
    assert "compare_old_test.json is of epoch 1, the run has 2" in warning
    assert warning.count("\n") == 1


@pytest.mark.parametrize("picture", ["gone.png", "", "..", "a\0.png", "config.json", 5])
def test_a_contact_sheet_that_is_no_picture_is_left_out(tmp_path, picture):
    write_comparison(write_run(tmp_path), picture=picture)
    assert plot_result.main(["--results_path", str(tmp_path)]) == 0
    assert "<img" not in (tmp_path / "results.html").read_text()
