"""Local attention patterns on the patch grid, and the boolean masks made from them.

A mask is a `torch.bool` tensor of shape [N, N] over the N = height * width patches in row-major order; True = query
patch i (row) may attend to key patch j (column). The diagonal is always True. Neighborhoods are truncated at the
border: a border patch has fewer neighbors, nothing wraps around in 2D. Masks know no class token, no model, no device.

A `MaskSpec` names a pattern; `MaskSpec("2d_cardinal", 2).build(14, 14)` makes its mask. Each 2D pattern is one line, a
condition on the positions of two patches, most often on the offset (dy, dx) between them. A pattern added to `PATTERNS`
is at once a `--mask_type` of every script, together with its 1D twin: a window on the flattened sequence with the same
nominal number of neighbors, so that shapes are compared at equal budget.

    python masks.py --mask_type 2d_cardinal --expansion_step 2 --grid 7x10
"""

from __future__ import annotations

import argparse
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np  # numpy makes the masks, so that the launcher can list the mask types without loading torch

import utils

if TYPE_CHECKING:
    import torch


class Positions(NamedTuple):
    """Rows and columns of patches: integer arrays that broadcast against those of other patches."""

    y: np.ndarray
    x: np.ndarray


@dataclass(frozen=True)
class Pattern:
    """A 2D neighborhood: who may attend to whom, and how many patches that makes away from the border."""

    allows: Callable[[Positions, Positions, int], np.ndarray]  # (query, key, step) -> bool
    num_neighbors: Callable[[int], int]  # step -> nominal number of neighbors, the patch itself included
    has_1d_twin: bool = True


def by_offset(allows: Callable[[np.ndarray, np.ndarray, int], np.ndarray]) -> Callable:
    """The same condition everywhere: (dy, dx, step) -> bool of the offset from the query to the key patch."""
    return lambda query, key, step: allows(key.y - query.y, key.x - query.x, step)


PATTERNS = {
    "cardinal": Pattern(
        allows=by_offset(lambda dy, dx, s: ((dy == 0) & (abs(dx) <= s)) | ((dx == 0) & (abs(dy) <= s))),
        num_neighbors=lambda s: 1 + 4 * s,
    ),
    "all_neighbors": Pattern(
        allows=by_offset(lambda dy, dx, s: (abs(dy) <= s) & (abs(dx) <= s)),
        num_neighbors=lambda s: (2 * s + 1) ** 2,
    ),
}

MAX_PATCHES = 65_536  # 256 x 256: a mask of 4 GiB
MASK_TYPES = (
    "full",
    *(f"1d_{name}" for name, pattern in PATTERNS.items() if pattern.has_1d_twin),
    *(f"2d_{name}" for name in PATTERNS),
)


# ---------------------------------------------------------------------------------------------------------------------
# A pattern by its name


