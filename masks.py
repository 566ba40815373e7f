"""Local attention patterns on the patch grid, and the boolean masks built from them.

A mask is a `torch.bool` tensor [N, N] over the N = height * width patches in row-major order:
True = query patch i (row) may attend to key patch j (column). The diagonal is always True.
Neighborhoods are truncated at the border: a border patch has fewer neighbors, and nothing wraps
around in 2D. Masks know nothing about class tokens, models or devices.

Each 2D pattern is one line in `PATTERNS`: a condition on the positions of two patches, usually on
the offset (dy, dx) between them. Add a pattern there, and it becomes a `--mask_type` of every
script, together with its 1D twin: a window on the flattened sequence with the same nominal number
of neighbors, so that shapes are compared at an equal budget.

`MaskSpec` refers to a pattern by name: `MaskSpec("2d_cardinal", 2).build(14, 14)` builds its mask.

    python masks.py --mask_type 2d_cardinal --expansion_step 2 --grid 7x10
"""

from __future__ import annotations

import argparse
import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Masks are built with numpy, so that the launcher can list the mask types without loading torch.
import numpy as np

import utils

if TYPE_CHECKING:
    import torch


class Positions(NamedTuple):
    """Rows and columns of patches: integer arrays that broadcast against those of other patches."""

    y: np.ndarray
    x: np.ndarray


@dataclass(frozen=True)
class Pattern:
    """A 2D neighborhood: who may attend to whom, and how many neighbors that makes."""

    # (query, key, step) -> bool: may the query patch attend to the key patch?
    allows: Callable[[Positions, Positions, int], np.ndarray]
    # step -> nominal number of neighbors: away from the border, the patch itself included
    num_neighbors: Callable[[int], int]
    has_1d_twin: bool = True


def by_offset(allows: Callable[[np.ndarray, np.ndarray, int], np.ndarray]) -> Callable:
    """Turn a condition on offsets, (dy, dx, step) -> bool, into one on positions.

    The offset points from the query patch to the key patch.
    """
    return lambda query, key, step: allows(key.y - query.y, key.x - query.x, step)


PATTERNS = {
    "cardinal": Pattern(
        allows=by_offset(
            lambda dy, dx, s: ((dy == 0) & (abs(dx) <= s)) | ((dx == 0) & (abs(dy) <= s))
        ),
        num_neighbors=lambda s: 1 + 4 * s,
    ),
    "all_neighbors": Pattern(
        allows=by_offset(lambda dy, dx, s: (abs(dy) <= s) & (abs(dx) <= s)),
        num_neighbors=lambda s: (2 * s + 1) ** 2,
    ),
}

MASK_TYPES = (
    "full",
    *(f"1d_{name}" for name, pattern in PATTERNS.items() if pattern.has_1d_twin),
    *(f"2d_{name}" for name in PATTERNS),
)

MAX_PATCHES = 65_536  # 256 x 256: a mask of 4 GiB
MAX_COMPARED = 4096  # 64 x 64: a mask of 16 MiB


# --------------------------------------------------------------------------------------------------
# A pattern by its name


