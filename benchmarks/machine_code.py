"""The kernels of attention/tiled.py as machine code, compiled without a GPU: what can be counted.

Triton compiles for any NVIDIA GPU, and brings NVIDIA's assembler and disassembler. Registers and
spills are in the result. Instructions are counted in it: those of the loop over the blocks of a
list count once per block, all others once per program. Divided by how many instructions all cores
of the GPU can issue per second, this is a lower bound of the time, `issue_bound_seconds`; memory
and latencies come on top.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from attention import tiled
from attention.tiles import TileLists

KERNELS = ("forward_kernel", "queries_kernel", "keys_kernel")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ROWS = ("LSE", "DELTA")  # always in fp32
NOT_SPECIALIZED = {"num_tokens", "STARTS"}
LISTS = ("TOKENS", "STARTS", "COLUMNS", "BITS")

# Compute capability -> warp instructions per second: multiprocessors * schedulers * clock
ISSUE_RATES = {80: 108 * 4 * 1.41e9, 90: 132 * 4 * 1.755e9}  # A100, H100 SXM

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")  # up to Ampere, Hopper, Blackwell
LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


@dataclass(frozen=True)
class Counts:
    """What one warp executes of a kernel, and what the kernel needs."""

    registers: int  # per thread
    spilled_bytes: int  # per thread, of registers that did not suffice
    shared_bytes: int  # per program
    num_warps: int  # per program
    instructions: int  # outside of the loop
    loop_instructions: int  # per block of a list
    tensor_core_instructions: int  # anywhere


def compile_kernel(name: str, capability: int, dtype: torch.dtype, head_dim: int) -> Counts:
    """Compile a kernel of attention/tiled_kernels.py, with aligned arguments as they usually are.

    `capability` is 80 for compute capability 8.0, and so on.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attention import tiled_kernels

    kernel = getattr(tiled_kernels, name)
    constants = tiled.constants(head_dim, dtype)
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
    place = {argument: n for n, argument in enumerate(kernel.arg_names)}
    signature = {argument: _type_of(argument, dtype, constants) for argument in place}

    is_aligned = {a for a, kind in signature.items() if kind not in ("constexpr", "fp32")}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(place[constant],): value for constant, value in constants.items()},
        attrs={(place[argument],): aligned for argument in is_aligned - NOT_SPECIALIZED},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, code = _disassemble(compiled.asm["cubin"], Path(triton.__file__).parent)
    return Counts(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared_bytes=compiled.metadata.shared,
        num_warps=options["num_warps"],
        **_count(code),
    )


def _type_of(argument: str, dtype: torch.dtype, constants: dict) -> str:
    """Triton's name of an argument's type: arrays are in capitals, and strides are not."""
    if argument in constants:
        return "constexpr"
    if argument == "scale":
        return "fp32"
    if argument in ROWS:
        return "*fp32"
    if argument in LISTS:
        return "*i32"
    return f"*{DTYPES[dtype]}" if argument.isupper() else "i32"


def _disassemble(binary: bytes, triton_folder: Path) -> tuple[str, str]:
    """What the binary uses, and its instructions, by NVIDIA's tools."""
    tools = triton_folder / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        commands = ([tools / "cuobjdump", "-res-usage", path], [tools / "nvdisasm", "-c", path])
        done = [
            subprocess.run(command, capture_output=True, text=True, check=True)
            for command in commands
        ]
    return done[0].stdout + done[0].stderr, done[1].stdout


def _count(code: str) -> dict[str, int]:
    """Instructions in and outside of the loop, and those for tensor cores.

    The loop is the longest stretch to which a branch leads back.
    """
    names, labels, loop = [], {}, 0
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.match(line):
            name, operands = found[1].split(".")[0], found[2]
            if name == "NOP":
                continue
            names.append(name)
            target = re.search(r"\.L_x_\d+", operands)
            if name == "BRA" and target and target[0] in labels:
                loop = max(loop, len(names) - labels[target[0]])

    counted = Counter(names)
    return {
        "instructions": len(names) - loop,
        "loop_instructions": loop,
        "tensor_core_instructions": sum(counted[name] for name in TENSOR_CORES),
    }


def issue_bound_seconds(
    counts: dict[str, Counts], lists: TileLists, num_heads: int, capability: int
) -> float:
    """How long a GPU takes at least to issue the instructions of a forward and backward.

    `counts` are those of the three kernels, `num_heads` images times heads.
    """
    num_tiles = len(lists.tokens)
    num_blocks = (lists.starts[:, -1] - lists.starts[:, 0]).tolist()
    blocks = dict(zip(KERNELS, (num_blocks[0], num_blocks[0], num_blocks[1]), strict=True))
    total = sum(
        count.num_warps * (num_tiles * count.instructions + blocks[name] * count.loop_instructions)
        for name, count in counts.items()
    )
    return num_heads * total / ISSUE_RATES[capability]
