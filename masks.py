"""Boolean masks of attention patterns on the patch grid: the public face of `patterns/`.

A mask is a `torch.bool` tensor [N, N] over the N = height * width patches in row-major order:
True = query patch i (row) may attend to key patch j (column). Unless a file says otherwise, the
diagonal is True. Masks know nothing about class tokens, models or devices.

`MaskSpec("2d_cardinal", 2).build(14, 14)` builds a mask, and `build_layers` those of all layers of
a model, which may differ. All mask types are in the table of patterns/table.py.

    python masks.py --mask_type 2d_cardinal --expansion_step 2 --grid 7x10
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import utils
from patterns.offsets import EDGES, PATTERNS, Pattern, windows_1d
from patterns.spec import MAX_COMPARED, MAX_PATCHES, MaskSpec, check_integer, to_tensor
from patterns.table import MASK_TYPES, TYPES

if TYPE_CHECKING:
    import torch

__all__ = [
    "EDGES",
    "MASK_TYPES",
    "MAX_COMPARED",
    "MAX_PATCHES",
    "PATTERNS",
    "STUDIED",
    "TYPES",
    "MaskSpec",
    "Pattern",
    "build_attention_mask",
    "compute_num_neighbors_all_neighbors",
    "compute_num_neighbors_cardinal",
    "generate_1d_attention_mask",
    "generate_2d_attention_mask_all_neighbors",
    "generate_2d_attention_mask_cardinal",
    "reachable",
]

# What a sweep or a benchmark compares unless asked for more.
STUDIED = ("full", "1d_cardinal", "1d_all_neighbors", "2d_cardinal", "2d_all_neighbors")


def build_attention_mask(
    mask_type: str, expansion_step: int | None, num_patches_height: int, num_patches_width: int
) -> torch.Tensor | None:
    """The mask of a `--mask_type`: bool [N, N], or None for `full`. See `MaskSpec.build`."""
    return MaskSpec(mask_type, expansion_step).build(num_patches_height, num_patches_width)


def generate_1d_attention_mask(num_neighbors: int, N: int) -> torch.Tensor:
    """A window of `num_neighbors` tokens (odd, itself included) centered on each of the N tokens.

    The window slides over the flattened sequence. On a patch grid it therefore continues past the
    end of a row into the next one, which is what makes it 1D.

    Returns bool [N, N]. Raises ValueError if `num_neighbors` is even or not positive, or if `N` is
    not positive.
    """
    num_neighbors = check_integer("num_neighbors", num_neighbors, minimum=1)
    N = check_integer("N", N, minimum=1)
    if num_neighbors % 2 == 0:
        raise ValueError(
            f"num_neighbors must be odd, so that the window has a center; got {num_neighbors}"
        )
    return to_tensor(windows_1d(num_neighbors, N))


def generate_2d_attention_mask_cardinal(
    expansion_step: int, num_patches_height: int, num_patches_width: int
) -> torch.Tensor:
    """A plus: the patch itself and up to `expansion_step` patches up, down, left and right.

    Returns bool [N, N].
    """
    return MaskSpec("2d_cardinal", expansion_step).build(num_patches_height, num_patches_width)


def generate_2d_attention_mask_all_neighbors(
    expansion_step: int, num_patches_height: int, num_patches_width: int
) -> torch.Tensor:
    """A square of side `2 * expansion_step + 1` centered on the patch. Returns bool [N, N]."""
    return MaskSpec("2d_all_neighbors", expansion_step).build(num_patches_height, num_patches_width)


def compute_num_neighbors_cardinal(expansion_step: int) -> int:
    """Nominal number of neighbors of the plus (itself included, away from the border): 1 + 4s."""
    step = check_integer("expansion_step", expansion_step, minimum=0)
    return PATTERNS["cardinal"].num_neighbors(step)


def compute_num_neighbors_all_neighbors(expansion_step: int) -> int:
    """Nominal number of neighbors of the square (itself included, away from the border).

    (2s + 1)² for step s.
    """
    step = check_integer("expansion_step", expansion_step, minimum=0)
    return PATTERNS["all_neighbors"].num_neighbors(step)


def reachable(
    mask: np.ndarray | Sequence[np.ndarray | None], num_layers: int, num_global_tokens: int = 0
) -> np.ndarray:
    """Whether information of patch j can have reached patch i after `num_layers` layers.

    Returns bool [N, N], True at [i, j] if it can. Each layer is one step along its mask, or along
    the residual connection, so these are the neighborhoods of `num_layers` steps. Global tokens,
    such as the class token, collect from all patches in one layer and pass it on in the next.

    `mask` is bool [N, N], also as a tensor, or a list with the mask of each layer: None is full
    attention, but not all may be None. Raises ValueError if `num_layers` is negative, or larger
    than the list.
    """
    num_layers = check_integer("num_layers", num_layers, minimum=0)
    is_list = isinstance(mask, Sequence)
    if is_list and num_layers > len(mask):
        raise ValueError(f"num_layers is {num_layers}, but there are masks for {len(mask)} layers")
    masks = mask[:num_layers] if is_list else [mask] * num_layers
    num_patches = len(next(m for m in mask if m is not None)) if is_list else len(mask)
    if (num_global_tokens and num_layers >= 2) or any(m is None for m in masks):
        return np.ones((num_patches, num_patches), dtype=bool)

    itself = reached = np.eye(num_patches, dtype=bool)
    for layer_mask in masks:
        step = np.asarray(layer_mask, dtype=bool) | itself
        step = step.astype(np.float32)  # which numpy multiplies fast
        further = (step @ reached) > 0
        if not is_list and np.array_equal(further, reached):
            break
        reached = further
    return reached


def main(argv=None) -> int:
    """Print or draw masks: see report/mask_command_line.py, which needs what is above this file."""
    from report import mask_command_line

    return mask_command_line.main(argv)


if __name__ == "__main__":
    utils.run_cli(main)
