"""What all plots share: style, axes, legends, saving.

The colors are those of Okabe and Ito (Color Universal Design, 2008), which color-blind readers can
tell apart; markers and line styles repeat the distinction for gray prints. matplotlib is imported
when the first figure is made, and without pyplot, so no window opens. All drawing happens inside
`drawing()`, so the same runs give the same figures everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import utils
from masks import PATTERNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

DPI = 160
FORMATS = ("png", "svg")
# What would make two files of one figure differ.
NO_DATES = {"svg": {"Date": None}, "svgz": {"Date": None}, "pdf": {"CreationDate": None}}

# Those that are no sets of offsets. Random patches, which others are held against, are gray.
FIXED = {
    "full": {"color": "#000000", "marker": "*", "linestyle": "-"},
    "axial": {"color": "#999933", "marker": "P", "linestyle": (0, (4, 2))},
    "2d_window": {"color": "#882255", "marker": "p", "linestyle": (0, (6, 1.5, 1, 1.5))},
    "random": {"color": "#777777", "marker": "X", "linestyle": (0, (2, 2))},
    "file": {"color": "#332288", "marker": "h", "linestyle": (0, (8, 2))},
}

# Mask type number n uses entry n of each list, modulo its length. The lengths (6, 7 and 5) are
# chosen so that a combination repeats only after 210 types. Even numbers are 1D and start with cool
# colors, odd ones are 2D and start with warm colors.
COLORS = ("#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v", "<", ">")
LINE_STYLES = ("--", "-.", (0, (1, 1.2)), "-", (0, (5, 1, 1, 1, 1, 1)))

# For the expansion steps of one mask type when they are drawn together.
VARIANT_LINE_STYLES = ("-", "--", (0, (1, 1.2)), "-.")

LEGEND = {"fontsize": 8, "title_fontsize": 8, "frameon": False, "handlelength": 3.2}
MARGIN = 0.2  # inches beside a legend
WIDTHS = {"title": 80, "panel": 20}  # columns of text that fit above a figure, and above one panel


# -------------------------------------------------------------------------------------------------
# Style


def style_of(mask_type: str, variant: int = 0, num_variants: int = 1, family: int = 0) -> dict:
    """Color, marker and line style of a mask type, as arguments of `Axes.plot`.

    They are the same in every figure, and a pattern appended to `PATTERNS` changes no other
    pattern's style. Runs of one family (such as its expansion steps) are `variant` 0, 1, ... of
    `num_variants`: they go from light to dark, each with a line style of its own. Beyond the first
    `family` of a mask type (such as its dilations), the others are darker, with other markers.
    """
    if mask_type in FIXED:
        style = dict(FIXED[mask_type])
        number = -1
    else:
        number = _number_of(mask_type)
        style = {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
        }

    if family:
        style["color"] = blend(style["color"], "#000000", 0.3 + 0.2 * (family % 2))
        style["marker"] = MARKERS[(number + family) % len(MARKERS)]
        style["linestyle"] = LINE_STYLES[(number + family) % len(LINE_STYLES)]
    if num_variants > 1:
        shade = 2 * variant / (num_variants - 1) - 1  # -1 lightest, 0 the color itself, 1 darkest
        toward = "#FFFFFF" if shade < 0 else "#000000"
        style["color"] = blend(style["color"], toward, 0.45 * abs(shade))
        style["linestyle"] = VARIANT_LINE_STYLES[variant % len(VARIANT_LINE_STYLES)]
    return style


def _number_of(mask_type: str) -> int:
    dimensions, _, pattern = mask_type.partition("_")
    patterns = list(PATTERNS)
    if pattern in patterns:
        index = patterns.index(pattern)
    else:
        # Runs of patterns that this checkout doesn't have are drawn too. A checksum of the name
        # gives them a number that never changes.
        index = len(patterns) + zlib.crc32(pattern.encode()) % 50
    return 2 * index + (dimensions == "2d")


def blend(color: str, other: str, amount: float) -> str:
    """Mix two `#RRGGBB` colors: amount 0 gives `color`, 1 gives `other`."""
    mixed = (1 - amount) * rgb(color) + amount * rgb(other)
    return "#" + "".join(f"{round(255 * channel):02X}" for channel in mixed)


def text_color_on(color: str) -> str:
    """Black or white, whichever is easier to read on `color`."""
    brightness = rgb(color) @ (0.299, 0.587, 0.114)
    return "#000000" if brightness > 0.5 else "#FFFFFF"


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


# -------------------------------------------------------------------------------------------------
# matplotlib with its defaults


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Run whatever draws or saves a figure with matplotlib's defaults and no math in texts.

    Saving needs this as well as drawing, because matplotlib reads its settings when part of a
    figure is created and again when it is rendered. Each of matplotlib's warnings is shown once,
    on one line.
    """
    with _ONE_AT_A_TIME:
        matplotlib = _import_matplotlib()
        settings = dict(matplotlib.rcParamsDefault)
        del settings["backend"]
        settings |= {"text.parse_math": False, "svg.hashsalt": "local attention"}
        with matplotlib.rc_context(settings), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)  # nothing users could act on
            yield

    for warning in caught:
        _pass_on(str(warning.message))


