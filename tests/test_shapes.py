"""2D shapes against 1D windows, compared with numpy's interpolation and scipy's test."""

import numpy as np
import pytest
from fake_runs import write_run
from scipy import stats

from report import comparison, logs, page, results, shapes


def write_pattern(root, mask_type, step, accuracies, mean_neighbors, **options):
    """One finished run per accuracy, with seeds 0, 1, ..."""
    for seed, accuracy in enumerate(accuracies):
        write_run(root, mask_type, step, seed, [accuracy], mean_neighbors=mean_neighbors, **options)


def compare(root):
    study = comparison.study(results.group_by_pattern(logs.load_runs(root)))
    return {found.row.label: found for found in shapes.against_windows(study)}


def test_a_shape_is_compared_with_windows_of_both_sizes(tmp_path):
    small, large, square = [70, 71, 72], [74, 74, 76], [75, 73, 78]
    write_pattern(tmp_path, "1d_cardinal", 1, small, 4.8)
    write_pattern(tmp_path, "1d_all_neighbors", 1, large, 8.6)  # 9 neighbors, nominally
    write_pattern(tmp_path, "2d_all_neighbors", 1, square, 6.25)

    found = compare(tmp_path)["2d_all_neighbors, step 1"]
    assert found.at_nominal.differences == (1, -1, 2)

    pairs = zip(square, small, large, strict=True)
    at = np.log([4.8, 8.6])
    expected = [ours - np.interp(np.log(6.25), at, theirs) for ours, *theirs in pairs]
    assert found.at_mean.differences == pytest.approx(expected)
    assert found.p_mean == pytest.approx(stats.ttest_1samp(expected, 0).pvalue)


def test_p_values_are_corrected_for_the_number_of_shapes(tmp_path):
    write_pattern(tmp_path, "1d_cardinal", 2, [70, 71, 72], 8.6)
    write_pattern(tmp_path, "2d_cardinal", 2, [72, 73.5, 74], 7.5)
    write_pattern(tmp_path, "2d_all_neighbors", 1, [71, 72, 72.5], 7.6)

    found = compare(tmp_path).values()
    raw = [one.at_nominal.p for one in found]
    assert [one.p_nominal for one in found] == pytest.approx(
        [2 * min(raw), max(2 * min(raw), max(raw))]
    )


def test_nothing_is_read_off_beyond_the_windows(tmp_path):
    write_pattern(tmp_path, "1d_cardinal", 1, [70, 71], 4.8)
    write_pattern(tmp_path, "1d_cardinal", 2, [72, 73], 8.6)
    write_pattern(tmp_path, "2d_cardinal", 1, [72, 75], 4.5)
    write_pattern(tmp_path, "2d_cardinal", 3, [72, 75], 9.0)

    found = compare(tmp_path)
    assert list(found) == ["2d_cardinal, step 1"]
    assert found["2d_cardinal, step 1"].at_nominal.differences == (2, 4)
    assert found["2d_cardinal, step 1"].at_mean is None
    assert shapes.cells(found["2d_cardinal, step 1"])[-2:] == ["–", "–"]


def test_a_window_of_the_same_size_is_enough(tmp_path):
    """As with `--edge shift`, where every patch has all of its neighbors."""
    write_pattern(tmp_path, "1d_cardinal", 2, [70, 71], 9.0, edge="shift")
    write_pattern(tmp_path, "2d_all_neighbors", 1, [72, 75], 9.0, edge="shift")
    (found,) = compare(tmp_path).values()
    assert found.at_mean.differences == found.at_nominal.differences == (2, 4)


@pytest.mark.parametrize(
    "change", [{"edge": "shift"}, {"dilation": 2}, {"global_layers": "1"}, {"lr": 0.5}]
)
def test_only_the_shape_may_differ(tmp_path, change):
    write_pattern(tmp_path, "1d_cardinal", 1, [70, 71], 4.8, **change)
    write_pattern(tmp_path, "1d_cardinal", 2, [70, 71], 8.6, **change)
    write_pattern(tmp_path, "2d_all_neighbors", 1, [72, 75], 7.6)
    assert compare(tmp_path) == {}


def test_windows_with_more_common_seeds_are_preferred(tmp_path):
    """Another run name, another setting: only one of the two windows of 9 has partners."""
    write_pattern(tmp_path, "1d_cardinal", 2, [70, 71], 8.6, lr=0.5)
    write_pattern(tmp_path, "1d_all_neighbors", 1, [70, 73], 8.6, run_name="window")
    write_pattern(tmp_path, "2d_all_neighbors", 1, [72, 75], 7.6)
    (found,) = compare(tmp_path).values()
    assert found.at_nominal.differences == (2, 2)


def test_only_common_seeds_count(tmp_path):
    write_pattern(tmp_path, "1d_cardinal", 2, [70], 8.6)
    write_pattern(tmp_path, "2d_all_neighbors", 1, [72, 75], 7.6)
    write_run(tmp_path, "1d_cardinal", 2, 1, [80], finished=False, mean_neighbors=8.6)
    (found,) = compare(tmp_path).values()
    assert found.at_nominal.differences == (2,)
    assert found.p_nominal is None


def test_the_page_shows_them(tmp_path):
    write_pattern(tmp_path, "1d_cardinal", 2, [70, 71], 8.6)
    write_pattern(tmp_path, "2d_all_neighbors", 1, [72, 75], 7.6)
    study = comparison.study(results.group_by_pattern(logs.load_runs(tmp_path)))
    html = page.format_page(study, [], [], "")
    assert f"<h2>{shapes.TITLE}</h2>" in html
    assert "+3.00 (-9.71 to +15.71), n = 2" in html
