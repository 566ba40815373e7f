"""The machine that a run computes on: device, precision, memory; and where a result came from."""

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
PRECISIONS = ("auto", "fp32", "bf16")


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises UsageError if the device asked for is not there, UserError if another process has the GPU to itself.
    """
    # With a CUDA compiler and no GPU, torch.compile would log a line about it.
    logging.getLogger("torch.utils.cpp_extension").addFilter(is_worth_saying)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise UsageError(f"--device {name}: torch {torch.__version__} sees no such device here; available: {there}")
    if name == "cuda":
        with taken_gpu_errors():
            torch.zeros(1, device="cuda")  # before what tries a compiler, and would take this error for one of its own
    return torch.device(name)


def is_worth_saying(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()


@contextlib.contextmanager
def taken_gpu_errors() -> Iterator[None]:
    """A GPU that another process has to itself, in exclusive compute mode, as an error with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if "busy or unavailable" not in str(error):
            raise
        raise UserError(
            f"the GPU is taken: {utils.first_line(error)}. Another process holds it, and its compute mode allows one "
            "only; wait for that process, choose another GPU with CUDA_VISIBLE_DEVICES, or allow several with "
            "nvidia-smi -c DEFAULT"
        ) from error


@contextlib.contextmanager
def device_errors(grad_accumulation: int) -> Iterator[None]:
    """A GPU that is taken, and running out of memory, as errors with a remedy; the second has its own exit code."""
    try:
        with taken_gpu_errors():
            yield
    except (MemoryError, RuntimeError) as error:
        if not utils.says_no_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory: {utils.first_line(error)}. --grad_accumulation {2 * grad_accumulation} halves what a "
            "step holds at once; --checkpoint_activations helps as well"
        ) from error


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the device has fast bf16 matrix products (CUDA from compute capability 8.0), else fp32."""
    if precision != "auto":
        return precision
    good_at_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if good_at_bf16 else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


# Dense bf16 matrix products of a GPU, FLOP/s, by a part of its name; from NVIDIA's data sheets (without sparsity).
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


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the device could reach at most in bf16; None for other precisions, unknown devices and MIG slices."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\bMIG\b", name):  # a part of the card
        return None
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def device_name(device: torch.device) -> str:
    """The hardware by name: the GPU's, or the processor's with torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.processor() or platform.machine()} (MPS)"
    return f"{_processor_name()}, {torch.get_num_threads()} threads"


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def pinned(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pin host memory so that the copy to the GPU is asynchronous."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device, asynchronously where that is possible."""
    return pinned(x, device).to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """What a call takes, until the device has done all of it."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def free_unused_memory(device: torch.device) -> None:
    """Give back what torch keeps for reuse, so that something else fits."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak since the last reset on CUDA; of the whole process on the CPU; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep large blocks for reuse; returns whether that could be done.

    By default each large tensor on the CPU is mapped and unmapped anew and its pages are faulted in again, which can
    double the time of a small operation. Call it once, at the start of a script.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    libc = ctypes.CDLL("libc.so.6")
    return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))


def provenance(argv: list[str], device: torch.device) -> dict:
    """Where a result came from: command, code, versions, machine, time."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    others = ("torchvision", "numpy", "scikit-learn", "timm", "matplotlib")
    return {
        "command": [Path(sys.argv[0]).name, *argv],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (status := _git("status", "--porcelain", "--", "*.py")) is None else bool(status),
        "versions": versions | {name: _version(name) for name in others},
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
