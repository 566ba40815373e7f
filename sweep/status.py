"""What a sweep says while it runs: news of its runs, how many are done, and the time left."""

from __future__ import annotations

import heapq
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import utils
from sweep.plan import DONE, ELSEWHERE, FAILED, RUNNING, WAITING, Job, PlannedRun
from training.run_record import RunRecord, number

SECONDS_BETWEEN_LOOKS = 1.0  # at the metrics of the runs
RECENT = 5  # epochs that give the pace; the first one of a process may compile


class Status:
    """Prints a line whenever there is news of a run, and one with the state of the sweep.

    On a terminal the latter is rewritten in place; in a file it follows each change. `jobs` are
    those of the planned runs that were not finished before. `num_slots` is the number of runs at a
    time, None where only the cluster knows.
    """

    def __init__(self, plan: list[PlannedRun], jobs: list[Job], num_slots: int | None):
        self.num_runs = len(plan)
        self.jobs = jobs
        self.forecast = Forecast(plan, jobs, num_slots)

        self.is_live = sys.stdout.isatty()
        self.printed: dict[PlannedRun, str] = {}  # the latest news of each run
        self.counted = ""  # the counts that were printed last
        self.looked_at = float("-inf")

    def on_change(self) -> None:
        """The state of a job may have changed."""
        self.forecast.observe()
        for job in self.jobs:
            if job.note and self.printed.get(job.run) != job.note:
                self.printed[job.run] = job.note
                self.clear()
                print(f"{job.run.name}: {job.note}", flush=True)

    def on_poll(self) -> None:
        """Time has passed. Several changes since the last call are one line in a file."""
        counts = self.count()
        is_news = counts != self.counted
        is_due = self.is_live and time.monotonic() - self.looked_at > SECONDS_BETWEEN_LOOKS
        if not is_news and not is_due:
            return

        self.counted, self.looked_at = counts, time.monotonic()
        seconds = self.forecast.seconds_left()
        is_over = all(job.is_over for job in self.jobs)
        left = "" if seconds is None or is_over else f", about {format_duration(seconds)} left"
        if self.is_live:
            width = shutil.get_terminal_size().columns - 1
            text = f"{counts}{left}{self.describe_running()}"
            print(f"\r\033[K{text[:width]}", end="", flush=True)
        else:
            print(f"{counts}{left}", flush=True)

    def clear(self) -> None:
        """Make room for other output."""
        if self.is_live:
            print("\r\033[K", end="")
            self.looked_at = float("-inf")

    def count(self) -> str:
        num_running = sum(job.state == RUNNING for job in self.jobs)
        num_failed = sum(job.state == FAILED for job in self.jobs)
        num_left = sum(not job.is_over for job in self.jobs)
        num_done = self.num_runs - num_left - num_failed
        return f"{num_done} of {self.num_runs} done, {num_running} running, {num_failed} failed"

    def describe_running(self) -> str:
        running = [job.run for job in self.jobs if job.state == RUNNING]
        return "".join(f" | {run.name}{describe_last_epoch(run.folder)}" for run in running)


def describe_last_epoch(folder: Path) -> str:
    try:
        row = read_rows(folder)[-1]
        return f": epoch {row['epoch']}, {row['eval_accuracy']:.1f}%"
    except (KeyError, IndexError, TypeError, ValueError):
        return ""  # no epoch yet, or not a file of ours


def read_rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl; none if it is not there, or not a file of ours."""
    try:
        lines = (folder / utils.METRICS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []
    return rows if all(isinstance(row, dict) for row in rows) else []


def format_duration(seconds: float) -> str:
    """In words, no more exactly than anybody can know: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / (24 * 60):.1f} days"


# --------------------------------------------------------------------------------------------------
# The time left


@dataclass(frozen=True)
class Pace:
    """How far a run is and how fast it goes, as its folder tells."""

    share_done: float = 0.0  # of its training
    seconds_per_epoch: float | None = None  # on average over the latest
    seconds_in_all: float | None = None  # as they went
    written_at: float = 0.0  # when the latest epoch was done, on the clock time.time()
    total_seconds: float | None = None  # of a finished run

    @classmethod
    def read(cls, folder: Path) -> Pace:
        """Of any folder; another process may be writing to it just now."""
        try:
            record = RunRecord.read(folder)
            if record is None:
                return cls()
            rows = read_rows(folder)
            share_done = share_of(record, rows)
            share = share_done - share_of(record, rows[:-RECENT])  # that the latest epochs did
            seconds = [number(row, "epoch_seconds") for row in rows[-RECENT:]]
            is_known = share > 0 and None not in seconds
            return cls(
                share_done=share_done,
                seconds_per_epoch=statistics.fmean(seconds) if is_known else None,
                seconds_in_all=sum(seconds) / share if is_known else None,
                written_at=(folder / utils.METRICS).stat().st_mtime if rows else 0.0,
                total_seconds=number(record.summary or {}, "total_seconds"),
            )
        except (utils.UserError, OSError):
            return cls()

    @property
    def share_left(self) -> float:
        return 1 - self.share_done

    @property
    def whole(self) -> float | None:
        """Seconds that the whole run takes or took, without its start."""
        return self.seconds_in_all if self.total_seconds is None else self.total_seconds

    def seconds_left(self, seconds_running: float) -> float | None:
        """Of a run whose process started so long ago; None if it has not shown its pace."""
        if self.seconds_per_epoch is None:
            return None
        # The latest epoch may be from an earlier process.
        since = min(time.time() - self.written_at, seconds_running)
        of_this_epoch = min(max(0.0, since), self.seconds_per_epoch)
        return max(0.0, self.share_left * self.seconds_in_all - of_this_epoch)


