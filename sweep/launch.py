"""Run jobs as subprocesses on a pool of slots: a GPU, some GPUs, or the CPU, has so many slots and never runs more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import utils
from runtime.stopping import PARENT
from sweep import gpus
from sweep.plan import DONE, ELSEWHERE, FAILED, RUNNING, WAITING, Job, last_lines

POLL_SECONDS = 0.2
SECONDS_BETWEEN_LOOKS = 2.0  # at runs that another process writes
GRACE_SECONDS = 120  # between asking a child to stop, which then saves, and killing it
# srun passes on SIGUSR1, and kills what it started at SIGTERM.
ASKING = signal.SIGUSR1
# Ctrl-C, schedulers, a closed terminal; a sweep under nohup ignores the last one before it comes here.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)


@dataclass(frozen=True)
class Rules:
    """How runs are started, and when one is given up."""

    script: Path  # main.py
    retries: int = 0
    timeout_minutes: float | None = None
    gpus_per_run: int = 1  # or processes, on the CPU; of each machine

    def command(self, job: Job) -> list[str]:
        return [*self.starter(), str(self.script), *job.arguments()]

    def starter(self) -> list[str]:
        """What runs the script."""
        return self.torchrun("--standalone") if self.gpus_per_run > 1 else [sys.executable]

    def torchrun(self, *options: str) -> list[str]:
        script, number = str(Path(__file__).with_name("torchrun.py")), str(self.gpus_per_run)
        return [sys.executable, script, "--nproc_per_node", number, *options]


@dataclass(eq=False)
class Child:
    """A process that runs a job."""

    job: Job
    slot: str
    process: subprocess.Popen
    ends_at: float = float("inf")  # then it is asked to stop, by time.monotonic()
    is_late: bool = False


class Pool:
    """Runs all jobs, each as soon as a slot is free; a failed one does not stop the others.

    `on_change` is called when a job's state has changed, `on_poll` in between.
    """

    def __init__(
        self, jobs: list[Job], slots: list[str], rules: Rules, on_change: Callable[[], None], on_poll: Callable
    ):
        self.jobs, self.slots, self.rules, self.on_change, self.on_poll = jobs, list(slots), rules, on_change, on_poll
        self.children: list[Child] = []
        self.signals: list[int] = []  # that have come
        self.looked_at = 0.0
        num_cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.cpu_count() or 1)
        self.threads = max(1, num_cpus // (len(slots) * rules.gpus_per_run))
        # Only of a GPU that nvidia-smi has found can it be said later that it has gone.
        self.known_gpus = {gpu for gpu in set(",".join(slots).split(",")) if gpu and gpus.responds(gpu)}

    def run(self) -> int | None:
        """Until no job is left that could be run; the signal that ended it early, or None.

        On the signal the children are asked to stop and have time to save; Ctrl-C then kills them at once. However
        this ends, no child is left.
        """
        previous_handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            while not self.signals and not all(job.is_over for job in self.jobs) and (self.slots or self.children):
                self._look_elsewhere()
                self._fill_slots()
                time.sleep(POLL_SECONDS)
                self._collect()
                self._stop_the_late()
                self.on_poll()
        finally:
            self._stop()
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
        return self.signals[0] if self.signals else None

    def _receive(self, number: int, frame) -> None:
        self.signals.append(number)

    def _set(self, job: Job, state: str, note: str) -> None:
        job.state, job.note = state, note
        self.on_change()

    def _look_elsewhere(self) -> None:
        """Runs that another process was writing: done by it, or free to be taken over."""
        if time.monotonic() - self.looked_at < SECONDS_BETWEEN_LOOKS:
            return
        self.looked_at = time.monotonic()
        for job in self.jobs:
            if job.state == ELSEWHERE and not job.run.is_being_written():
                job.state = WAITING

    def _fill_slots(self) -> None:
        for job in self.jobs:
            if job.state == WAITING and self.slots and not self.signals:
                try:
                    if job.run.is_finished():
                        self._set(job, DONE, "finished by another process")
                    elif job.run.is_being_written():
                        self._set(job, ELSEWHERE, "is being written by another process, left to it")
                    else:
                        self._start(job, self.slots[0])
                except OSError as error:
                    self._set(job, FAILED, f"FAILED to start: {utils.first_line(error)}")

    def _start(self, job: Job, slot: str) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": slot, PARENT: str(os.getpid())}
        if "CUDA_VISIBLE_DEVICES" not in os.environ:  # else the numbers are the user's, in the user's order
            environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's
        if not slot:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))  # the runs on one CPU share its cores
        job.run.folder.mkdir(parents=True, exist_ok=True)
        with open(job.run.log, "ab") as log:
            # A session of its own: Ctrl-C reaches the sweep alone, which then stops its children in order.
            process = subprocess.Popen(
                self.rules.command(job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        child = Child(job, slot, process)
        if self.rules.timeout_minutes is not None:
            child.ends_at = time.monotonic() + 60 * self.rules.timeout_minutes
        self.children.append(child)
        self.slots.remove(slot)
        self._set(job, RUNNING, f"started on {'GPU ' + slot if slot else 'the CPU'}, log in {job.run.log}")

    def _collect(self) -> None:
        """See which children have ended, free their slots and judge their jobs."""
        for child in [child for child in self.children if child.process.poll() is not None]:
            _kill_group(child.process)  # whatever it started and left behind
            self.children.remove(child)
            self.slots.append(child.slot)
            self._set(child.job, *self._judge(child))

    def _judge(self, child: Child) -> tuple[str, str]:
        """The state of a job whose process has ended, and what there is to say."""
        job, code = child.job, child.process.returncode
        code = 128 - code if code > 128 else code  # killed by a signal, as srun and shells say it
        outcome = judge(
            code,
            Facts(
                has_summary=(job.run.folder / utils.SUMMARY).exists(),
                is_late=child.is_late,
                is_stopping=bool(self.signals),
                can_halve_batches=job.micro_batches is None,
                retries_left=self.rules.retries - job.num_retries,
            ),
        )
        if outcome == DONE:
            return DONE, "finished"
        if outcome == TIMED_OUT:
            return FAILED, f"FAILED: timed out after {self.rules.timeout_minutes:g} minutes"
        if outcome == STOPPED:
            return WAITING, "stopped, all is saved" if self.signals else "was asked to stop, and starts again"
        if outcome == CUT_SHORT:
            return WAITING, f"ended by {describe_exit(code)}"
        if outcome == ELSEWHERE:
            return ELSEWHERE, "is being written by another process, left to it"
        if outcome == OUT_OF_MEMORY:
            job.micro_batches = 2 * job.run.micro_batches()
            return WAITING, f"out of memory, starts again with {job.micro_batches} micro-batches a step"

        if self._drop_lost_gpus(child.slot):
            return WAITING, "lost its GPU, and waits for another"
        reason = describe_exit(code) if code else f"it ended without a {utils.SUMMARY}"
        text = f"with {reason}: {last_lines(job.run.log)[-1].strip()}"
        if outcome == RETRY:
            job.num_retries += 1
            return WAITING, f"failed {text}; retry {job.num_retries} of {self.rules.retries}"
        return FAILED, f"FAILED {text}"

    def _drop_lost_gpus(self, slot: str) -> bool:
        """Whether a GPU of the slot no longer answers; then no slot with it is used again."""
        lost = {gpu for gpu in slot.split(",") if gpu in self.known_gpus and not gpus.responds(gpu)}
        if lost:
            self.slots = [slot for slot in self.slots if not lost & set(slot.split(","))]
            utils.warn(f"GPU {', '.join(sorted(lost))} no longer answers to nvidia-smi; nothing is started there again")
        return bool(lost)

    def _stop_the_late(self) -> None:
        for child in self.children:
            if time.monotonic() > child.ends_at:
                if child.is_late:
                    _kill_group(child.process)
                else:
                    _ask_to_stop(child.process)
                child.is_late, child.ends_at = True, time.monotonic() + GRACE_SECONDS

    def _stop(self) -> None:
        for child in self.children:
            _ask_to_stop(child.process)
        if self.children:
            with contextlib.suppress(OSError):
                print(f"\nstopping: {len(self.children)} runs save first; Ctrl-C kills them at once", flush=True)
        deadline = time.monotonic() + GRACE_SECONDS
        while self.children:
            if signal.SIGINT in self.signals[1:] or time.monotonic() > deadline:
                for child in self.children:
                    _kill_group(child.process)
            time.sleep(POLL_SECONDS)
            with contextlib.suppress(OSError):  # of whoever reads our output
                self._collect()


# What the end of a process means, beside DONE, FAILED and ELSEWHERE.
TIMED_OUT, STOPPED, CUT_SHORT, OUT_OF_MEMORY, RETRY = "timed out", "stopped", "cut short", "out of memory", "retry"


@dataclass(frozen=True)
class Facts:
    """What there is to know, beside its exit code, of a process that has ended."""

    has_summary: bool
    is_late: bool  # its time was up
    is_stopping: bool  # the sweep was told to stop
    can_halve_batches: bool  # it has not run out of memory before
    retries_left: int


def judge(code: int, facts: Facts) -> str:
    """What the end of a run's process means; negative codes are signals."""
    if code == 0 and facts.has_summary:
        return DONE
    if facts.is_late:
        return TIMED_OUT
    if code == utils.EXIT_AGAIN:
        return STOPPED
    if code == utils.EXIT_BUSY:
        return ELSEWHERE
    if facts.is_stopping and code < 0:  # by our signal, before it could save
        return CUT_SHORT
    if code == utils.EXIT_OUT_OF_MEMORY and facts.can_halve_batches:
        return OUT_OF_MEMORY
    if facts.retries_left > 0 and code != utils.EXIT_USAGE:
        return RETRY
    return FAILED


def describe_exit(code: int) -> str:
    """In words; negative codes are signals, as subprocess has it."""
    with contextlib.suppress(ValueError):
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _ask_to_stop(process: subprocess.Popen) -> None:
    """The process alone: those that it started are its to stop. It must not lose its compilers while it saves."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(ASKING)


def _kill_group(process: subprocess.Popen) -> None:
    """Kill a child and the processes that it started itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
