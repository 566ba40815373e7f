"""Runs jobs as subprocesses on a pool of slots.

A GPU, a group of GPUs or the CPU has a fixed number of slots, and never runs more jobs than that.
"""

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
SECONDS_BETWEEN_LOOKS = 2.0  # at runs that another process is writing
GRACE_SECONDS = 120  # for a child to save after it is asked to stop; then it is killed

# Asks a child to stop. srun passes it on, whereas at SIGTERM it kills what it has started.
ASKING = signal.SIGUSR1
# What stops a sweep: Ctrl-C, schedulers, a closed terminal (but not under nohup, which ignores it).
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)

LEFT_ALONE = "is being written by another process, left alone"


@dataclass(frozen=True)
class Rules:
    """How runs are started, and when to give up on one."""

    script: Path  # main.py
    retries: int = 0
    timeout_minutes: float | None = None
    gpus_per_run: int = 1  # on each machine; on the CPU, the number of processes

    def command(self, job: Job) -> list[str]:
        return [*self.starter(), str(self.script), *job.arguments()]

    def starter(self) -> list[str]:
        """The beginning of the command, which runs the script."""
        if self.gpus_per_run > 1:
            return self.torchrun("--standalone")
        return [sys.executable]

    def torchrun(self, *options: str) -> list[str]:
        script = str(Path(__file__).with_name("torchrun.py"))
        return [sys.executable, script, "--nproc_per_node", str(self.gpus_per_run), *options]


@dataclass(eq=False)
class Child:
    """A process that runs a job."""

    job: Job
    slot: str
    process: subprocess.Popen
    deadline: float = float("inf")  # when to ask it to stop, on the clock time.monotonic()
    is_late: bool = False


