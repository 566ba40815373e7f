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
MAX_RULED_GRID = 40  # up to this many patches per side, lines separate the patches of a grid

ATTENDED = "#0072B2"
NOT_ATTENDED = "#ECECEC"
QUERY = "#000000"


@figures.drawing()
def draw_attention_mask(mask: torch.Tensor | None, height: int, width: int, title: str) -> Figure:
    """The mask on the left, three of its rows as neighborhoods on the grid on the right.

    `mask` is bool [N, N] with N = height * width; None means full attention.
    """
    N = height * width
    if mask is not None and tuple(mask.shape) != (N, N):
        raise ValueError(
            f"the mask of a {height}x{width} grid has shape ({N}, {N}), got {tuple(mask.shape)}"
        )

    figure = figures.new_figure(7.6, 5.6)
    figure.suptitle(text.label(title, figures.WIDTHS["title"]), fontsize=11)
    layout = figure.add_gridspec(3, 2, width_ratios=(3.4, 1))
    _draw_matrix(figure.add_subplot(layout[:, 0]), mask, N)

    for position, (name, (row, column)) in enumerate(example_patches(height, width).items()):
        axes = figure.add_subplot(layout[position, 1])
        num_neighbors = draw_neighborhood(axes, mask, height, width, row, column)
        query = row * width + column
        axes.set_title(f"{name}: row {query:,}\n{_count(num_neighbors)}", fontsize=8.5)
    return figure


def _draw_matrix(axes: Axes, mask: torch.Tensor | None, N: int) -> None:
    allowed = np.ones((1, 1), dtype=bool) if mask is None else mask.cpu().numpy()
    block = math.ceil(N / MAX_CELLS)
    axes.imshow(_colors(reduce_by_blocks(allowed, block)), extent=(-0.5, N - 0.5, N - 0.5, -0.5))

    title = f"mask over all {N:,} patches"
    if block > 1:
        title += f", {block} × {block} to a dot"
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("key patch (attended to)", fontsize=9)
    axes.set_ylabel("query patch (attends)", fontsize=9)
    axes.tick_params(labelsize=8)


@figures.drawing()
def draw_mask_types(
    masks_by_type: dict[str, torch.Tensor | None], height: int, width: int
) -> Figure:
    """One column per mask type; rows for a patch in the center, on the edge and in the corner."""
    patches = example_patches(height, width)
    row_height = 1.75 * min(2.0, height / width) + 0.3  # inches
    figure_width = 1.75 * len(masks_by_type) + 0.4
    figure = figures.new_figure(figure_width, row_height * len(patches) + 0.3)
    panels = figure.subplots(len(patches), len(masks_by_type), squeeze=False)

    for j, (mask_type, mask) in enumerate(masks_by_type.items()):
        # Black would hide the query patch, which is black itself.
        lighten = 0.4 if mask_type == "full" else 0.0
        color = figures.blend(figures.style_of(mask_type)["color"], "#FFFFFF", lighten)

        for i, (name, (row, column)) in enumerate(patches.items()):
            axes = panels[i, j]
            num_neighbors = draw_neighborhood(axes, mask, height, width, row, column, color)
            axes.set_xlabel(_count(num_neighbors), fontsize=8)
            if j == 0:
                axes.set_ylabel(name, fontsize=10)
        panels[0, j].set_title(text.label(mask_type, figures.WIDTHS["panel"]), fontsize=10)
    return figure


def draw_neighborhood(
    axes: Axes,
    mask: torch.Tensor | None,
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
        allowed = mask[row * width + column].cpu().numpy()

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
