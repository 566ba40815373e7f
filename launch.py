"""Run commands as subprocesses on a pool of slots: a GPU, or the CPU, has so many slots and never runs more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import utils

POLL_SECONDS = 0.2
GRACE_SECONDS = 15  # between asking a child to stop and killing it
# Ctrl-C, a scheduler, a closed terminal; a sweep under nohup ignores the last one before it comes here.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)


@dataclass
class Job:
    """A command to run, and what became of it."""

    name: str
    command: list[str]
    log: Path
    gpu: str | None = None  # what CUDA_VISIBLE_DEVICES was set to; None = not started
    exit_code: int | None = None
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def failed(self) -> bool:
        return self.exit_code not in (None, 0)


def gpu_ids(num_gpus: int | None) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them: the first `num_gpus`, or all with None; [] = the CPU.

    Raises UsageError if there are fewer. GPUs are counted by CUDA_VISIBLE_DEVICES, else by nvidia-smi; where neither
    is there the number asked for is believed.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        found = names[: names.index("-1")] if "-1" in names else names  # as CUDA reads it
        counted_by = "CUDA_VISIBLE_DEVICES names"
    else:
        found, counted_by = _ask_nvidia_smi(), "nvidia-smi lists"
    if num_gpus is None:
        return found or []
    if found is None:
        return [str(index) for index in range(num_gpus)]
    if num_gpus > len(found):
        raise utils.UsageError(
            f"--gpus {num_gpus}, but {counted_by} {len(found)}; ask for at most that many, --gpus 0 runs on the CPU"
        )
    return found[:num_gpus]


def _ask_nvidia_smi() -> list[str] | None:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    num_gpus = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return [str(index) for index in range(num_gpus)]


def make_slots(gpus: list[str], runs_per_gpu: int) -> list[str]:
    """One entry a slot, its GPU ("" = the CPU); the GPUs take turns, so that few runs spread over many."""
    return (gpus or [""]) * runs_per_gpu


def run_jobs(jobs: list[Job], slots: list[str], on_change: Callable[[], None], on_poll: Callable[[], None]) -> None:
    """Run all jobs, each as soon as a slot is free; a failed job does not stop the others.

    `on_change` is called when a job starts or ends, `on_poll` in between. On Ctrl-C or SIGTERM the children are asked
    to stop, then killed, and KeyboardInterrupt is raised.
    """
    threads = max(1, (os.cpu_count() or 1) // len(slots))
    waiting, free, running = list(jobs), list(slots), []
    previous_handlers = {number: signal.signal(number, _raise_interrupt) for number in STOP_SIGNALS}
    try:
        while waiting or running:
            while waiting and free:
                job = waiting.pop(0)
                running.append(job)  # before it starts: whatever interrupts us, it will be stopped
                _start(job, free.pop(0), threads)
                on_change()
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if job.process.poll() is not None]:
                job.exit_code = job.process.returncode
                running.remove(job)
                free.append(job.gpu)
                on_change()
            on_poll()
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # stopping the children is not interrupted again
        _stop([job for job in running if job.process is not None])
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _start(job: Job, gpu: str, threads: int) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    if not gpu:
        environment.setdefault("OMP_NUM_THREADS", str(threads))  # the runs on one CPU share its cores
    job.gpu = gpu
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        # A session of its own: Ctrl-C reaches the sweep alone, which then stops its children in order.
        job.process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _stop(running: list[Job]) -> None:
    for job in running:
        _signal_group(job, signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    for job in running:
        try:
            job.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(job, signal.SIGKILL)
            job.process.wait()


def _signal_group(job: Job, number: int) -> None:
    """Signal the child and the processes that it started itself."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, number)
    else:  # Windows
        job.process.terminate()


def _raise_interrupt(number, frame):
    raise KeyboardInterrupt
