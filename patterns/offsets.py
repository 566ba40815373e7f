"""Patterns that are sets of relative offsets, the same around every patch. Add yours to `PATTERNS`.

Dilation multiplies the offsets. What lies beyond the border is left out (`truncate`), or the next
patches on the other side take its place (`shift`). On the flattened sequence, a window with as many
neighbors is the 1D twin of such a pattern.

Masks are boolean numpy arrays [N, N] over the N = height * width patches in row-major order: True =
query patch i (row) may attend to key patch j (column).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

EDGES = ("truncate", "shift")

FAR = 2**30  # an offset beyond any grid, whose square fits into 64 bits


@dataclass(frozen=True)
class Pattern:
    """A set of offsets from a patch to its neighbors, and how many there are."""

    # (dy, dx, step) -> bool, for integer arrays that broadcast: is this offset in the set?
    offsets: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    # step -> number of offsets; odd, or else it has no 1D twin
    num_neighbors: Callable[[int], int]

    # For the documentation: what a patch attends to, and the number of neighbors.
    about: str = "your own pattern"
    formula: str = ""
    has_1d_twin: bool = True


def count_circle(step: int) -> int:
    """Gauss's circle problem: how many (dy, dx) lie no further than `step` from the origin."""
    dy = np.arange(-step, step + 1, dtype=np.int64)
    largest_dx = np.sqrt(step**2 - dy**2).astype(np.int64)  # exact far beyond any grid
    return int((2 * largest_dx + 1).sum())


PATTERNS = {
    "cardinal": Pattern(
        offsets=lambda dy, dx, s: ((dy == 0) & (abs(dx) <= s)) | ((dx == 0) & (abs(dy) <= s)),
        num_neighbors=lambda s: 1 + 4 * s,
        about="itself and up to *s* patches up, down, left and right",
        formula="1 + 4*s*",
    ),
    "all_neighbors": Pattern(
        offsets=lambda dy, dx, s: (abs(dy) <= s) & (abs(dx) <= s),
        num_neighbors=lambda s: (2 * s + 1) ** 2,
        about="the square of side 2*s* + 1 around it",
        formula="(2*s* + 1)²",
    ),
    "circle": Pattern(
        offsets=lambda dy, dx, s: dx * dx <= s * s - dy * dy,
        num_neighbors=count_circle,
        about="patches whose centers are at most *s* away",
        formula="5, 13, 29, 49, ...",
    ),
}


# --------------------------------------------------------------------------------------------------
# Sets of offsets


def neighborhoods(
    offsets: Callable, step: int, height: int, width: int, dilation: int = 1, edge: str = "truncate"
) -> np.ndarray:
    """The mask of a set of offsets around every patch of a grid: bool [N, N], perhaps read-only."""
    # The axes of a pair of patches: query row, query column, key row, key column.
    dy = axis_offsets(height, dilation, edge)[:, None, :, None]
    dx = axis_offsets(width, dilation, edge)[:, None, :]

    # Offsets are [height, 1, height, 1] and [width, 1, width]: small. Only the last step of the
    # condition broadcasts to all pairs, and it is boolean: one byte per pair.
    allowed = offsets(dy, dx, step)
    if dilation > 1:
        allowed = allowed & (dy != FAR) & (dx != FAR)
    allowed = np.broadcast_to(allowed, (height, width, height, width))
    return allowed.reshape(height * width, height * width)


def axis_offsets(length: int, dilation: int = 1, edge: str = "truncate") -> np.ndarray:
    """Offsets, in steps of `dilation`, from each position of an axis to each: int64 [length]².

    FAR between positions that are no multiple of `dilation` apart. With `shift`, a position beyond
    those that can be paired with one on the other side gets the offset of a missing one: from
    position 0 on, the offsets are 0, 1, -1, 2, -2, ... So every interval of offsets -s to s is the
    window of NATTEN (Hassani et al. 2023, "Neighborhood Attention Transformer", section 3.1), moved
    as far as it takes to lie within the axis, and any set of offsets keeps its size.
    """
    dilation = min(dilation, length)
    place, group = np.divmod(np.arange(length), dilation)  # position -> place among its own kind
    offset = place - place[:, None]  # [query, key]

    if edge == "shift":
        last = (length - 1 - group) // dilation  # the last place of a position's own kind
        # A window must lie within the axis. To reach the key, it may have to start at the end that
        # lies behind the query. From there the key is `to_end` places away, so that the smallest
        # such window, of 2 * radius + 1 places, has this radius:
        to_end = np.where(offset > 0, place, last - place)
        radius = (to_end + 1) // 2
        # The last of its places would be +radius; if that is the key before, the key is -radius.
        is_mirrored = to_end % 2 == 0
        moved = np.sign(offset) * np.where(is_mirrored, -radius, radius)
        offset = np.where(abs(offset) > radius, moved, offset)

    return np.where(group == group[:, None], offset, FAR)


def windows_1d(
    num_neighbors: int, length: int, dilation: int = 1, edge: str = "truncate"
) -> np.ndarray:
    """The mask of a window of `num_neighbors` tokens (odd) around each token of a sequence.

    The same as `abs(axis_offsets(...)) <= num_neighbors // 2`, without an integer for each pair.
    """
    radius = min(num_neighbors // 2, length)
    dilation = min(dilation, length)
    place, group = np.divmod(np.arange(length), dilation)

    first = place - radius
    if edge == "shift":
        last = (length - 1 - group) // dilation
        first = np.clip(first, 0, np.maximum(last - 2 * radius, 0))

    allowed = place >= first[:, None]
    allowed &= place <= (first + 2 * radius)[:, None]
    if dilation > 1:
        allowed &= group == group[:, None]
    return allowed
