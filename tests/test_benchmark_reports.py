"""Reports of benchmark.py in the page of results: read with care, shown as text."""

import json

import pytest
from fake_runs import write_run

import plot_result
import utils

REPORT = utils.REPOSITORY / "experiments" / "benchmark" / "attention_cpu_auto.json"


def plot(run_script, root, report, name="speed.json"):
    """Write the page of one run with a report -> (exit code, stderr)."""
    write_run(root)
    path = root / name
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    arguments = ("--results_path", str(root), "--benchmark", str(path))
    code, _, err = run_script(plot_result.main, *arguments)
    return code, err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"level": "training"}, "is not a report"),
        ({"level": ["model"]}, "is not a report"),
        ({"level": "model", "settings": {}}, "is not a report"),
        ({"settings": None}, "is not a report"),
        ({"rows": []}, "has no rows"),
        ({"rows": [None]}, "row 1 has no usable keys"),
        ({"rows": [{"mask_type": "full"}]}, "row 1 has no usable expansion_step"),
    ],
)
def test_other_reports_are_refused_in_one_line(tmp_path, changes, said, run_script):
    code, err = plot(run_script, tmp_path, utils.read_json(REPORT) | changes)
    assert code == 1
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("key", ["mask_type", "num_patches", "speedup", "ceiling"])
def test_rows_that_lack_a_key_are_refused_in_one_line(tmp_path, key, run_script):
    report = utils.read_json(REPORT)
    del report["rows"][2][key]
    code, err = plot(run_script, tmp_path, report)
    assert code == 1
    assert err.count("\n") == 1
    assert f"row 3 has no usable {key}" in err


def test_unknown_provenance_is_no_trouble(tmp_path, run_script):
    report = utils.read_json(REPORT) | {"provenance": "unknown"}
    assert plot(run_script, tmp_path, report) == (0, "")


def test_a_report_cannot_become_markup(tmp_path, run_script):
    report = utils.read_json(REPORT)
    report["provenance"]["device"] = "<img src=x> `code` *a*"
    assert plot(run_script, tmp_path, report, "my <b> (1).json")[0] == 0
    markdown = (tmp_path / "results.md").read_text()
    assert r"\<img src=x> \`code\` \*a\*" in markdown
    assert r"## Speed against full attention (my \<b> (1))" in markdown
    assert "(figures/my%20%3Cb%3E%20%281%29_speedup.png)" in markdown
    html = (tmp_path / "results.html").read_text()
    assert "<img src=x>" not in html
    assert "<b> (1)" not in html
