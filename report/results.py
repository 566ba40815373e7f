"""Turn runs on disk into rows and tables. Imports neither torch nor matplotlib.

A run is a folder `<run_name>/seed_<n>/` with config.json, metrics.jsonl and, once it is done,
summary.json. A row is one attention pattern: all runs that share a run name, one per seed.
Accuracies are those of the FINAL epoch, in percent; only finished runs count. A number that a run
did not write stays missing (None) and never becomes 0.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import utils
from masks import EDGES, MASK_TYPES, MAX_PATCHES, MaskSpec
from report import text
from training.run_record import RunRecord, number
from training.settings import MAY_CHANGE, default_run_name

GIB = 2**30

# How much better a model is on what it trains on: in points, in nats.
GAPS = ("gap_accuracy", "gap_loss")

# Settings in which the runs of a sweep are meant to differ, and settings that say where a run
# computes, not what. The device is compared by its name, which is in the provenance.
OF_THE_MASK = {field.name for field in fields(MaskSpec)}
MAY_DIFFER = {*OF_THE_MASK, "num_registers", "run_name", "seed", *MAY_CHANGE}


@dataclass(frozen=True)
class Run(RunRecord):
    """A run folder whose files could all be read."""

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
        return None if self.summary is None else number(self.summary, "train_images_per_second")

    @cached_property
    def clock(self) -> dict[int, float]:
        """Epoch -> seconds from the start to its end, as far as all epochs before have a time."""
        seconds = self.curve("epoch_seconds")
        clock, passed = {}, 0.0
        for epoch in range(1, len(self.metrics) + 1):
            if epoch not in seconds:
                break
            passed += seconds[epoch]
            clock[epoch] = passed
        return clock

    def seconds_to(self, accuracy: float) -> float | None:
        """Time from the start to the end of the first epoch of at least this accuracy."""
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
        return {key: settings[key] for key in settings if key not in apart}


@dataclass(frozen=True)
class Spread:
    """Mean of `n` values and their sample standard deviation (ddof = 1; None for one value)."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the values that are not None; None if there are none."""
        values = [value for value in values if value is not None]
        if not values:
            return None

        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))


@dataclass(frozen=True, eq=False)
class Row:
    """The runs of one attention pattern."""

    run_name: str
    mask: MaskSpec
    num_neighbors_nominal: int  # of a patch far from every border, itself included
    num_neighbors_mean: float  # over all patches of the grid
    num_parameters: int | None
    runs: tuple[Run, ...]  # by seed, finished or not
    # This is number `variant` of `num_variants` rows of one family, which decides its style, and
    # that is number `place` of `num_families` of its mask type.
    variant: int = 0
    num_variants: int = 1
    place: int = 0
    num_families: int = 1

    @property
    def num_registers(self) -> int:
        return self.runs[0].settings.model.num_registers or 0

    @property
    def is_named_by_default(self) -> bool:
        return self.run_name == default_run_name(self.mask, self.num_registers)

    @property
    def mask_label(self) -> str:
        """`2d_cardinal, step 2`, with the registers that reach beyond it."""
        return self.mask.label + self._and_registers

    @property
    def family(self) -> str:
        """The same of all rows that differ in the expansion step or the run name only."""
        return self.mask.family + self._and_registers

    @property
    def _and_registers(self) -> str:
        plural = "s" if self.num_registers > 1 else ""
        return f", {self.num_registers} register{plural}" if self.num_registers else ""

    @property
    def label(self) -> str:
        if self.is_named_by_default:
            return self.mask_label
        return f"{self.run_name} ({self.mask_label})"

    @property
    def short_label(self) -> str:
        """The label among rows of the same family."""
        if not self.is_named_by_default:
            return self.run_name
        step = self.mask.expansion_step
        return self.mask_label if step is None else f"step {step}"

    @property
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.state == "done"]

    @property
    def eval_split(self) -> str:
        """What the accuracies are of, see `settings.EVAL_SPLITS`."""
        return self.runs[0].settings.data.eval_split

    @property
    def accuracy(self) -> Spread | None:
        """Accuracy after the final epoch, on the images of `eval_split`, in percent."""
        return Spread.of(run.eval_accuracy for run in self.done)

    @property
    def throughput(self) -> Spread | None:
        """Training images per second, without the first epoch."""
        return Spread.of(run.images_per_second for run in self.done)

    @property
    def train_seconds(self) -> Spread | None:
        """Of a whole run, with its evaluations; without loading data or choosing a backend."""
        return Spread.of(number(run.summary, "total_seconds") for run in self.done)

    @property
    def density(self) -> float | None:
        """Share of the pairs of patches that the mask allows."""
        num_patches = number(self.runs[0].config["attention"], "num_patches")
        return None if not num_patches else self.num_neighbors_mean / num_patches

    @property
    def attention_flops(self) -> float | None:
        """FLOPs of scores and weighted sums over the allowed pairs, per image and forward."""
        about = self.runs[0].config["attention"]
        share = number(about, "attention_share_of_flops")
        total = number(about, "forward_flops_per_image")
        return None if share is None or total is None else share * total

    @property
    def num_images_evaluated(self) -> int | None:
        key = {"test": "num_test", "holdout": "num_held_out"}[self.eval_split]
        return number(self.runs[0].config["data"], key)

    @property
    def peak_memory_bytes(self) -> float | None:
        """The highest of all finished runs."""
        peaks = [number(run.summary, "peak_memory_bytes") for run in self.done]
        return max(filter(None, peaks), default=None)

    @property
    def state(self) -> str:
        """How many runs are done, and whether a sweep split their batches to save memory."""
        if len(self.done) == len(self.runs):
            state = "done"
        else:
            state = f"{len(self.done)} of {len(self.runs)} done"

        accumulation = [run.settings.machine.grad_accumulation for run in self.runs]
        parts = max((value for value in accumulation if isinstance(value, int)), default=1)
        return f"{state}, batches in {parts} parts" if parts > 1 else state

    def curve(self, metric: str, over: str = "epoch") -> list[tuple[float, float, float, float]]:
        """(x, mean, lowest, highest) for each epoch, over the seeds that have reached it.

        x is the epoch, or with `over="seconds"` the mean time from the start to its end. As that
        may run backwards where the seeds become fewer, such a curve ends before, and seeds without
        times are left out.
        """
        runs = [run for run in self.runs if over == "epoch" or run.clock]
        curves = [run.curve(metric) for run in runs]

        points = []
        for epoch in sorted(set().union(*curves)):
            values = [curve[epoch] for curve in curves if epoch in curve]
            x = epoch
            if over == "seconds":
                times = [run.clock[epoch] for run in runs if epoch in run.clock]
                if len(times) < len(runs) or len(values) < len(runs):
                    break
                x = statistics.fmean(times)
            points.append((x, statistics.fmean(values), min(values), max(values)))
        return points

    def seconds_to(self, accuracy: float) -> Spread | None:
        """Time from the start to the end of the first epoch of at least this accuracy.

        Over the finished seeds that get there and wrote their times; None if there are none.
        """
        return Spread.of(run.seconds_to(accuracy) for run in self.done)


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


