"""Turn runs on disk into rows and tables. Imports neither torch nor matplotlib.

A run is a folder `<run_name>/seed_<n>/` with config.json, metrics.jsonl and, once it is done,
summary.json. A row is one attention pattern: all runs that share a run name, one per seed.
Accuracies are those of the FINAL epoch, in percent; only finished runs count. A number that a run
did not write stays missing (None) and never becomes 0.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import utils
from masks import MASK_TYPES, MaskSpec
from report import text
from training.run_record import RunRecord, number
from training.settings import EVAL_SPLITS, FLAGS, MAY_CHANGE

GIB = 2**30

# Settings in which the runs of a sweep are meant to differ, and settings that say where a run
# computes, not what. The device is compared by its name, which is in the provenance.
MAY_DIFFER = {"mask_type", "expansion_step", "run_name", "seed", *MAY_CHANGE}


@dataclass(frozen=True)
class Run(RunRecord):
    """A run folder whose files could all be read."""

    @property
    def name(self) -> str:
        """The run's name in messages."""
        return f"{text.one_line(self.settings.run.run_name)} seed {self.settings.optimization.seed}"


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

    @property
    def is_named_by_default(self) -> bool:
        return self.run_name == self.mask.run_name

    @property
    def label(self) -> str:
        if self.is_named_by_default:
            return self.mask.label
        return f"{self.run_name} ({self.mask.label})"

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
    def eval_split(self) -> str:
        """What the accuracies are of, see `settings.EVAL_SPLITS`."""
        return self.runs[0].settings.data.eval_split

    @property
    def accuracy(self) -> Spread | None:
        """Accuracy after the final epoch, on the images of `eval_split`, in percent."""
        return Spread.of(number(run.summary["final"], "eval_accuracy") for run in self.done)

    @property
    def throughput(self) -> Spread | None:
        """Training images per second, without the first epoch."""
        return Spread.of(number(run.summary, "train_images_per_second") for run in self.done)

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

    def curve(self, metric: str) -> list[tuple[int, float, float, float]]:
        """(epoch, mean, lowest, highest) over the seeds that have reached that epoch."""
        curves = [run.curve(metric) for run in self.runs]

        points = []
        for epoch in sorted(set().union(*curves)):
            values = [curve[epoch] for curve in curves if epoch in curve]
            points.append((epoch, statistics.fmean(values), min(values), max(values)))
        return points


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


# -------------------------------------------------------------------------------------------------
# Comparing


