"""The sweep, with a stand-in for main.py that trains nothing: it records its arguments, fails or hangs when told."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import launch
import run_experiments
import utils

STAND_IN = """
import argparse, fcntl, json, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("mask_type", "expansion_step", "seed", "dataset", "output_dir", "device", "fail", "hang", "seconds"):
    parser.add_argument(f"--{name}")
args = parser.parse_args()
name = "full" if args.mask_type == "full" else f"{args.mask_type}_expansion_{args.expansion_step}"
folder = pathlib.Path(args.output_dir, args.dataset, name, f"seed_{args.seed}")
gpu = os.environ["CUDA_VISIBLE_DEVICES"]
root = pathlib.Path(args.output_dir)
with open(root / "calls.jsonl", "a") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.write(json.dumps({"name": name, "seed": args.seed, "gpu": gpu, "device": args.device, "pid": os.getpid(),
                            "start": time.monotonic()}) + "\\n")
if args.hang == name:
    time.sleep(600)
time.sleep(float(args.seconds or 0))
if args.fail == name:
    sys.exit("stand-in: error: told to fail")
row = {"epoch": 1, "step": 1, "eval_accuracy": 50.0 + int(args.seed), "train_images_per_second": 10.0}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
settings = {"mask_type": args.mask_type, "expansion_step": int(args.expansion_step) if args.expansion_step else None,
            "dataset": args.dataset, "run_name": name, "seed": int(args.seed), "epochs": 1, "pool": "cls"}
config = {"format": 1, "settings": settings, "num_parameters": 1, "data": {"name": args.dataset, "label": "stand-in"},
          "attention": {"num_neighbors_nominal": 5, "num_neighbors_mean": 4.5, "num_patches": 16},
          "provenance": {"command": ["main.py", *sys.argv[1:]], "device": "stand-in"}}
(folder / "config.json").write_text(json.dumps(config))
summary = {"format": 1, "final": row, "best": {"epoch": 1, "eval_accuracy": row["eval_accuracy"]}, "epochs": 1,
           "total_seconds": 1.0, "train_images_per_second": 10.0, "peak_memory_bytes": 2**30}
(folder / "summary.json").write_text(json.dumps(summary))
with open(root / "ends.jsonl", "a") as ends:
    ends.write(json.dumps({"name": name, "seed": args.seed, "end": time.monotonic()}) + "\\n")
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(run_experiments, "MAIN_SCRIPT", script)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch, "_ask_nvidia_smi", lambda: [str(index) for index in range(8)])
    output = tmp_path / "experiments"
    output.mkdir()

    def run(*arguments):
        return run_experiments.main(["--output_dir", str(output), "--dataset", "digits", *arguments])

    run.output = output
    return run


def calls(output):
    return utils.read_json_lines(output / "calls.jsonl")


def test_plan_is_full_and_each_type_at_each_step_over_seeds(sweep, capsys):
    assert sweep("--gpus", "8", "--expansion_steps", "[1, 2, 3]", "--seeds", "[0, 1]", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 4 * 3) + 1
    assert lines[0].startswith("GPU 0     full seed 0")
    assert "--expansion_step" not in lines[0]
    assert [line.split()[1] for line in lines[:9]] == list("012345670")
    names = {" ".join(line.split()[2:5]) for line in lines[:-1]}
    assert len(names) == 26
    assert not (sweep.output / "digits").exists()


def test_a_sweep_to_the_end_and_again(sweep, capsys):
    arguments = ["--gpus", "2", "--expansion_steps", "[1]", "--seeds", "[0, 1]"]
    assert sweep(*arguments) == 0
    printed = capsys.readouterr().out
    assert "50.50 ± 0.71 (n = 2)" in printed  # seeds 0 and 1 give 50 and 51
    assert len(calls(sweep.output)) == 10
    assert {call["device"] for call in calls(sweep.output)} == {"cuda"}
    assert sweep(*arguments) == 0
    again = capsys.readouterr().out
    assert len(calls(sweep.output)) == 10
    assert "10 finished before" in again
    assert again[again.index("|") :] == printed[printed.index("|") :]


def test_another_command_is_not_taken_for_finished(sweep):
    assert sweep("--gpus", "1", "--mask_types", '["full"]') == 0
    assert sweep("--gpus", "1", "--mask_types", '["full"]', "--", "--seconds", "0.1") == 0
    assert len(calls(sweep.output)) == 2