class Pool:
    """Runs all jobs, each as soon as a slot is free. A failed job doesn't stop the others.

    `on_change` is called when the state of a job has changed, `on_poll` in between.
    """

    def __init__(
        self,
        jobs: list[Job],
        slots: list[str],
        rules: Rules,
        on_change: Callable[[], None],
        on_poll: Callable[[], None],
    ):
        self.jobs = jobs
        self.slots = list(slots)  # the free ones
        self.rules = rules
        self.on_change = on_change
        self.on_poll = on_poll

        self.children: list[Child] = []
        self.signals: list[int] = []  # received so far
        self.looked_at = 0.0

        num_cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.cpu_count() or 1)
        self.threads = max(1, num_cpus // (len(slots) * rules.gpus_per_run))

        # Only a GPU that nvidia-smi has found before can be reported as lost later.
        names = set(",".join(slots).split(","))
        self.known_gpus = {name for name in names if name and gpus.responds(name)}

    def run(self) -> int | None:
        """Run until no job is left that could run. Returns the signal that ended it early, or None.

        After a signal, the children are asked to stop and have time to save; Ctrl-C then kills them
        at once. However this ends, no child is left.
        """
        previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            while not self.signals and self._can_continue():
                self._look_elsewhere()
                self._fill_slots()
                time.sleep(POLL_SECONDS)
                self._collect()
                self._stop_the_late()
                self.on_poll()
        finally:
            self._stop()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.signals[0] if self.signals else None

    def _can_continue(self) -> bool:
        is_left = not all(job.is_over for job in self.jobs)
        return is_left and bool(self.slots or self.children)

    def _receive(self, number: int, frame) -> None:
        self.signals.append(number)

    def _set(self, job: Job, state: str, note: str) -> None:
        job.state = state
        job.note = note
        self.on_change()

    def _look_elsewhere(self) -> None:
        """Let jobs wait again if another process no longer writes their runs."""
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
                    self._start_or_leave(job)
                except OSError as error:
                    self._set(job, FAILED, f"FAILED to start: {utils.first_line(error)}")

    def _start_or_leave(self, job: Job) -> None:
        """Start a job, unless another process has finished its run or is writing it."""
        # Looked at first: a run that ends in between counts as finished.
        is_being_written = job.run.is_being_written()
        if job.run.is_finished():
            self._set(job, DONE, "finished by another process")
        elif is_being_written:
            self._set(job, ELSEWHERE, LEFT_ALONE)
        else:
            self._start(job, self.slots[0])

    def _start(self, job: Job, slot: str) -> None:
        job.run.folder.mkdir(parents=True, exist_ok=True)
        with open(job.run.log, "ab") as log:
            # In its own session: Ctrl-C reaches only the sweep, which then stops its children.
            process = subprocess.Popen(
                self.rules.command(job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(slot),
                start_new_session=True,
            )

        child = Child(job, slot, process)
        if self.rules.timeout_minutes is not None:
            child.deadline = time.monotonic() + 60 * self.rules.timeout_minutes
        self.children.append(child)
        self.slots.remove(slot)

        place = f"GPU {slot}" if slot else "the CPU"
        self._set(job, RUNNING, f"started on {place}, log in {job.run.log}")

    def _environment(self, slot: str) -> dict[str, str]:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": slot, PARENT: str(os.getpid())}
        if "CUDA_VISIBLE_DEVICES" not in os.environ:
            # The numbers are nvidia-smi's. If the user has set them, so is their order.
            environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        # Runs share the cores: each process gets as many threads and compilers as it has cores.
        for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
            environment.setdefault(name, str(self.threads))
        return environment

    def _collect(self) -> None:
        """Find children that have ended, free their slots and judge their jobs."""
        for child in [child for child in self.children if child.process.poll() is not None]:
            _kill_group(child.process)  # anything it has started and left behind
            self.children.remove(child)
            self.slots.append(child.slot)
            self._set(child.job, *self._judge(child))

    def _judge(self, child: Child) -> tuple[str, str]:
        """(state, note) of a job whose process has ended."""
        job, code = child.job, child.process.returncode
        if code > 128:  # how srun and shells report a signal
            code = 128 - code

        facts = Facts(
            has_summary=(job.run.folder / utils.SUMMARY).exists(),
            is_late=child.is_late,
            is_stopping=bool(self.signals),
            can_halve_batches=job.micro_batches is None,
            retries_left=self.rules.retries - job.num_retries,
        )
        outcome = judge(code, facts)
        if outcome == DONE:
            return DONE, "finished"
        if outcome == TIMED_OUT:
            return FAILED, f"FAILED: timed out after {self.rules.timeout_minutes:g} minutes"
        if outcome == STOPPED and self.signals:
            return WAITING, "stopped, everything is saved"
        if outcome == STOPPED:
            return WAITING, "was asked to stop, starts again"
        if outcome == CUT_SHORT:
            then = "" if self.signals else ", starts again"
            return WAITING, f"ended by {describe_exit(code)}{then}"
        if outcome == ELSEWHERE:
            return ELSEWHERE, LEFT_ALONE
        if outcome == OUT_OF_MEMORY:
            job.micro_batches = 2 * job.run.micro_batches()
            note = f"out of memory, starts again with {job.micro_batches} micro-batches per step"
            return WAITING, note
        return self._judge_failure(child, code, can_retry=outcome == RETRY)

    def _judge_failure(self, child: Child, code: int, can_retry: bool) -> tuple[str, str]:
        job = child.job
        if self._drop_lost_gpus(child.slot):
            return WAITING, "lost its GPU, waits for another"

        reason = describe_exit(code) if code else f"it ended without a {utils.SUMMARY}"
        text = f"with {reason}: {last_lines(job.run.log)[-1].strip()}"
        if can_retry:
            job.num_retries += 1
            return WAITING, f"failed {text}; retry {job.num_retries} of {self.rules.retries}"
        return FAILED, f"FAILED {text}"

    def _drop_lost_gpus(self, slot: str) -> bool:
        """Whether a GPU of the slot has dropped out. If so, no slot with it is used again."""
        names = [name for name in slot.split(",") if name in self.known_gpus]
        lost = {name for name in names if not gpus.responds(name)}
        if lost:
            self.slots = [slot for slot in self.slots if not lost & set(slot.split(","))]
            utils.warn(
                f"GPU {', '.join(sorted(lost))} no longer responds to nvidia-smi; "
                "no more runs are started on it"
            )
        return bool(lost)

    def _stop_the_late(self) -> None:
        """Ask children to stop whose time is up, and kill those that still run after that."""
        for child in self.children:
            if time.monotonic() > child.deadline:
                if child.is_late:
                    _kill_group(child.process)
                else:
                    _ask_to_stop(child.process)
                child.is_late = True
                child.deadline = time.monotonic() + GRACE_SECONDS

    def _stop(self) -> None:
        """Ask all children to stop and wait for them; kill them after Ctrl-C or GRACE_SECONDS."""
        for child in self.children:
            _ask_to_stop(child.process)
        if self.children:
            with contextlib.suppress(OSError):
                print(
                    f"\nstopping: {len(self.children)} runs save first; "
                    "press Ctrl-C to kill them at once",
                    flush=True,
                )

        deadline = time.monotonic() + GRACE_SECONDS
        while self.children:
            if signal.SIGINT in self.signals[1:] or time.monotonic() > deadline:
                for child in self.children:
                    _kill_group(child.process)
            time.sleep(POLL_SECONDS)
            with contextlib.suppress(OSError):  # nobody reads our output any more
                self._collect()


# What the end of a process can mean, besides DONE, FAILED and ELSEWHERE.
TIMED_OUT = "timed out"
STOPPED = "stopped"
CUT_SHORT = "cut short"
OUT_OF_MEMORY = "out of memory"
RETRY = "retry"


@dataclass(frozen=True)
class Facts:
    """What is known about a process that has ended, besides its exit code."""

    has_summary: bool
    is_late: bool  # its time was up
    is_stopping: bool  # the sweep was told to stop
    can_halve_batches: bool  # it has not run out of memory before
    retries_left: int


def judge(code: int, facts: Facts) -> str:
    """What the end of a run's process means. Negative codes are signals."""
    if code == 0 and facts.has_summary:
        return DONE
    if facts.is_late:
        return TIMED_OUT
    if code == utils.EXIT_AGAIN:
        return STOPPED
    if code == utils.EXIT_BUSY:
        return ELSEWHERE
    if code == -ASKING:  # asked to stop before it listened
        return CUT_SHORT
    if facts.is_stopping and code < 0:  # our signal ended it before it could save
        return CUT_SHORT
    if code == utils.EXIT_OUT_OF_MEMORY and facts.can_halve_batches:
        return OUT_OF_MEMORY
    if facts.retries_left > 0 and code != utils.EXIT_USAGE:
        return RETRY
    return FAILED


def describe_exit(code: int) -> str:
    """An exit code in words. Negative codes are signals, as in subprocess."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _ask_to_stop(process: subprocess.Popen) -> None:
    """Signal only the process itself, which stops those that it has started.

    While it saves, it must not lose its compiler processes.
    """
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(ASKING)


def _kill_group(process: subprocess.Popen) -> None:
    """Kill a child and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
