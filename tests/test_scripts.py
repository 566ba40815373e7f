"""Every script from the outside: it starts, prints its help offline, and fails with one line."""

import importlib
import os
import subprocess
import sys
import tarfile

import pytest

import utils

SCRIPTS = ["main.py", "benchmark.py", "run_experiments.py", "plot_result.py", "eval.py", "masks.py"]


def run_script(*command):
    return subprocess.run(command, capture_output=True, text=True, cwd=utils.REPOSITORY)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_with_a_text(script):
    done = run_script(sys.executable, script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "--" in done.stdout
    assert "default: None" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_ends_in_one_line(script):
    done = run_script(sys.executable, script, "--no_such")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: error: ")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys, monkeypatch):
    """A sweep of runs with --debug acts on the codes as well."""

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
    return subprocess.run(
        command, capture_output=True, text=True, cwd=utils.REPOSITORY, env=environment
    )


def test_the_gpu_script_measures_and_writes_each_row(tmp_path):
    done = gpu_script(tmp_path, "machine")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = utils.read_json_lines(tmp_path / "gpu" / "rows.jsonl")
    names = ["versions", "copy", "matmul fp32", "matmul tf32", "matmul bf16", "ceilings"]
    assert [row["name"] for row in rows] == names
    assert rows[0]["provenance"]["versions"]["torch"]
    assert rows[1]["bytes_per_second"] > 0
    assert "left_out" in rows[3]
    assert rows[5]["exit_code"] == 0


def test_the_gpu_script_continues_after_a_failure_and_names_it(tmp_path):
    done = gpu_script(tmp_path, "4", PYTHON="false")
    assert done.returncode == 1
    steps = utils.read_json_lines(tmp_path / "gpu" / "rows.jsonl")
    assert len(steps) == 8
    assert {(row["what"], row["part"], row["exit_code"]) for row in steps} == {("step", "grids", 1)}
    last = done.stdout.splitlines()[-1]
    failed = "full_3 (exit code 1), grid_3 (exit code 1), "
    assert last.startswith(f"gpu.sh: failed in part grids: {failed}")


def test_the_gpu_script_ends_what_hangs(tmp_path):
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    done = gpu_script(tmp_path, "base", PYTHON=str(hanging), PART_SECONDS="1")
    assert done.returncode == 1
    off, default, graphs, profile, tf32 = utils.read_json_lines(tmp_path / "gpu" / "rows.jsonl")
    assert [row["exit_code"] for row in (off, default, profile)] == [124] * 3
    assert graphs["left_out"] == "CUDA graphs need CUDA"
    assert tf32["left_out"] == "a mode of CUDA"
    assert (tmp_path / "gpu" / "base-default.txt").read_text() == "not started\n"


def test_the_gpu_script_lists_its_parts_and_refuses_others(tmp_path):
    listed = run_script("bash", "experiments/gpu.sh")
    assert listed.returncode == 0
    assert "7  accuracy" in listed.stdout
    for part, environment, words in [
        ("8", {}, "no part is called 8; expected 1 to 7 or one of machine tests"),
        ("7", {"SMALL": "", "DATA": "nowhere", "ARCHIVE": "none"}, "or its archive as ARCHIVE="),
    ]:
        done = gpu_script(tmp_path, part, **environment)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr


def test_the_gpu_script_unpacks_its_images_whole(tmp_path):
    image = tmp_path / "made" / "cifar10-jpeg" / "train" / "cat" / "0001.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"an image")
    archive = tmp_path / "cifar10-jpeg.tar.xz"
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(tmp_path / "made" / "cifar10-jpeg", "cifar10-jpeg")

    only_tar = tmp_path / "python"  # which fails when it should train
    only_tar.write_text(f'#!/bin/sh\n[ "$2" = tarfile ] && exec {sys.executable} "$@"\nexit 3\n')
    only_tar.chmod(0o755)
    places = {"ARCHIVE": str(archive), "DATA": str(tmp_path / "data" / "images")}
    done = gpu_script(tmp_path, "accuracy", SMALL="", PYTHON=str(only_tar), **places)
    assert "failed in part accuracy: sweep (exit code 3)" in done.stdout
    folder = tmp_path / "data" / "images"
    assert (folder / "train" / "cat" / "0001.jpg").read_bytes() == b"an image"
    assert (folder / "label.txt").read_text() == "CIFAR-10 (JPEG q75 copy)\n"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failing_candidate_on_a_gpu_costs_no_other_its_row(tmp_path, monkeypatch, capsys):
    gpu = load_gpu_measurements(monkeypatch)
    attend = gpu.candidates.make_attend

    def broken(backend, *arguments):
        if backend == "dense":
            raise RuntimeError("CUDA error: out of luck\nand more")
        return attend(backend, *arguments)

    monkeypatch.setattr(gpu.candidates, "make_attend", broken)
    options = [
        *("--device", "cpu", "--grids", "[3]", "--batch_size", "1", "--num_heads", "1"),
        *("--head_dim", "8", "--rounds", "3", "--expansion_steps", "[1]"),
        *("--mask_types", '["2d_cardinal"]', "--backends", '["dense", "flex", "uncompiled"]'),
    ]
    assert gpu.main(["attention", str(tmp_path), *options]) == 1
    flex, dense, uncompiled = utils.read_json_lines(tmp_path / "rows.jsonl")
    assert flex["left_out"] == "runs on CUDA, not on cpu"
    assert dense["error"] == "CUDA error: out of luck"
    assert uncompiled["milliseconds"]["median"] > 0
    assert uncompiled["largest_error"] < 1e-4


def load_gpu_measurements(monkeypatch):
    monkeypatch.syspath_prepend(utils.REPOSITORY / "experiments")
    return importlib.import_module("gpu")


def test_a_path_may_start_with_a_tilde(monkeypatch):
    """Shells expand `~` in `--output_dir ~/x`, but not in `--output_dir=~/x`."""
    import main
    import plot_result
    import run_experiments
    from sweep.plan import data_dir_of

    monkeypatch.setenv("HOME", "/home/me")
    arguments = ["--data_dir=~/x", "--output_dir=~/y", "--device", "cpu"]
    settings = main.resolve_settings(main.parse_args(arguments))
    assert (settings.data.data_dir, settings.run.output_dir) == ("/home/me/x", "/home/me/y")
    args = run_experiments.parse_args(["--output_dir=~/y", "--", "--data_dir=~/x"])
    assert (data_dir_of(args), args.output_dir) == ("/home/me/x", "/home/me/y")
    assert str(plot_result.parse_args(["--results_path=~/y"]).results_path) == "/home/me/y"
