"""The plots of benchmark.py: time against patches, speedup against its ceiling, memory."""

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

LINE_STYLES = {  # by backend; all others are dashed
    "full SDPA": "-",
    "timm": ":",
    "dense": ":",
    "diagonal": "-",
    "flex": "-.",
    "local-attention": (0, (5, 1, 1, 1)),
}
PANELS_PER_ROW = 2


def drawings(report: dict) -> dict[str, Callable[[], Figure]]:
    """Functions that draw `time`, `speedup` and `memory` from a report of benchmark.py."""
    if report["level"] == "attention":
        subject = "attention"
        per = "per head and image"
    else:
        subject = report["settings"]["model"]
        per = "per image"

    # Without launches from Python; see timing.py.
    of_gpu = any(row.get("replays_graph") for row in report["rows"])
    time = f"{'GPU ' if of_gpu else ''}time of {subject}, forward + backward, {per} (ms)"
    speed = f"speed of {subject}, × full attention"
    memory = f"peak memory of {subject}, {per} (MiB)"
    draw = functools.partial(_draw, report)
    return {
        "time": functools.partial(draw, time, _milliseconds, with_exponent=True),
        "speedup": functools.partial(draw, speed, _speedup, with_ceiling=True),
        "memory": functools.partial(draw, memory, _mebibytes),
    }


def fit_exponent(num_patches: list[int], values: list[float]) -> float:
    """The k of values ~ num_patches ** k, by least squares on the logarithms."""
    return float(np.polyfit(np.log(num_patches), np.log(values), 1)[0])


# These read (median, first quartile, third quartile) from a row.


def _milliseconds(row: dict) -> tuple[float, float, float]:
    return tuple(row["milliseconds"][key] / row["num_sequences"] for key in ("median", "q1", "q3"))


def _speedup(row: dict) -> tuple[float, float, float]:
    return tuple(row["speedup"][key] for key in ("median", "q1", "q3"))


def _mebibytes(row: dict) -> tuple[float, float, float] | None:
    if not row["peak_memory_bytes"]:
        return None
    mebibytes = row["peak_memory_bytes"] / 2**20 / row["num_sequences"]
    return mebibytes, mebibytes, mebibytes


@figures.drawing()
def _draw(
    report: dict,
    ylabel: str,
    value_of: Callable[[dict], tuple[float, float, float] | None],
    with_exponent: bool = False,
    with_ceiling: bool = False,
) -> Figure:
    """One panel per mask type, with full attention in each."""
    rows = report["rows"]
    mask_types = list(dict.fromkeys(row["mask_type"] for row in rows))
    local_types = [mask_type for mask_type in mask_types if mask_type != "full"] or ["full"]

    num_columns = min(PANELS_PER_ROW, len(local_types))
    num_lines = math.ceil(len(local_types) / num_columns)
    figure = figures.new_figure(5.4 * num_columns, 4.4 * num_lines)
    panels = figure.subplots(num_lines, num_columns, sharex=True, sharey=True, squeeze=False)
    panels = panels.flatten()
    for unused in panels[len(local_types) :]:
        unused.remove()

    patches = sorted({row["num_patches"] for row in rows})
    for panel, mask_type in zip(panels, local_types, strict=False):
        shown = [row for row in rows if row["mask_type"] in ("full", mask_type)]
        _draw_panel(panel, shown, mask_type, value_of, with_exponent, with_ceiling)
        _label_axes(panel, patches)
        xlabel = "patches" if panel in panels[-num_columns:] else ""
        figures.style_axes(panel, title=mask_type, xlabel=xlabel)
        panel.legend(fontsize=7, frameon=False, handlelength=3.2)
    figure.supylabel(ylabel, fontsize=9)
    return figure


def _draw_panel(
    panel: Axes,
    rows: list[dict],
    mask_type: str,
    value_of: Callable,
    with_exponent: bool,
    with_ceiling: bool,
) -> None:
    """One line with quartiles per expansion step and backend, one ceiling per step."""
    steps = sorted(
        {row["expansion_step"] for row in rows if row["mask_type"] == mask_type} - {None}
    )
    series = {}
    for row in rows:
        key = (row["mask_type"], row["expansion_step"], row["backend"])
        series.setdefault(key, []).append(row)

    steps_with_ceiling = set()
    for (kind, step, backend), members in series.items():
        variant = steps.index(step) if step in steps else 0
        style = figures.style_of(kind, variant, len(steps) if kind != "full" else 1)
        style["linestyle"] = LINE_STYLES.get(backend, "--")
        label = backend if step is None else f"step {step}: {backend}"
        _draw_series(panel, members, value_of, style, label, with_exponent)

        if with_ceiling and step is not None and step not in steps_with_ceiling:
            _draw_ceiling(panel, members, style["color"], step)
            steps_with_ceiling.add(step)


def _draw_series(
    panel: Axes, rows: list[dict], value_of: Callable, style: dict, label: str, with_exponent: bool
) -> None:
    points = []
    for row in rows:
        values = value_of(row)
        if values is not None:
            points.append((row["num_patches"], *values))
    if not points:
        return

    x, median, low, high = zip(*points, strict=True)
    if with_exponent and len(x) > 1:
        label += f"  ~ N^{fit_exponent(x, median):.2f}"
    errors = [np.subtract(median, low).clip(0), np.subtract(high, median).clip(0)]
    look = {"markersize": 5, "linewidth": 1.4, "capsize": 2}
    panel.errorbar(x, median, yerr=errors, label=label, **look, **style)


def _draw_ceiling(panel: Axes, rows: list[dict], color: str, step: int) -> None:
    x = [row["num_patches"] for row in rows]
    ceiling = [row["ceiling"] for row in rows]
    look = {"color": color, "linewidth": 1, "linestyle": (0, (1, 3)), "marker": "_"}
    panel.plot(x, ceiling, **look, label=f"step {step}: ceiling by FLOPs")


def _label_axes(panel: Axes, patches: list[int]) -> None:
    """Logarithmic axes, with a tick at each number of patches."""
    from matplotlib.ticker import LogLocator

    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(patches, [f"{n:,}\n({round(n**0.5)}²)" for n in patches])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
