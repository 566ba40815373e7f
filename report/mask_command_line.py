"""The command line of masks.py: look at a mask without training anything. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import masks
import utils
from masks import MaskSpec
from patterns.table import TYPES
from report import figures, mask_pictures
from training.settings import FLAGS, MASK_FLAGS

CHOICES = {"mask_type": masks.MASK_TYPES, "edge": masks.EDGES}
# Beside the mask types at the step asked for, a picture of all patterns shows what changes these.
VARIANTS = (
    ("2d_all_neighbors", {"dilation": 2}),
    ("2d_all_neighbors", {"edge": "shift"}),
    ("2d_circle", {"edge": "shift"}),
)


def parse_args(argv=None):
    parser = utils.ArgumentParser(
        description="Print the neighborhood of a patch, or draw all patterns."
    )
    group = parser.add_argument_group("which mask, as in main.py")
    for name in MASK_FLAGS:
        about = FLAGS[name].metadata
        options = {name: about[name] for name in ("help", "type", "metavar", "default")}
        if name == "mask_type":
            options["help"] += " (default: 2d_cardinal)"
        if name in CHOICES:
            options["choices"] = CHOICES[name]
        group.add_argument(f"--{name}", **options)
    parser.set_defaults(mask_type=None)  # decided in `main`, as the help says

    group = parser.add_argument_group("what to show")
    add = group.add_argument
    pair = utils.parse_pair
    at_least_0 = utils.number_type(int, minimum=0)
    add("--grid", type=pair, default="14x14", metavar="HxW", help="rows x columns of patches")
    add("--patch", type=pair, metavar="RxC", help="row x column of a patch (default: center)")
    add("--layer", type=at_least_0, default=0, metavar="L", help="layer, counted from 0")
    add("--picture", metavar="FILE", help="draw patterns at this step and grid (.png, .svg)")
    types = utils.json_list(str, masks.MASK_TYPES)
    picture_help = "patterns of the picture (default: all)"
    add("--mask_types", type=types, metavar="JSON", help=picture_help)
    args = parser.parse_args(argv)
    if args.picture:
        unused = [name for name in MASK_FLAGS if name not in ("expansion_step", "mask_seed")]
        reason = "--picture draws all patterns, or those in --mask_types, and variants of them"
        parser.refuse(args, [*unused, "patch", "layer"], reason)
    else:
        parser.refuse(args, ["mask_types"], "without --picture, --mask_type is printed")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.mask_type is None:
        args.mask_type = "2d_cardinal" if args.mask_file is None else "file"
    with utils.usage_errors():
        print(draw(args) if args.picture else describe(args))
    return 0


def describe(args) -> str:
    """How many neighbors a patch has, and the neighborhood of one patch as characters."""
    height, width = args.grid
    spec = MaskSpec.of_flags(**{name: getattr(args, name) for name in MASK_FLAGS})
    mask = spec.build_array(height, width, args.layer)
    if mask is None:
        mask = np.ones((height * width, height * width), dtype=bool)

    row, column = args.patch or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"--patch {row}x{column} lies outside the {height}x{width} grid "
            "(rows and columns count from 0)"
        )

    in_layer = f" in layer {args.layer}" if args.layer else ""
    summary = (
        f"{spec.label}, grid {height}x{width}{in_layer}: "
        f"{spec.num_neighbors(height, width)} neighbors nominal, "
        f"{mask.sum(1).mean():.1f} on average, "
        f"{mask[row * width + column].sum()} of patch {row}x{column}"
    )
    return f"{summary}\n{format_neighborhood(mask, height, width, row, column)}"


def format_neighborhood(mask: np.ndarray, height: int, width: int, row: int, column: int) -> str:
    """The grid as characters: `@` the patch, `#` what it attends to, `.` what it does not."""
    neighborhood = mask[row * width + column].reshape(height, width)
    cells = np.where(neighborhood, "#", ".")
    cells[row, column] = "@"
    return "\n".join(" ".join(line) for line in cells)


def draw(args) -> str:
    figure = mask_pictures.draw_mask_types(pictured(args), *args.grid)
    figures.save(figure, Path(args.picture))
    return f"wrote {args.picture}"


def pictured(args) -> dict[str, tuple[str, np.ndarray | None]]:
    """Title -> (mask type, mask) of each pattern in the picture."""
    shown = {}
    for mask_type in args.mask_types or masks.MASK_TYPES:
        spec = MaskSpec(mask_type, args.expansion_step, mask_seed=args.mask_seed)
        shown[mask_type] = (mask_type, spec.build_array(*args.grid))
        if TYPES[mask_type].num_kinds > 1:
            shown[f"{mask_type}, layer 1"] = (mask_type, spec.build_array(*args.grid, 1))

    if args.mask_types is None:
        for mask_type, changes in VARIANTS:
            spec = MaskSpec(mask_type, args.expansion_step, **changes)
            shown[spec.family] = (mask_type, spec.build_array(*args.grid))
    return shown
