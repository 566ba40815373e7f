"""The pool's parts: slots, GPUs that answer, exit codes in words, and torchrun with main.py's exit codes."""

import subprocess
import sys

import pytest

import launch
import utils


def test_slots_spread_few_runs_over_many_gpus():
    assert launch.make_slots(["0", "1"], 2) == ["0", "1", "0", "1"]
    assert launch.make_slots([], 3) == ["", "", ""]
    assert launch.make_slots(["0", "1", "2", "3", "4"], 1, 2) == ["0,1", "2,3"]  # the fifth is left over
    with pytest.raises(utils.UsageError, match="--gpus_per_run 4, but there are 2 GPUs"):
        launch.make_slots(["0", "1"], 1, 4)


@pytest.mark.parametrize(("exit_code", "answer"), [(0, True), (9, False), (None, True)])
def test_a_gpu_answers_as_nvidia_smi_says_where_there_is_one(tmp_path, monkeypatch, exit_code, answer):
    if exit_code is not None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\n[ "$*" = "-i 3 -L" ] && exit {exit_code}\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.answers("3") is answer


def test_exit_codes_in_words():
    assert launch.describe_exit(1) == "exit code 1"
    assert launch.describe_exit(-9) == "signal SIGKILL"


@pytest.mark.parametrize("code", [0, 1, utils.EXIT_OUT_OF_MEMORY, utils.EXIT_AGAIN])
def test_torchrun_exits_as_the_script(tmp_path, code):
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys\nsys.exit({code} if os.environ['RANK'] == '1' else {int(code > 0)})")
    command = [sys.executable, str(utils.REPOSITORY / "torchrun.py"), "--standalone", "--nproc_per_node", "2"]
    assert subprocess.run([*command, str(script)], capture_output=True).returncode == code
