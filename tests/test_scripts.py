"""Every script from outside: it starts, helps without network, and fails on one line."""

import os
import subprocess
import sys

import pytest

import utils

SCRIPTS = ["main.py", "benchmark.py", "run_experiments.py", "plot_result.py", "eval.py", "masks.py"]
LIGHT = ["run_experiments.py", "plot_result.py"]  # start without torch


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_with_a_text(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=utils.REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "--" in done.stdout
    assert "default: None" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_ends_in_one_line(script):
    done = subprocess.run([sys.executable, script, "--no_such"], capture_output=True, text=True, cwd=utils.REPOSITORY)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: error: ")


@pytest.mark.parametrize("module", [script.removesuffix(".py") for script in LIGHT])
def test_light_scripts_do_not_load_torch(module):
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=utils.REPOSITORY).returncode == 0


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys, monkeypatch):
    """A sweep of runs with --debug goes by the codes as well."""

    def fail():
        raise utils.OutOfMemoryError("no memory")

    monkeypatch.setattr(sys, "argv", ["main.py", "--debug"])
    with pytest.raises(SystemExit) as stop:
        utils.run_cli(fail)
    assert stop.value.code == utils.EXIT_OUT_OF_MEMORY
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("Traceback")
    assert error[-1] == "main.py: error: no memory"


def gpu_script(tmp_path, part, **environment):
    command = ["bash", "experiments/gpu.sh", part, str(tmp_path / "gpu")]
    environment = {**os.environ, "SMALL": "1", "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=utils.REPOSITORY, env=environment)


def test_the_script_for_gpus_measures_and_writes_each_row(tmp_path):
    done = gpu_script(tmp_path, "machine")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = utils.read_json_lines(tmp_path / "gpu" / "rows.jsonl")
    assert [row["what"] for row in rows[:2]] == ["versions", "copy"]


def test_the_script_for_gpus_names_what_failed_and_lists_its_parts(tmp_path):
    done = gpu_script(tmp_path, "5", PYTHON="false")
    assert done.returncode == 1
    words = "gpu.sh: failed in part base: base_off (exit code 1); base_default (exit code 1)"
    assert words in done.stdout  # the second step ran although the first had failed
    unknown = gpu_script(tmp_path, "8")
    assert unknown.returncode == 2
    assert "7 accuracy" in unknown.stderr


def test_a_path_may_begin_at_home(monkeypatch):
    """Shells expand `~` in `--output_dir ~/x`, and not in `--output_dir=~/x`."""
    import main
    import plot_result
    import run_experiments
    from sweep.plan import data_dir_of

    monkeypatch.setenv("HOME", "/home/me")
    settings = main.resolve_settings(main.parse_args(["--data_dir=~/x", "--output_dir=~/y", "--device", "cpu"]))
    assert (settings["data_dir"], settings["output_dir"]) == ("/home/me/x", "/home/me/y")
    args = run_experiments.parse_args(["--output_dir=~/y", "--", "--data_dir=~/x"])
    assert (data_dir_of(args), args.output_dir) == ("/home/me/x", "/home/me/y")
    assert str(plot_result.parse_args(["--results_path=~/y"]).results_path) == "/home/me/y"