@dataclass(frozen=True)
class MaskSpec:
    """Which pattern, and how far it reaches: what `--mask_type` and `--expansion_step` say together.

    Any name can be spelled, also that of a pattern which only another checkout has; `build` and `num_neighbors` raise
    ValueError for one that is not in MASK_TYPES.
    """

    mask_type: str = "full"
    expansion_step: int | None = None  # reach, in patches; None for full

    def __post_init__(self):
        if self.mask_type == "full":
            object.__setattr__(self, "expansion_step", None)

    @classmethod
    def from_settings(cls, settings: dict) -> MaskSpec:
        """That of a run, by the settings in its config.json or checkpoint."""
        return cls(settings["mask_type"], settings["expansion_step"])

    @property
    def label(self) -> str:
        """As tables and pictures name it: `2d_cardinal, step 2`."""
        return self.mask_type if self.expansion_step is None else f"{self.mask_type}, step {self.expansion_step}"

    @property
    def run_name(self) -> str:
        """As folders of runs name it: `2d_cardinal_expansion_2`."""
        return self.mask_type if self.mask_type == "full" else f"{self.mask_type}_expansion_{self.expansion_step}"

    def num_neighbors(self, num_patches: int) -> int:
        """Nominal: of a patch away from every border, itself included; all `num_patches` for full."""
        pattern = self._pattern()
        if pattern is None:
            return num_patches
        return pattern.num_neighbors(_check_integer("expansion_step", self.expansion_step, minimum=0))

    def build(self, num_patches_height: int, num_patches_width: int) -> torch.Tensor | None:
        """The mask, bool [N, N], or None for full, which attends without any mask.

        Raises ValueError for more than MAX_PATCHES patches, whose mask would not fit into memory.
        """
        pattern = self._pattern()
        if num_patches_height * num_patches_width > MAX_PATCHES:
            raise ValueError(
                f"the grid has {num_patches_height}x{num_patches_width} patches, at most {MAX_PATCHES:,} in all are "
                "possible; use smaller images or larger patches"
            )
        if pattern is None:
            return None
        if self.mask_type.startswith("2d"):
            return _generate_2d_mask(pattern, self.expansion_step, num_patches_height, num_patches_width)
        height = _check_integer("num_patches_height", num_patches_height, minimum=1)
        width = _check_integer("num_patches_width", num_patches_width, minimum=1)
        return generate_1d_attention_mask(self.num_neighbors(height * width), height * width)

    def _pattern(self) -> Pattern | None:
        """None for full. Raises ValueError for an unknown name."""
        if self.mask_type not in MASK_TYPES:
            raise ValueError(f"unknown mask type {self.mask_type!r}; expected one of {', '.join(MASK_TYPES)}")
        return None if self.mask_type == "full" else PATTERNS[self.mask_type[len("1d_") :]]


