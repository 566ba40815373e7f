"""The table of all mask types: flags, documentation, sweeps and plots follow from it.

Beside sets of offsets, these are windows that do not overlap, random patches, and a mask in a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from patterns import files
from patterns.offsets import PATTERNS, Pattern, neighborhoods, windows_1d


@dataclass(frozen=True)
class MaskType:
    """A `--mask_type`: which fields of a `MaskSpec` it follows, and how its mask is built."""

    about: str  # what a patch attends to
    formula: str  # nominal number of neighbors
    takes: tuple[str, ...]  # fields of MaskSpec
    # (height, width, kind, each field by its name) -> bool [N, N]; None for full attention. `kind`
    # says which of the `num_kinds` masks: it is 0 but for those that differ by layer
    build: Callable[..., np.ndarray] | None
    # step -> nominal number of neighbors; None: the largest number on the grid
    num_neighbors: Callable[[int], int] | None = None
    num_kinds: int = 1  # layers take turns in so many masks


def types_of(name: str, pattern: Pattern) -> dict[str, MaskType]:
    """The mask types of a set of offsets: `2d_<name>` and its 1D twin."""

    def build_1d(height, width, kind, expansion_step, dilation, edge) -> np.ndarray:
        number = pattern.num_neighbors(expansion_step)
        return windows_1d(number, height * width, dilation, edge)

    def build_2d(height, width, kind, expansion_step, dilation, edge) -> np.ndarray:
        return neighborhoods(pattern.offsets, expansion_step, height, width, dilation, edge)

    shared = {
        "formula": pattern.formula,
        "takes": ("expansion_step", "dilation", "edge"),
        "num_neighbors": pattern.num_neighbors,
    }
    twin_about = f"a window on the flattened sequence, as large as `2d_{name}`"
    types = {f"2d_{name}": MaskType(pattern.about, build=build_2d, **shared)}
    if pattern.has_1d_twin:
        types[f"1d_{name}"] = MaskType(twin_about, build=build_1d, **shared)
    return types


def _build_axial(height: int, width: int, kind: int, dilation: int) -> np.ndarray:
    def is_in_line(dy: np.ndarray, dx: np.ndarray, step: int) -> np.ndarray:
        return (dy == 0) | (dx == 0)

    return neighborhoods(is_in_line, 0, height, width, dilation)


def _build_windows(height: int, width: int, kind: int, expansion_step: int) -> np.ndarray:
    return swin_windows(2 * expansion_step + 1, height, width, is_moved=kind == 1)


def _build_random(
    height: int, width: int, kind: int, expansion_step: int, edge: str, mask_seed: int
) -> np.ndarray:
    square = PATTERNS["all_neighbors"].offsets
    matched = neighborhoods(square, expansion_step, height, width, edge=edge)
    return random_patches(matched.sum(1), mask_seed)


def _build_from_file(
    height: int, width: int, kind: int, mask_file: str, mask_hash: str | None
) -> np.ndarray:
    mask = files.read(mask_file)
    if len(mask) != height * width:
        raise ValueError(
            f"the mask {mask_file} is for {len(mask)} patches, but the grid of "
            f"{height}x{width} has {height * width}"
        )
    if mask_hash is not None and not files.hash_of(mask).startswith(mask_hash):
        raise ValueError(f"the mask {mask_file} has changed since it was first used")
    return mask


def _all_types() -> dict[str, MaskType]:
    offsets = {}
    for name, pattern in PATTERNS.items():
        offsets |= types_of(name, pattern)

    square = PATTERNS["all_neighbors"]
    as_many = {"formula": square.formula, "num_neighbors": square.num_neighbors}
    window_about = (
        "the window of side 2*s* + 1 in which it lies; windows do not overlap, and every other "
        "layer moves them by half a window, as in Swin"
    )
    random_about = (
        "itself and random patches, as many as `2d_all_neighbors` has there; drawn once, by "
        "`--mask_seed`"
    )
    return {
        "full": MaskType("every patch, without any mask", "N", takes=(), build=None),
        # The 1D ones first.
        **{name: offsets[name] for name in sorted(offsets, key=lambda name: name[:2])},
        "axial": MaskType(
            "its whole row and column", "H + W − 1", takes=("dilation",), build=_build_axial
        ),
        "2d_window": MaskType(
            window_about, takes=("expansion_step",), build=_build_windows, num_kinds=2, **as_many
        ),
        "random": MaskType(
            random_about,
            takes=("expansion_step", "edge", "mask_seed"),
            build=_build_random,
            **as_many,
        ),
        "file": MaskType(
            "what the mask in `--mask_file` says",
            "the most of any patch",
            takes=("mask_file", "mask_hash"),
            build=_build_from_file,
        ),
    }


# --------------------------------------------------------------------------------------------------
# Windows and random patches


def swin_windows(side: int, height: int, width: int, is_moved: bool) -> np.ndarray:
    """The mask of windows that do not overlap; those at the border may be smaller.

    With `is_moved`, as in every other layer, they lie half a window further, so that they join what
    the layer before kept apart (Liu et al. 2021, "Swin Transformer", section 3.2): not along an
    axis that is no longer than a window.
    """

    def numbers(length: int) -> np.ndarray:
        """The number of the window in which each position lies."""
        is_shifted = is_moved and side < length
        first = side // 2 if is_shifted else side  # where the second window begins
        return (np.arange(length) + side - first) // side

    row, column = numbers(height), numbers(width)
    same_rows = (row[:, None] == row)[:, None, :, None]
    same_columns = (column[:, None] == column)[:, None, :]
    return (same_rows & same_columns).reshape(height * width, height * width)


def random_patches(num_neighbors: np.ndarray, seed: int) -> np.ndarray:
    """The mask in which patch i attends to itself and `num_neighbors[i] - 1` random others."""
    num_patches = len(num_neighbors)
    # Checkpoints rely on it: RandomState, unlike newer generators, never changes its numbers.
    generator = np.random.RandomState(seed)
    mask = np.eye(num_patches, dtype=bool)
    for i, number in enumerate(num_neighbors):
        others = generator.permutation(num_patches - 1)[: number - 1]
        mask[i, others + (others >= i)] = True
    return mask


TYPES = _all_types()
MASK_TYPES = tuple(name for name in TYPES if name != "file")  # which a file implies
