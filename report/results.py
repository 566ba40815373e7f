"""Runs on disk to rows and tables. Imports neither torch nor matplotlib.

A run is a folder `<run_name>/seed_<n>/` with config.json, metrics.jsonl and, once it is done, summary.json. A row is
one attention pattern: all the runs, one a seed, that share a run name. Accuracies are those of the FINAL epoch, in
percent; only finished runs count. A number that a run did not write stays missing (None), it is never 0.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import utils
from masks import MASK_TYPES, MaskSpec
from report import text
from training.run_record import RunRecord, number
from training.settings import MAY_CHANGE

GIB = 2**30
# What the runs of a sweep are meant to differ in, and settings that say where a run is, not what it computes. The
# device is compared by its name, in the provenance.
MAY_DIFFER = {"mask_type", "expansion_step", "run_name", "seed", *MAY_CHANGE}


@dataclass(frozen=True)
class Run(RunRecord):
    """One run folder that could be read, whole."""

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{text.one_line(self.settings['run_name'])} seed {self.settings['seed']}"


@dataclass(frozen=True)
class Spread:
    """Mean of `n` values and their sample standard deviation (ddof = 1), None with a single value."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None where all values are missing."""
        values = [value for value in values if value is not None]
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True, eq=False)
class Row:
    """The runs of one attention pattern."""

    run_name: str
    mask: MaskSpec
    num_neighbors_nominal: int  # of a patch far from every border, itself included
    num_neighbors_mean: float  # over all patches of the grid
    num_parameters: int | None
    runs: tuple[Run, ...]  # by seed, finished or not

    @property
    def is_named_by_default(self) -> bool:
        return self.run_name == self.mask.run_name

    @property
    def label(self) -> str:
        return self.mask.label if self.is_named_by_default else f"{self.run_name} ({self.mask.label})"

    @property
    def short_label(self) -> str:
        """The label among rows of the same mask type."""
        if not self.is_named_by_default:
            return self.run_name
        step = self.mask.expansion_step
        return self.mask.label if step is None else f"step {step}"

    @property
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.state == "done"]

    @property
    def accuracy(self) -> Spread | None:
        """Of the final epoch, in percent."""
        return Spread.of(number(run.summary["final"], "eval_accuracy") for run in self.done)

    @property
    def throughput(self) -> Spread | None:
        """Training images a second, without the first epoch."""
        return Spread.of(number(run.summary, "train_images_per_second") for run in self.done)

    @property
    def peak_memory_bytes(self) -> float | None:
        """The highest of all finished runs."""
        return max(filter(None, (number(run.summary, "peak_memory_bytes") for run in self.done)), default=None)

    @property
    def state(self) -> str:
        """How many runs are done, and whether one went through its batches in parts: the sweep's way to save memory."""
        done = "done" if len(self.done) == len(self.runs) else f"{len(self.done)} of {len(self.runs)} done"
        numbers = [run.settings.get("grad_accumulation") for run in self.runs]
        parts = max((number for number in numbers if isinstance(number, int)), default=1)
        return f"{done}, batches in {parts} parts" if parts > 1 else done

    def curve(self, metric: str) -> list[tuple[int, float, float, float]]:
        """(epoch, mean, lowest, highest) over the seeds that have got to that epoch."""
        curves = [run.curve(metric) for run in self.runs]
        points = []
        for epoch in sorted(set().union(*curves)):
            values = [curve[epoch] for curve in curves if epoch in curve]
            points.append((epoch, statistics.fmean(values), min(values), max(values)))
        return points


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_runs(results_path: Path) -> list[Run]:
    """All runs in `results_path` and below, in order of their paths; other files and folders are passed over."""
    folders = sorted(path.parent for path in Path(results_path).rglob(utils.CONFIG))
    folders = [folder for folder in folders if re.fullmatch(r"seed_\d+", folder.resolve().name)]
    return [run for run in map(load_run, folders) if run is not None]


def load_run(folder: Path) -> Run | None:
    """The run in a folder; None where there is none, and, with a warning, where any of it cannot be read."""
    try:
        run = Run.read(folder)
        if run is not None:
            _ = run.metrics, run.summary  # now, where it can still be skipped
        return run
    except utils.UserError as error:
        utils.warn(f"skipped a run: {error}")
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def group_by_pattern(runs: Iterable[Run]) -> list[Row]:
    """One row per pattern: `full` first, then as in MASK_TYPES, by growing step; your own names after the default."""
    groups = {}
    for run in runs:
        settings = run.settings
        key = (settings["run_name"], run.mask)
        groups.setdefault(key, []).append(run)
    rows = []
    for (run_name, mask), members in groups.items():
        members.sort(key=lambda run: run.settings["seed"])
        config = members[0].config
        rows.append(
            Row(
                run_name=run_name,
                mask=mask,
                num_neighbors_nominal=config["attention"]["num_neighbors_nominal"],
                num_neighbors_mean=config["attention"]["num_neighbors_mean"],
                num_parameters=number(config, "num_parameters"),
                runs=tuple(members),
            )
        )
    return sorted(rows, key=_natural_order)


