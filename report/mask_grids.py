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
from report.results import Row, is_grid

MAX_GRIDS = 24
DEFAULT_DEPTH = 12  # of a run that did not write it


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
    grids, data = [], []
    for row in shown:
        allowed = row.mask.build_array(height, width)
        neighborhood = np.ones(height * width, bool) if allowed is None else allowed[center]
        number = int(neighborhood.sum())
        color = figures.style_of(row.mask.mask_type)["color"]
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
        data.append(None if allowed is None else encode(allowed))

    return {
        "height": height,
        "width": width,
        "depth": first.settings.model.depth or DEFAULT_DEPTH,
        "has_class_token": first.settings.model.pool == "cls",
        "query": outline([center], width),
        "rules": rules(height, width),
        "grids": grids,
        "data": {"height": height, "width": width, "masks": data},
        "note": _note(len(shown), results),
    }


def _rows_to_show(results: Study, grid: object) -> list[Row]:
    if not is_grid(grid) or grid[0] * grid[1] > masks.MAX_COMPARED:
        return []

    by_mask = {}
    for row in results.distinct:
        same_grid = row.runs[0].config["attention"].get("grid") == grid
        if row.mask.is_known and same_grid:
            by_mask.setdefault(row.mask, row)
    return list(by_mask.values())[:MAX_GRIDS]


def _note(num_shown: int, results: Study) -> str:
    note = (
        "Black: a patch. Color: what it attends to in one layer. Lighter: what can have reached it "
        "after some layers, each of which passes on what it has seen. A class token sees all "
        "patches in one layer and passes them on in the next, to every patch."
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
