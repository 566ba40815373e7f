"""On a node of a Slurm cluster: a task of the job array, which looks after one run.

A task is a `launch.Pool` with a single job, so that retries, timeouts and running out of memory are
handled as on one machine. When Slurm warns it (SIGUSR1: preemption, the time limit), its run saves
and the task requeues itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import utils
from runtime.stopping import PARENT
from sweep import gpus, launch
from sweep.plan import FAILED, Job, PlannedRun

# From Slurm's warning to the time limit: more than launch.GRACE_SECONDS, to leave time to requeue.
SECONDS_OF_WARNING = 180
# When a run's processes on one node have ended, those on other nodes get this long to end as well.
SECONDS_TO_FOLLOW = 60


@dataclass(frozen=True)
class RulesOnNodes(launch.Rules):
    """For runs on several nodes: srun starts a torchrun on each, and they meet on the first."""

    nodes: int = 1
    cpus: int = 1  # on each node

    def starter(self) -> list[str]:
        if self.nodes == 1:
            return super().starter()
        return [*self.srun(), *self.torchrun("--nnodes", str(self.nodes), *self.meeting_place())]

    def srun(self) -> list[str]:
        """srun and its options, to start a command once on each node."""
        once_per_node = [f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1"]
        # Let the step use the CPUs of the task that starts it; Slurm would keep the two apart.
        share = ["--overlap", f"--cpus-per-task={self.cpus}", "--cpu-bind=none", "--mpi=none"]
        end = [f"--wait={SECONDS_TO_FOLLOW}", "--kill-on-bad-exit=0"]
        # The task's process id means nothing on other nodes, where Slurm ends the step anyway.
        environment = [f"--export=ALL,{PARENT}="]
        return ["srun", "--quiet", *once_per_node, *share, *end, *environment]

    def meeting_place(self) -> list[str]:
        """Options of torchrun: this node, and a port that is free."""
        with socket.socket() as server:
            server.bind(("", 0))
            port = server.getsockname()[1]
        return ["--master_addr", socket.gethostname(), "--master_port", str(port)]


@dataclass(frozen=True)
class Task:
    """What submitit calls on the node, to look after one run."""

    run: PlannedRun
    rules: RulesOnNodes
    root: Path
    on_gpu: bool
    minutes: int  # the time limit

    def __call__(self) -> None:
        started_at = time.time()
        signals = []
        for number in launch.STOP_SIGNALS:  # remember those that come before the pool listens
            signal.signal(number, lambda number, frame: signals.append(number))

        job = Job(self.run)
        outcome = self.root / f"{own_id()}.json"
        outcome.unlink(missing_ok=True)  # from before the job was requeued
        try:
            self.run_or_requeue(job, signals, started_at)
        except (utils.UserError, OSError) as error:
            job.state, job.note = FAILED, f"FAILED: {utils.first_line(error)}"
        if job.state == FAILED:
            utils.write_json(outcome, {"note": job.note})

    def run_or_requeue(self, job: Job, signals: list[int], started_at: float) -> None:
        """Run the job to its end, or until Slurm warns it: then put it back in the queue."""
        found = gpus.to_use(self.rules.gpus_per_run) if self.on_gpu else []
        slots = gpus.make_slots(found, 1, self.rules.gpus_per_run)

        def print_note() -> None:
            print(job.note, flush=True)

        pool = launch.Pool([job], slots, self.rules, on_change=print_note, on_poll=lambda: None)
        pool.signals = signals
        stopped_by = pool.run()
        if job.is_over:
            return

        if stopped_by in (signal.SIGUSR1, signal.SIGTERM) and not is_canceled():
            if self.has_wasted_its_time(started_at):
                raise utils.UserError(
                    f"nothing could be saved within {self.minutes} minutes; raise --slurm_time"
                )
            requeue()

        if stopped_by is None:
            how = "without a GPU that responds"
        else:
            how = f"by {signal.Signals(stopped_by).name}"
        raise utils.UserError(f"stopped {how}, unfinished; submit it again to go on")

    def has_wasted_its_time(self, started_at: float) -> bool:
        """Whether over half of the time limit has passed and nothing was saved.

        Then the job would be requeued over and over again.
        """
        last = self.run.folder / utils.CHECKPOINT
        has_saved = last.exists() and last.stat().st_mtime > started_at
        return not has_saved and time.time() - started_at > half_time(self.minutes)


def half_time(minutes: int) -> float:
    """Half of the seconds that a time limit leaves until the warning."""
    return (60 * minutes - SECONDS_OF_WARNING) / 2


def is_canceled() -> bool:
    """Whether Slurm is ending this job for good, rather than preempting it."""
    command = ["squeue", "--noheader", "--jobs", own_id(), "--format=%T"]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return state in ("CANCELLED", "COMPLETING")


def own_id() -> str:
    """The id of this job, as squeue writes it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def requeue() -> NoReturn:
    """Put this job back in the queue, which ends this process.

    Raises UserError if Slurm refuses.
    """
    print("back into the queue", flush=True)
    done = subprocess.run(["scontrol", "requeue", own_id()], capture_output=True, text=True)
    if done.returncode != 0:
        raise utils.UserError(f"saved, but Slurm didn't requeue it: {last_line(done.stderr)}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(120)
    sys.exit("Slurm has requeued this job but not ended it")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it doesn't say why"
