"""Reports of benchmark.py, read again for the page of results. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import utils
from benchmarks import charts
from report import text
from report.plots import Plot
from training.run_record import number

SECTION = "Speed measured on its own"
LEVELS = ("attention", "model")  # that have one row per mask and grid
SPEEDUP = (
    " Above one, local attention is faster; the ceiling is what saving arithmetic alone can give."
)
# What the plots read of a row.
ROW = {
    "mask_type": str,
    "expansion_step": (int, type(None)),
    "backend": str,
    "num_patches": int,
    "num_sequences": int,
    "milliseconds": dict,
    "speedup": dict,
    "ceiling": (int, float),
}
QUARTILES = ("median", "q1", "q3")
TITLES = {"speedup": "Speed against full attention", "time": "Time against patches"}


def read(path: Path) -> dict:
    """A report with plots. Raises UserError for any other file."""
    report = utils.read_json(path)
    expected = "a report as benchmark.py writes it with --level attention or model"
    level, settings = report.get("level"), report.get("settings")
    if level not in list(LEVELS):
        raise utils.UserError(f"{path} is not {expected}")
    if not isinstance(report.get("rows"), list) or not report["rows"]:
        raise utils.UserError(f"{path} has no rows; expected {expected}")

    is_named = level == "attention" or isinstance(_section(report, "settings").get("model"), str)
    if not isinstance(settings, dict) or not is_named:
        raise utils.UserError(f"{path} is not {expected}")
    for line, row in enumerate(report["rows"], start=1):
        trouble = _trouble_with(row)
        if trouble:
            raise utils.UserError(
                f"{path}: row {line} has no usable {trouble}; expected {expected}"
            )
    return report


def _trouble_with(row: object) -> str | None:
    """The first key that the plots could not use; None if all are fine."""
    if not isinstance(row, dict):
        return "keys"
    for key, kind in ROW.items():
        value = row.get(key, ...)
        if not isinstance(value, kind):
            return key
        if kind is dict and any(not number(value, name) for name in QUARTILES):
            return key
    return None


def plots(paths: Sequence[Path]) -> dict[str, Plot]:
    """Speed and time of each report, by file name without suffix.

    Raises UsageError if two reports have one name, which their plots would share.
    """
    chosen = {}
    for path in paths:
        report = read(path)
        drawings = charts.drawings(report)
        for kind, title in TITLES.items():
            name = f"{path.stem}_{kind}"
            if name in chosen:
                raise utils.UsageError(f"two files of --benchmark are called {path.name}")
            heading = f"{title} ({text.one_line(path.stem)})"
            caption = describe(report) + (SPEEDUP if kind == "speedup" else "")
            chosen[name] = Plot(SECTION, heading, caption, drawings[kind])
    return chosen


def describe(report: dict) -> str:
    """What was measured, how often, where: a caption."""
    provenance = _section(report, "provenance")
    torch = _section(provenance, "versions").get("torch", "unknown")
    settings = report["settings"]
    return text.one_line(
        f"Median and quartiles of n = {settings.get('rounds', 'unknown')} rounds, "
        f"{settings.get('dtype', '')}: {report.get('protocol', 'protocol unknown')}. "
        f"{provenance.get('device', 'Device unknown')}; torch {torch}."
    )


def _section(values: dict, key: str) -> dict:
    section = values.get(key)
    return section if isinstance(section, dict) else {}
