"""Reading run folders, grouping them, the statistics and the table."""

import json
import math

import pytest
from fake_runs import write_run
from hypothesis import given
from hypothesis import strategies as st

import masks
import utils
from report import differences, logs, results, table


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# -------------------------------------------------------------------------------------------------
# Reading


def test_runs_are_found_at_every_depth(tmp_path):
    folder = write_run(tmp_path)
    write_run(tmp_path, "2d_cardinal", 1, seed=1)
    assert len(logs.load_runs(tmp_path)) == len(logs.load_runs(tmp_path / "digits")) == 2
    assert [run.folder for run in logs.load_runs(folder.parent)] == [folder]
    (run,) = logs.load_runs(folder)
    assert (run.name, run.state, len(run.metrics)) == ("full seed 0", "done", 2)


def test_what_is_not_a_run_is_silently_ignored(tmp_path, capsys):
    write_run(tmp_path)
    names = ["notes/config.json", "digits/full/seed_x/config.json"]
    names += ["digits/full/seed_7/log.txt", "metrics.jsonl"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not JSON")

    assert len(logs.load_runs(tmp_path)) == 1
    assert logs.load_run(tmp_path / "digits" / "full" / "seed_7") is None
    assert logs.load_run(tmp_path / "nowhere") is None
    assert logs.load_runs(tmp_path / "nowhere") == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", '{"format": 1, "sett', "cannot read"),
        ("config.json", "[]", "should hold a JSON object"),
        ("config.json", '{"format": 3}', "format 3, expected 1 or 2"),
        ("config.json", '{"format": 1}', "has no section 'settings'"),
        ("config.json", '{"format": 1, "settings": {"mask_type": 3}}', "settings.mask_type is 3"),
        ("config.json", '{"format": 1, "settings": {}}', "settings.mask_type is 'missing'"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo\n{"epoch": 3}\n', "line 2"),
        ("summary.json", "", "cannot read"),
        ("summary.json", "{}", "has no section 'final'"),
    ],
)
def test_a_broken_run_is_skipped_with_one_line(tmp_path, capsys, name, text, said):
    write_run(tmp_path, seed=1)
    broken = write_run(tmp_path, seed=0)
    (broken / name).write_text(text)
    assert [run.settings.optimization.seed for run in logs.load_runs(tmp_path)] == [1]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert str(broken / name) in error


def test_a_half_written_last_line_is_skipped_with_a_warning(tmp_path, capsys):
    folder = write_run(tmp_path, finished=False)
    with open(folder / utils.METRICS, "a") as file:
        file.write('{"epoch": 3, "eval_acc')
    (run,) = logs.load_runs(tmp_path)
    assert run.state == "incomplete"
    assert run.curve("eval_accuracy") == {1: 50.0, 2: 60.0}
    assert "half-written last line 3" in capsys.readouterr().err


def test_a_run_that_has_just_started(tmp_path):
    folder = write_run(tmp_path, finished=False)
    (folder / utils.METRICS).unlink()
    (run,) = logs.load_runs(tmp_path)
    assert (run.metrics, run.state, run.curve("eval_loss")) == ([], "incomplete", {})


# -------------------------------------------------------------------------------------------------
# Statistics


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6))
def test_mean_and_sample_deviation_against_their_definitions(values):
    spread = results.Spread.of(values)
    mean = sum(values) / len(values)
    assert spread.n == len(values)
    assert spread.mean == pytest.approx(mean)
    if len(values) == 1:
        assert spread.std is None
    else:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        assert spread.std == pytest.approx(math.sqrt(variance), abs=1e-9)


def test_a_row_reports_the_final_epoch_of_its_finished_runs(tmp_path):
    write_run(tmp_path, seed=0, accuracies=[99, 80], images_per_second=100.0, peak_memory_bytes=5)
    write_run(tmp_path, seed=1, accuracies=[10, 84], images_per_second=300.0, peak_memory_bytes=7)
    write_run(tmp_path, seed=2, accuracies=[1, 2], images_per_second=900.0, finished=False)
    (row,) = results.group_by_pattern(logs.load_runs(tmp_path))
    assert row.accuracy == results.Spread(82, pytest.approx(math.sqrt(8)), 2)
    assert row.throughput.mean == 200
    assert row.peak_memory_bytes == 7
    assert [run.settings.optimization.seed for run in row.runs] == [0, 1, 2]


@pytest.mark.parametrize("value", [None, float("nan"), "fast", True])
def test_a_missing_number_stays_missing(tmp_path, value):
    folders = [write_run(tmp_path, seed=seed, accuracies=[70]) for seed in range(2)]

    def spoil(summary):
        summary["final"]["eval_accuracy"] = summary["peak_memory_bytes"] = value
        del summary["train_images_per_second"]

    change_json(folders[0] / utils.SUMMARY, spoil)
    (row,) = results.group_by_pattern(logs.load_runs(tmp_path))
    assert row.accuracy == results.Spread(70, None, 1)
    assert row.throughput.n == 1
    change_json(folders[1] / utils.SUMMARY, spoil)
    (row,) = results.group_by_pattern(logs.load_runs(tmp_path))
    assert row.accuracy is row.throughput is row.peak_memory_bytes is None
    assert table.rows_as_table([row]).count("–") == 5