@dataclass(frozen=True)
class MaskSpec:
    """Which pattern, and how far it reaches: `--mask_type` and `--expansion_step` in one object.

    Any name is accepted, even of a pattern that only exists in another checkout, so that its logs
    can be read here. `build` and `num_neighbors` raise ValueError if it is not in MASK_TYPES.
    """

    mask_type: str = "full"
    expansion_step: int | None = None  # reach, in patches; None for full

    def __post_init__(self):
        if self.mask_type == "full":
            object.__setattr__(self, "expansion_step", None)

    @property
    def is_known(self) -> bool:
        """Whether `build` can make it; a damaged or foreign log may name what it cannot."""
        step = self.expansion_step
        has_step = self.mask_type == "full" or (type(step) is int and step >= 0)
        return self.mask_type in MASK_TYPES and has_step

    @property
    def label(self) -> str:
        """Display name in tables and plots: `2d_cardinal, step 2`."""
        if self.expansion_step is None:
            return self.mask_type
        return f"{self.mask_type}, step {self.expansion_step}"

    @property
    def run_name(self) -> str:
        """Name of the run's folder: `2d_cardinal_expansion_2`."""
        if self.mask_type == "full":
            return self.mask_type
        return f"{self.mask_type}_expansion_{self.expansion_step}"

    def num_neighbors(self, num_patches: int) -> int:
        """Nominal number of neighbors: away from the border, the patch itself included.

        All `num_patches` for full attention.
        """
        pattern = self._pattern()
        if pattern is None:
            return num_patches
        step = _check_integer("expansion_step", self.expansion_step, minimum=0)
        return pattern.num_neighbors(step)

    def build(self, num_patches_height: int, num_patches_width: int) -> torch.Tensor | None:
        """The mask, bool [N, N]; None for full attention, which runs without a mask.

        Raises ValueError for more than MAX_PATCHES patches, whose mask would not fit into memory.
        """
        mask = self.build_array(num_patches_height, num_patches_width)
        return None if mask is None else _to_tensor(mask)

    def build_array(self, num_patches_height: int, num_patches_width: int) -> np.ndarray | None:
        """The same as a numpy array, for code that must not load torch."""
        pattern = self._pattern()
        if num_patches_height * num_patches_width > MAX_PATCHES:
            raise ValueError(
                f"the grid has {num_patches_height}x{num_patches_width} patches, at most "
                f"{MAX_PATCHES:,} are supported; use smaller images or larger patches"
            )

        if pattern is None:
            return None
        if self.mask_type.startswith("2d"):
            step = self.expansion_step
            return _generate_2d_mask(pattern, step, num_patches_height, num_patches_width)

        height = _check_integer("num_patches_height", num_patches_height, minimum=1)
        width = _check_integer("num_patches_width", num_patches_width, minimum=1)
        num_patches = height * width
        return _generate_1d_mask(self.num_neighbors(num_patches), num_patches)

    def identity(self, num_patches_height: int, num_patches_width: int) -> str:
        """Equal for two specs exactly if their masks on this grid are equal.

        Names differ more than masks do: `1d_cardinal` at step 2 and `1d_all_neighbors` at step 1
        are the same window of 9, and a step beyond the grid is full attention. On a grid of more
        than MAX_COMPARED patches only windows are compared, by their width.
        """
        num_patches = num_patches_height * num_patches_width
        if num_patches > MAX_COMPARED:
            is_window = self.mask_type.startswith("1d")
            return str(self.num_neighbors(num_patches)) if is_window else self.run_name

        mask = self.build_array(num_patches_height, num_patches_width)
        if mask is None or mask.all():
            return "full"
        return hashlib.sha256(np.packbits(mask)).hexdigest()

    def _pattern(self) -> Pattern | None:
        """The pattern, or None for full. Raises ValueError for an unknown name."""
        if self.mask_type not in MASK_TYPES:
            expected = ", ".join(MASK_TYPES)
            raise ValueError(f"unknown mask type {self.mask_type!r}; expected one of {expected}")
        if self.mask_type == "full":
            return None
        _, _, name = self.mask_type.partition("_")  # without 1d_ or 2d_
        return PATTERNS[name]


def build_attention_mask(
    mask_type: str, expansion_step: int | None, num_patches_height: int, num_patches_width: int
) -> torch.Tensor | None:
    """The mask of a `--mask_type`: bool [N, N], or None for `full`. See `MaskSpec.build`."""
    return MaskSpec(mask_type, expansion_step).build(num_patches_height, num_patches_width)


# --------------------------------------------------------------------------------------------------
# Masks


def generate_1d_attention_mask(num_neighbors: int, N: int) -> torch.Tensor:
    """A window of `num_neighbors` tokens (odd, itself included) centered on each of the N tokens.

    The window slides over the flattened sequence. On a patch grid it therefore continues past the
    end of a row into the next one, which is what makes it 1D.

    Returns bool [N, N]. Raises ValueError if `num_neighbors` is even or not positive, or if `N` is
    not positive.
    """
    return _to_tensor(_generate_1d_mask(num_neighbors, N))