def is_grid(value: object) -> bool:
    """Whether a config's `grid` is what main.py writes: rows and columns of patches."""
    are_two = isinstance(value, list) and len(value) == 2
    return are_two and all(type(side) is int and 0 < side <= MAX_PATCHES for side in value)


# -------------------------------------------------------------------------------------------------
# Comparing


def group_by_pattern(runs: Iterable[Run]) -> list[Row]:
    """One row per pattern, sorted by mask type (as in MASK_TYPES), family, step and name.

    Default run names come before custom ones.
    """
    groups = {}
    for run in runs:
        key = (run.settings.run.run_name, run.mask)
        groups.setdefault(key, []).append(run)

    rows = []
    for (run_name, mask), members in groups.items():
        members.sort(key=lambda run: run.settings.optimization.seed)
        config = members[0].config
        row = Row(
            run_name=run_name,
            mask=mask,
            num_neighbors_nominal=config["attention"]["num_neighbors_nominal"],
            num_neighbors_mean=config["attention"]["num_neighbors_mean"],
            num_parameters=number(config, "num_parameters"),
            runs=tuple(members),
        )
        rows.append(row)
    return _number_variants(sorted(rows, key=_natural_order))


def _number_variants(rows: list[Row]) -> list[Row]:
    members, families = {}, {}
    for row in rows:
        members.setdefault(row.family, []).append(row)
        families.setdefault(row.mask.mask_type, {})[row.family] = None
    return [
        replace(
            row,
            variant=members[row.family].index(row),
            num_variants=len(members[row.family]),
            place=list(families[row.mask.mask_type]).index(row.family),
            num_families=len(families[row.mask.mask_type]),
        )
        for row in rows
    ]


def _natural_order(row: Row) -> tuple:
    mask = row.mask
    known = mask.mask_type in MASK_TYPES
    position = MASK_TYPES.index(mask.mask_type) if known else len(MASK_TYPES)
    family = (mask.dilation, mask.edge != EDGES[0], mask.global_layers, mask.mask_seed)
    return (
        position,
        mask.mask_type,
        row.num_registers,
        *map(_sortable, family),
        row.family,
        mask.expansion_step or 0,
        not row.is_named_by_default,
        row.run_name,
    )


def _sortable(value: object) -> tuple:
    """A key by which values of damaged logs can be compared too."""
    return (False, value) if isinstance(value, (int, tuple)) else (True, str(value))
