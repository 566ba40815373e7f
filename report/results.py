"""Runs -> rows, one per attention pattern. Imports neither torch nor matplotlib.

A row has all runs that share a run name, one per seed. Accuracies are those of the FINAL epoch, in
percent; only finished runs count.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from masks import EDGES, MASK_TYPES, MAX_PATCHES, MaskSpec
from report.logs import Run
from training.run_record import number
from training.settings import default_run_name

GIB = 2**30


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
        return Spread.of(run.total_seconds for run in self.done)

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
        return self.runs[0].num_images_evaluated

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
        """(epoch, mean, lowest, highest) for each epoch, over the seeds that have reached it.

        With `over="seconds"`, x is the mean training time, and seeds are averaged at equal shares
        of their training: those that are given minutes do not end their epochs at the same time.
        Seeds that are not finished are left out there, unless none is.
        """
        if over == "seconds":
            return self._curve_over_time(metric)

        curves = [run.curve(metric) for run in self.runs]
        points = []
        for epoch in sorted(set().union(*curves)):
            values = [curve[epoch] for curve in curves if epoch in curve]
            points.append((epoch, statistics.fmean(values), min(values), max(values)))
        return points

    def _curve_over_time(self, metric: str) -> list[tuple[float, float, float, float]]:
        """Values between two epochs of a seed are read off the line from one to the other."""
        lines = []
        for run in self.done or self.runs:
            curve = run.curve(metric)
            line = [(run.share_done[n], run.clock[n], curve[n]) for n in run.clock if n in curve]
            if line:
                lines.append(tuple(zip(*line, strict=True)))
        if not lines:
            return []

        start = max(shares[0] for shares, _, _ in lines)
        end = min(shares[-1] for shares, _, _ in lines)
        shares = {share for shares, _, _ in lines for share in shares if start <= share <= end}

        points = []
        for share in sorted(shares):
            times = [np.interp(share, shares, seconds) for shares, seconds, _ in lines]
            values = [float(np.interp(share, shares, values)) for shares, _, values in lines]
            x = float(np.mean(times))
            points.append((x, statistics.fmean(values), min(values), max(values)))
        return points

    def seconds_to(self, accuracy: float) -> Spread | None:
        """Seconds trained until the end of the first epoch of at least this accuracy.

        Over the finished seeds that get there and wrote their times; None if there are none.
        """
        return Spread.of(run.seconds_to(accuracy) for run in self.done)


# -------------------------------------------------------------------------------------------------
# Comparing


def group_by_pattern(runs: Iterable[Run]) -> list[Row]:
    """One row per pattern, sorted by mask type (as in MASK_TYPES), family, step and name.

    Default run names come before custom ones.
    """
    groups = {}
    for run in runs:
        # The mask in a file is the same wherever the file lies.
        key = (run.settings.run.run_name, replace(run.mask, mask_file=None))
        groups.setdefault(key, []).append(run)

    rows = []
    for (run_name, _), members in groups.items():
        members.sort(key=lambda run: run.settings.optimization.seed)
        config = members[0].config
        row = Row(
            run_name=run_name,
            mask=members[0].mask,
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


def is_grid(value: object) -> bool:
    """Whether a config's `grid` is what main.py writes: rows and columns of patches."""
    are_two = isinstance(value, list) and len(value) == 2
    return are_two and all(type(side) is int and 0 < side <= MAX_PATCHES for side in value)
