"""Rewrite the tables of docs/kernels.md: the kernels of the backend `tiled`, compiled and counted.

    python docs/kernels.py   # a minute, and no GPU

A change of a kernel shows in the difference of that file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# The repository, wherever this is called from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import masks
import utils
from attention.tiles import BLOCK, find_tiles
from benchmarks.machine_code import DTYPES, KERNELS, compile_kernel, issue_bound_seconds

PAGE = utils.REPOSITORY / "docs" / "kernels.md"
CAPABILITIES = {80: "A100", 90: "H100", 100: "B200"}
CONFIGURATIONS = [
    *((torch.bfloat16, head_dim) for head_dim in (32, 64, 128)),
    (torch.float32, 64),
]

# Issue-bound times: images times heads, and the cases (mask type, step, grid side, global tokens)
NUM_HEADS = 96
CASES = [
    *(("2d_all_neighbors", step, 64, 0) for step in (1, 2, 3)),
    ("2d_cardinal", 2, 64, 0),
    ("1d_all_neighbors", 2, 64, 0),
    *(("2d_all_neighbors", 2, side, 0) for side in (14, 28, 128)),
    *(("2d_all_neighbors", 2, side, 1) for side in (14, 64)),
]


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def count_table() -> str:
    rows = []
    for capability, gpu in CAPABILITIES.items():
        for dtype, head_dim in CONFIGURATIONS:
            for name in KERNELS:
                count = compile_kernel(name, capability, dtype, head_dim)
                # Blackwell's tensor cores work on their own, and are waited for in further loops.
                is_simple = capability < 100
                rows.append(
                    [
                        f"{gpu}, sm_{capability}",
                        f"{DTYPES[dtype]}, {head_dim}",
                        name.removesuffix("_kernel"),
                        count.registers,
                        count.spilled_bytes,
                        count.shared_bytes,
                        count.num_warps,
                        count.instructions if is_simple else "–",
                        count.loop_instructions if is_simple else "–",
                        count.tensor_core_instructions,
                    ]
                )
    header = ["GPU", "type, head dim", "kernel", "registers", "spilled bytes", "shared bytes"]
    return table([*header, "warps", "instructions", "in the loop", "on tensor cores"], rows)


def time_table() -> str:
    counts = {
        capability: {name: compile_kernel(name, capability, torch.bfloat16, 64) for name in KERNELS}
        for capability in (80, 90)
    }
    rows = []
    for mask_type, step, side, num_global in CASES:
        mask = masks.build_attention_mask(mask_type, step, side, side)
        lists = find_tiles(mask, num_global)
        microseconds = [
            f"{1e6 * issue_bound_seconds(counts[capability], lists, NUM_HEADS, capability):.0f}"
            for capability in (90, 80)
        ]
        longest = int(lists.starts.diff().max()) * BLOCK
        pattern = f"`{mask_type}`, {step}"
        case = [f"{side}×{side}", pattern, num_global, len(lists.tokens), longest]
        rows.append([*case, *microseconds])
    header = ["grid", "pattern, step", "global tokens", "tiles", "longest list"]
    return table([*header, "H100, µs", "A100, µs"], rows)


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between the marks of this name."""
    begin, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), name
    return pattern.sub(lambda _: begin + content + end, text)


def main() -> None:
    import triton

    contents = {
        "versions": f"Compiled by Triton {triton.__version__} of torch {torch.__version__}.",
        "counts": count_table(),
        "times": time_table(),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = fill(text, name, content)
    utils.write_text(PAGE, text)


if __name__ == "__main__":
    main()
