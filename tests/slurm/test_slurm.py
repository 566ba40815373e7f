"""The sweep on a real Slurm cluster: two nodes, both on this machine, with only CPUs."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import wait_for

import utils

HERE = Path(__file__).resolve().parent
MAIN = utils.REPOSITORY / "main.py"
STAND_IN = HERE.parent / "stand_in.py"
TWO = ["--mask_types", '["full", "2d_cardinal"]', "--expansion_steps", "[1]"]
LOCAL = "2d_cardinal_expansion_1"
REAL = [
    *("--model", "vit_micro", "--img_size", "8", "--patch_size", "2"),
    *("--batch_size", "128", "--epochs", "12", "--device", "cpu", "--backend", "dense"),
]

MISSING = [
    name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None
]
if importlib.util.find_spec("submitit") is None:
    MISSING.append("submitit")
if os.geteuid() != 0:
    MISSING.append("root")
if MISSING and os.environ.get("REQUIRE_SLURM") != "1":
    pytest.skip(f"no Slurm to test with: {', '.join(MISSING)} missing", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    assert not MISSING, f"REQUIRE_SLURM=1, but {', '.join(MISSING)} missing"
    folder = tmp_path_factory.mktemp("cluster")
    subprocess.run([HERE / "cluster.sh", "start", folder], check=True, timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield folder
    subprocess.run([HERE / "cluster.sh", "stop", folder], check=True, timeout=60)


def start_sweep(output, *arguments, script=STAND_IN):
    """A sweep in its own process that looks often, with `script` in place of main.py."""
    program = "\n".join(
        [
            "import pathlib, sys",
            f"sys.path.insert(0, {str(utils.REPOSITORY)!r})",
            "import run_experiments, utils",
            "from sweep import slurm",
            "slurm.SECONDS_BETWEEN_LOOKS, slurm.SECONDS_UNTIL_LOST = 0.3, 3.0",
            f"run_experiments.MAIN_SCRIPT = pathlib.Path({str(script)!r})",
            "utils.run_cli(run_experiments.main)",
        ]
    )
    options = [
        *("--output_dir", str(output), "--dataset", "digits", *TWO, "--gpus", "0"),
        *("--launcher", "slurm", "--slurm_cpus_per_task", "1", "--slurm_time", "5"),
    ]
    command = [sys.executable, "-c", program, *options, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(sweep, seconds=120):
    """(exit code, stdout, stderr) of a sweep."""
    try:
        printed, error = sweep.communicate(timeout=seconds)
    finally:
        sweep.kill()
    return sweep.returncode, printed, error


def rows(path):
    return utils.read_json_lines(path) if path.exists() else []


def job_of(output, name):
    jobs = {row["run"]: row["job"] for row in rows(output / "slurm" / "jobs.jsonl")}
    return jobs[f"digits/{name}/seed_0"]


def warned_and_requeued(output, *arguments, by=None):
    """A sweep to its end, with a run that Slurm warns midway, by scancel or because of `by`."""
    sweep = start_sweep(output, *arguments, "--", *REAL, script=MAIN)
    folder = output / "digits" / "full" / "seed_0"
    wait_for(lambda: len(rows(folder / "metrics.jsonl")) >= 2)
    command = by or ["scancel", "--signal=USR1", job_of(output, "full")]
    subprocess.run(command, check=True, timeout=90)
    code, printed, error = end_of(sweep)
    assert code == 0, printed + error
    log = (folder / "log.txt").read_text()
    assert log.count("stopped (") == 1, log
    assert log.count("resuming in epoch") == 1
    return printed


def losses_of(output):
    return [row["eval_loss"] for row in rows(output / "digits/full/seed_0/metrics.jsonl")]


def losses_without_slurm(output, *starter):
    options = ["--dataset", "digits", "--output_dir", str(output), *REAL]
    command = [sys.executable, *starter, str(MAIN), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return losses_of(output)


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory):
    return losses_without_slurm(tmp_path_factory.mktemp("whole"))


def test_real_runs_are_requeued_and_resume_exactly(tmp_path, losses_of_one_process):
    printed = warned_and_requeued(tmp_path)
    assert printed.count("(n = 1)") == 3  # two accuracies, and their difference
    assert losses_of(tmp_path) == losses_of_one_process
    code, printed, _ = end_of(start_sweep(tmp_path, "--", *REAL, script=MAIN))
    assert code == 0
    assert "2 finished before" in printed
    assert len(rows(tmp_path / "slurm" / "jobs.jsonl")) == 2


@pytest.mark.parametrize("signal_of_slurm", ["SIGUSR1", "SIGTERM"])
def test_a_preempted_run_is_requeued_and_resumes_exactly(
    tmp_path, cluster, losses_of_one_process, signal_of_slurm
):
    """A job in a partition of higher priority takes both nodes for a moment."""
    urgent = ["srun", "--quiet", "--partition", "high", "--nodes", "2", "--exclusive", "true"]
    ours = "SlurmctldParameters=preempt_send_user_signal"
    with configured(cluster, ours, ours if signal_of_slurm == "SIGUSR1" else ""):
        options = ["--slurm_partition", "low", "--mask_types", '["full"]']
        warned_and_requeued(tmp_path, *options, by=urgent)
    assert losses_of(tmp_path) == losses_of_one_process


@contextlib.contextmanager
def configured(cluster, line, other):
    """Replace a line in the configuration of the cluster."""
    file, text = cluster / "slurm.conf", (cluster / "slurm.conf").read_text()
    assert line in text
    try:
        file.write_text(text.replace(line, other))
        subprocess.run(["scontrol", "reconfigure"], check=True)
        yield
    finally:
        file.write_text(text)
        subprocess.run(["scontrol", "reconfigure"], check=True)


SLOW_TO_LISTEN = """
import sys, time
if "submitit.core._submit" in sys.orig_argv:
    time.sleep(3)
