"""Studies side by side: the picture and the table at the top of the README."""

import pytest
from fake_runs import write_run

from report import comparison, logs, overview, results

FULL = [70.0, 71.0, 72.0]


def write_study(root, **differences):
    """Seeds 0 to 2 of full attention, and of each pattern `<mask_type>__<step>` with its gains."""
    for seed, accuracy in enumerate(FULL):
        write_run(root, seed=seed, accuracies=[50, accuracy], img_size=32, label=root.name)
    for pattern, gains in differences.items():
        mask_type, step = pattern.split("__")
        for seed, gain in enumerate(gains):
            accuracies = [50, FULL[seed] + gain]
            settings = {"accuracies": accuracies, "img_size": 32, "label": root.name}
            write_run(root, mask_type, int(step), seed, **settings)
    return comparison.study(results.group_by_pattern(logs.load_runs(root)))


@pytest.fixture
def studies(tmp_path):
    certain, varied = [2.0, 2.1, 1.9], [3.0, -3.0, 0.3]
    one = write_study(
        tmp_path / "one", **{"1d_cardinal__2": varied, "2d_all_neighbors__1": certain}
    )
    two = write_study(tmp_path / "a|b", **{"1d_all_neighbors__1": varied, "2d_cardinal__1": [1.0]})
    return [one, two]


def draw(studies):
    return overview.draw_differences(studies, overview.names_in(studies))


def table_of(studies):
    return overview.format_differences(studies, overview.names_in(studies))


def test_the_lines_that_several_studies_have(studies):
    assert overview.names_in(studies, at_least=2) == ["1D window of 9"]


def test_the_table_has_a_line_per_mask_and_a_column_per_study(studies):
    lines = table_of(studies).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| mean of all patterns",
        "| plus of 5",
        "| 1D window of 9",
        "| square of 9",
    ]
    assert lines[2].endswith("| +1.05 (-2.62 to +4.72) | – |")  # by hand: 4.303 * 1.476 / sqrt(3)
    assert lines[3].endswith("| – | +1.00 (n = 1) |")
    assert lines[4].count("+0.10 (-7.36 to +7.56)") == 2  # by hand: 4.303 * 3.005 / sqrt(3)
    assert lines[5].endswith("| **+2.00 (+1.75 to +2.25)** | – |")


def test_a_study_without_a_pair_is_empty(tmp_path, studies):
    nothing = write_study(tmp_path / "none")
    _, axes = draw([studies[0], nothing]).axes
    assert axes.get_title().endswith("none\n2 epochs, class token, n = 0 seeds")
    assert table_of([studies[0], nothing]).count("| – |") == 3


def test_what_is_drawn(studies):
    first, second = draw(studies).axes
    assert [tick.get_text() for tick in first.get_yticklabels()] == [
        "mean of all patterns",
        "plus of 5",
        "1D window of 9",
        "square of 9",
    ]

    def marked(axes):
        lines = [line for line in axes.lines if line.get_marker() not in ("None", None, "", ".")]
        return {
            line.get_ydata()[0]: (line.get_xdata()[0], line.get_markerfacecolor() != "white")
            for line in lines
        }

    assert marked(first) == {
        0: (pytest.approx(1.05), False),
        2: (pytest.approx(0.1), False),
        3: (pytest.approx(2), True),
    }
    assert marked(second) == {1: (pytest.approx(1), False), 2: (pytest.approx(0.1), False)}
    assert first.get_title().endswith("one\n2 epochs, class token, n = 3 seeds")
    assert second.get_title().endswith("a|b\n2 epochs, class token, n = 1 to 3 seeds")

    dots = [line for line in first.lines if line.get_marker() == "."]
    assert [list(line.get_xdata()) for line in dots] == [
        pytest.approx([2.5, -0.45, 1.1]),
        pytest.approx([3.0, -3.0, 0.3]),
        pytest.approx([2.0, 2.1, 1.9]),
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mix": 0.5}, ", MixUp and CutMix"),
        ({"mix": 0.5, "mixup_alpha": 0.0}, ", CutMix"),
        ({"mix": 0.0}, ""),
        ({"mix": 0.5, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}, ""),
    ],
)
def test_studies_of_the_same_data_are_told_apart(tmp_path, changes, said):
    write_run(tmp_path, accuracies=[70], pool="mean", epochs=12, label="CIFAR", **changes)
    study = comparison.study(results.group_by_pattern(logs.load_runs(tmp_path)))
    header = table_of([study]).splitlines()[0]
    assert header == f"| mask | CIFAR, 12 epochs{said} |"


def test_variants_of_a_pattern_have_names_of_their_own(tmp_path):
    write_run(tmp_path, accuracies=[70])
    write_run(tmp_path, "2d_cardinal", 1, accuracies=[71])
    shifted = {"run_name": "2d_cardinal_expansion_1_shift", "edge": "shift"}
    write_run(tmp_path, "2d_cardinal", 1, accuracies=[72], **shifted)
    study = comparison.study(results.group_by_pattern(logs.load_runs(tmp_path)))
    names = ["plus of 5", "2d_cardinal, step 1, edge shift"]
    assert sorted(overview.lines_of(study)) == sorted(names)


def test_many_studies_are_in_several_rows(tmp_path, studies):
    panels = draw([*studies, *studies]).axes
    tops = [round(panel.get_position().y1, 2) for panel in panels]
    assert len(panels) == 4
    assert tops[0] == tops[1] == tops[2] > tops[3]
