"""The table of results, defined once: as Markdown and plain text, in the page, and as CSV.

Imports neither torch nor matplotlib.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

from report import comparison, statistics, text
from report.comparison import Study, format_interval, study
from report.results import GIB, Row, Spread
from training.settings import EVAL_SPLITS

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    text: str  # as it is read
    values: tuple[float | str | None, ...]  # one per CSV column; the first one sorts the table


@dataclass(frozen=True)
class Column:
    title: str
    csv_titles: tuple[str, ...]
    cell: Callable[[Row, Study], Cell]
    is_text: bool = False  # aligned left, sorted as text
    is_extra: bool = False  # only in the page and the CSV, where there is room


# -------------------------------------------------------------------------------------------------
# Cells


def _mask(row: Row, results: Study) -> Cell:
    label = row.label
    if row in results.same_as:
        label += f" (same mask as {results.same_as[row].label})"
    return Cell(label, (row.run_name, row.mask.mask_type, row.mask.expansion_step))


def _number(value: float | None, form: str, scale: float = 1.0) -> Cell:
    if value is None:
        return Cell(MISSING, (None,))
    return Cell(format(value / scale, form), (value,))


def _accuracy(row: Row, results: Study) -> Cell:
    accuracy, interval = row.accuracy, interval_of(row)
    if accuracy is None:
        return Cell(MISSING, (None, None, None, 0))
    bounds = interval or (None, None)
    return Cell(format_accuracy(row), (accuracy.mean, bounds[0], bounds[1], accuracy.n))


def interval_of(row: Row) -> statistics.Interval | None:
    """The 95 % interval of the mean accuracy over seeds; None where there is no telling."""
    accuracies = [run.eval_accuracy for run in row.done]
    return statistics.mean_interval([value for value in accuracies if value is not None])


def format_accuracy(row: Row) -> str:
    """`93.27 ± 0.41 (n = 3)`: mean ± half of the 95 % interval over seeds, in percent."""
    accuracy, interval = row.accuracy, interval_of(row)
    if accuracy is None:
        return MISSING
    half = "" if interval is None else f" ± {(interval.high - interval.low) / 2:.2f}"
    return f"{accuracy.mean:.2f}{half} (n = {accuracy.n})"


def _difference(row: Row, results: Study) -> Cell:
    found = results.against_full.get(row)
    if found is None:
        return Cell(MISSING, (None, None, None, 0))
    accuracies = found.accuracies
    bounds = accuracies.interval or (None, None)
    values = (accuracies.mean, bounds[0], bounds[1], accuracies.n)
    return Cell(format_difference(accuracies), values)


def format_difference(found: statistics.Comparison | None) -> str:
    """`+1.20 (+0.35 to +2.05)`: mean and 95 % interval, in percentage points."""
    if found is None:
        return MISSING
    if found.interval is None:
        return f"{found.mean:+.2f} (n = {found.n})"
    return f"{found.mean:+.2f} ({format_interval(found.interval)})"


def _p(row: Row, results: Study) -> Cell:
    found = results.against_full.get(row)
    p = None if found is None else found.p_holm
    return Cell(format_p(p), (p,))


def format_p(p: float | None) -> str:
    return MISSING if p is None else comparison.format_p(p)


def _throughput(row: Row, results: Study) -> Cell:
    rate = row.throughput
    if rate is None:
        return Cell(MISSING, (None,))
    return _number(rate.mean, ",.0f" if rate.mean >= 100 else ",.1f")


def _seconds(row: Row, results: Study) -> Cell:
    return format_seconds(row.train_seconds)


def format_seconds(seconds: Spread | None) -> Cell:
    """`12.3 min`, of the mean."""
    if seconds is None:
        return Cell(MISSING, (None,))
    mean = seconds.mean
    if mean < 120:
        words = f"{mean:.0f} s"
    elif mean < 7200:
        words = f"{mean / 60:.1f} min"
    else:
        words = f"{mean / 3600:.1f} h"
    return Cell(words, (mean,))


COLUMNS = (
    Column("mask", ("run_name", "mask_type", "expansion_step"), _mask, is_text=True),
    Column(
        "neighbors, nominal",
        ("neighbors_nominal",),
        lambda row, _: _number(row.num_neighbors_nominal, ".0f"),
    ),
    Column(
        "neighbors, mean",
        ("neighbors_mean",),
        lambda row, _: _number(row.num_neighbors_mean, ".1f"),
    ),
    Column(
        "density, %",
        ("density",),
        lambda row, _: _number(row.density, ".1f", 0.01),
        is_extra=True,
    ),
    Column(
        "attention, MFLOPs",
        ("attention_flops",),
        lambda row, _: _number(row.attention_flops, ",.1f", 1e6),
        is_extra=True,
    ),
    Column(
        "final accuracy, %",
        ("accuracy_percent", "accuracy_low", "accuracy_high", "n"),
        _accuracy,
    ),
    Column(
        "difference to full, points",
        ("difference_points", "difference_low", "difference_high", "pairs"),
        _difference,
    ),
    Column("p", ("p_holm",), _p),
    Column("images/s", ("train_images_per_second",), _throughput),
    Column("time to train", ("train_seconds",), _seconds, is_extra=True),
    Column(
        "peak memory, GiB",
        ("peak_memory_bytes",),
        lambda row, _: _number(row.peak_memory_bytes, ".2f", GIB),
    ),
    Column("state", ("state",), lambda row, _: Cell(row.state, (row.state,)), is_text=True),
)


def titles(rows: list[Row], columns: tuple[Column, ...]) -> list[str]:
    """The header. Unless all accuracies are of test images, it says what they are of."""
    splits = dict.fromkeys(row.eval_split for row in rows)
    note = ""
    if list(splits) != ["test"]:
        note = f" on {' or '.join(EVAL_SPLITS[split] for split in splits)}"
    return [column.title + (note if column.cell is _accuracy else "") for column in columns]


# -------------------------------------------------------------------------------------------------
# Formats


def format_table(results: Study) -> str:
    """A Markdown table that also reads well as plain text."""
    columns = tuple(column for column in COLUMNS if not column.is_extra)
    cells = [titles(results.rows, columns)]
    for row in results.rows:
        cells.append([text.markdown(column.cell(row, results).text) for column in columns])
    # Markdown wants at least one dash beside the colon of a column that is aligned right.
    widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]

    lines = []
    for line in cells:
        aligned = []
        for column, cell, width in zip(columns, line, widths, strict=True):
            aligned.append(cell.ljust(width) if column.is_text else cell.rjust(width))
        lines.append(" | ".join(aligned))

    rules = []
    for column, width in zip(columns, widths, strict=True):
        rules.append("-" * width if column.is_text else "-" * (width - 1) + ":")
    lines.insert(1, " | ".join(rules))
    return "\n".join(f"| {line} |" for line in lines)


def format_csv(results: Study) -> str:
    """All columns, with numbers as they were measured; an empty field where there is none."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([title for column in COLUMNS for title in column.csv_titles])
    for row in results.rows:
        cells = [column.cell(row, results) for column in COLUMNS]
        writer.writerow([_csv_value(value) for cell in cells for value in cell.values])
    return written.getvalue()


def _csv_value(value: float | str | None) -> float | str | None:
    """Names that a spreadsheet would take for a formula get a quote in front of them."""
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
    return f"'{text.one_line(value)}" if is_formula else value


def rows_as_table(rows: list[Row]) -> str:
    """`format_table` of rows that have not been compared yet."""
    return format_table(study(rows))
