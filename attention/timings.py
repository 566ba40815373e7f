"""What was measured before, in the user's cache folder: seconds of each backend, by case."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor

import utils
from attention.backends import BACKENDS, Choice
from runtime import hardware

# The code that is measured: other kernels take other times.
KERNELS = ("dispatch", "diagonal", "flex", "native", "tiled", "tiled_kernels", "tiles", "windows")

# Backend -> seconds for a forward and backward; None = it does not work here.
Timings = dict[str, float | None]


def path_of(mask: Tensor, qkv_shape: tuple, dtype: torch.dtype, device: torch.device) -> Path:
    """A file in the user's cache folder, named by everything that the timings depend on.

    `mask` is a bool [N, N] on the CPU, `qkv_shape` [B, T, 3, H, D].
    """
    key = (
        hashlib.sha256(mask.numpy().tobytes()).hexdigest(),
        tuple(qkv_shape),
        str(dtype),
        torch.get_float32_matmul_precision(),
        hardware.device_name(device),
        torch.__version__,
        _kernels_hash(),
    )
    key_hash = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    return utils.cache_folder() / f"{key_hash}.json"


@functools.cache
def _kernels_hash() -> str:
    here = Path(__file__)
    sources = [here.with_name(f"{name}.py") for name in KERNELS] + [here.with_name("native.cpp")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def read(path: Path) -> Timings:
    """The timings measured before; {} if there are none, or if the file is damaged."""
    try:
        timings = utils.read_json(path)
    except utils.UserError:
        return {}

    def is_timing(value) -> bool:
        return value is None or (isinstance(value, float) and value > 0)

    if not all(is_timing(value) for value in timings.values()):
        return {}
    if not timings.keys() <= set(BACKENDS):
        return {}
    if "dense" in timings and timings["dense"] is None:  # dense always works, if it fits
        return {}
    return timings


def fastest(timings: Timings) -> Choice | None:
    """The choice that these timings make; None if nothing that was measured works."""
    working = {backend: seconds for backend, seconds in timings.items() if seconds is not None}
    if not working:
        return None
    measured = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in working.items())
    return Choice(min(working, key=working.get), f"the fastest measured: {measured}", timings)