_ONE_AT_A_TIME = threading.RLock()  # matplotlib's settings are global to the process


def _import_matplotlib():
    """Import matplotlib without the user's configuration: a damaged one would make that fail."""
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]

    # MATPLOTLIBRC takes precedence over the file in the home folder, but not over one in the
    # current folder, which must therefore appear not to exist.
    exists = os.path.exists
    before = {name: os.environ.pop(name, None) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
    os.environ["MATPLOTLIBRC"] = os.devnull
    os.path.exists = lambda path: path != "matplotlibrc" and exists(path)
    try:
        import matplotlib
    finally:
        os.path.exists = exists
        del os.environ["MATPLOTLIBRC"]
        os.environ.update({name: value for name, value in before.items() if value is not None})
    return matplotlib


def _pass_on(warning: str) -> None:
    # matplotlib warns once per missing character or script; one warning for all of them is enough.
    if warning.startswith(("Glyph", "Matplotlib currently does not support")):
        warning = "the plots' font lacks some characters of the names; each is drawn as a box"
    _warn_once(warning)


@functools.cache
def _warn_once(message: str) -> None:
    utils.warn(message)


# -------------------------------------------------------------------------------------------------
# Figures and files


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; its size is in inches."""
    # Deferred: importing matplotlib takes longer than `plot_result.py --help`.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """The common look of a plot: a light grid and no box."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8, color="0.6")
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")


def add_legend(
    owner: Axes | Figure, width: float, columns: int, title: str = "", **where
) -> tuple[float, float]:
    """Add a legend of at most `columns` columns and return its (width, height), all in inches.

    It gets fewer columns if it would be wider than `width`; with one column it may still be wider.
    """
    for num_columns in range(columns, 0, -1):
        legend = owner.legend(ncols=num_columns, title=title, **where, **LEGEND)
        size = _size(legend)
        if size[0] <= width or num_columns == 1:
            return size
        legend.remove()


def add_legend_below(figure: Figure, columns: int = 3, title: str = "", **look) -> None:
    """Add one legend for all panels below them.

    The figure grows by the size of the legend, so the panels keep theirs.
    """
    handles, labels = figure.axes[0].get_legend_handles_labels()
    entries = {"handles": handles, "labels": labels, "loc": "outside lower center"}
    max_width = figure.get_figwidth() - MARGIN
    width, height = add_legend(figure, max_width, columns, title, **entries, **look)

    height += 2 * figure.get_layout_engine().get()["h_pad"]
    figure_width = max(figure.get_figwidth(), width + MARGIN)
    figure.set_size_inches(figure_width, figure.get_figheight() + height)


def _size(legend: Legend) -> tuple[float, float]:
    box = legend.get_window_extent(legend.figure.canvas.get_renderer())
    return box.width / DPI, box.height / DPI


@drawing()
def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format of its suffix; the same figure gives the same file.

    Raises UsageError for a suffix that matplotlib doesn't know, and UserError if the file cannot be
    written.
    """
    kind = path.suffix[1:].lower()
    supported = figure.canvas.get_supported_filetypes()
    if kind not in supported:
        suffixes = ", .".join(sorted(supported))
        raise utils.UsageError(f"cannot draw into {path}: expected a name ending in .{suffixes}")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with utils.atomic_path(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=NO_DATES.get(kind))
    except OSError as error:
        raise utils.UserError(f"cannot write {path}: {error}") from error


def save_as(figure: Figure, path: Path, formats: Sequence[str] = FORMATS) -> None:
    """Write `<path>.<format>` for each format."""
    for suffix in formats:
        save(figure, path.with_name(f"{path.name}.{suffix}"))


def save_drawings(
    folder: Path, drawings: dict[str, Callable[[], Figure]], formats: Sequence[str] = FORMATS
) -> dict[str, Exception]:
    """Draw each figure and write it as `<name>.<format>` for each format.

    One that fails does not stop the others. Returns the failures: name -> error.
    """
    failed = {}
    for name, draw in drawings.items():
        try:
            save_as(draw(), folder / name, formats)
        except Exception as error:  # matplotlib may raise anything
            failed[name] = error
    return failed


def raise_failed(failed: dict[str, Exception]) -> None:
    """Raise UserError if `save_drawings` returned any failures."""
    if not failed:
        return
    reasons = "; ".join(f"{name} ({utils.first_line(error)})" for name, error in failed.items())
    cause = next(iter(failed.values()))
    raise utils.UserError(f"could not draw {reasons}") from cause
