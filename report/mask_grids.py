"""The masks of a table as the page shows them: grids that answer to the pointer.

Without JavaScript they show the neighborhood of the patch in the center.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np

import masks
from report import figures, text
from report.comparison import Study
from report.logs import Run
from report.results import Row, is_grid

MAX_GRIDS = 24
DEFAULT_DEPTH = 12  # of a run that did not write it
MAX_DEPTH = 1000


def describe(results: Study) -> dict | None:
    """What the template needs; None if the grid is unknown or too large to play with.

    Rows with a grid other than that of the first one are left out, and of several rows with one
    mask there is one.
    """
    first = results.rows[0].runs[0]
    grid = first.config["attention"].get("grid")
    shown = _rows_to_show(results, grid)
    if not shown:
        return None

    height, width = grid
    center = (height // 2) * width + width // 2
    depth = depth_of(first)
    grids, layers = [], []
    matrices = {}  # encoded -> its place; None is full attention
    for row in shown:
        arrays = row.mask.build_layer_arrays(height, width, depth_of(row.runs[0]))
        neighborhood = np.ones(height * width, bool) if arrays[0] is None else arrays[0][center]
        number = int(neighborhood.sum())
        color = figures.style_of(row.mask.mask_type, family=row.place)["color"]
        if row.mask.mask_type == "full":  # black would hide the patch itself
            color = figures.blend(color, "#888888", 0.8)
        grids.append(
            {
                "label": text.one_line(row.mask.label),
                "color": color,
                "path": outline(neighborhood.nonzero()[0], width),
                "count": f"{number} neighbor" + ("" if number == 1 else "s"),
            }
        )
        encoded = {id(array): None if array is None else encode(array) for array in arrays}
        names = [encoded[id(array)] for array in arrays]
        layers.append([matrices.setdefault(name, len(matrices)) for name in names])

    return {
        "height": height,
        "width": width,
        "depth": depth,
        "has_global_tokens": first.settings.model.pool == "cls" or shown[0].num_registers > 0,
        "query": outline([center], width),
        "rules": rules(height, width),
        "grids": grids,
        "data": {"height": height, "width": width, "matrices": list(matrices), "layers": layers},
        "note": _note(len(shown), results),
    }


def depth_of(run: Run) -> int:
    depth = run.settings.model.depth
    return depth if type(depth) is int and 0 < depth <= MAX_DEPTH else DEFAULT_DEPTH


def _rows_to_show(results: Study, grid: object) -> list[Row]:
    if not is_grid(grid) or grid[0] * grid[1] > masks.MAX_COMPARED:
        return []

    by_mask = {}
    for row in results.distinct:
        same_grid = row.runs[0].config["attention"].get("grid") == grid
        has_layers = max(row.mask.global_layers, default=0) < depth_of(row.runs[0])
        if row.mask.is_known and same_grid and has_layers:
            by_mask.setdefault(row.mask, row)
    return list(by_mask.values())[:MAX_GRIDS]


def _note(num_shown: int, results: Study) -> str:
    note = (
        "Black: a patch. Color: what it attends to in the last of these layers. Lighter: what can "
        "have reached it after all of them, each of which passes on what it has seen. A global "
        "token, such as a class token or a register, sees all patches in one layer and passes them "
        "on in the next, to every patch."
    )
    num_masks = len({row.mask for row in results.distinct})
    if num_shown < num_masks:
        note += f" Shown are {num_shown} of {num_masks} masks."
    return note


def encode(allowed: np.ndarray) -> str:
    """Bool [N, N] -> its bits in row-major order, first the highest of a byte; zlib, base64."""
    return base64.b64encode(zlib.compress(np.packbits(allowed).tobytes(), 9)).decode()


def outline(patches, width: int) -> str:
    """An SVG path of unit squares."""
    return "".join(f"M{i % width} {i // width}h1v1h-1z" for i in map(int, patches))


def rules(height: int, width: int) -> str:
    """An SVG path of the lines between the patches; none on a fine grid."""
    if max(height, width) > 40:
        return ""
    across = "".join(f"M0 {y}h{width}" for y in range(1, height))
    return across + "".join(f"M{x} 0v{height}" for x in range(1, width))
