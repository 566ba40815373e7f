"""Reports of benchmark.py, read again for the page of results. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import utils
from benchmarks import charts
from report import text
from report.plots import Plot

SECTION = "Speed measured on its own"
LEVELS = ("attention", "model")  # that have one row per mask and grid
SPEEDUP = (
    " Above one, local attention is faster; the ceiling is what saving arithmetic alone can give."
)
TITLES = {"speedup": "Speed against full attention", "time": "Time against patches"}


def read(path: Path) -> dict:
    """A report with plots. Raises UserError for any other file."""
    report = utils.read_json(path)
    expected = "a report as benchmark.py writes it with --level attention or model"
    if not isinstance(report, dict) or report.get("level") not in LEVELS:
        raise utils.UserError(f"{path} is not {expected}")
    if not isinstance(report.get("rows"), list) or not report["rows"]:
        raise utils.UserError(f"{path} has no rows; expected {expected}")
    return report


def plots(paths: Sequence[Path]) -> dict[str, Plot]:
    """Speed and time of each report, by file name without suffix.

    Raises UsageError if two reports have one name, which their plots would share.
    """
    chosen = {}
    for path in paths:
        report = read(path)
        drawings = charts.drawings(report)
        for kind, title in TITLES.items():
            name = f"{re.sub(r'[^A-Za-z0-9-]+', '_', path.stem)}_{kind}"
            if name in chosen:
                raise utils.UsageError(f"two files of --benchmark are called {path.name}")
            heading = f"{title} ({text.one_line(path.stem)})"
            caption = describe(report) + (SPEEDUP if kind == "speedup" else "")
            chosen[name] = Plot(SECTION, heading, caption, drawings[kind])
    return chosen


def describe(report: dict) -> str:
    """What was measured, how often, where: a caption."""
    provenance = report.get("provenance") or {}
    torch = (provenance.get("versions") or {}).get("torch", "unknown")
    settings = report.get("settings") or {}
    return text.one_line(
        f"Median and quartiles of n = {settings.get('rounds', 'unknown')} rounds, "
        f"{settings.get('dtype', '')}: {report.get('protocol', 'protocol unknown')}. "
        f"{provenance.get('device', 'Device unknown')}; torch {torch}."
    )