"""


def test_a_warning_before_the_task_listens_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(SLOW_TO_LISTEN)  # imported when Python starts
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    sweep = start_sweep(tmp_path, "--", "--seconds", "1")

    def is_running():
        states = subprocess.run(["squeue", "-h", "-o", "%T"], capture_output=True, text=True).stdout
        return states.split() == ["RUNNING", "RUNNING"]

    wait_for(is_running)
    job = job_of(tmp_path, LOCAL)  # the last of the array, which in Slurm has the array's own id
    for _ in range(6):  # while submitit starts; later ones find it waiting or starting again
        subprocess.run(["scancel", "--signal=USR1", job], stderr=subprocess.DEVNULL)
        time.sleep(0.4)
    code, printed, error = end_of(sweep)
    assert code == 0, printed + error
    assert "User defined signal 1" in (tmp_path / "slurm" / f"{job}_0_log.out").read_text()
    assert [row["name"] for row in rows(tmp_path / "calls.jsonl")].count("full") == 1


def test_a_run_on_two_nodes_is_requeued_and_resumes_exactly(tmp_path):
    printed = warned_and_requeued(tmp_path, "--nodes", "2", "--mask_types", '["full"]')
    assert "started on a,b as" in printed or "started on [a-b] as" in printed, printed
    torchrun = str(utils.REPOSITORY / "sweep" / "torchrun.py")
    two = [torchrun, "--standalone", "--nproc_per_node", "2"]
    assert losses_of(tmp_path) == losses_without_slurm(tmp_path / "whole", *two)


def test_a_run_on_two_nodes_that_fails_says_why(tmp_path):
    options = ["--nodes", "2", "--mask_types", '["full"]', "--", *REAL, "--lr", "1e30"]
    code, printed, error = end_of(start_sweep(tmp_path, *options, script=MAIN))
    assert code == 1, printed + error
    assert "full seed 0: FAILED with exit code 1: main.py: error: the loss became nan" in printed


def test_a_warned_run_is_requeued_and_resumes_while_others_fail(tmp_path):
    sweep = start_sweep(tmp_path, "--retries", "1", "--", "--seconds", "4", "--fail", LOCAL)
    wait_for(lambda: len(rows(tmp_path / "calls.jsonl")) == 2)
    time.sleep(1)
    subprocess.run(["scancel", "--signal=USR1", job_of(tmp_path, "full")], check=True)
    code, printed, error = end_of(sweep)
    assert code == 1, printed + error
    assert error.endswith(
        "1 of 2 runs failed: 2d_cardinal_expansion_1 seed 0; their logs say why\n"
    )
    assert "FAILED with exit code 1: stand-in: error: told to fail" in printed
    calls = rows(tmp_path / "calls.jsonl")
    assert [call["name"] for call in calls].count(LOCAL) == 2
    first, second = [call for call in calls if call["name"] == "full"]
    assert first["resumed"] == 0
    assert 1 < second["resumed"] < 4
    assert first["parent"] != second["parent"]  # in another task
    assert printed.count(f"full seed 0: queued in Slurm as {job_of(tmp_path, 'full')}") >= 1
    assert "full seed 0: finished" in printed


def test_attaching_to_a_sweep_follows_it_and_notices_canceled_jobs(tmp_path):
    arguments = ["--", "--hang", LOCAL, "--seconds", "3"]
    sweep = start_sweep(tmp_path, *arguments)
    wait_for(lambda: len(rows(tmp_path / "calls.jsonl")) == 2)
    sweep.send_signal(signal.SIGINT)
    code, printed, _ = end_of(sweep)
    assert code == 130
    assert "--attach" in printed
    attached = start_sweep(tmp_path, "--attach", *arguments)
    wait_for(lambda: (tmp_path / "digits" / "full" / "seed_0" / "summary.json").exists())
    subprocess.run(["scancel", job_of(tmp_path, LOCAL)], check=True)
    code, printed, error = end_of(attached)
    assert code == 1
    assert "full seed 0: finished" in printed
    assert f"{LOCAL} seed 0: FAILED: stopped by SIGTERM, unfinished" in printed, (printed, error)
    assert (tmp_path / "digits" / LOCAL / "seed_0" / "last.pt").exists()  # it had time to save
    assert len(rows(tmp_path / "slurm" / "jobs.jsonl")) == 2


def test_what_slurm_refuses_ends_in_one_line(tmp_path):
    code, _, error = end_of(start_sweep(tmp_path, "--slurm_partition", "nowhere"))
    assert code == 1
    assert len(error.splitlines()) == 1
    assert "sbatch refused" in error
    assert "nvalid partition" in error
    code, _, error = end_of(start_sweep(tmp_path, "--attach"))
    assert code == 1
    assert "nothing has been submitted" in error
