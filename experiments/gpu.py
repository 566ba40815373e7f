"""What experiments/gpu.sh measures and no other script does; gpu.sh runs it.

    gpu.py ceilings FOLDER    versions; the rates of a copy and of matrix products
    gpu.py full FOLDER        full attention by the kernel that torch picks, by cuDNN and by FlashAttention-2
    gpu.py attention FOLDER   masked attention, one backend after the other
    gpu.py training FOLDER    training steps, and what share of the device's peak they reach
    gpu.py profile FOLDER     a trace of one epoch of few steps

`full` and `attention` take the flags of benchmark.py, the others those of its --level training. Each measurement is
appended to FOLDER/rows.jsonl as soon as it is made; one that fails becomes a row with its error, and the next one runs.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import benchmark
import models
import utils
from benchmarks import candidates, pipeline, training
from masks import MaskSpec
from runtime import hardware

KERNELS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
COPY_BYTES = {"cuda": 2**30}
SMALL_COPY = 2**26  # elsewhere
MATMUL_PRECISIONS = ("fp32", "tf32", "bf16")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events


class Rows:
    """FOLDER/rows.jsonl, to which a command appends."""

    def __init__(self, folder: Path, command: str, device: torch.device):
        self.path = folder / "rows.jsonl"
        self.origin = {"what": command, "device": hardware.device_name(device), "torch": torch.__version__}
        self.num_failed = 0

    def add(self, name: str, measure: Callable[..., dict], *arguments) -> None:
        """Measure and append; an error is appended as well."""
        try:
            found = measure(*arguments)
        except Exception as error:  # of a kernel, a compiler, the memory: the others can still be measured
            traceback.print_exc()
            self.num_failed += 1
            found = {"error": utils.first_line(error)}
        self.append({"name": name, **found})

    def leave_out(self, name: str, reason: str) -> None:
        self.append({"name": name, "left_out": reason})

    def append(self, row: dict) -> None:
        line = json.dumps({**self.origin, **row}, allow_nan=False)
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def measure_ceilings(rows: Rows, folder: Path, args, device: torch.device) -> None:
    rows.add("versions", versions, device)
    rows.add("copy", copy_rate, args.rounds, device)
    for precision in MATMUL_PRECISIONS:
        if precision == "tf32" and device.type != "cuda":
            rows.leave_out("matmul tf32", f"CUDA has it, {device.type} does not")
        else:
            rows.add(f"matmul {precision}", matmul_rate, precision, args.rounds, device)


def versions(device: torch.device) -> dict:
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    found = {"provenance": hardware.provenance(sys.argv[1:], device), "triton": triton}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return found


def driver_version() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or None


def copy_rate(rounds: int, device: torch.device) -> dict:
    num_bytes = COPY_BYTES.get(device.type, SMALL_COPY)
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of_rounds(lambda: target.copy_(source), rounds, device)
    return {"bytes_per_second": 2 * num_bytes / seconds, "bytes_is": "read and written"}


def matmul_rate(precision: str, rounds: int, device: torch.device) -> dict:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    product, flops = training.matrix_product("bf16" if precision == "bf16" else "fp32", device)
    return {"flops_per_second": flops / seconds_of_rounds(product, rounds, device)}


def seconds_of_rounds(function: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median seconds of a call, after two to warm up."""
    return statistics.median([hardware.seconds_of(function, device) for _ in range(2 + rounds)][2:])


# ---------------------------------------------------------------------------------------------------------------------
# Attention, by the flags of benchmark.py


def measure_full(rows: Rows, folder: Path, args, device: torch.device) -> None:
    for grid in args.grids:
        rows.add(f"full SDPA, {grid}x{grid}", full_row, args, grid, device)
        for name, kernel in KERNELS.items():
            if device.type == "cuda":
                rows.add(f"full SDPA, {name}, {grid}x{grid}", forced_row, args, grid, name, kernel, device)
            else:
                rows.leave_out(f"full SDPA, {name}, {grid}x{grid}", f"a kernel of CUDA, not of {device.type}")


def full_row(args, grid: int, device: torch.device) -> dict:
    """With the kernel that torch picks, which a claim about its speed should name."""
    batch_size, num_heads = candidates.shape_of(args, grid)
    dtype = candidates.DTYPES[args.dtype]
    q = torch.zeros(batch_size, num_heads, grid * grid, args.head_dim, device=device, dtype=dtype, requires_grad=True)
    kernel = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    return {"kernel": kernel} | row_of(args, grid, candidates.attention_candidates(args, grid, [], device), device)


def forced_row(args, grid: int, name: str, kernel: SDPBackend, device: torch.device) -> dict:
    (full,) = candidates.attention_candidates(args, grid, [], device)
    return row_of(args, grid, [full, with_kernel(full, name, kernel)], device)


def with_kernel(full: candidates.Candidate, name: str, kernel: SDPBackend) -> candidates.Candidate:
    """Full attention by this kernel alone."""

    def forced(function: Callable) -> Callable:
        def call():
            with sdpa_kernel(kernel):
                return function()

        return call

    backend = f"{candidates.FULL}, {name}"
    return replace(full, backend=backend, run=forced(full.run), check=forced(full.check))


