"""Pictures of attention masks: the matrix, and the neighborhoods of a few patches on the grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from report import figures, text

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CELLS = 480  # a mask with more rows is reduced to at most this many, about one pixel each
MAX_COLUMNS = 7  # patterns beside each other
MAX_RULED_GRID = 40  # up to this many patches per side, lines separate the patches of a grid

ATTENDED = "#0072B2"
NOT_ATTENDED = "#ECECEC"
QUERY = "#000000"


@figures.drawing()
def draw_attention_mask(mask: torch.Tensor | None, height: int, width: int, title: str) -> Figure:
    """The mask on the left, three of its rows as neighborhoods on the grid on the right.

    `mask` is bool [N, N] with N = height * width; None means full attention.
    """
    return draw_attention_masks({"": mask}, height, width, title)


@figures.drawing()
def draw_attention_masks(
    masks: dict[str, torch.Tensor | None], height: int, width: int, title: str
) -> Figure:
    """The same for each of several masks, one below the other, with their names."""
    N = height * width
    for mask in masks.values():
        if mask is not None and tuple(mask.shape) != (N, N):
            raise ValueError(
                f"the mask of a {height}x{width} grid has shape ({N}, {N}), got {tuple(mask.shape)}"
            )

    figure = figures.new_figure(7.6, 5.2 * len(masks) + 0.4)
    figure.suptitle(text.label(title, figures.WIDTHS["title"]), fontsize=11)
    layout = figure.add_gridspec(3 * len(masks), 2, width_ratios=(3.4, 1))

    for number, (name, mask) in enumerate(masks.items()):
        first = 3 * number
        matrix = figure.add_subplot(layout[first : first + 3, 0])
        _draw_matrix(matrix, mask, N, name)
        for i, (place, patch) in enumerate(example_patches(height, width).items()):
            axes = figure.add_subplot(layout[first + i, 1])
            num_neighbors = draw_neighborhood(axes, mask, height, width, *patch)
            query = patch[0] * width + patch[1]
            axes.set_title(f"{place}: row {query:,}\n{_count(num_neighbors)}", fontsize=8.5)
    return figure


def _draw_matrix(axes: Axes, mask: torch.Tensor | None, N: int, name: str) -> None:
    allowed = np.ones((1, 1), dtype=bool) if mask is None else mask.cpu().numpy()
    block = math.ceil(N / MAX_CELLS)
    axes.imshow(_colors(reduce_by_blocks(allowed, block)), extent=(-0.5, N - 0.5, N - 0.5, -0.5))

    title = f"mask over all {N:,} patches"
    if block > 1:
        title += f", {block} × {block} to a dot"
    if name:
        title = f"{name}: {title}"
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("key patch (attended to)", fontsize=9)
    axes.set_ylabel("query patch (attends)", fontsize=9)
    axes.tick_params(labelsize=8)


@figures.drawing()
def draw_mask_types(
    masks: dict[str, tuple[str, np.ndarray | None]], height: int, width: int
) -> Figure:
    """One column per mask; rows for a patch in the center, on the edge and in the corner.

    `masks` maps a title to a mask type, which has the color, and a mask. Beyond MAX_COLUMNS masks
    there is another block of three rows.
    """
    patches = example_patches(height, width)
    num_columns = min(len(masks), MAX_COLUMNS)
    num_blocks = math.ceil(len(masks) / num_columns)
    row_height = 1.75 * min(2.0, height / width) + 0.3  # inches
    figure_height = num_blocks * (row_height * len(patches) + 0.3)
    figure = figures.new_figure(1.75 * num_columns + 0.4, figure_height)
    panels = figure.subplots(num_blocks * len(patches), num_columns, squeeze=False)

    for number, (title, (mask_type, mask)) in enumerate(masks.items()):
        block, column = divmod(number, num_columns)
        column_panels = panels[block * len(patches) : (block + 1) * len(patches), column]
        _draw_mask_type(column_panels, mask_type, mask, height, width, is_first=column == 0)
        lines = [text.label(part, figures.WIDTHS["panel"]) for part in title.split(", ")]
        column_panels[0].set_title("\n".join(lines), fontsize=10)
    for unused in range(len(masks), num_blocks * num_columns):
        for axes in panels[-len(patches) :, unused % num_columns]:
            axes.remove()
    return figure


def _draw_mask_type(
    panels: np.ndarray,
    mask_type: str,
    mask: np.ndarray | None,
    height: int,
    width: int,
    is_first: bool,
) -> None:
    # Black would hide the query patch, which is black itself.
    lighten = 0.4 if mask_type == "full" else 0.0
    color = figures.blend(figures.style_of(mask_type)["color"], "#FFFFFF", lighten)

    patches = example_patches(height, width)
    for axes, (name, (row, column)) in zip(panels, patches.items(), strict=True):
        num_neighbors = draw_neighborhood(axes, mask, height, width, row, column, color)
        axes.set_xlabel(_count(num_neighbors), fontsize=8)
        if is_first:
            axes.set_ylabel(name, fontsize=10)


def draw_neighborhood(
    axes: Axes,
    mask: torch.Tensor | np.ndarray | None,
    height: int,
    width: int,
    row: int,
    column: int,
    color: str = ATTENDED,
) -> int:
    """Draw the patch grid and return the number of neighbors.

    The query patch, at (row, column), is black; the patches it attends to have `color`.
    """
    if mask is None:
        allowed = np.ones(height * width, dtype=bool)
    else:
        allowed = np.asarray(mask[row * width + column])

    cells = _colors(allowed.reshape(height, width), color)
    cells[row, column] = figures.rgb(QUERY)
    axes.imshow(cells, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)

    side = max(height, width)
    if side <= MAX_RULED_GRID:
        axes.set_xticks(np.arange(-0.5, width), minor=True)
        axes.set_yticks(np.arange(-0.5, height), minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2 if side <= 20 else 0.5)
        axes.tick_params(which="minor", length=0)
    return int(allowed.sum())


def _count(num_neighbors: int) -> str:
    return f"{num_neighbors:,} neighbor" + ("" if num_neighbors == 1 else "s")


def example_patches(height: int, width: int) -> dict[str, tuple[int, int]]:
    """(row, column) of three patches: in the center, on the left edge, and in the corner.

    On the left edge a 1D window continues in the row above.
    """
    return {"center": (height // 2, width // 2), "edge": (height // 2, 0), "corner": (0, 0)}


def reduce_by_blocks(mask: np.ndarray, block: int) -> np.ndarray:
    """Whether any pair of a block x block square may attend.

    Bool [N, N] -> [ceil(N / block), ceil(N / block)].
    """
    if block == 1 or len(mask) == 1:
        return mask
    starts = np.arange(0, len(mask), block)
    rows = np.logical_or.reduceat(mask, starts, axis=0)
    return np.logical_or.reduceat(rows, starts, axis=1)


def _colors(allowed: np.ndarray, color: str = ATTENDED) -> np.ndarray:
    """Bool [height, width] -> RGB [height, width, 3]."""
    return np.where(allowed[..., None], figures.rgb(color), figures.rgb(NOT_ATTENDED))
