"""The parts of a pool: slots, GPUs that respond, exit codes, and torchrun with main.py's codes."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from processes import alive, wait_for

import utils
from masks import MaskSpec
from runtime import exit_codes
from sweep import gpus, launch, torchrun
from sweep.plan import Job, PlannedRun
from sweep.slurm_task import RulesOnNodes, Task

TORCHRUN = utils.REPOSITORY / "sweep" / "torchrun.py"


def test_slots_spread_few_runs_over_many_gpus():
    assert gpus.make_slots(["0", "1"], 2) == ["0", "1", "0", "1"]
    assert gpus.make_slots([], 3) == ["", "", ""]
    # The fifth one is left over.
    assert gpus.make_slots(["0", "1", "2", "3", "4"], 1, 2) == ["0,1", "2,3"]
    with pytest.raises(utils.UsageError, match="--gpus_per_run 4, but there are 2 GPUs"):
        gpus.make_slots(["0", "1"], 1, 4)


@pytest.mark.parametrize(("exit_code", "answer"), [(0, True), (9, False), (None, True)])
def test_a_gpu_responds_if_nvidia_smi_finds_it(tmp_path, monkeypatch, exit_code, answer):
    """Without nvidia-smi, it is assumed to."""
    if exit_code is not None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\n[ "$*" = "-i 3 -L" ] && exit {exit_code}\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.responds("3") is answer


@pytest.mark.parametrize(("slots", "expected"), [(["0", "1", "0", "1"], "4"), (["", ""], "8")])
def test_runs_on_one_machine_share_its_cores(monkeypatch, slots, expected):
    """On GPUs as well: each run compiles and launches from CPU cores."""
    names = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    for name in (*names, "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(launch.gpus, "responds", lambda gpu: True)
    pool = launch.Pool([], slots, launch.Rules(Path("main.py")), None, None)
    environment = pool._environment(slots[0])
    assert [environment[name] for name in names] == [expected] * 2

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert pool._environment(slots[0])["OMP_NUM_THREADS"] == "3"


def test_a_run_that_another_process_finishes_meanwhile_is_not_started(monkeypatch, tmp_path):
    """Its process is seen to be gone a moment after it was still training."""
    is_finished = []
    monkeypatch.setattr(PlannedRun, "is_being_written", lambda run: is_finished.append(True))
    monkeypatch.setattr(PlannedRun, "is_finished", lambda run: bool(is_finished))
    job = Job(PlannedRun(MaskSpec(), 0, tmp_path, ()))
    rules = launch.Rules(tmp_path / "not_to_be_started.py")
    pool = launch.Pool([job], [""], rules, lambda: None, lambda: None)
    assert pool.run() is None
    assert (job.state, job.note) == (launch.DONE, "finished by another process")
    assert not (tmp_path / utils.LOG).exists()


def test_exit_codes_in_words():
    assert launch.describe_exit(1) == "exit code 1"
    assert launch.describe_exit(-9) == "signal SIGKILL"


@pytest.mark.parametrize(
    ("code", "changes", "outcome"),
    [
        (0, {"has_summary": True}, launch.DONE),
        (0, {"has_summary": True, "is_late": True}, launch.DONE),  # it was just in time
        (0, {}, launch.FAILED),
        (1, {"has_summary": True}, launch.FAILED),
        (75, {"is_late": True}, launch.TIMED_OUT),
        (75, {}, launch.STOPPED),
        (76, {}, launch.ELSEWHERE),
        (-15, {"is_stopping": True}, launch.CUT_SHORT),
        (-signal.SIGUSR1, {}, launch.CUT_SHORT),
        (-15, {}, launch.FAILED),
        (77, {}, launch.OUT_OF_MEMORY),
        (77, {"can_halve_batches": False}, launch.FAILED),
        (77, {"can_halve_batches": False, "retries_left": 1}, launch.RETRY),
        (-9, {"retries_left": 2}, launch.RETRY),
        (2, {"retries_left": 2}, launch.FAILED),  # the same command line would fail again
    ],
)
def test_what_the_end_of_a_process_means(code, changes, outcome):
    usual = launch.Facts(
        has_summary=False, is_late=False, is_stopping=False, can_halve_batches=True, retries_left=0
    )
    assert launch.judge(code, replace(usual, **changes)) == outcome


@pytest.mark.parametrize("code", [0, 1, utils.EXIT_OUT_OF_MEMORY, utils.EXIT_AGAIN])
def test_torchrun_exits_as_the_script(tmp_path, code):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nsys.exit({code} if os.environ['RANK'] == '1' else {int(code > 0)})"
    )
    command = [sys.executable, str(TORCHRUN), "--standalone", "--nproc_per_node", "2"]
    assert subprocess.run([*command, str(script)], capture_output=True).returncode == code


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([75, 75], 75),
        ([75, 0], 75),
        ([130, 130], 130),
        ([75, 1], 1),  # a disk that was full
        ([exit_codes.KILLED, 75], 137),
        ([], 75),  # the signal came before any rank was listening
    ],
)
def test_exit_code_of_torchrun_after_it_has_stopped_its_ranks(codes, expected):
    assert torchrun.after_stop(codes) == expected


def test_exit_codes_that_ranks_leave_behind(tmp_path, monkeypatch):
    def announce_and_record(rank, *codes):
        monkeypatch.setenv("RANK", str(rank))
        exit_codes.announce()
        for code in codes:
            exit_codes.record(code)

    monkeypatch.setenv(exit_codes.FOLDER, str(tmp_path))
    (tmp_path / "none_12ab").mkdir()  # torchrun's own
    assert exit_codes.collect(tmp_path) == []
    announce_and_record(10, 75)
    announce_and_record(9)  # killed
    announce_and_record(2, 77, 1)
    assert exit_codes.collect(tmp_path) == [77, exit_codes.KILLED, 75]

    monkeypatch.delenv(exit_codes.FOLDER)
    announce_and_record(4, 75)
    assert len(exit_codes.collect(tmp_path)) == 3


@pytest.mark.parametrize(
    ("rank_1", "expected"),
    [
        ("return utils.EXIT_AGAIN", 75),
        ("raise utils.UserError('the disk is full')", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("raise RuntimeError", 1),
        (None, 75),  # the signal ends it before it is listening
    ],
)
def test_ranks_stopped_by_torchrun_exit_for_it(tmp_path, rank_1, expected):
    """75 only if all have saved. No temporary files are left."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, signal, time, utils\n"
        "from runtime import distributed, stopping\n"
        f"is_ready = pathlib.Path({str(tmp_path)!r}, 'ready_' + os.environ['RANK'])\n"
        "def main():\n"
        f"    if os.environ['RANK'] == '1' and {rank_1 is None}:\n"
        "        is_ready.touch()\n        time.sleep(60)\n"
        "    stop = stopping.StopRequest()\n"
        "    with stop.listening():\n"
        "        is_ready.touch()\n"
        "        while stop.reason is None:\n            time.sleep(0.05)\n"
        "        if os.environ['RANK'] == '1':\n"
        f"            {rank_1}\n"
        "        return utils.EXIT_AGAIN\n"
        "utils.run_cli(main, distributed.leave)\n"
    )
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, str(TORCHRUN), "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(utils.REPOSITORY), "TMPDIR": str(temporary)}
    whole = subprocess.Popen([*command, str(script)], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
        whole.send_signal(signal.SIGUSR1)
        assert whole.wait(timeout=60) == expected
    finally:
        whole.kill()
    assert list(temporary.iterdir()) == []


def test_no_process_survives_its_torchrun(tmp_path):
    """They have their own sessions, and here they ignore signals."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, signal, time\n"
        "from runtime import distributed\n"
        "distributed.die_with_parent()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    command = [sys.executable, str(TORCHRUN), "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(utils.REPOSITORY)}
    whole = subprocess.Popen([*command, str(script)], env=environment, stderr=subprocess.DEVNULL)
    files = [tmp_path / "0", tmp_path / "1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    whole.kill()
    whole.wait()
    wait_for(lambda: not any(alive(file.read_text()) for file in files), seconds=20)


def test_torchrun_without_a_meeting_place_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = ["--nnodes", "2", "--node_rank", "0"]
        options += ["--master_addr", "127.0.0.1", "--master_port", port]
        command = [sys.executable, str(TORCHRUN), *options, "main.py"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("torchrun.py: error: the processes cannot meet: ")
    assert "Traceback" not in done.stderr


def test_a_job_that_has_saved_nothing_in_its_time_is_not_requeued(tmp_path):
    run = PlannedRun(MaskSpec(), 0, tmp_path, ())
    task = Task(run, RulesOnNodes(tmp_path), tmp_path, on_gpu=False, minutes=60)
    now = time.time()
    assert task.has_wasted_its_time(now - 57 * 60)
    assert not task.has_wasted_its_time(now - 60)  # preempted early
    (tmp_path / utils.CHECKPOINT).touch()
    assert not task.has_wasted_its_time(now - 57 * 60)
    os.utime(tmp_path / utils.CHECKPOINT, (now - 3600, now - 3600))
    assert task.has_wasted_its_time(now - 57 * 60)
