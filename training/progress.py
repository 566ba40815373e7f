"""How far a run is: the numbers that are saved, the stopwatch, and what the user sees."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from runtime import distributed, hardware
from training.budget import Budget

SECONDS_BETWEEN_LOOKS = 1.0  # between updates of the bar, each of which waits for the device


@dataclass
class Progress:
    """How far a run is, in plain numbers: a checkpoint holds each field under its name."""

    # Rows of metrics.jsonl, one per finished epoch.
    history: list[dict] = field(default_factory=list)

    # Of the epoch in progress.
    epoch: int = 1
    epoch_step: int = 0  # steps that are done
    compile_seconds: float = 0.0  # of steps that compile, see Stopwatch
    timed_seconds: float = 0.0  # of all others
    timed_images: int = 0  # in these others

    def next_epoch(self, finished: dict) -> Progress:
        """The progress at the start of the next epoch; `finished` is the row of this one."""
        return Progress([*self.history, finished], self.epoch + 1)

    @property
    def train_seconds(self) -> float:
        """Of the epoch so far, as far as the clock was read."""
        return self.compile_seconds + self.timed_seconds

    def images_per_second(self, num_images: int) -> float:
        """Of the epoch; steps that compile count only if all of its `num_images` were in them."""
        if self.timed_images == 0:
            return num_images / self.compile_seconds
        return self.timed_images / self.timed_seconds


class Stopwatch:
    """Adds the time of the steps to a Progress.

    A process's first step with each shape compiles kernels for it, and is counted apart. The clock
    is read only around these steps and at pauses, as each reading waits for the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.shapes_seen: set[int] = set()

    def start(self, progress: Progress) -> None:
        """Add the time from here on to `progress`."""
        self.progress = progress
        self.last_reading = time.perf_counter()

    def pause(self) -> None:
        """Stop until the next `start`."""
        self._count_ordinary_steps()

    @contextmanager
    def step(self, num_images: int, shape: int) -> Iterator[None]:
        """Time a step on `num_images` images, over all processes, in batches of one `shape`."""
        if shape in self.shapes_seen:
            yield
            self.progress.timed_images += num_images
            return

        self._count_ordinary_steps()
        yield
        self.shapes_seen.add(shape)
        self.progress.compile_seconds += self._read()

    def now(self) -> float:
        """Seconds of training in this epoch, between `start` and `pause`.

        Does not wait for the device, which may be some steps behind.
        """
        return self.progress.train_seconds + time.perf_counter() - self.last_reading

    def _count_ordinary_steps(self) -> None:
        """Those since the last reading."""
        self.progress.timed_seconds += self._read()

    def _read(self) -> float:
        """Seconds since the last reading, once the device has done all that it was given."""
        hardware.synchronize(self.device)
        last, self.last_reading = self.last_reading, time.perf_counter()
        return self.last_reading - last


class ProgressBar:
    """A bar on a terminal, and one line every `log_every` steps; only on the first process."""

    def __init__(self, title: str, num_images: int, num_done: int, num_steps: int, log_every: int):
        self.title, self.num_steps, self.log_every = title, num_steps, log_every
        self.num_images = num_done  # of the epoch, so far
        self.last_look = time.perf_counter()
        self.bar = tqdm(
            total=num_images,
            initial=num_done,
            desc=title,
            unit="img",
            leave=False,
            disable=not distributed.IS_FIRST or not sys.stdout.isatty(),
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def update(self, step: int, num_images: int, losses: Tensor, num_correct: Tensor) -> None:
        """After a step of the epoch, counted from 1.

        `losses` [steps] and `num_correct` [] are this process's, and stay on the device until
        something is shown.
        """
        self.bar.update(num_images)
        self.num_images += num_images

        if not self.bar.disable and time.perf_counter() - self.last_look > SECONDS_BETWEEN_LOOKS:
            self.last_look = time.perf_counter()
            accuracy = 100 * distributed.WORLD_SIZE * num_correct.item() / self.num_images
            loss = mean_loss(losses[step - 1 : step])
            self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1f}%")

        if self.log_every and step % self.log_every == 0 and distributed.IS_FIRST:
            loss = mean_loss(losses[max(0, step - self.log_every) : step])
            self.bar.write(f"{self.title}, step {step}/{self.num_steps}: loss {loss:.4f}")


def mean_loss(losses: Tensor) -> float:
    """Mean loss over all processes, estimated from this one's part of each step's."""
    return distributed.WORLD_SIZE * losses.mean().item()


def format_epoch(row: dict, budget: Budget) -> str:
    """A row of metrics.jsonl as one line of text."""
    utilization, compiling = "", ""
    if row["flops_utilization"] is not None:
        utilization = f" ({row['flops_utilization']:.1f}% of peak)"
    if row["compile_seconds"] > 1:
        compiling = f", {row['compile_seconds']:.1f} s of it the first steps"

    return (
        f"epoch {budget.name_of(row['epoch'])}"
        f" | train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:5.2f}%"
        f" | eval loss {row['eval_loss']:.4f}, accuracy {row['eval_accuracy']:5.2f}%"
        f" | {row['train_images_per_second']:.0f} images/s{utilization}"
        f" | {row['epoch_seconds']:.1f} s{compiling}"
    )