def test_no_gpu_is_booked_twice(sweep):
    assert sweep("--gpus", "3", "--runs_per_gpu", "2", "--expansion_steps", "[1, 2]", "--", "--seconds", "0.3") == 0
    started = {(call["name"], call["seed"]): call for call in calls(sweep.output)}
    for end in utils.read_json_lines(sweep.output / "ends.jsonl"):
        started[end["name"], end["seed"]]["end"] = end["end"]
    events = sorted(
        (call[key], 1 if key == "start" else -1, call["gpu"]) for call in started.values() for key in ("start", "end")
    )
    load, most = dict.fromkeys("012", 0), dict.fromkeys("012", 0)
    for _, change, gpu in events:
        load[gpu] += change
        most[gpu] = max(most[gpu], load[gpu])
    assert len(started) == 9
    assert all(1 <= count <= 2 for count in most.values())


def test_gpus_are_those_that_cuda_visible_devices_names(sweep, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert sweep("--expansion_steps", "[1]") == 0
    assert {call["gpu"] for call in calls(sweep.output)} == {"5", "7"}
    with pytest.raises(utils.UsageError, match=r"--gpus 3, but CUDA_VISIBLE_DEVICES names 2"):
        sweep("--gpus", "3")


def test_hidden_gpus_are_no_gpus(sweep, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert sweep("--dry_run", "--mask_types", '["full"]') == 0
    assert capsys.readouterr().out.startswith("CPU")


def test_on_the_cpu_no_gpu_is_visible(sweep):
    assert sweep("--gpus", "0", "--mask_types", '["full"]') == 0
    assert calls(sweep.output)[0]["gpu"] == ""
    assert calls(sweep.output)[0]["device"] == "cpu"


def test_a_failing_run_does_not_stop_the_others(sweep, capsys):
    arguments = ["--gpus", "2", "--expansion_steps", "[1]"]
    with pytest.raises(utils.UserError, match="1 of 5 runs failed: 2d_cardinal_expansion_1 seed 0"):
        sweep(*arguments, "--", "--fail", "2d_cardinal_expansion_1")
    assert len(calls(sweep.output)) == 5
    printed = capsys.readouterr().out
    assert "FAILED with exit code 1: stand-in: error: told to fail" in printed
    assert "50.00" in printed


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children_and_says_what_is_left(sweep, number, tmp_path):
    arguments = ["--output_dir", str(sweep.output), "--gpus", "0", "--mask_types", '["full", "2d_cardinal"]']
    program = "\n".join(
        [
            "import pathlib, sys",
            f"sys.path.insert(0, {str(utils.REPOSITORY)!r})",
            "import run_experiments, utils",
            f"run_experiments.MAIN_SCRIPT = pathlib.Path({str(tmp_path / 'stand_in.py')!r})",
            "utils.run_cli(run_experiments.main)",
        ]
    )
    arguments += ["--expansion_steps", "[1]", "--", "--hang", "2d_cardinal_expansion_1"]
    child = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (sweep.output / "calls.jsonl").exists() or len(calls(sweep.output)) < 2:
        assert time.monotonic() < deadline, "the hanging run did not start"
        time.sleep(0.05)
    child.send_signal(number)
    printed, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "1 of 2 runs left: 2d_cardinal_expansion_1 seed 0" in printed
    assert not alive(calls(sweep.output)[-1]["pid"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--expansion_steps", "1 2"], "JSON list like '[1, 2, 3]'"),
        (["--expansion_steps", "[-1]"], "at least 0, got -1"),
        (["--expansion_steps", "[1.5]"], "JSON list"),
        (["--expansion_steps", "[]"], "JSON list"),
        (["--mask_types", '["3d"]'], "unknown '3d'"),
        (["--gpus", "-1"], "at least 0"),
        (["--gpus", "two"], "expected an integer, got 'two'"),
        (["--runs_per_gpu", "0"], "at least 1"),
        (["--epochs", "3"], "options of main.py go after a lone --"),
        (["--", "--seed", "3"], "the sweep sets it"),
    ],
)
def test_bad_command_lines_end_in_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run_experiments.parse_args(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_progress_line_names_the_epoch(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 3, "eval_accuracy": 81.26}) + "\n")
    assert run_experiments.describe_last_epoch(tmp_path) == ": epoch 3, 81.3%"
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 4, "eval')
    assert run_experiments.describe_last_epoch(tmp_path) == ""
    assert re.fullmatch("", run_experiments.describe_last_epoch(tmp_path / "nowhere"))
