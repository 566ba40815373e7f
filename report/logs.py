"""Run folders on disk -> runs. Imports neither torch nor matplotlib.

A run is a folder `<run_name>/seed_<n>/` with config.json, metrics.jsonl and, once it is done,
summary.json. A number that it did not write stays missing (None) and never becomes 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import utils
from masks import MaskSpec
from report import text
from training.run_record import RunRecord, number
from training.settings import MAY_CHANGE

# How much better a model is on what it trains on: in points, in nats.
GAPS = ("gap_accuracy", "gap_loss")

# Settings in which the runs of a sweep are meant to differ, and settings that say where a run
# computes, not what. The device is compared by its name, which is in the provenance.
OF_THE_MASK = {field.name for field in fields(MaskSpec)}
MAY_DIFFER = {*OF_THE_MASK, "num_registers", "run_name", "seed", *MAY_CHANGE}


@dataclass(frozen=True)
class Run(RunRecord):
    """A run folder whose files could all be read."""

    is_timed: bool = True  # False: its times say nothing, as something else disturbed it

    @property
    def name(self) -> str:
        """The run's name in messages."""
        return f"{text.one_line(self.settings.run.run_name)} seed {self.seed}"

    @property
    def seed(self) -> int:
        return self.settings.optimization.seed

    @property
    def eval_accuracy(self) -> float | None:
        """After the final epoch, in percent; None for a run that is not finished."""
        return None if self.summary is None else number(self.summary["final"], "eval_accuracy")

    def curve(self, metric: str) -> dict[int, float]:
        """Epoch -> value, for the epochs that have one; `metric` may be one of GAPS."""
        if metric not in GAPS:
            return super().curve(metric)

        kind = metric.removeprefix("gap_")
        trained, evaluated = self.curve(f"train_{kind}"), self.curve(f"eval_{kind}")
        sign = 1 if kind == "accuracy" else -1  # a lower loss is better
        epochs = trained.keys() & evaluated.keys()
        return {epoch: sign * (trained[epoch] - evaluated[epoch]) for epoch in sorted(epochs)}

    @property
    def images_per_second(self) -> float | None:
        """Training throughput without the first epoch; None for a run that is not finished."""
        return self._measured("train_images_per_second")

    @property
    def total_seconds(self) -> float | None:
        """Of training and evaluations; None for a run that is not finished."""
        return self._measured("total_seconds")

    def _measured(self, name: str) -> float | None:
        has_time = self.is_timed and self.summary is not None
        return number(self.summary, name) if has_time else None

    @property
    def num_images_evaluated(self) -> int | None:
        key = {"test": "num_test", "holdout": "num_held_out"}[self.settings.data.eval_split]
        return number(self.config["data"], key)

    @cached_property
    def train_seconds(self) -> dict[int, float]:
        """Epoch -> its seconds of training, without the evaluation."""
        if not self.is_timed:
            return {}
        whole, rates = self.curve("epoch_seconds"), self.curve("eval_images_per_second")
        num_images = self.num_images_evaluated

        # Older logs lack it; it is computed from these two.
        seconds = {}
        for epoch in whole.keys() & rates.keys():
            if num_images and rates[epoch] > 0:
                seconds[epoch] = whole[epoch] - num_images / rates[epoch]
        return seconds | self.curve("train_seconds")

    @cached_property
    def clock(self) -> dict[int, float]:
        """Epoch -> seconds trained until its end, as far as all epochs before have a time."""
        seconds = self.train_seconds
        clock, passed = {}, 0.0
        for epoch in range(1, len(self.metrics) + 1):
            if epoch not in seconds:
                break
            passed += seconds[epoch]
            clock[epoch] = passed
        return clock

    @cached_property
    def share_done(self) -> dict[int, float]:
        """Epoch -> share of the training that is done at its end, of those that have a time."""
        budget = self.settings.optimization.budget
        return {epoch: budget.share_done(epoch, seconds) for epoch, seconds in self.clock.items()}

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds trained until the end of the first epoch of at least this accuracy."""
        reached = [epoch for epoch, x in self.curve("eval_accuracy").items() if x >= accuracy]
        return self.clock.get(min(reached)) if reached else None

    @property
    def speed_conditions(self) -> dict[str, object]:
        """What must be equal for images/s and memory to be comparable, beside the settings."""
        provenance, machine = self.config["provenance"], self.settings.machine
        return {
            "device": provenance.get("device"),
            "torch": (provenance.get("versions") or {}).get("torch"),
            "--grad_accumulation": machine.grad_accumulation,
            "--checkpoint_activations": machine.checkpoint_activations,
        }

    @cached_property
    def compared_settings(self) -> dict:
        """All that must be equal for a fair comparison, but the mask and the seed."""
        apart = MAY_DIFFER - {"num_registers"} | {"backend"}
        settings = self.settings.to_dict()
        compared = {key: settings[key] for key in settings if key not in apart}
        return compared | {"starting weights": self.start}

    @property
    def start(self) -> str:
        """The weights that it started from, the same for the same file wherever it lies."""
        about = self.config.get("weights")
        return f"{about['source']} {about['sha256'][:8]}" if about else "drawn"


# -------------------------------------------------------------------------------------------------
# Reading


def load_runs(results_path: Path) -> list[Run]:
    """All runs in and below `results_path`, sorted by path; other files and folders are ignored."""
    folders = sorted(path.parent for path in Path(results_path).rglob(utils.CONFIG))
    folders = [folder for folder in folders if re.fullmatch(r"seed_\d+", folder.resolve().name)]
    return [run for run in map(load_run, folders) if run is not None]


def load_run(folder: Path) -> Run | None:
    """The run in a folder; None if there is none, or, with a warning, if a file is unreadable."""
    try:
        run = Run.read(folder)
        if run is not None:
            _ = run.metrics, run.summary  # read both now, while the run can still be skipped
        return run
    except utils.UserError as error:
        utils.warn(f"skipped a run: {error}")
        return None
