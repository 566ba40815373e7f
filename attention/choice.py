"""Which backend is the fastest here: measured on the real shape where asked, then cached."""

from __future__ import annotations

import statistics
import time

import torch

import utils
from attention import compiled_mask, tiled, timings, windows
from attention.backends import BACKENDS, Choice, unusable
from attention.compiled_mask import CompiledMask, compile_mask
from attention.dispatch import attend_packed
from runtime import hardware, locks

ROUNDS = 7
MAX_MEASURE_SECONDS = 10.0  # no further round starts after this

# Of each round, on a GPU: one call alone is too short to time, and is mostly its launch.
CALLS_ON_GPU = 30


def choose_backend(
    compiled: CompiledMask,
    batch_size: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    num_calls: int,
) -> Choice:
    """Resolve `auto` and `measure`: how attention is to be computed with this shape and device.

    `measure` times a forward and backward of each backend that can work, and takes the fastest.
    `auto` measures nothing: it takes the fastest of what `measure` found before, or else follows a
    rule (rule.py).

    `num_calls` is how often attention will run with this shape. On a GPU, the rule stays dense if
    another backend would gain less time in all of them than compiling it takes.

    Timings are cached in the user's cache folder by mask, shape, dtype, device and version, so that
    a sweep measures once and all of its runs make the same choice.

    A mask compiled with another backend, or None (full attention), keeps its choice. This only
    returns the choice; `compiled.apply_choice` applies it. Raises ValueError if the
    requested backend cannot run on the device.
    """
    if compiled.requested not in ("auto", "measure") or compiled.mask is None:
        compiled.check_device(device)
        return compiled.choice

    num_tokens = compiled.num_global_tokens + compiled.num_tokens
    qkv_shape = (batch_size, num_tokens, 3, num_heads, head_dim)  # [B, T, 3, H, D]
    if compiled.requested == "auto":
        path = timings.path_of(compiled.mask, qkv_shape, dtype, device)
        if (measured := timings.fastest(timings.read(path))) is not None:
            return measured
        shape = (batch_size * num_heads, head_dim)
        takes_tiles = tiled.takes(dtype, head_dim)
        return compiled_mask.choose_by_rule(compiled, device, shape, num_calls, takes_tiles)

    others = find_candidates(compiled, device, dtype, head_dim)
    if not others:
        return Choice("dense", compiled.too_many_diagonals)
    found = _get_timings(compiled, others, qkv_shape, dtype, device)
    if (choice := timings.fastest(found)) is not None:
        return choice
    tried = ", ".join(["dense", *others])
    raise torch.OutOfMemoryError(
        f"attention alone runs out of memory with every backend tried ({tried})"
    )


def find_candidates(
    compiled: CompiledMask, device: torch.device, dtype: torch.dtype, head_dim: int
) -> list[str]:
    """The backends to measure besides dense."""
    fits = {
        "native": True,
        "tiled": tiled.takes(dtype, head_dim),
        "flex": True,
        "varlen": compiled.window is not None and windows.takes(dtype, head_dim),
        "diagonal": bool(compiled.offsets),
    }
    names = [name for name in BACKENDS if fits.get(name) and not unusable(name, device.type)]
    # On a CPU, the diagonals are a reference and not a candidate.
    return [name for name in names if name != "diagonal" or "native" not in names]


def _get_timings(
    compiled: CompiledMask,
    others: list[str],
    qkv_shape: tuple,
    dtype: torch.dtype,
    device: torch.device,
) -> timings.Timings:
    """Timings as `_measure` returns them: from the cache, or else measured now."""
    path = timings.path_of(compiled.mask, qkv_shape, dtype, device)
    lock = path.with_name(f"{path.name}.lock")
    risk = "runs that start together all measure the backends and disturb each other's timings"

    with locks.acquire_if_possible(lock, risk):
        known = timings.read(path)
        missing = [name for name in ["dense", *others] if name not in known]
        if missing:
            # If only those that ran out of memory before are missing, keep the timings of the rest,
            # so that the runs of a sweep make the same choice.
            known |= _measure(compiled, missing, qkv_shape, dtype, device)
            utils.write_json(path, known)

    return known


def _measure(
    compiled: CompiledMask,
    candidates: list[str],
    qkv_shape: tuple,
    dtype: torch.dtype,
    device: torch.device,
) -> timings.Timings:
    """Median seconds of a forward and backward of each candidate, all measured in alternation.

    None for a candidate that does not work here. A candidate that runs out of memory is left out,
    as it may fit next time.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(qkv_shape, generator=generator).to(device, dtype).requires_grad_()
    grad_shape = (*qkv_shape[:2], *qkv_shape[3:])  # [B, T, H, D]
    grad = torch.randn(grad_shape, generator=generator).to(device, dtype)

    masks = {
        name: compile_mask(compiled.mask, compiled.num_global_tokens, name) for name in candidates
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    broken: dict[str, None] = {}

    def measure(candidate: CompiledMask, num_calls: int) -> float:
        def step():
            torch.autograd.grad(attend_packed(qkv, candidate), qkv, grad)

        return hardware.seconds_per_call(step, device, num_calls)

    def measure_each(num_calls: int) -> None:
        for backend in list(seconds):
            try:
                seconds[backend].append(measure(masks[backend], num_calls))
                continue
            except Exception as error:  # a compiler may raise anything, and dense is still there
                reason = utils.first_line(error)
                if utils.says_no_memory(error):
                    utils.warn(f"backend {backend} is left out of this choice: {reason}")
                elif backend == "dense":
                    raise
                else:
                    utils.warn(f"backend {backend} does not work here and is left out: {reason}")
                    broken[backend] = None

            # After the except block, in which the error still holds on to what was computed.
            del seconds[backend]
            hardware.free_unused_memory(device)

    measure_each(1)  # compiles; not counted below
    start = time.perf_counter()
    for _ in range(ROUNDS):
        measure_each(CALLS_ON_GPU if device.type == "cuda" else 1)
        if time.perf_counter() - start > MAX_MEASURE_SECONDS:
            break

    medians = {name: statistics.median(measured[1:]) for name, measured in seconds.items()}
    return medians | broken