def group_by_pattern(runs: Iterable[Run]) -> list[Row]:
    """One row per pattern, sorted by mask type (as in MASK_TYPES), step and name.

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
    return sorted(rows, key=_natural_order)


def _natural_order(row: Row) -> tuple:
    mask_type = row.mask.mask_type
    known = mask_type in MASK_TYPES
    position = MASK_TYPES.index(mask_type) if known else len(MASK_TYPES)
    step = row.mask.expansion_step or 0
    return position, mask_type, step, not row.is_named_by_default, row.run_name


def group_by_data(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs grouped by dataset, in the order in which the datasets first appear."""
    groups = []
    for run in runs:
        for group in groups:
            if all(is_same_data(run, other) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def is_same_data(run: Run, other: Run) -> bool:
    """Whether two runs used the same data, and were evaluated on the same images of it.

    Compares the names and sizes of the files if both runs recorded them, else the labels and the
    checksums of the decoded pixels.
    """
    if run.settings.data.dataset != other.settings.data.dataset:
        return False
    if run.settings.data.holdout != other.settings.data.holdout:
        return False

    here = run.config["data"]
    there = other.config["data"]
    if here.get("files") is not None and there.get("files") is not None:
        return here["files"] == there["files"]
    if here["label"] != there["label"]:
        return False

    checksums = (here.get("checksum"), there.get("checksum"))
    comparable = None not in checksums and here.get("image_shape") == there.get("image_shape")
    return not comparable or checksums[0] == checksums[1]


def differing_settings(runs: list[Run]) -> list[str]:
    """One sentence for each difference that keeps the runs of a table from comparing cleanly."""
    compared = {}
    for key in FLAGS:
        if key not in MAY_DIFFER:
            compared[f"--{key}"] = lambda run, key=key: run.settings.to_dict()[key]
    for key in ("label", "num_train", "num_test", "num_classes"):
        compared[f"data {key}"] = lambda run, key=key: run.config["data"].get(key, "missing")

    speed_only = {
        "device": lambda run: run.config["provenance"].get("device"),
        "torch": lambda run: (run.config["provenance"].get("versions") or {}).get("torch"),
        "--grad_accumulation": lambda run: run.settings.machine.grad_accumulation,
        "--checkpoint_activations": lambda run: run.settings.machine.checkpoint_activations,
    }

    notes = []
    for name, values in _differing(runs, compared):
        notes.append(f"{name} differs between the runs: {values}")
    for name, values in _differing(runs, speed_only):
        consequence = "so images/s and peak memory are not comparable"
        notes.append(f"{name} differs between the runs, {consequence}: {values}")
    return notes


def _differing(
    runs: list[Run], compared: dict[str, Callable[[Run], object]]
) -> Iterator[tuple[str, str]]:
    """(name, values and the runs that have them) of whatever is not the same in all runs."""
    for name, value_of in compared.items():
        run_names_by_value = {}
        for run in runs:
            run_names_by_value.setdefault(str(value_of(run)), []).append(run.name)
        if len(run_names_by_value) < 2:
            continue

        described = []
        for value, run_names in run_names_by_value.items():
            few = len(run_names) <= 3
            which = ", ".join(run_names) if few else f"{len(run_names)} runs"
            described.append(f"{value} ({which})")
        yield name, "; ".join(described)


# -------------------------------------------------------------------------------------------------
# The table

ACCURACY = "final accuracy, %"
HEADER = (
    "mask",
    "neighbors, nominal",
    "neighbors, mean",
    ACCURACY,
    "images/s",
    "peak memory, GiB",
    "state",
)
TEXT_COLUMNS = (0, len(HEADER) - 1)  # aligned left; columns of numbers are aligned right
MISSING = "–"


def format_table(rows: list[Row]) -> str:
    """The rows as a Markdown table that also reads well as plain text.

    Unless all accuracies are of test images, the header says what they are of.
    """
    header = list(HEADER)
    header[HEADER.index(ACCURACY)] += _note_on_splits(rows)
    cells = [header, *map(_cells_of, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    lines = []
    for line in cells:
        aligned = []
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            aligned.append(cell.ljust(width) if column in TEXT_COLUMNS else cell.rjust(width))
        lines.append(" | ".join(aligned))

    rules = []
    for column, width in enumerate(widths):
        rules.append("-" * width if column in TEXT_COLUMNS else "-" * (width - 1) + ":")
    lines.insert(1, " | ".join(rules))
    return "\n".join(f"| {line} |" for line in lines)


def _note_on_splits(rows: list[Row]) -> str:
    """` on held-out training images`, or nothing where all rows are of test images."""
    splits = dict.fromkeys(row.eval_split for row in rows)
    if list(splits) == ["test"]:
        return ""
    return f" on {' or '.join(EVAL_SPLITS[split] for split in splits)}"


def _cells_of(row: Row) -> tuple[str, ...]:
    memory = row.peak_memory_bytes
    return (
        text.markdown(row.label),
        str(row.num_neighbors_nominal),
        f"{row.num_neighbors_mean:.1f}",
        format_accuracy(row.accuracy),
        _format_throughput(row.throughput),
        MISSING if memory is None else f"{memory / GIB:.2f}",
        row.state,
    )


def format_accuracy(accuracy: Spread | None) -> str:
    """`93.27 ± 0.41 (n = 3)`: mean ± sample standard deviation over seeds, in percent."""
    if accuracy is None:
        return MISSING
    deviation = "" if accuracy.std is None else f" ± {accuracy.std:.2f}"
    return f"{accuracy.mean:.2f}{deviation} (n = {accuracy.n})"


def _format_throughput(throughput: Spread | None) -> str:
    if throughput is None:
        return MISSING
    decimals = 0 if throughput.mean >= 100 else 1
    return f"{throughput.mean:,.{decimals}f}"
