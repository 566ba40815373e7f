"""The measurements of experiments/gpu.sh that no other script makes.

    gpu.py backends           prints the names of the sparse backends, for gpu.sh
    gpu.py ceilings FOLDER    versions; the rates of a copy and of matrix products
    gpu.py full FOLDER        full attention: torch's choice of kernel, cuDNN, FlashAttention-2
    gpu.py attention FOLDER   masked attention, with one backend after the other
    gpu.py training FOLDER    training steps, and the share of the device's peak that they reach
    gpu.py profile FOLDER     a trace of one epoch of a few steps

`full` and `attention` take the flags of benchmark.py, the others those of its --level training.
Each measurement is appended to FOLDER/rows.jsonl right away. One that fails becomes a row with its
error, and the next one runs.
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
SMALL_COPY = 2**26  # bytes, on other devices
MATMUL_PRECISIONS = ("fp32", "tf32", "bf16")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events in a trace


class Rows:
    """FOLDER/rows.jsonl, to which a command appends."""

    def __init__(self, folder: Path, command: str, device: torch.device):
        self.path = folder / "rows.jsonl"
        self.origin = {
            "what": command,
            "device": hardware.device_name(device),
            "torch": torch.__version__,
        }
        self.num_failed = 0

    def add(self, name: str, measure: Callable[..., dict], *arguments) -> None:
        """Measure and append the result or the error."""
        try:
            found = measure(*arguments)
        except Exception as error:  # kernels, compilers, memory: the rest can still be measured
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


# --------------------------------------------------------------------------------------------------
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
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return output.partition("\n")[0] or None


def copy_rate(rounds: int, device: torch.device) -> dict:
    num_bytes = COPY_BYTES.get(device.type, SMALL_COPY)
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of_rounds(lambda: target.copy_(source), rounds, device)
    return {"bytes_per_second": 2 * num_bytes / seconds, "bytes_is": "read and written"}


def matmul_rate(precision: str, rounds: int, device: torch.device) -> dict:
    hardware.set_precision(precision)
    product, flops = training.matrix_product("bf16" if precision == "bf16" else "fp32", device)
    return {"flops_per_second": flops / seconds_of_rounds(product, rounds, device)}


def seconds_of_rounds(function: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median seconds of a call, after two calls to warm up."""
    seconds = [hardware.seconds_of(function, device) for _ in range(2 + rounds)]
    return statistics.median(seconds[2:])


# --------------------------------------------------------------------------------------------------
# Attention, with the flags of benchmark.py


def measure_full(rows: Rows, folder: Path, args, device: torch.device) -> None:
    for grid in args.grids:
        rows.add(f"full SDPA, {grid}x{grid}", full_row, args, grid, device)
        for name, kernel in KERNELS.items():
            title = f"full SDPA, {name}, {grid}x{grid}"
            if device.type == "cuda":
                rows.add(title, forced_row, args, grid, name, kernel, device)
            else:
                rows.leave_out(title, f"a kernel of CUDA, not of {device.type}")


def full_row(args, grid: int, device: torch.device) -> dict:
    """With torch's own choice of kernel, whose name belongs to any claim about the speed."""
    batch_size, num_heads = candidates.shape_of(args, grid, device)
    shape = (batch_size, num_heads, grid * grid, args.head_dim)
    dtype = candidates.DTYPES[args.dtype]
    q = torch.zeros(shape, device=device, dtype=dtype, requires_grad=True)
    kernel = SDPBackend(torch._fused_sdp_choice(q, q, q)).name

    full = candidates.attention_candidates(args, grid, [], device)
    return {"kernel": kernel, **row_of(args, grid, full, device)}


def forced_row(args, grid: int, name: str, kernel: SDPBackend, device: torch.device) -> dict:
    (full,) = candidates.attention_candidates(args, grid, [], device)
    return row_of(args, grid, [full, with_kernel(full, name, kernel)], device)


def with_kernel(full: candidates.Candidate, name: str, kernel: SDPBackend) -> candidates.Candidate:
    """Full attention with this kernel only."""

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
                title = f"{spec.label}, {grid}x{grid}: {backend}"
                rows.add(title, masked_row, args, grid, spec, backend, device)


def masked_row(args, grid: int, spec: MaskSpec, backend: str, device: torch.device) -> dict:
    one_mask = {"mask_types": [spec.mask_type], "expansion_steps": [spec.expansion_step]}
    args = argparse.Namespace(**{**vars(args), **one_mask})
    full, *masked = candidates.attention_candidates(args, grid, [backend], device)
    if not masked:
        raise utils.UserError(f"backend {backend} does not support this mask")
    return row_of(args, grid, [full, *masked], device)