def _generate_1d_mask(num_neighbors: int, N: int) -> np.ndarray:
    num_neighbors = _check_integer("num_neighbors", num_neighbors, minimum=1)
    N = _check_integer("N", N, minimum=1)
    if num_neighbors % 2 == 0:
        raise ValueError(
            f"num_neighbors must be odd, so that the window has a center; got {num_neighbors}"
        )

    radius = min(num_neighbors // 2, N)
    up_to_the_end = np.tri(N, N, radius, dtype=bool)  # j <= i + radius
    before_the_start = np.tri(N, N, -radius - 1, dtype=bool)  # j < i - radius
    return up_to_the_end & ~before_the_start


def generate_2d_attention_mask_cardinal(
    expansion_step: int, num_patches_height: int, num_patches_width: int
) -> torch.Tensor:
    """A plus: the patch itself and up to `expansion_step` patches up, down, left and right.

    Returns bool [N, N].
    """
    pattern = PATTERNS["cardinal"]
    mask = _generate_2d_mask(pattern, expansion_step, num_patches_height, num_patches_width)
    return _to_tensor(mask)


def generate_2d_attention_mask_all_neighbors(
    expansion_step: int, num_patches_height: int, num_patches_width: int
) -> torch.Tensor:
    """A square of side `2 * expansion_step + 1` centered on the patch. Returns bool [N, N]."""
    pattern = PATTERNS["all_neighbors"]
    mask = _generate_2d_mask(pattern, expansion_step, num_patches_height, num_patches_width)
    return _to_tensor(mask)


def compute_num_neighbors_cardinal(expansion_step: int) -> int:
    """Nominal number of neighbors of the plus (itself included, away from the border): 1 + 4s."""
    step = _check_integer("expansion_step", expansion_step, minimum=0)
    return PATTERNS["cardinal"].num_neighbors(step)


def compute_num_neighbors_all_neighbors(expansion_step: int) -> int:
    """Nominal number of neighbors of the square (itself included, away from the border).

    (2s + 1)² for step s.
    """
    step = _check_integer("expansion_step", expansion_step, minimum=0)
    return PATTERNS["all_neighbors"].num_neighbors(step)


def _generate_2d_mask(pattern: Pattern, expansion_step: int, height: int, width: int) -> np.ndarray:
    step = _check_integer("expansion_step", expansion_step, minimum=0)
    height = _check_integer("num_patches_height", height, minimum=1)
    width = _check_integer("num_patches_width", width, minimum=1)

    rows = np.arange(height, dtype=np.int32)
    columns = np.arange(width, dtype=np.int32)
    # The axes of a pair of patches: query row, query column, key row, key column.
    query = Positions(y=rows[:, None, None, None], x=columns[:, None, None])
    key = Positions(y=rows[:, None], x=columns)

    # Offsets are [height, 1, height, 1] and [width, 1, width]: small. Only the last step of the
    # condition broadcasts to all pairs, and it is boolean: one byte per pair.
    allowed = pattern.allows(query, key, step)
    allowed = np.broadcast_to(allowed, (height, width, height, width))
    return allowed.reshape(height * width, height * width)


def reachable(mask: np.ndarray, num_layers: int, num_global_tokens: int = 0) -> np.ndarray:
    """Whether information of patch j can have reached patch i after `num_layers` layers.

    Each layer is one step along the mask, so these are the neighborhoods of `num_layers` steps.
    Global tokens, such as the class token, collect from all patches in one layer and pass it on to
    all in the next. `mask` is bool [N, N], also as a tensor. Returns bool [N, N], True at [i, j].
    Raises ValueError if `num_layers` is negative.
    """
    num_layers = _check_integer("num_layers", num_layers, minimum=0)
    step = np.asarray(mask, dtype=np.float32)
    if num_global_tokens and num_layers >= 2:
        return np.ones(step.shape, dtype=bool)

    reached = np.eye(len(step), dtype=bool)
    for _ in range(num_layers):
        further = (reached @ step) > 0  # float32, which numpy multiplies fast
        if np.array_equal(further, reached):
            break
        reached = further
    return reached


def _to_tensor(mask: np.ndarray) -> torch.Tensor:
    import torch  # deferred: see the import of numpy

    return torch.from_numpy(np.require(mask, requirements=["C", "W"]))


def _check_integer(name: str, value, minimum: int) -> int:
    """`value` as an int. Raises ValueError if it is no integer (bools are none) or too small."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None

    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


# --------------------------------------------------------------------------------------------------
# The command line: look at a mask without plotting it


def parse_args(argv=None):
    parser = utils.ArgumentParser(
        description="Print the neighborhood of a patch, or draw all mask types."
    )
    add = parser.add_argument
    add("--mask_type", choices=MASK_TYPES, default="2d_cardinal", help="attention pattern")
    add("--expansion_step", type=int, default=1, metavar="S", help="how far it reaches, in patches")
    add("--grid", type=parse_pair, default="14x14", metavar="HxW", help="rows x columns of patches")
    add("--patch", type=parse_pair, metavar="RxC", help="row x column of a patch (default: center)")
    draw_help = "draw all mask types at this step and grid into FILE (.png, .svg)"
    add("--picture", metavar="FILE", help=draw_help)
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
    """How many neighbors a patch has, and the neighborhood of one patch as characters."""
    height, width = args.grid
    spec = MaskSpec(args.mask_type, args.expansion_step)
    mask = spec.build(height, width)
    if mask is None:  # full attention, shown as the square that covers the grid
        mask = generate_2d_attention_mask_all_neighbors(max(height, width), height, width)

    row, column = args.patch or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"--patch {row}x{column} lies outside the {height}x{width} grid "
            "(rows and columns count from 0)"
        )

    nominal = spec.num_neighbors(height * width)
    neighbors = mask.sum(1, dtype=float)  # [N]
    summary = (
        f"{args.mask_type}, expansion step {args.expansion_step}, grid {height}x{width}: "
        f"{nominal} neighbors nominal, {neighbors.mean():.1f} on average, "
        f"{int(neighbors[row * width + column])} of patch {row}x{column}"
    )
    return f"{summary}\n{format_neighborhood(mask, height, width, row, column)}"


def format_neighborhood(mask: torch.Tensor, height: int, width: int, row: int, column: int) -> str:
    """The grid as characters: `@` the patch, `#` what it attends to, `.` what it does not."""
    neighborhood = mask[row * width + column].reshape(height, width).numpy()
    cells = np.where(neighborhood, "#", ".")
    cells[row, column] = "@"
    return "\n".join(" ".join(line) for line in cells)


def draw_all(args) -> str:
    from report import figures, mask_pictures  # deferred: only this needs matplotlib

    masks = {
        mask_type: build_attention_mask(mask_type, args.expansion_step, *args.grid)
        for mask_type in MASK_TYPES
    }
    figures.save(mask_pictures.draw_mask_types(masks, *args.grid), Path(args.picture))
    return f"wrote {args.picture}"


if __name__ == "__main__":
    utils.run_cli(main)