def share_of(record: RunRecord, rows: list[dict]) -> float:
    """The share of a run's training that these rows of its metrics are."""
    seconds = sum(number(row, "train_seconds") or 0.0 for row in rows)
    return record.settings.optimization.budget.share_done(len(rows), seconds)


class Forecast:
    """How long until the sweep is over, from the runs that are done and the pace of the others.

    A run that has not shown its pace is expected to take as long as others with its mask or, if
    there are none, as others on average.
    """

    def __init__(self, plan: list[PlannedRun], jobs: list[Job], num_slots: int | None):
        self.jobs, self.num_slots = jobs, num_slots
        self.states: dict[Job, str] = {}
        self.started: dict[Job, float] = {}  # of those that run, on the clock time.monotonic()
        self.is_new: dict[Job, bool] = {}  # whether it had no epoch when it started

        self.paces = {run: Pace.read(run.folder) for run in plan}
        self.watched: dict[PlannedRun, float] = {}  # seconds from the start to the end

    def observe(self) -> None:
        """Note which jobs have started or ended. To be called at each change."""
        now = time.monotonic()
        for job in self.jobs:
            before = self.states.get(job)
            if job.state == before:
                continue
            self.states[job] = job.state
            self.paces[job.run] = Pace.read(job.run.folder)

            started = self.started.pop(job, None)
            if job.state == RUNNING:
                self.started[job] = now
                self.is_new[job] = self.paces[job.run].share_done == 0
            elif job.state == DONE and started is not None and self.is_new[job]:
                self.watched[job.run] = now - started

    def seconds_left(self) -> float | None:
        """Until all jobs are over; None as long as nobody can know."""
        running = [job for job in self.jobs if job.state == RUNNING]
        elsewhere = [job for job in self.jobs if job.state == ELSEWHERE]
        waiting = [job for job in self.jobs if job.state == WAITING]
        for job in (*running, *elsewhere):
            self.paces[job.run] = Pace.read(job.run.folder)
        whole = {run: self.watched.get(run, pace.whole) for run, pace in self.paces.items()}
        known = {run: seconds for run, seconds in whole.items() if seconds is not None}

        num_slots = self.num_slots or len(running)
        if waiting and num_slots == 0:
            return None

        ends = [self._left_of(job, known) for job in running]
        ends_elsewhere = [self._left_of(job, known) for job in elsewhere]
        lengths = [self._length_of(job, known) for job in waiting]
        if None in (*ends, *ends_elsewhere, *lengths):
            return None
        free = [0.0] * (num_slots - len(running))
        return max([0.0, *ends_elsewhere, *schedule([*ends, *free], lengths)])

    def _left_of(self, job: Job, known: dict[PlannedRun, float]) -> float | None:
        """Seconds until a job is over that is running, here or elsewhere; None if unknown."""
        started = self.started.get(job)  # None: elsewhere, we don't know when
        seconds_running = float("inf") if started is None else time.monotonic() - started
        left = self.paces[job.run].seconds_left(seconds_running)
        if left is not None:
            return left

        length = self._length_of(job, known)
        if length is None or started is None:
            return length
        # If it takes longer than the others did, there is no telling.
        return length - seconds_running if seconds_running < length else None

    def _length_of(self, job: Job, known: dict[PlannedRun, float]) -> float | None:
        """Seconds that the rest of a job takes once it starts; None if unknown.

        `known` has the seconds of whole runs.
        """
        seconds = known.get(job.run)
        if seconds is None and known:
            of_mask = [seconds for run, seconds in known.items() if run.mask == job.run.mask]
            seconds = statistics.fmean(of_mask or known.values())
        return None if seconds is None else self.paces[job.run].share_left * seconds


def schedule(slots: Iterable[float], lengths: Iterable[float]) -> list[float]:
    """When each slot is free for good, if each job in turn takes the one that is free first.

    `slots` is when they are free now, and `lengths` how long the jobs take; seconds.
    """
    slots = list(slots)
    heapq.heapify(slots)
    for length in lengths:
        heapq.heapreplace(slots, slots[0] + length)
    return slots
