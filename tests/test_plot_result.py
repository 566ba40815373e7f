"""plot_result.py on made-up run folders: the report, what the plots show, and how it fails."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from fake_runs import MEAN_NEIGHBORS, write_run
from matplotlib.text import Text

import masks
import plot_result
import utils
from report import charts, comparison, curves, figures, logs, plots, results, table

PLOTS = (
    "accuracy_vs_throughput",
    "accuracy_over_time",
    "accuracy_vs_budget",
    "accuracy_vs_neighbors",
    "accuracy_curves",
    "loss_curves",
    "generalization_gap",
)
CURVES = ["accuracy_over_time", "accuracy_curves", "loss_curves", "generalization_gap"]


def write_sweep(root, steps, seeds):
    for seed in seeds:
        write_run(root, "full", None, seed, accuracies=[40 + seed, 80 + seed])
        for number, mask_type in enumerate(masks.STUDIED[1:]):
            for step in steps:
                accuracies = [30 + seed + number, 60 + 3 * step + seed + number]
                rate = 1000.0 + 10 * step
                write_run(root, mask_type, step, seed, accuracies, images_per_second=rate)


def rows_of(path):
    return results.group_by_pattern(logs.load_runs(path))


def run_script(*arguments):
    command = [sys.executable, str(utils.REPOSITORY / "plot_result.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


# -------------------------------------------------------------------------------------------------
# The report


def test_a_sweep_gives_a_report_and_every_plot_in_two_formats(tmp_path, capsys):
    write_sweep(tmp_path, steps=[1, 2, 3], seeds=[0, 1])
    path = tmp_path / "digits"
    assert plot_result.main(["--results_path", str(path)]) == 0

    output = capsys.readouterr()
    assert output.err == ""
    report = (path / "results.md").read_text()
    markdown = table.rows_as_table(rows_of(path))
    assert markdown in output.out
    assert markdown in report

    title, answer, setup, *_ = report.split("\n\n")
    assert title == "# Local attention on Digits"
    assert "full attention" in answer
    assert setup.startswith("vit_micro, 12,345 parameters, 16×16 images in 4×4 patches")
    assert "--pool cls, 2 epochs, 2 seeds." in report
    assert "26 runs; device Abacus; torch 2.15.0; python 3.11.2; git commit 0123456789" in report
    assert "0123456789 (modified)." in report
    assert f"`python plot_result.py --results_path {path}`" in report
    assert "Attention is 20.0% of the arithmetic" in report
    assert "more than 1.25 times as fast" in report
    assert "class token is a global token" in report
    assert "Unfinished" not in report

    for name in PLOTS:
        png = path / "figures" / f"{name}.png"
        assert png.read_bytes().startswith(b"\x89PNG")
        assert png.stat().st_size > 10_000
        assert "<svg" in png.with_suffix(".svg").read_text()
        assert f"(figures/{name}.png)" in report
        assert f"(figures/{name}.svg)" in report

    files = [file.name for file in path.iterdir() if file.is_file()]
    assert sorted(files) == ["results.html", "results.md"], "nothing else is left behind"


def test_the_same_runs_give_the_same_files(tmp_path):
    write_run(tmp_path)
    output_dir = tmp_path / "elsewhere" / "report"
    arguments = ["--results_path", str(tmp_path / "digits"), "--output_dir", str(output_dir)]

    contents = []
    for _ in range(2):
        assert plot_result.main(arguments) == 0
        files = sorted(path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file())
        contents.append([path.read_bytes() for path in files])

    assert len(contents[0]) == 2 + 2 * len(PLOTS)
    assert contents[0] == contents[1]
    assert not (tmp_path / "digits" / "results.md").exists()


def test_runs_in_progress_are_plotted_and_marked(tmp_path, capsys):
    write_run(tmp_path, "full", None, 0, [50, 60, 70])
    write_run(tmp_path, "2d_cardinal", 1, 0, [40], finished=False, epochs=3)
    write_run(tmp_path, "2d_cardinal", 1, 1, [], finished=False, epochs=3)
    assert plot_result.main(["--results_path", str(tmp_path)]) == 0

    report = (tmp_path / "results.md").read_text()
    assert "0 of 2 done" in report
    name = "2d_cardinal_expansion_1"
    assert f"{name} seed 0 (epoch 1 of 3), {name} seed 1 (epoch 0 of 3)" in report
    assert capsys.readouterr().err == ""


def test_without_a_finished_run_there_are_curves_only(tmp_path):
    write_run(tmp_path, finished=False)
    assert list(plots.choose(comparison.study(rows_of(tmp_path)))) == CURVES


@pytest.mark.parametrize("seed", range(5))
def test_the_pareto_front_is_what_no_other_point_beats(seed):
    random = np.random.default_rng(seed)
    points = [tuple(point) for point in random.integers(0, 6, (12, 2)).tolist()]  # with ties

    def is_beaten(point):
        x, y = point
        return any(a >= x and b >= y for a, b in points if (a, b) != point)

    expected = sorted({point for point in points if not is_beaten(point)})
    assert charts.pareto_front(points) == expected


def test_points_count_the_finished_seeds_and_curves_all_that_have_begun(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, finished=False)
    write_run(tmp_path, seed=2, accuracies=[], epochs=2, finished=False)
    chosen = plots.choose(comparison.study(rows_of(tmp_path)))
    for name, plot in chosen.items():
        n = 2 if name in CURVES else 1
        assert f"n = {n} seed" in plot.caption, name


def test_notes_follow_the_settings(tmp_path, capsys):
    write_run(tmp_path, "full", None, pool="mean", device="cuda")
    write_run(tmp_path, "2d_cardinal", 1, pool="mean", device="cuda", epochs=5)
    assert plot_result.main(["--results_path", str(tmp_path)]) == 0

    report = (tmp_path / "results.md").read_text()
    assert "class token" not in report
    assert "whole process" not in report
    assert "--epochs differs between the runs" in report
    assert capsys.readouterr().err.count("warning: --epochs differs between the runs") == 1


# -------------------------------------------------------------------------------------------------
# The plots


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_curves_of_a_few_runs_share_a_pair_of_panels(tmp_path, kind):
    write_sweep(tmp_path, steps=[2], seeds=[0, 1, 2])
    rows = rows_of(tmp_path)
    labels = [row.label for row in rows]

    figure = curves.draw_curves(rows, kind)
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    for axes, split in zip(figure.axes, ("eval", "train"), strict=True):
        lines = lines_of(axes)
        assert list(lines) == labels
        for row in rows:
            epochs, means = lines[row.label].get_data()
            by_hand = [[run.metrics[e][f"{split}_{kind}"] for run in row.runs] for e in range(2)]
            assert list(epochs) == [1, 2]
            np.testing.assert_allclose(means, np.mean(by_hand, axis=1))
    assert len(figure.axes[0].collections) == len(rows), "one band per row"


def test_curves_of_many_runs_have_panels_by_mask_type_with_full_in_each(tmp_path):
    write_sweep(tmp_path, steps=[1, 2, 3], seeds=[0])
    figure = curves.draw_curves(rows_of(tmp_path), "accuracy")
    assert len(figure.axes) == 2 * 4
    assert [axes.get_title() for axes in figure.axes[:4]] == list(masks.STUDIED[1:])
    for axes in figure.axes:
        lines = lines_of(axes)
        assert list(lines) == ["full", "step 1", "step 2", "step 3"]
        assert len({line.get_color() for line in lines.values()}) == 4
        assert not axes.collections, "one seed has no band"
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == list(lines)


def test_more_mask_types_than_fit_side_by_side(tmp_path):
    for number in range(7):
        write_run(tmp_path, f"2d_own{number}", 1)
    figure = curves.draw_curves(rows_of(tmp_path), "loss")
    assert len(figure.axes) == 2 * 7
    figures.save(figure, tmp_path / "many.png")


def test_accuracy_against_the_true_number_of_neighbors(tmp_path):
    write_sweep(tmp_path, steps=[1, 3], seeds=[0, 1])
    rows = rows_of(tmp_path)
    (axes,) = charts.draw_accuracy_vs_neighbors(rows).axes
    lines = lines_of(axes)
    assert axes.get_xscale() == "log"
    assert list(lines) == list(masks.STUDIED)

    assert lines["full"].get_data() == ([16], [80.5])
    x, y = lines["2d_cardinal"].get_data()
    assert list(x) == [MEAN_NEIGHBORS[1], MEAN_NEIGHBORS[3]]
    assert list(y) == [rows[5].accuracy.mean, rows[6].accuracy.mean] == [65.5, 71.5]

    bars = [segment for bar in axes.collections for segment in bar.get_segments()]
    half = np.std([80, 81], ddof=1)
    assert any(np.allclose(bar, [[16, 80.5 - half], [16, 80.5 + half]]) for bar in bars)

    assert [text.get_text() for text in axes.texts] == ["1", "3"] * 4
    low, high = axes.get_xlim()
    assert all(low <= tick <= high for tick in axes.get_xticks())


def test_accuracy_against_throughput(tmp_path):
    write_sweep(tmp_path, steps=[1], seeds=[0])
    again = {"run_name": "full_again", "accuracies": [77], "images_per_second": 500.0}
    write_run(tmp_path, "full", None, **again)

    (axes,) = charts.draw_accuracy_vs_throughput(rows_of(tmp_path)).axes
    lines = lines_of(axes)
    np.testing.assert_array_equal(lines["full"].get_data(), [[1000, 500], [80, 77]])
    np.testing.assert_array_equal(lines["2d_cardinal"].get_data(), [[1010], [65]])
    assert "full_again" in [text.get_text() for text in axes.texts]


# -------------------------------------------------------------------------------------------------
# The names of runs

SHOWN_AS = {
    "_first": "_first",
    "a$b_{c$d'": "a$b_{c$d'",
    r"lr_$\alpha$": r"lr_$\alpha$",
    "two\nlines": r"two\nlines",
    "back\\slash `code` | <b>": "back\\slash `code` | <b>",
    "mark\u202e": r"mark\u202e",
}
PATTERNS = list(masks.STUDIED[1:])


def write_named(root, names, mask_types=("2d_cardinal",), **options):
    for number, name in enumerate(names):
        mask_type = mask_types[number % len(mask_types)]
        step = 1 + number % 3
        accuracies = [30 + number / 4, 40 + number / 4]
        options["images_per_second"] = 1000.0 + 7 * number
        write_run(root, mask_type, step, 0, accuracies, run_name=name, **options)


def texts_of(artist):
    return [found.get_text().lstrip("\u200b") for found in artist.findobj(Text)]


def layout_of(figure):
    """The boxes of the axes and of the legends, in inches."""
    figure.draw_without_rendering()
    to_inches = figure.dpi_scale_trans.inverted()

    def boxes_of(artists):
        return [artist.get_window_extent().transformed(to_inches) for artist in artists]

    legends_of_axes = filter(None, (axes.get_legend() for axes in figure.axes))
    return boxes_of(figure.axes), boxes_of([*figure.legends, *legends_of_axes])


def check_layout(figure):
    """No axes are squeezed; legends lie inside the figure and cover no axes."""
    all_axes, legends = layout_of(figure)
    assert all(axes.width > 1.8 and axes.height > 1.6 for axes in all_axes)
    for legend in legends:
        assert legend.x0 >= 0 <= legend.y0
        assert legend.x1 <= figure.get_figwidth()
        assert not any(legend.overlaps(axes) for axes in all_axes)


def test_names_are_shown_literally(tmp_path, capsys):
    write_named(tmp_path, SHOWN_AS, label="my\n*data*|")
    assert plot_result.main(["--results_path", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""

    rows = rows_of(tmp_path)
    in_legend = texts_of(curves.draw_curves(rows, "accuracy").legends[0])
    beside_points = texts_of(charts.draw_accuracy_vs_throughput(rows))
    for name in SHOWN_AS.values():
        assert any(entry.startswith(f"{name} (2d_cardinal") for entry in in_legend)
        assert name in beside_points
    figure = charts.draw_accuracy_vs_neighbors(rows)
    assert not any(found.get_parse_math() for found in figure.findobj(Text))

    report = (tmp_path / "results.md").read_text()
    assert report.startswith("# Local attention on my\\\\n\\*data\\*\\|\n")
    assert sum(line.startswith("|") for line in report.splitlines()) == 2 + len(SHOWN_AS)
    assert r"| two\\nlines (2d_cardinal, step 1) " in report
    assert r"| back\\slash \`code\` \| \<b> (2d_cardinal, " in report


@pytest.mark.parametrize("mask_types", [PATTERNS[:1], PATTERNS])
@pytest.mark.parametrize("length", [30, 84])
def test_long_names_do_not_squeeze_the_axes(tmp_path, mask_types, length):
    stem = ("a_long_name_" * 7)[: length - 2]
    write_named(tmp_path, [f"{stem}{number:02}" for number in range(8)], mask_types)
    rows = rows_of(tmp_path)
    for figure in (
        curves.draw_curves(rows[:4], "loss"),
        curves.draw_curves(rows, "loss"),
        charts.draw_accuracy_vs_neighbors(rows),
        charts.draw_accuracy_vs_throughput(rows),
    ):
        check_layout(figure)


def test_among_too_many_runs_the_most_accurate_are_named(tmp_path):
    write_named(tmp_path, [f"run_{number:03}" for number in range(200)])
    rows = rows_of(tmp_path)

    figure = curves.draw_curves(rows, "accuracy")
    check_layout(figure)
    shown = [name for name in texts_of(figure.legends[0]) if name.startswith("run_")]
    assert {name[:7] for name in shown} == {f"run_{number:03}" for number in range(184, 200)}
    assert "16 of 200 runs named" in figure.legends[0].get_title().get_text()
    assert len(figure.axes[0].lines) == 200

    for draw in (charts.draw_accuracy_vs_neighbors, charts.draw_accuracy_vs_throughput):
        figure = draw(rows)
        check_layout(figure)
        (axes,) = figure.axes
        boxes = [found.get_window_extent() for found in axes.texts]
        assert 4 <= len(boxes) <= charts.MAX_NAMED
        assert not any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))
        assert f"{len(boxes)} of 200 runs named" in figure.legends[0].get_title().get_text()


def test_among_too_many_runs_of_several_mask_types_as_well(tmp_path):
    write_named(tmp_path, [f"run_{number:03}" for number in range(40)], PATTERNS[:2])
    for number in range(5):
        write_run(tmp_path, "full", None, run_name=f"full_{number}", accuracies=[number])

    figure = curves.draw_curves(rows_of(tmp_path), "accuracy")
    check_layout(figure)
    legend = figure.axes[-1].get_legend()
    assert len(legend.get_texts()) == charts.MAX_NAMED + charts.MAX_FULL
    assert "16 of 20 runs named" in legend.get_title().get_text()
    assert "3 of 5 runs of full shown" in legend.get_title().get_text()


def test_characters_missing_from_the_font_give_one_warning(tmp_path, capsys):
    figures._warn_once.cache_clear()
    write_named(tmp_path, ["注意力实验一", "注意力实验二号", "宽度"])
    assert plot_result.main(["--results_path", str(tmp_path)]) == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "lacks some characters" in warning


# -------------------------------------------------------------------------------------------------
# Failing


def test_a_plot_that_fails_costs_no_other_plot_and_no_number(tmp_path, monkeypatch, run_script):
    def fail(rows, nominal):
        raise RuntimeError("matplotlib says no")

    monkeypatch.setattr(charts, "draw_accuracy_vs_neighbors", fail)
    write_sweep(tmp_path, steps=[1], seeds=[0])
    code, out, err = run_script(plot_result.main, "--results_path", str(tmp_path))
    assert code == 1
    assert err.count("\n") == 1
    assert "accuracy_vs_neighbors (matplotlib says no)" in err
    assert "| full " in out

    report = (tmp_path / "results.md").read_text()
    page = (tmp_path / "results.html").read_text()
    for name in PLOTS:
        drawn = name not in ("accuracy_vs_neighbors", "accuracy_vs_budget")
        assert (tmp_path / "figures" / f"{name}.svg").exists() == drawn
        assert (name in report) == drawn
        assert (f'id="{name}"' in page) == drawn


def write_nothing(path):
    pass


def write_a_file(path):
    path.write_text("")


def write_an_empty_folder(path):
    path.mkdir()


def write_no_epoch(path):
    write_run(path, accuracies=[], finished=False)


def write_a_run_twice(path):
    write_run(path / "a")
    write_run(path / "b")


def write_two_datasets(path):
    write_run(path)
    write_run(path, dataset="cifar10", label="CIFAR-10")


@pytest.mark.parametrize(
    ("prepare", "code", "said"),
    [
        (write_nothing, 2, "does not exist or is not a folder"),
        (write_a_file, 2, "does not exist or is not a folder"),
        (write_an_empty_folder, 1, "no runs in"),
        (write_no_epoch, 1, "has finished an epoch"),
        (write_a_run_twice, 1, "full seed 0 exists twice"),
        (write_two_datasets, 1, "several datasets (CIFAR-10 in"),
    ],
)
def test_what_cannot_be_compared_is_refused_on_one_line(tmp_path, prepare, code, said):
    prepare(tmp_path / "results")
    finished = run_script("--results_path", tmp_path / "results")
    assert finished.returncode == code
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("plot_result.py: error: ")
    assert said in finished.stderr
    assert not list(tmp_path.rglob("results.md"))


def test_an_output_folder_that_cannot_be_written(tmp_path):
    write_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(utils.UserError, match="cannot write"):
        plot_result.main(["--results_path", str(tmp_path), "--output_dir", str(tmp_path / "file")])