def test_a_curve_is_taken_over_the_seeds_that_have_the_epoch(tmp_path):
    write_run(tmp_path, seed=0, accuracies=[10, 20, 30])
    write_run(tmp_path, seed=1, accuracies=[20, 40], finished=False)
    (row,) = results.group_by_pattern(logs.load_runs(tmp_path))
    assert row.curve("eval_accuracy") == [(1, 15, 10, 20), (2, 30, 20, 40), (3, 30, 30, 30)]
    assert row.curve("no_such_metric") == []


# -------------------------------------------------------------------------------------------------
# Grouping and comparing


def test_rows_are_in_natural_order(tmp_path):
    steps = {name: [None] if name in ("full", "axial") else [1, 2, 3] for name in masks.MASK_TYPES}
    patterns = [(name, step) for name in masks.MASK_TYPES for step in steps[name]]
    for seed in (1, 0):
        for mask_type, step in reversed(patterns):
            write_run(tmp_path, mask_type, step, seed)
    write_run(tmp_path, "full", None, run_name="a_full_of_my_own")
    write_run(tmp_path, "2d_spiral", 1)  # from another checkout

    rows = results.group_by_pattern(logs.load_runs(tmp_path))
    found = [(row.mask.mask_type, row.mask.expansion_step) for row in rows]
    assert found == [patterns[0], *patterns, ("2d_spiral", 1)]
    labels = [row.label for row in rows[:3]]
    assert labels == ["full", "a_full_of_my_own (full)", "1d_cardinal, step 1"]
    assert [row.short_label for row in rows[:3]] == ["full", "a_full_of_my_own", "step 1"]


def test_differing_settings(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, "2d_cardinal", 1, seed=1)
    assert differences.differing_settings([]) == []
    assert differences.differing_settings(logs.load_runs(tmp_path)) == []

    write_run(tmp_path, "2d_cardinal", 2, epochs=9, device_name="Slide rule", dropout=0.5)
    before = "(2d_cardinal_expansion_1 seed 1, full seed 0)"
    now = "(2d_cardinal_expansion_2 seed 0)"
    assert differences.differing_settings(logs.load_runs(tmp_path)) == [
        f"--dropout differs between the runs: 0.1 {before}; 0.5 {now}",
        f"--epochs differs between the runs: 2 {before}; 9 {now}",
        "device differs between the runs, so images/s and peak memory are not comparable: "
        f"Abacus {before}; Slide rule {now}",
    ]


# -------------------------------------------------------------------------------------------------
# The table


def test_table(tmp_path):
    measured = {"images_per_second": 12345.6, "peak_memory_bytes": 3 * 2**29}
    for seed, accuracy in enumerate([60, 62, 64]):
        write_run(tmp_path, "full", None, seed, [accuracy], **measured)
    measured = {"images_per_second": 45.67, "peak_memory_bytes": None}
    write_run(tmp_path, "2d_cardinal", 2, 0, [55.25], **measured)
    write_run(tmp_path, "2d_cardinal", 2, 1, [50], finished=False)
    write_run(tmp_path, "1d_cardinal", 1, 0, [50], finished=False, run_name="a|b")

    markdown = table.rows_as_table(results.group_by_pattern(logs.load_runs(tmp_path)))
    lines = markdown.splitlines()
    assert len({len(line) for line in lines}) == 1, "the columns are aligned"
    cells = []
    for line in lines:
        columns = line.replace("\\|", "/").strip("|").split("|")
        cells.append([cell.strip() for cell in columns])

    header = "mask|neighbors, nominal|neighbors, mean|final accuracy, %|difference to full, points|"
    header += "p|images/s|peak memory, GiB|state"
    plus = ["2d_cardinal, step 2", "9", "7.5"]
    assert [cells[0], *cells[2:]] == [
        header.split("|"),
        # t with 2 degrees of freedom is 4.303, and 4.303 * 2 / sqrt 3 = 4.97.
        ["full", "16", "16.0", "62.00 ± 4.97 (n = 3)", "–", "–", "12,346", "1.50", "done"],
        ["a/b (1d_cardinal, step 1)", "5", "4.0", "–", "–", "–", "–", "–", "0 of 1 done"],
        [*plus, "55.25 (n = 1)", "-4.75 (n = 1)", "–", "45.7", "–", "1 of 2 done"],
    ]
    assert all(set(cell) <= {"-", ":"} for cell in cells[1])


def test_the_state_says_that_batches_were_split(tmp_path):
    for seed, parts in enumerate([1, 2]):
        write_run(tmp_path, seed=seed, grad_accumulation=parts)

    runs = logs.load_runs(tmp_path)
    assert results.group_by_pattern(runs)[0].state == "done, batches in 2 parts"
    (note,) = differences.differing_settings(runs)
    assert note.startswith("--grad_accumulation differs")
    assert "images/s and peak memory are not comparable" in note


@pytest.mark.parametrize("holdout", ["0.1", [0.1]])
def test_a_damaged_holdout_is_skipped_with_a_warning(tmp_path, holdout, capsys):
    path = write_run(tmp_path) / utils.CONFIG
    config = utils.read_json(path)
    config["settings"]["holdout"] = holdout
    utils.write_json(path, config)
    assert logs.load_runs(tmp_path) == []
    assert "settings.holdout is" in capsys.readouterr().err