def measure_attention(rows: Rows, folder: Path, args, device: torch.device) -> None:
    backends, left_out = candidates.usable_backends(args.backends, "attention", device)
    for name, reason in left_out.items():
        rows.leave_out(name, reason)
    for grid in args.grids:
        for spec in candidates.masks_of(args):
            for backend in backends:
                rows.add(f"{spec.label}, {grid}x{grid}: {backend}", masked_row, args, grid, spec, backend, device)


def masked_row(args, grid: int, spec: MaskSpec, backend: str, device: torch.device) -> dict:
    steps = [spec.expansion_step]
    one = argparse.Namespace(**{**vars(args), "mask_types": [spec.mask_type], "expansion_steps": steps})
    full, *masked = candidates.attention_candidates(one, grid, [backend], device)
    if not masked:
        raise utils.UserError(f"backend {backend} does not take this mask")
    return row_of(one, grid, [full, *masked], device)


def row_of(args, grid: int, measured: list[candidates.Candidate], device: torch.device) -> dict:
    """The row of the last one, compared with the first one: checked, then timed in turns."""
    batch_size, num_heads = candidates.shape_of(args, grid)
    shape = {"dtype": args.dtype, "batch_size": batch_size, "num_heads": num_heads, "head_dim": args.head_dim}
    return shape | benchmark.measure_candidates(measured, args, grid, device)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Training, by the flags of benchmark.py --level training: the loop of main.py in bf16


def measure_training(rows: Rows, folder: Path, args, device: torch.device) -> None:
    rows.add(f"{args.model} at {args.img_size} px, {args.compile}", training_row, args, device)


def training_row(args, device: torch.device) -> dict:
    epoch = build_epoch(args, device)
    first_seconds = hardware.seconds_of(epoch, device)
    hardware.reset_peak_memory(device)
    seconds = [hardware.seconds_of(epoch, device) for _ in range(args.rounds)]

    num_images = args.steps * args.batch_size
    rate = num_images / statistics.median(seconds)
    flops = 3 * models.count_forward_flops(training.build_ours(args))["total"] * rate  # backward counts twice
    peak = hardware.peak_flops(device, "bf16")
    return {
        "batch_size": args.batch_size,
        "num_steps": args.steps * args.rounds,
        "images_per_second": rate,
        "images_per_second_of_rounds": [num_images / value for value in seconds],
        "first_epoch_seconds": first_seconds,
        "flops_per_second": flops,
        "flops_utilization": None if peak is None else 100 * flops / peak,
        "flops_utilization_of_matmul": 100 * flops / matmul_rate("bf16", args.rounds, device)["flops_per_second"],
        "peak_memory_bytes": hardware.peak_memory_bytes(device),
    }


def measure_profile(rows: Rows, folder: Path, args, device: torch.device) -> None:
    rows.add(f"{args.model} at {args.img_size} px, {args.compile}", profile_row, folder, args, device)


def profile_row(folder: Path, args, device: torch.device) -> dict:
    """A trace of one epoch for chrome://tracing, its table as text, and the share of the time that kernels ran."""
    epoch = build_epoch(args, device)
    for _ in range(2):  # compiles, and records CUDA graphs
        epoch()
    with torch.profiler.profile() as profile:
        seconds = hardware.seconds_of(epoch, device)

    stem = f"profile_{args.model}_{args.img_size}px_{args.compile}"
    trace, table = folder / f"{stem}.json.gz", folder / f"{stem}.txt"
    profile.export_chrome_trace(str(trace))
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    utils.write_text(table, profile.key_averages().table(sort_by=order, row_limit=60))

    return {
        "num_steps": args.steps,
        "seconds": seconds,
        "percent_on_device": percent_on_device(trace, seconds) if device.type == "cuda" else None,
        "trace": trace.name,
        "table": table.name,
    }


def percent_on_device(trace: Path, seconds: float) -> float:
    """What kernels and copies took of the time; they follow each other on one stream."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return 100 * sum(event["dur"] for event in events if event.get("cat") in ON_DEVICE) / (1e6 * seconds)


def build_epoch(args, device: torch.device) -> Callable[[], None]:
    """A function that trains `args.steps` steps as main.py does, on random images."""
    side = pipeline.SIDE
    pixels = torch.randint(256, (args.steps * args.batch_size, 3, side, side), dtype=torch.uint8)
    return training.our_loop(args, pixels, "bf16", ["--recipe", "plain"], device)


# ---------------------------------------------------------------------------------------------------------------------


def training_args(argv: list[str]) -> argparse.Namespace:
    return benchmark.parse_args(["--level", "training", *argv])


COMMANDS = {
    "ceilings": (measure_ceilings, training_args),
    "full": (measure_full, benchmark.parse_args),
    "attention": (measure_attention, benchmark.parse_args),
    "training": (measure_training, training_args),
    "profile": (measure_profile, training_args),
}


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) < 2 or argv[0] not in COMMANDS:
        raise utils.UsageError(f"expected one of {', '.join(COMMANDS)} and a folder, got {' '.join(argv) or 'nothing'}")
    command, folder = argv[0], Path(argv[1])
    measure, parse_args = COMMANDS[command]
    args = parse_args(argv[2:])
    hardware.keep_freed_memory()
    device = hardware.pick_device(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(folder, command, device)
    measure(rows, folder, args, device)
    return 1 if rows.num_failed else 0


if __name__ == "__main__":
    utils.run_cli(main)
