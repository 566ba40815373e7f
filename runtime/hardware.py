"""The machine that a run computes on: device, precision, memory, and the provenance of results."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path

import torch

import utils
from utils import OutOfMemoryError, UsageError, UserError

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "fp32", "tf32", "bf16")


def pick_device(name: str) -> torch.device:
    """The device with this name; `auto` picks CUDA, else Apple's MPS, else the CPU.

    Raises UsageError if the machine has no such device, UserError if another process has the GPU to
    itself.
    """
    # On a machine with a CUDA compiler but no GPU, torch.compile would log a line about it.
    logging.getLogger("torch.utils.cpp_extension").addFilter(is_worth_logging)

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")

    if name == "auto":
        name = available[0]
    if name not in available:
        raise UsageError(
            f"--device {name}: torch {torch.__version__} finds no such device here; "
            f"available: {', '.join(available)}"
        )

    if name == "cuda":
        # Fail here, and not where a compiler is tried out, which would be blamed for the error.
        with taken_gpu_errors():
            torch.zeros(1, device="cuda")
    return torch.device(name)


def is_worth_logging(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()


@contextlib.contextmanager
def taken_gpu_errors() -> Iterator[None]:
    """Raise a UserError that says what to do if another process has the GPU to itself.

    The GPU is then in exclusive compute mode.
    """
    try:
        yield
    except RuntimeError as error:
        if "busy or unavailable" not in str(error):
            raise
        raise UserError(
            f"the GPU is taken: {utils.first_line(error)}. Another process holds it, and its "
            "compute mode allows only one; wait for that process, choose another GPU with "
            "CUDA_VISIBLE_DEVICES, or allow several processes with nvidia-smi -c DEFAULT"
        ) from error


@contextlib.contextmanager
def device_errors(grad_accumulation: int) -> Iterator[None]:
    """Raise a UserError that says what to do if the GPU is taken or memory runs out.

    Running out of memory has its own exit code.
    """
    try:
        with taken_gpu_errors():
            yield
    except (MemoryError, RuntimeError) as error:
        if not utils.says_no_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory: {utils.first_line(error)}. "
            f"--grad_accumulation {2 * grad_accumulation} halves the images in memory at a time; "
            "--checkpoint_activations helps as well"
        ) from error


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 on devices with fast bf16 matrix products, else fp32.

    CUDA devices have them from compute capability 8.0. Raises UsageError for tf32 elsewhere.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(
            f"--precision tf32 is a mode of NVIDIA's GPUs, got device {device.type}; use fp32"
        )
    if precision != "auto":
        return precision
    has_fast_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if has_fast_bf16 else "fp32"


def set_precision(precision: str) -> None:
    """Have fp32 matrix products of the whole process computed in fp32, or with "tf32" in TF32.

    TF32 rounds their inputs to 10 bits of mantissa, as many as fp16 has, and keeps fp32's range.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Matrix products and attention in bf16 if that is the precision; else changes nothing."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


# FLOP/s of a GPU's dense bf16 matrix products, by a part of its name.
# From NVIDIA's data sheets, without sparsity. The first match counts.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L4": 121e12,
}
SHARE_OF_BF16 = {"bf16": 1.0, "tf32": 0.5}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The most FLOP/s that the device can reach in bf16 or tf32.

    None for fp32, unknown devices, and MIG slices.
    """
    if device.type != "cuda" or precision not in SHARE_OF_BF16:
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\bMIG\b", name):  # only a slice of the card
        return None
    for part, peak in PEAK_BF16_FLOPS.items():
        if re.search(rf"\b{part}\b", name):
            return SHARE_OF_BF16[precision] * peak
    return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its vector instructions and torch's threads.

    For example "AMD EPYC (AVX512), 2 threads": other processors have the same name, but not AVX512.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.processor() or platform.machine()} (MPS)"
    vectors = torch.backends.cpu.get_cpu_capability()
    name = _processor_name() if vectors == "DEFAULT" else f"{_processor_name()} ({vectors})"
    return f"{name}, {torch.get_num_threads()} threads"


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not on Linux
    return platform.processor() or platform.machine()


def pinned(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pin host memory so that the copy to the GPU is asynchronous."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device, asynchronously if possible."""
    return pinned(x, device).to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work queued on it."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """The duration of a call, until the device has finished its work."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def seconds_per_call(function: Callable[[], object], device: torch.device, num_calls: int) -> float:
    """The mean duration of calls one after the other.

    On CUDA, between events on the device: waiting for the CPU is part of it only where the device
    waits for its launches.
    """
    if device.type != "cuda":
        return sum(seconds_of(function, device) for _ in range(num_calls)) / num_calls

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    start.record()
    for _ in range(num_calls):
        function()
    end.record()
    synchronize(device)
    return start.elapsed_time(end) / 1e3 / num_calls


def free_unused_memory(device: torch.device) -> None:
    """Release the memory that torch keeps for reuse, to make room for something else."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The peak since the last reset on CUDA, of the whole process on the CPU, None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep large blocks for reuse; returns whether it worked.

    By default, each large tensor on the CPU is mapped and unmapped anew and its pages are faulted
    in again, which can double the time of a small operation. Call it once, when a script starts.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
    libc = ctypes.CDLL("libc.so.6")
    return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))


def provenance(argv: list[str], device: torch.device) -> dict:
    """Where a result came from: command, code, versions, machine, time."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in ("torchvision", "numpy", "scikit-learn", "timm", "matplotlib"):
        versions[package] = _version(package)

    changes = _git("status", "--porcelain", "--", "*.py")
    return {
        "command": [Path(sys.argv[0]).name, *argv],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "versions": versions,
        "device": device_name(device),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(utils.REPOSITORY), *arguments]
    with contextlib.suppress(OSError):
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode == 0:
            return finished.stdout.strip()
    return None


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
