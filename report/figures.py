"""What every picture shares: style, panels, legends, saving.

Colors are those of Okabe and Ito (Color Universal Design, 2008), which the color-blind can tell apart; markers and line
styles say the same again for print in gray. matplotlib is imported with the first picture, and without pyplot: no
window opens. Whatever draws does so in `drawing()`: the same runs give the same pictures everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import masks
import utils

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

DPI = 160

FULL = {"color": "#000000", "marker": "*", "linestyle": "-"}
# Of each mask type the (color, marker, line style) at its number, around and around; the lengths are chosen so that
# the combination comes back only after 210 types. Even numbers are 1D and cool at first, odd ones 2D and warm.
COLORS = ("#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v", "<", ">")
LINE_STYLES = ("--", "-.", (0, (1, 1.2)), "-", (0, (5, 1, 1, 1, 1, 1)))
VARIANT_LINE_STYLES = ("-", "--", (0, (1, 1.2)), "-.")  # of the steps of one mask type, drawn together


LEGEND = {"fontsize": 8, "title_fontsize": 8, "frameon": False, "handlelength": 3.2}
MARGIN = 0.2  # inches beside a legend
WIDTHS = {"title": 80, "panel": 20}  # columns of text that fit above a picture, and above a panel of it


# ---------------------------------------------------------------------------------------------------------------------
# Style


def style_of(mask_type: str, variant: int = 0, num_variants: int = 1) -> dict:
    """Color, marker and line style of a mask type: `Axes.plot` arguments, the same in every picture.

    A pattern appended to `masks.PATTERNS` changes no other's style. The runs of one type, such as its expansion steps,
    are `variant` 0, 1, ... of `num_variants`: from light to dark, each with a line style of its own.
    """
    if mask_type == "full":
        style = dict(FULL)
    else:
        number = _number_of(mask_type)
        style = {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
        }
    if num_variants > 1:
        shade = 2 * variant / (num_variants - 1) - 1  # -1 lightest, 0 the color itself, 1 darkest
        style["color"] = blend(style["color"], "#FFFFFF" if shade < 0 else "#000000", 0.45 * abs(shade))
        style["linestyle"] = VARIANT_LINE_STYLES[variant % len(VARIANT_LINE_STYLES)]
    return style


def _number_of(mask_type: str) -> int:
    dimensions, _, pattern = mask_type.partition("_")
    # The runs of a pattern that this checkout does not have are drawn too; a checksum of its name never changes.
    patterns = list(masks.PATTERNS)
    index = patterns.index(pattern) if pattern in patterns else len(patterns) + zlib.crc32(pattern.encode()) % 50
    return 2 * index + (dimensions == "2d")


def blend(color: str, other: str, amount: float) -> str:
    """`#RRGGBB` colors mixed: 0 = `color`, 1 = `other`."""
    mixed = (1 - amount) * rgb(color) + amount * rgb(other)
    return "#" + "".join(f"{round(255 * channel):02X}" for channel in mixed)


def text_color_on(color: str) -> str:
    """Black or white, whichever is easier to read on `color`."""
    return "#000000" if rgb(color) @ (0.299, 0.587, 0.114) > 0.5 else "#FFFFFF"


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


# ---------------------------------------------------------------------------------------------------------------------
# matplotlib by default


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """What draws or saves a picture runs in this: matplotlib with its defaults, and all text as it is, without math.

    matplotlib reads its settings when a part of a picture is made and again when it is drawn. Its warnings become one
    line each, and are not repeated.
    """
    with _ONE_AT_A_TIME:
        matplotlib = _import_matplotlib()
        settings = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
        settings |= {"text.parse_math": False, "svg.hashsalt": "local attention"}
        with matplotlib.rc_context(settings), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)  # no matter of the user's
            yield
    for warning in caught:
        _pass_on(str(warning.message))


_ONE_AT_A_TIME = threading.RLock()  # matplotlib's settings are those of the whole process


def _import_matplotlib():
    """matplotlib, imported without the user's configuration: one that is damaged would end the import."""
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    exists, before = os.path.exists, {name: os.environ.pop(name, None) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
    os.environ["MATPLOTLIBRC"] = os.devnull  # comes before the one at home, but after that of the working folder
    os.path.exists = lambda path: path != "matplotlibrc" and exists(path)
    try:
        import matplotlib
    finally:
        os.path.exists = exists
        del os.environ["MATPLOTLIBRC"]
        os.environ.update({name: value for name, value in before.items() if value is not None})
    return matplotlib


def _pass_on(warning: str) -> None:
    if warning.startswith(("Glyph", "Matplotlib currently does not support")):  # one for each character, or script
        warning = "the font of the pictures lacks some characters of the names; a box stands for each"
    _warn_once(warning)


@functools.cache
def _warn_once(message: str) -> None:
    utils.warn(message)


# ---------------------------------------------------------------------------------------------------------------------
# Panels and files


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # deferred: takes longer than plot_result.py --help
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """The common look of a plot: a light grid, no box."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8, color="0.6")
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")


def add_legend(owner: Axes | Figure, width: float, columns: int, title: str = "", **where) -> tuple[float, float]:
    """A legend of at most so many columns, fewer where they are wider than `width`; returns its width and height.

    All in inches. With one column it may still be wider.
    """
    for num_columns in range(columns, 0, -1):
        legend = owner.legend(ncols=num_columns, title=title, **where, **LEGEND)
        size = _size(legend)
        if size[0] <= width or num_columns == 1:
            return size
        legend.remove()


def add_legend_below(figure: Figure, columns: int = 3, title: str = "", **look) -> None:
    """The legend of all panels below them; the figure grows by it, so that the panels stay as large as they are."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    entries = {"handles": handles, "labels": labels, "loc": "outside lower center"}
    width, height = add_legend(figure, figure.get_figwidth() - MARGIN, columns, title, **entries, **look)
    height += 2 * figure.get_layout_engine().get()["h_pad"]
    figure.set_size_inches(max(figure.get_figwidth(), width + MARGIN), figure.get_figheight() + height)


def _size(legend: Legend) -> tuple[float, float]:
    box = legend.get_window_extent(legend.figure.canvas.get_renderer())
    return box.width / DPI, box.height / DPI


@drawing()
def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, in the format of the suffix; the same figure gives the same SVG.

    Raises UserError for a suffix that matplotlib does not know and where the file cannot be written.
    """
    kind = path.suffix[1:].lower()
    supported = figure.canvas.get_supported_filetypes()
    if kind not in supported:
        raise utils.UsageError(f"cannot draw into {path}: expected a name ending in .{', .'.join(sorted(supported))}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with utils.atomic_path(path) as temporary:
            figure.savefig(temporary, format=kind, metadata={"Date": None} if kind in ("svg", "svgz") else None)
    except OSError as error:
        raise utils.UserError(f"cannot write {path}: {error}") from error


def save_png_and_svg(figure: Figure, path: Path) -> None:
    """Write `<path>.png` and `<path>.svg`."""
    for suffix in ("png", "svg"):
        save(figure, path.with_name(f"{path.name}.{suffix}"))


def save_drawings(folder: Path, drawings: dict[str, Callable[[], Figure]]) -> dict[str, Exception]:
    """Draw and write each as `<name>.png` and `<name>.svg`. One that fails does not stop the others.

    Returns the names of those that did fail, and why.
    """
    failed = {}
    for name, draw in drawings.items():
        try:
            save_png_and_svg(draw(), folder / name)
        except Exception as error:  # whatever matplotlib raises: the others can still be had
            failed[name] = error
    return failed


def raise_failed(failed: dict[str, Exception]) -> None:
    """Raise UserError if there is anything in what `save_drawings` returned."""
    if failed:
        reasons = "; ".join(f"{name} ({utils.first_line(error)})" for name, error in failed.items())
        raise utils.UserError(f"pictures that could not be drawn: {reasons}") from next(iter(failed.values()))
