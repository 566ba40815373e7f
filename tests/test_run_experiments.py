"""The sweep, with a stand-in for main.py that trains nothing, and fails or hangs if told to."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from processes import alive, wait_for

import run_experiments
import utils
from sweep import gpus, launch, slurm, status

STAND_IN = utils.REPOSITORY / "tests" / "stand_in.py"
NAMES = {"full": "full", "cardinal": "2d_cardinal_expansion_1"}
WARNED = 128 + signal.SIGUSR1  # how srun exits then
TWO = ["--mask_types", '["full", "2d_cardinal"]', "--expansion_steps", "[1]"]  # the runs in NAMES


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(run_experiments, "MAIN_SCRIPT", STAND_IN)
    monkeypatch.setattr(gpus, "responds", lambda gpu: True)
    monkeypatch.setattr(launch, "SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.05)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "_list_gpus", lambda: {str(index): [] for index in range(8)})
    output = tmp_path / "experiments"
    output.mkdir()

    def run(*arguments):
        options = ["--output_dir", str(output), "--dataset", "digits"]
        return run_experiments.main([*options, *arguments])

    run.output = output
    return run


def calls(output):
    return utils.read_json_lines(output / "calls.jsonl")


def test_plan_is_full_and_each_type_at_each_step_over_seeds(sweep, capsys):
    masks = ["--expansion_steps", "[1, 2, 3]", "--seeds", "[0, 1]", "--same_masks"]
    assert sweep("--gpus", "8", *masks, "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 4 * 3) + 1
    assert lines[0].startswith("GPU 0     full seed 0")
    assert "--expansion_step" not in lines[0]
    assert [line.split()[1] for line in lines[:9]] == list("012345670")
    names = {" ".join(line.split()[2:5]) for line in lines[:-1]}
    assert len(names) == 26
    assert not (sweep.output / "digits").exists()


def test_a_mask_with_two_names_is_trained_once(sweep, capsys):
    steps = ["--expansion_steps", "[1, 2, 20]"]
    sizes = ["--", "--img_size", "16", "--patch_size=2"]  # a grid of 8 x 8
    assert sweep("--gpus", "1", *steps, "--dry_run", *sizes) == 0
    *said, last = capsys.readouterr().out.splitlines()
    same = [line.split(":")[0] for line in said if "the same mask" in line]
    assert same == [
        "1d_all_neighbors, step 1 is the same mask as 1d_cardinal, step 2 on this grid",
        "1d_all_neighbors, step 20 is the same mask as full on this grid",
        "2d_all_neighbors, step 20 is the same mask as full on this grid",
    ]
    assert "its result is that of 1d_cardinal_expansion_2 (--same_masks trains both)" in said[0]
    names = [line.split()[2] for line in said if line.startswith("GPU")]
    assert len(names) == 1 + 4 * 3 - 3
    assert "1d_all_neighbors_expansion_1" not in names
    assert "first 1 start" in last


def test_full_attention_keeps_its_name(sweep, capsys):
    """Wherever it is in the list: without it, there would be nothing to compare with."""
    arguments = ["--mask_types", '["1d_cardinal", "full"]', "--expansion_steps", "[99]"]
    sizes = ["--", "--img_size", "16", "--patch_size=2"]
    assert sweep("--gpus", "1", *arguments, "--dry_run", *sizes) == 0
    said = capsys.readouterr().out
    assert "1d_cardinal, step 99 is the same mask as full on this grid" in said
    assert "full seed 0" in said


@pytest.mark.parametrize("mask_types", [["1d_all_neighbors"], ["1d_all_neighbors", "full"]])
def test_a_mask_is_trained_under_the_name_that_is_asked_for(sweep, capsys, mask_types):
    arguments = ["--mask_types", json.dumps(mask_types), "--expansion_steps", "[1]"]
    assert sweep("--gpus", "1", *arguments, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "1d_all_neighbors_expansion_1" in out
    assert "the same mask" not in out


def test_full_attention_is_trained_as_such_whatever_the_order(sweep, capsys):
    arguments = ["--mask_types", '["2d_all_neighbors", "full"]', "--expansion_steps", "[20]"]
    assert sweep("--gpus", "1", *arguments, "--dry_run", "--", "--img_size", "224") == 0
    out = capsys.readouterr().out
    assert "2d_all_neighbors, step 20 is the same mask as full on this grid" in out


@pytest.mark.parametrize("size", ["zero", "0", "-4", "1"])
def test_sizes_that_make_no_grid_are_left_to_the_run(sweep, capsys, size):
    assert sweep("--gpus", "1", "--dry_run", "--", "--img_size", size) == 0
    assert "the same mask" not in capsys.readouterr().out


def test_a_finished_sweep_does_nothing_when_run_again(sweep, capsys):
    arguments = ["--gpus", "2", "--expansion_steps", "[1]", "--seeds", "[0, 1]"]
    assert sweep(*arguments) == 0
    printed = capsys.readouterr().out
    assert "50.50 ± 6.35 (n = 2)" in printed  # seeds 0 and 1 give 50 and 51
    assert len(calls(sweep.output)) == 10
    assert {call["device"] for call in calls(sweep.output)} == {"cuda"}
    assert sweep(*arguments) == 0
    again = capsys.readouterr().out
    assert len(calls(sweep.output)) == 10
    assert "10 finished before" in again
    assert again[again.index("|") :] == printed[printed.index("|") :]


def test_a_run_of_another_command_does_not_count_as_finished(sweep):
    assert sweep("--gpus", "1", "--mask_types", '["full"]') == 0
    assert sweep("--gpus", "1", "--mask_types", '["full"]', "--", "--seconds", "0.1") == 0
    assert len(calls(sweep.output)) == 2


def test_a_folder_whose_name_starts_with_a_dash(sweep, monkeypatch):
    monkeypatch.chdir(sweep.output)
    for _ in range(2):  # the second time, it is found
        assert sweep("--gpus", "1", "--mask_types", '["full"]', "--output_dir=-runs") == 0
    assert len(utils.read_json_lines(sweep.output / "-runs" / "calls.jsonl")) == 1


def test_no_gpu_is_booked_twice(sweep):
    slots = ["--gpus", "3", "--runs_per_gpu", "2"]
    assert sweep(*slots, "--expansion_steps", "[1, 2]", "--", "--seconds", "0.3") == 0
    started = {(call["name"], call["seed"]): call for call in calls(sweep.output)}
    for end in utils.read_json_lines(sweep.output / "ends.jsonl"):
        started[end["name"], end["seed"]]["end"] = end["end"]

    events = []
    for call in started.values():
        events += [(call["start"], 1, call["gpu"]), (call["end"], -1, call["gpu"])]
    load = dict.fromkeys("012", 0)
    most = dict.fromkeys("012", 0)
    for _, change, gpu in sorted(events):
        load[gpu] += change
        most[gpu] = max(most[gpu], load[gpu])
    assert len(started) == 8, "two of the nine masks are the same"
    assert all(1 <= count <= 2 for count in most.values())


def test_cuda_visible_devices_sets_the_gpus(sweep, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert sweep("--expansion_steps", "[1]") == 0
    assert {call["gpu"] for call in calls(sweep.output)} == {"5", "7"}
    with pytest.raises(utils.UsageError, match=r"--gpus 3, but CUDA_VISIBLE_DEVICES names 2"):
        sweep("--gpus", "3")


def test_hidden_gpus_are_not_used(sweep, monkeypatch, capsys):
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


def test_a_run_out_of_memory_is_tried_again_with_smaller_micro_batches(sweep, capsys):
    arguments = ["--gpus", "2", *TWO, "--", "--out_of_memory", NAMES["full"]]
    assert sweep(*arguments) == 0
    printed = capsys.readouterr().out
    assert "full seed 0: out of memory, starts again with 2 micro-batches per step" in printed
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
    states = {row[1].strip(): row[-2].strip() for row in rows}
    assert states["full"] == "done, batches in 2 parts"
    assert states["2d_cardinal, step 1"] == "done"
    assert sweep(*arguments) == 0  # finished, although main.py got more options
    assert len(calls(sweep.output)) == 3


def test_running_out_of_memory_twice_is_a_failure_and_is_remembered(sweep, capsys):
    with pytest.raises(utils.UserError, match="1 of 2 runs failed: full seed 0"):
        sweep("--gpus", "1", *TWO, "--", "--out_of_memory", NAMES["full"], "--below", "4")
    assert "FAILED with exit code 77: stand-in: error: out of memory" in capsys.readouterr().out
    assert sweep("--gpus", "1", *TWO, "--", "--out_of_memory", NAMES["full"], "--below", "3") == 0
    assert "starts again with 4 micro-batches" in capsys.readouterr().out


def test_failures_are_retried_and_reported_with_the_end_of_the_log(sweep, capsys):
    assert sweep("--gpus", "1", "--retries", "1", *TWO, "--", "--fail_once", NAMES["full"]) == 0
    assert "told to fail; retry 1 of 1" in capsys.readouterr().out
    seed_1 = ["--seeds", "[1]", *TWO]
    with pytest.raises(utils.UserError, match="1 of 2 runs failed"):
        sweep("--gpus", "1", "--retries", "2", *seed_1, "--", "--fail", NAMES["full"])
    printed = capsys.readouterr().out
    assert "    a line before\n    stand-in: error: told to fail\n" in printed
    assert sum(call["name"] == "full" for call in calls(sweep.output)) == 2 + 3


@pytest.mark.parametrize("how", ["hang", "deaf"])
def test_a_run_that_takes_too_long_is_stopped(sweep, capsys, monkeypatch, how):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    with pytest.raises(utils.UserError, match="1 of 2 runs failed: full seed 0"):
        sweep("--gpus", "1", "--timeout_minutes", "0.01", *TWO, "--", f"--{how}", NAMES["full"])
    assert "full seed 0: FAILED: timed out after 0.01 minutes" in capsys.readouterr().out
    assert not alive(calls(sweep.output)[0]["pid"])


def test_a_run_that_was_asked_to_stop_starts_again(sweep, capsys):
    assert sweep("--gpus", "1", *TWO, "--", "--ask_itself", NAMES["full"]) == 0
    assert "full seed 0: was asked to stop, starts again" in capsys.readouterr().out
    assert [call["resumed"] > 0 for call in calls(sweep.output)] == [False, True, False]


def test_a_gpu_that_drops_out_gets_no_more_runs(sweep, capsys, monkeypatch):
    answers = iter([True, True, False])  # two at the start, then for the first failure
    monkeypatch.setattr(gpus, "responds", lambda gpu: next(answers, True))
    options = [*TWO, "--seeds", "[0, 1, 2]"]
    assert sweep("--gpus", "2", *options, "--", "--fail_once", NAMES["full"]) == 0
    assert "no longer responds to nvidia-smi" in capsys.readouterr().err
    rows = calls(sweep.output)
    lost = next(row["gpu"] for row in rows if row["name"] == "full")
    failed_at = [row["gpu"] for row in rows].index(lost)
    later = rows[failed_at + 2 :]
    assert all(row["gpu"] == str(1 - int(lost)) for row in later)
    assert len(rows) == 7


def test_the_sweep_ends_when_no_gpu_is_left(sweep, monkeypatch, capsys):
    answers = iter([True])
    monkeypatch.setattr(gpus, "responds", lambda gpu: next(answers, False))
    with pytest.raises(utils.UserError, match="no GPU is left that responds; 2 of 2 runs left"):
        sweep("--gpus", "1", *TWO, "--", "--fail", NAMES["full"])
    assert len(calls(sweep.output)) == 1


def test_a_run_that_cannot_be_started_fails_alone(sweep, capsys):
    (sweep.output / "digits").mkdir()
    (sweep.output / "digits" / "full").write_text("in the way")
    with pytest.raises(utils.UserError, match="1 of 2 runs failed: full seed 0"):
        sweep("--gpus", "1", *TWO)
    assert "full seed 0: FAILED to start: " in capsys.readouterr().out


def start_sweep(output, *arguments):
    """A sweep in its own process."""
    program = "\n".join(
        [
            "import pathlib, sys",
            f"sys.path.insert(0, {str(utils.REPOSITORY)!r})",
            "import run_experiments, utils",
            "from sweep import gpus, launch",
            "launch.SECONDS_BETWEEN_LOOKS = 0.1",
            f"run_experiments.MAIN_SCRIPT = pathlib.Path({str(STAND_IN)!r})",
            "utils.run_cli(run_experiments.main)",
        ]
    )
    options = ["--output_dir", str(output), "--gpus", "0", *TWO]
    command = [sys.executable, "-c", program, *options, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def num_calls(output):
    return len(calls(output)) if (output / "calls.jsonl").exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_children_save_and_says_what_is_left(sweep, number):
    child = start_sweep(sweep.output, "--", "--hang", NAMES["cardinal"])
    wait_for(lambda: num_calls(sweep.output) == 2)
    assert calls(sweep.output)[-1]["parent"] == child.pid
    child.send_signal(number)
    printed, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "1 of 2 runs left: 2d_cardinal_expansion_1 seed 0" in printed
    assert "stopped, everything is saved" in printed
    assert (sweep.output / "cifar10" / NAMES["cardinal"] / "seed_0" / "last.pt").exists()
    assert not alive(calls(sweep.output)[-1]["pid"])


def test_a_second_interrupt_kills(sweep):
    child = start_sweep(sweep.output, "--", "--deaf", NAMES["full"])
    wait_for(lambda: num_calls(sweep.output) == 1)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert "2 of 2 runs left" in child.communicate(timeout=10)[0]
    assert child.returncode == 130
    assert not alive(calls(sweep.output)[-1]["pid"])


def test_two_sweeps_share_the_runs(sweep):
    arguments = ["--runs_per_gpu", "1", "--seeds", "[0, 1, 2]", "--", "--seconds", "0.3"]
    both = [start_sweep(sweep.output, *arguments) for _ in range(2)]
    printed = [child.communicate(timeout=60)[0] for child in both]
    assert [child.returncode for child in both] == [0, 0]
    ends = utils.read_json_lines(sweep.output / "ends.jsonl")
    assert len(ends) == len({(row["name"], row["seed"]) for row in ends}) == 6
    assert len({call["parent"] for call in calls(sweep.output)}) == 2
    assert all("51.00 ± 2.48 (n = 3)" in text for text in printed)


def test_a_sweep_takes_over_what_another_one_leaves(sweep):
    first = start_sweep(sweep.output, "--", "--hang", NAMES["full"])
    wait_for(lambda: num_calls(sweep.output) == 1)
    hanging = calls(sweep.output)[0]["pid"]
    folder = sweep.output / "cifar10" / "full" / "seed_0"
    second = start_sweep(sweep.output, "--", "--seconds", "0")
    wait_for(lambda: num_calls(sweep.output) == 2)
    assert not (folder / "summary.json").exists()
    first.kill()  # it leaves its child, which main.py would notice, but not the stand-in
    os.kill(hanging, signal.SIGKILL)
    printed, _ = second.communicate(timeout=30)
    assert second.returncode == 0
    assert "full seed 0: is being written by another process, left alone" in printed
    full = [call for call in calls(sweep.output) if call["name"] == "full"]
    assert [call["parent"] for call in full] == [first.pid, second.pid]
    first.communicate()


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
        (["--retries", "-1"], "at least 0"),
        (["--timeout_minutes", "0"], "above 0"),
        (["--gpus_per_run", "0"], "at least 1"),
        (["--slurm_partition", "gpu"], "--slurm_partition needs --launcher slurm"),
        (["--attach"], "--attach needs --launcher slurm"),
        (["--launcher", "slurm", "--gpus", "2"], "leave out --gpus"),
        (["--launcher", "slurm", "--slurm_options", "[1]"], "expected a JSON object"),
        (["--launcher", "slurm", "--slurm_options", '{"time": 9}'], "cannot set 'time'"),
    ],
)
def test_bad_command_lines_fail_with_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run_experiments.parse_args(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_progress_line_names_the_epoch(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 3, "eval_accuracy": 81.26}) + "\n")
    assert status.describe_last_epoch(tmp_path) == ": epoch 3, 81.3%"
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 4, "eval')
    assert status.describe_last_epoch(tmp_path) == ""
    assert re.fullmatch("", status.describe_last_epoch(tmp_path / "nowhere"))


def test_slurm_without_submitit_says_what_to_install(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(utils.UserError, match=r"pip install -r requirements-slurm\.txt"):
        sweep("--launcher", "slurm")


def test_slurm_without_its_commands_fails_with_one_line(sweep, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(utils.UserError, match="there is no squeue here"):
        sweep("--launcher", "slurm", "--mask_types", '["full"]')


@pytest.mark.parametrize(
    ("code", "seconds", "said"),
    [
        (WARNED, 20, "requeue 7\n"),
        (WARNED, 70, "stopped before the run had begun; raise --slurm_time\n"),
        (0, 20, ""),
        (1, 20, ""),
    ],
)
def test_a_job_that_a_warning_ends_is_requeued(tmp_path, code, seconds, said):
    """Unless half of its time, here a minute, was up: then it only starts too slowly."""
    ended, out = end_of_batch_script(tmp_path, code, seconds, SLURM_JOB_ID="7")
    assert (ended, out) == (code, said)


def test_of_an_array_only_the_job_itself_is_requeued(tmp_path):
    """One of its jobs has the id of the whole array."""
    ids = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert end_of_batch_script(tmp_path, WARNED, 20, **ids) == (WARNED, "requeue 7_1\n")


def end_of_batch_script(folder, code, seconds, **ids):
    """(exit code, stdout) if srun ends after `seconds` with `code`; scontrol is a stand-in."""
    (folder / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
    (folder / "scontrol").chmod(0o755)
    script = f"SECONDS={seconds}\n{slurm.requeue_if_warned(5)}\n(exit {code})"
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **ids}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_plan_for_slurm(sweep, capsys):
    assert sweep("--launcher", "slurm", "--dry_run", *TWO) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["Slurm", "Slurm"]
    assert "--device cuda" in lines[0]
    assert sweep("--launcher", "slurm", "--gpus", "0", "--dry_run", *TWO) == 0
    assert "--device cpu" in capsys.readouterr().out