def row_of(args, grid: int, measured: list[candidates.Candidate], device: torch.device) -> dict:
    """The row of the last candidate, checked against the first one and timed in turns with it."""
    batch_size, num_heads = candidates.shape_of(args, grid, device)
    shape = {
        "dtype": args.dtype,
        "batch_size": batch_size,
        "num_heads": num_heads,
        "head_dim": args.head_dim,
    }
    return shape | benchmark.measure_candidates(measured, args, grid, device)[-1]


# --------------------------------------------------------------------------------------------------
# Training, with the flags of benchmark.py --level training: the loop of main.py


def measure_training(rows: Rows, folder: Path, args, device: torch.device) -> None:
    title = f"{args.model} at {args.img_size} px, {args.compile}, {args.precision}"
    rows.add(title, training_row, args, device)


def training_row(args, device: torch.device) -> dict:
    epoch = build_epoch(args, device)
    first_seconds = hardware.seconds_of(epoch, device)
    hardware.reset_peak_memory(device)
    seconds = [hardware.seconds_of(epoch, device) for _ in range(args.rounds)]

    num_images = args.steps * args.batch_size
    rate = num_images / statistics.median(seconds)
    flops_per_image = models.count_forward_flops(training.build_ours(args))["total"]
    flops = 3 * flops_per_image * rate  # the backward pass takes twice as many as the forward pass
    peak = hardware.peak_flops(device, args.precision)
    matmul_peak = matmul_rate(args.precision, args.rounds, device)["flops_per_second"]
    return {
        "batch_size": args.batch_size,
        "num_steps": args.steps * args.rounds,
        "images_per_second": rate,
        "images_per_second_of_rounds": [num_images / value for value in seconds],
        "first_epoch_seconds": first_seconds,
        "flops_per_second": flops,
        "flops_utilization": None if peak is None else 100 * flops / peak,
        "flops_utilization_of_matmul": 100 * flops / matmul_peak,
        "peak_memory_bytes": hardware.peak_memory_bytes(device),
    }


def measure_profile(rows: Rows, folder: Path, args, device: torch.device) -> None:
    rows.add(
        f"{args.model} at {args.img_size} px, {args.compile}", profile_row, folder, args, device
    )


def profile_row(folder: Path, args, device: torch.device) -> dict:
    """Write a trace of one epoch, for chrome://tracing, and its table; the share of kernel time."""
    epoch = build_epoch(args, device)
    for _ in range(2):  # compile, and record CUDA graphs
        epoch()
    with torch.profiler.profile() as profile:
        seconds = hardware.seconds_of(epoch, device)

    stem = f"profile_{args.model}_{args.img_size}px_{args.compile}"
    trace = folder / f"{stem}.json.gz"
    table = folder / f"{stem}.txt"
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
    """The share of the time that kernels and copies took. They follow each other on one stream."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    microseconds = sum(event["dur"] for event in events if event.get("cat") in ON_DEVICE)
    return 100 * microseconds / (1e6 * seconds)


def build_epoch(args, device: torch.device) -> Callable[[], None]:
    """A function that trains `args.steps` steps as main.py does, on random images."""
    num_images = args.steps * args.batch_size
    shape = (num_images, 3, pipeline.SIDE, pipeline.SIDE)
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    return training.our_loop(args, pixels, args.precision, ["--recipe", "plain"], device)


# --------------------------------------------------------------------------------------------------


def training_args(argv: list[str]) -> argparse.Namespace:
    """With a flag of its own, `--precision`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="bf16")
    own, others = parser.parse_known_args(argv)
    return argparse.Namespace(
        **vars(benchmark.parse_args(["--level", "training", *others])), **vars(own)
    )


COMMANDS = {
    "ceilings": (measure_ceilings, training_args),
    "full": (measure_full, benchmark.parse_args),
    "attention": (measure_attention, benchmark.parse_args),
    "training": (measure_training, training_args),
    "profile": (measure_profile, training_args),
}


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["backends"]:
        names = set(candidates.OURS) - {"native"}  # which is for CPUs
        # The diagonals last, as compiling them takes the longest.
        print(json.dumps(sorted(names, key=lambda name: (name == "diagonal", name))))
        return 0
    if len(argv) < 2 or argv[0] not in COMMANDS:
        raise utils.UsageError(
            f"expected one of {', '.join(COMMANDS)} and a folder, got {' '.join(argv) or 'nothing'}"
        )
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