def _natural_order(row: Row) -> tuple:
    mask = row.mask
    position = MASK_TYPES.index(mask.mask_type) if mask.mask_type in MASK_TYPES else len(MASK_TYPES)
    return position, mask.mask_type, mask.expansion_step or 0, not row.is_named_by_default, row.run_name


def group_by_data(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs of each dataset together, in the order of their first ones."""
    groups = []
    for run in runs:
        group = next((group for group in groups if all(is_same_data(run, other) for other in group)), None)
        if group is None:
            groups.append(group := [])
        group.append(run)
    return groups


def is_same_data(run: Run, other: Run) -> bool:
    """By the names and sizes of files, wherever both runs noted them; else by the label, and by the pixels as read."""
    if run.settings["dataset"] != other.settings["dataset"]:
        return False
    here, there = run.config["data"], other.config["data"]
    if here.get("files") is not None and there.get("files") is not None:
        return here["files"] == there["files"]
    sums = [data["checksum"] for data in (here, there) if data.get("checksum") is not None]
    comparable = len(sums) == 2 and here.get("image_shape") == there.get("image_shape")
    return here["label"] == there["label"] and not (comparable and sums[0] != sums[1])


def differing_settings(runs: list[Run]) -> list[str]:
    """A sentence for everything that makes the runs of one table no clean comparison; [] where they are one."""
    settings = dict.fromkeys(key for run in runs for key in run.settings if key not in MAY_DIFFER)
    compared = {f"--{key}": lambda run, key=key: run.settings.get(key, "missing") for key in settings}
    compared |= {
        f"data {key}": lambda run, key=key: run.config["data"].get(key, "missing")
        for key in ("label", "num_train", "num_test", "num_classes")
    }
    machines = {
        "device": lambda run: run.config["provenance"].get("device"),
        "torch": lambda run: (run.config["provenance"].get("versions") or {}).get("torch"),
        "--grad_accumulation": lambda run: run.settings.get("grad_accumulation", 1),
        "--checkpoint_activations": lambda run: run.settings.get("checkpoint_activations", False),
    }
    notes = [f"{name} differs between the runs: {values}" for name, values in _differing(runs, compared)]
    return notes + [
        f"{name} differs between the runs, so that images/s and peak memory do not compare: {values}"
        for name, values in _differing(runs, machines)
    ]


def _differing(runs: list[Run], compared: dict[str, Callable[[Run], object]]) -> Iterable[tuple[str, str]]:
    for name, value_of in compared.items():
        names_by_value = {}
        for run in runs:
            names_by_value.setdefault(str(value_of(run)), []).append(run.name)
        if len(names_by_value) > 1:
            yield (
                name,
                "; ".join(
                    f"{value} ({', '.join(names) if len(names) <= 3 else f'{len(names)} runs'})"
                    for value, names in names_by_value.items()
                ),
            )


# ---------------------------------------------------------------------------------------------------------------------
# The table


def format_table(rows: list[Row]) -> str:
    """The rows as a Markdown table that also reads well as plain text; `–` where a number is missing."""
    header = ["mask", "neighbors, nominal", "neighbors, mean", "final accuracy, %", "images/s", "peak memory, GiB"]
    cells = [[*header, "state"]]
    for row in rows:
        memory = row.peak_memory_bytes
        cells.append(
            [
                text.markdown(row.label),
                str(row.num_neighbors_nominal),
                f"{row.num_neighbors_mean:.1f}",
                format_accuracy(row.accuracy),
                "–" if row.throughput is None else f"{row.throughput.mean:,.{0 if row.throughput.mean >= 100 else 1}f}",
                "–" if memory is None else f"{memory / GIB:.2f}",
                row.state,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = (0, len(widths) - 1)  # the columns of words are aligned left, those of numbers right
    lines = [
        " | ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    rule = " | ".join("-" * width if i in words else "-" * (width - 1) + ":" for i, width in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def format_accuracy(accuracy: Spread | None) -> str:
    """`93.27 ± 0.41 (n = 3)`: mean ± sample standard deviation over seeds, in percent."""
    if accuracy is None:
        return "–"
    deviation = "" if accuracy.std is None else f" ± {accuracy.std:.2f}"
    return f"{accuracy.mean:.2f}{deviation} (n = {accuracy.n})"
