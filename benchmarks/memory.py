"""How much memory a call needs at its peak."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

import torch

PEAK_MEMORY_IS = {
    "cuda": "the most that torch's allocator held during a run, above what it held before",
    "cpu": "the most resident memory of the process during a run, above what it had before (Linux)",
    "mps": "not known",
}


def peak_memory_of(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs at its peak, as PEAK_MEMORY_IS says; None where that cannot be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
            return None
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier calls have left, or it would hide this one
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
        before = _status_bytes("VmRSS")
        function()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = [1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")]
    if not values:
        raise OSError(f"/proc/self/status has no {key}")
    return values[0]