def build_attention_mask(
    mask_type: str, expansion_step: int | None, num_patches_height: int, num_patches_width: int
) -> torch.Tensor | None:
    """The mask of a `--mask_type`: bool [N, N], or None for `full`. See `MaskSpec.build`."""
    return MaskSpec(mask_type, expansion_step).build(num_patches_height, num_patches_width)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def generate_1d_attention_mask(num_neighbors: int, N: int) -> torch.Tensor:
    """Window of `num_neighbors` tokens (odd, the token itself included) centered on each of the N tokens.

    The window is taken on the flattened sequence: on a patch grid it runs on over the end of a row; that makes it 1D.
    Returns bool [N, N]. Raises ValueError if `num_neighbors` is even or not positive, or `N` is not positive.
    """
    num_neighbors = _check_integer("num_neighbors", num_neighbors, minimum=1)
    N = _check_integer("N", N, minimum=1)
    if num_neighbors % 2 == 0:
        raise ValueError(f"num_neighbors must be odd, so that the window has a center; got {num_neighbors}")
    radius = min(num_neighbors // 2, N)
    return _to_tensor(np.tri(N, N, radius, dtype=bool) & ~np.tri(N, N, -radius - 1, dtype=bool))


def generate_2d_attention_mask_cardinal(
    expansion_step: int, num_patches_height: int, num_patches_width: int
) -> torch.Tensor:
    """Plus shape: the patch itself and up to `expansion_step` patches up, down, left and right. Returns bool [N, N]."""
    return _generate_2d_mask(PATTERNS["cardinal"], expansion_step, num_patches_height, num_patches_width)


def generate_2d_attention_mask_all_neighbors(
    expansion_step: int, num_patches_height: int, num_patches_width: int
) -> torch.Tensor:
    """Square of side `2 * expansion_step + 1` centered on the patch. Returns bool [N, N]."""
    return _generate_2d_mask(PATTERNS["all_neighbors"], expansion_step, num_patches_height, num_patches_width)


def compute_num_neighbors_cardinal(expansion_step: int) -> int:
    """Nominal neighbors (the patch itself included, no border) of the plus shape: 1 + 4 * step."""
    return PATTERNS["cardinal"].num_neighbors(_check_integer("expansion_step", expansion_step, minimum=0))


def compute_num_neighbors_all_neighbors(expansion_step: int) -> int:
    """Nominal neighbors (the patch itself included, no border) of the square: (2 * step + 1) ** 2."""
    return PATTERNS["all_neighbors"].num_neighbors(_check_integer("expansion_step", expansion_step, minimum=0))


def _generate_2d_mask(pattern: Pattern, expansion_step: int, height: int, width: int) -> torch.Tensor:
    step = _check_integer("expansion_step", expansion_step, minimum=0)
    height = _check_integer("num_patches_height", height, minimum=1)
    width = _check_integer("num_patches_width", width, minimum=1)
    y, x = np.arange(height, dtype=np.int32), np.arange(width, dtype=np.int32)
    query = Positions(y[:, None, None, None], x[:, None, None])  # [H, 1, 1, 1], [W, 1, 1]
    key = Positions(y[:, None], x)  # [H, 1], [W]
    # Only the last step of the condition broadcasts to [H, W, H, W], and that one is boolean: a byte a pair of patches.
    allowed = np.broadcast_to(pattern.allows(query, key, step), (height, width, height, width))
    return _to_tensor(allowed.reshape(height * width, height * width))


def _to_tensor(mask: np.ndarray) -> torch.Tensor:
    import torch  # deferred: see the import of numpy

    return torch.from_numpy(np.require(mask, requirements=["C", "W"]))


def _check_integer(name: str, value, minimum: int) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


# ---------------------------------------------------------------------------------------------------------------------
# Looking at a mask without plotting it


def format_neighborhood(mask: torch.Tensor, height: int, width: int, row: int, column: int) -> str:
    """The grid as characters: `@` the patch at (row, column), `#` what it attends to, `.` what it does not."""
    cells = np.where(mask[row * width + column].reshape(height, width).numpy(), "#", ".")
    cells[row, column] = "@"
    return "\n".join(" ".join(line) for line in cells)


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Print the neighborhood of a patch, or draw all mask types.")
    parser.add_argument("--mask_type", choices=MASK_TYPES, default="2d_cardinal", help="attention pattern")
    parser.add_argument("--expansion_step", type=int, default=1, metavar="S", help="reach of the pattern, in patches")
    parser.add_argument("--grid", type=parse_pair, default=(14, 14), metavar="HxW", help="patch grid, rows x columns")
    parser.add_argument(
        "--patch", type=parse_pair, metavar="RxC", help="row x column of the patch (default: the center)"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="draw every mask type of this step and grid into FILE (.png, .svg)"
    )
    return parser.parse_args(argv)


def parse_pair(text: str) -> tuple[int, int]:
    """`'7x10'` -> `(7, 10)`."""
    try:
        first, second = text.lower().split("x")
        return int(first), int(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two integers like 7x10, got {text!r}") from None


def main(argv=None) -> int:
    args = parse_args(argv)
    with utils.usage_errors():
        print(draw_all(args) if args.picture else describe(args))
    return 0


def describe(args) -> str:
    """The mask's numbers of neighbors, and the neighborhood of one patch as characters."""
    height, width = args.grid
    spec = MaskSpec(args.mask_type, args.expansion_step)
    mask = spec.build(height, width)
    if mask is None:
        mask = generate_2d_attention_mask_all_neighbors(max(height, width), height, width)
    row, column = args.patch or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"--patch {row}x{column} lies outside the {height}x{width} grid (rows and columns count from 0)"
        )
    nominal = spec.num_neighbors(height * width)
    return (
        f"{args.mask_type}, expansion step {args.expansion_step}, grid {height}x{width}: {nominal} neighbors nominal, "
        f"{mask.sum(1, dtype=float).mean():.1f} on average, "
        f"{int(mask[row * width + column].sum())} of patch {row}x{column}\n"
        + format_neighborhood(mask, height, width, row, column)
    )


def draw_all(args) -> str:
    from report import figures, mask_pictures  # deferred: matplotlib is only needed here

    masks = {name: build_attention_mask(name, args.expansion_step, *args.grid) for name in MASK_TYPES}
    figures.save(mask_pictures.draw_mask_types(masks, *args.grid), Path(args.picture))
    return f"wrote {args.picture}"


if __name__ == "__main__":
    utils.run_cli(main)
