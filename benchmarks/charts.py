"""The pictures of benchmark.py: time against patches, speedup against its ceiling, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_STYLES = {
    "full SDPA": "-",
    "timm": ":",
    "dense": ":",
    "diagonal": "-",
    "flex": "-.",
    "local-attention": (0, (5, 1, 1, 1)),
}  # the others dashed
PANELS_ABREAST = 2


def drawings(report: dict) -> dict[str, Callable[[], Figure]]:
    """What draws `time`, `speedup` and `memory` of a report of benchmark.py."""
    words = "attention" if report["level"] == "attention" else report["settings"]["model"]
    per = "per head and image" if report["level"] == "attention" else "per image"
    draw = functools.partial(_draw, report)
    time, speed = f"time of {words}, forward + backward, {per} (ms)", f"speed of {words}, × full attention"
    return {
        "time": functools.partial(draw, time, _milliseconds, with_exponent=True),
        "speedup": functools.partial(draw, speed, _speedup, with_ceiling=True),
        "memory": functools.partial(draw, f"peak memory of {words}, {per} (MiB)", _mebibytes),
    }


def fit_exponent(num_patches: list[int], values: list[float]) -> float:
    """The k of values ~ num_patches ** k, by least squares of the logarithms."""
    return float(np.polyfit(np.log(num_patches), np.log(values), 1)[0])


def _milliseconds(row: dict) -> tuple[float, float, float]:
    return tuple(row["milliseconds"][key] / row["num_sequences"] for key in ("median", "q1", "q3"))


def _speedup(row: dict) -> tuple[float, float, float]:
    return tuple(row["speedup"][key] for key in ("median", "q1", "q3"))


def _mebibytes(row: dict) -> tuple[float, float, float] | None:
    return (row["peak_memory_bytes"] / 2**20 / row["num_sequences"],) * 3 if row["peak_memory_bytes"] else None


@figures.drawing()
def _draw(report: dict, ylabel: str, value_of, with_exponent: bool = False, with_ceiling: bool = False) -> Figure:
    """One panel per mask type, full attention in each; one line per step and backend, with quartiles."""
    from matplotlib.ticker import LogLocator

    rows = report["rows"]
    mask_types = list(dict.fromkeys(row["mask_type"] for row in rows if row["mask_type"] != "full")) or ["full"]
    num_columns = min(PANELS_ABREAST, len(mask_types))
    num_lines = -(-len(mask_types) // num_columns)
    figure = figures.new_figure(5.4 * num_columns, 4.4 * num_lines)
    panels = figure.subplots(num_lines, num_columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel in panels[len(mask_types) :]:
        panel.remove()
    for panel, mask_type in zip(panels, mask_types, strict=False):
        steps = sorted({row["expansion_step"] for row in rows if row["mask_type"] == mask_type} - {None})
        series, with_a_ceiling = {}, set()
        for row in rows:
            if row["mask_type"] in ("full", mask_type):
                series.setdefault((row["mask_type"], row["expansion_step"], row["backend"]), []).append(row)
        for (kind, step, backend), members in series.items():
            variant = steps.index(step) if step in steps else 0
            style = figures.style_of(kind, variant, len(steps) if kind != "full" else 1)
            style["linestyle"] = LINE_STYLES.get(backend, "--")
            label = backend if step is None else f"step {step}: {backend}"
            _draw_series(panel, members, value_of, style, label, with_exponent)
            if with_ceiling and step is not None and step not in with_a_ceiling:
                _draw_ceiling(panel, members, style["color"], step)
                with_a_ceiling.add(step)
        panel.set_xscale("log")
        panel.set_yscale("log")
        patches = sorted({row["num_patches"] for row in rows})
        panel.set_xticks(patches, [f"{n:,}\n({round(n**0.5)}²)" for n in patches])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        figures.style_axes(panel, mask_type, "patches" if panel in panels[-num_columns:] else "", "")
        panel.legend(fontsize=7, frameon=False, handlelength=3.2)
    figure.supylabel(ylabel, fontsize=9)
    return figure


def _draw_series(panel: Axes, rows: list[dict], value_of, style: dict, label: str, with_exponent: bool) -> None:
    points = [(row["num_patches"], *values) for row in rows if (values := value_of(row)) is not None]
    if not points:
        return
    x, median, low, high = zip(*points, strict=True)
    if with_exponent and len(x) > 1:
        label += f"  ~ N^{fit_exponent(x, median):.2f}"
    errors = [np.subtract(median, low).clip(0), np.subtract(high, median).clip(0)]
    panel.errorbar(x, median, yerr=errors, label=label, markersize=5, linewidth=1.4, capsize=2, **style)


def _draw_ceiling(panel: Axes, rows: list[dict], color: str, step: int) -> None:
    x, ceiling = zip(*((row["num_patches"], row["ceiling"]) for row in rows), strict=True)
    panel.plot(
        x, ceiling, color=color, linewidth=1, linestyle=(0, (1, 3)), marker="_", label=f"step {step}: ceiling by FLOPs"
    )
