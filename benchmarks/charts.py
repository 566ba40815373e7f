"""Plots of benchmark.py: time against patches, speedup against its ceiling, peak memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By backend; all others are dashed.
LINE_STYLES = {
    "full SDPA": "-",
    "timm": ":",
    "dense": ":",
    "diagonal": "-",
    "flex": "-.",
    "local-attention": (0, (5, 1, 1, 1)),
}
OTHER_LINE_STYLE = "--"
CEILING_LINE_STYLE = (0, (1, 3))
PANELS_PER_ROW = 2

# (median, lower quartile, upper quartile) of a row, or None if it was not measured.
ValueOf = Callable[[dict], tuple[float, float, float] | None]


def drawings(report: dict) -> dict[str, Callable[[], Figure]]:
    """Functions that draw the `time`, `speedup` and `memory` of a report by benchmark.py."""
    if report["level"] == "attention":
        subject = "attention"
        unit = "per head and image"
    else:
        subject = report["settings"]["model"]
        unit = "per image"

    time_label = f"time of {subject}, forward + backward, {unit} (ms)"
    speed_label = f"speed of {subject}, × full attention"
    memory_label = f"peak memory of {subject}, {unit} (MiB)"
    draw = functools.partial(_draw, report)
    return {
        "time": functools.partial(draw, time_label, _milliseconds, with_exponent=True),
        "speedup": functools.partial(draw, speed_label, _speedup, with_ceiling=True),
        "memory": functools.partial(draw, memory_label, _mebibytes),
    }


def fit_exponent(num_patches: list[int], values: list[float]) -> float:
    """The k of values ~ num_patches ** k, by least squares of the logarithms."""
    return float(np.polyfit(np.log(num_patches), np.log(values), 1)[0])


def _milliseconds(row: dict) -> tuple[float, float, float]:
    return tuple(row["milliseconds"][key] / row["num_sequences"] for key in ("median", "q1", "q3"))


def _speedup(row: dict) -> tuple[float, float, float]:
    return tuple(row["speedup"][key] for key in ("median", "q1", "q3"))


def _mebibytes(row: dict) -> tuple[float, float, float] | None:
    if not row["peak_memory_bytes"]:
        return None
    value = row["peak_memory_bytes"] / 2**20 / row["num_sequences"]
    return value, value, value  # measured once


@figures.drawing()
def _draw(
    report: dict,
    ylabel: str,
    value_of: ValueOf,
    with_exponent: bool = False,
    with_ceiling: bool = False,
) -> Figure:
    """One panel per mask type, with full attention in each."""
    rows = report["rows"]
    mask_types = list(dict.fromkeys(row["mask_type"] for row in rows if row["mask_type"] != "full"))
    mask_types = mask_types or ["full"]

    num_columns = min(PANELS_PER_ROW, len(mask_types))
    num_lines = math.ceil(len(mask_types) / num_columns)
    figure = figures.new_figure(5.4 * num_columns, 4.4 * num_lines)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    panels = figure.subplots(num_lines, num_columns, **shared).flatten()
    for unused in panels[len(mask_types) :]:
        unused.remove()

    patches = sorted({row["num_patches"] for row in rows})
    for panel, mask_type in zip(panels, mask_types, strict=False):
        shown = [row for row in rows if row["mask_type"] in ("full", mask_type)]
        _draw_backends(panel, shown, mask_type, value_of, with_exponent, with_ceiling)
        _scale_axes(panel, patches)
        xlabel = "patches" if panel in panels[-num_columns:] else ""
        figures.style_axes(panel, mask_type, xlabel, "")
        panel.legend(fontsize=7, frameon=False, handlelength=3.2)

    figure.supylabel(ylabel, fontsize=9)
    return figure


def _draw_backends(
    panel: Axes,
    rows: list[dict],
    mask_type: str,
    value_of: ValueOf,
    with_exponent: bool,
    with_ceiling: bool,
) -> None:
    """One line per expansion step and backend; one ceiling per step."""
    series = {}
    for row in rows:
        key = (row["mask_type"], row["expansion_step"], row["backend"])
        series.setdefault(key, []).append(row)

    steps = sorted({step for kind, step, _ in series if kind == mask_type} - {None})
    steps_with_ceiling = set()
    for (kind, step, backend), members in series.items():
        variant = steps.index(step) if step in steps else 0
        num_variants = 1 if kind == "full" else len(steps)
        style = figures.style_of(kind, variant, num_variants)
        style["linestyle"] = LINE_STYLES.get(backend, OTHER_LINE_STYLE)
        label = backend if step is None else f"step {step}: {backend}"
        _draw_series(panel, members, value_of, style, label, with_exponent)

        if with_ceiling and step is not None and step not in steps_with_ceiling:
            _draw_ceiling(panel, members, style["color"], step)
            steps_with_ceiling.add(step)


def _scale_axes(panel: Axes, patches: list[int]) -> None:
    from matplotlib.ticker import LogLocator

    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(patches, [f"{n:,}\n({math.isqrt(n)}²)" for n in patches])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()


def _draw_series(
    panel: Axes, rows: list[dict], value_of: ValueOf, style: dict, label: str, with_exponent: bool
) -> None:
    """Medians with quartiles as error bars; rows without a value are left out."""
    measured = [row for row in rows if value_of(row) is not None]
    if not measured:
        return

    x = [row["num_patches"] for row in measured]
    median, low, high = zip(*map(value_of, measured), strict=True)
    if with_exponent and len(x) > 1:
        label += f"  ~ N^{fit_exponent(x, median):.2f}"

    errors = [np.subtract(median, low).clip(0), np.subtract(high, median).clip(0)]
    look = {"markersize": 5, "linewidth": 1.4, "capsize": 2}
    panel.errorbar(x, median, yerr=errors, label=label, **look, **style)


def _draw_ceiling(panel: Axes, rows: list[dict], color: str, step: int) -> None:
    x = [row["num_patches"] for row in rows]
    ceilings = [row["ceiling"] for row in rows]
    look = {"color": color, "linewidth": 1, "linestyle": CEILING_LINE_STYLE, "marker": "_"}
    panel.plot(x, ceilings, **look, label=f"step {step}: ceiling by FLOPs")
