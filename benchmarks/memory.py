"""Peak memory of a call."""

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
    """Peak memory of a call in bytes, as PEAK_MEMORY_IS defines it; None if it is not known."""
    if device.type == "cuda":
        return _peak_on_cuda(function, device)
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return None

    try:
        return _peak_on_linux(function)
    except OSError:
        return None


def _peak_on_cuda(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_linux(function: Callable[[], object]) -> int:
    """Raises OSError if the system doesn't allow it."""
    # Return the memory that earlier calls have freed; otherwise it would hide what this one needs.
    ctypes.CDLL("libc.so.6").malloc_trim(0)

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")
