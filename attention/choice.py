"""Which backend is the fastest here: measured once on the real shape, then cached for the user."""

from __future__ import annotations

import functools
import hashlib
import statistics
import time
from pathlib import Path

import torch

import utils
from attention import build, compiled_mask, diagonal, native
from attention.compiled_mask import BACKENDS, Choice, CompiledMask, attend_packed, compile_mask
from runtime import hardware, locks

# Compiling and measuring another backend takes about this long. A run that spends less than this in
# dense attention stays dense.
CHOICE_SECONDS = 60.0

ROUNDS = 7
MAX_MEASURE_SECONDS = 10.0  # no further round starts after this


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

    `auto` follows a rule on the CPU, where nothing has to be compiled (rule.py). Elsewhere, and for
    `measure`, a forward and backward of each backend that can work is timed, and the fastest taken.

    `num_calls` is how often attention will run with this shape. For `auto`, if dense attention
    takes less than CHOICE_SECONDS for all of them, nothing else is tried.

    Timings are cached in the user's cache folder by mask, shape, dtype, device and version, so that
    a sweep measures once and all of its runs make the same choice.

    A mask compiled with another backend, or None (full attention), keeps its choice. This only
    returns the choice; `compiled.apply_choice` applies it. Raises ValueError if the
    requested backend cannot run on the device.
    """
    compiled.check_device(device)
    if compiled.requested not in ("auto", "measure") or compiled.mask is None:
        return compiled.choice
    if compiled.requested == "auto" and device.type in compiled_mask.NATIVE_DEVICES:
        return compiled_mask.choose_by_rule(compiled)

    others = []
    if device.type in compiled_mask.NATIVE_DEVICES and build.is_available():
        others.append("native")
    elif compiled.offsets:
        others.append("diagonal")
    if device.type in compiled_mask.FLEX_DEVICES:
        others.append("flex")
    if not others:
        return Choice("dense", compiled.too_many_diagonals)

    num_tokens = compiled.num_global_tokens + compiled.num_tokens
    qkv_shape = (batch_size, num_tokens, 3, num_heads, head_dim)  # [B, T, 3, H, D]
    worthwhile = CHOICE_SECONDS / num_calls if compiled.requested == "auto" else 0.0
    timings = _get_timings(compiled, others, worthwhile, qkv_shape, dtype, device)
    working = {backend: seconds for backend, seconds in timings.items() if seconds is not None}
    if not working:
        tried = ", ".join(["dense", *others])
        raise torch.OutOfMemoryError(
            f"attention alone runs out of memory with every backend tried ({tried})"
        )

    if _dense_seconds(timings) < worthwhile:
        reason = (
            f"dense attention takes {num_calls * timings['dense']:.1f} s in the whole run, less "
            "than compiling another backend"
        )
        return Choice("dense", reason, timings)

    fastest = min(working, key=working.get)
    measured = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in working.items())
    return Choice(fastest, f"the fastest measured: {measured}", timings)


def _get_timings(
    compiled: CompiledMask,
    others: list[str],
    worthwhile: float,
    qkv_shape: tuple,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float | None]:
    """Timings as `_measure` returns them: from the cache, or else measured now.

    `others` are only measured if dense attention takes at least `worthwhile` seconds.
    """
    path = _timings_path(compiled, qkv_shape, dtype, device)
    lock = path.with_name(f"{path.name}.lock")
    risk = "runs that start together all measure the backends and disturb each other's timings"

    with locks.acquire_if_possible(lock, risk):
        timings = _read_timings(path)
        if "dense" not in timings:
            timings |= _measure(compiled, ["dense"], qkv_shape, dtype, device)
            utils.write_json(path, timings)

        missing = [name for name in others if name not in timings]
        if missing and _dense_seconds(timings) >= worthwhile:
            # Measure dense again, alternating with the others. If only those that ran out of memory
            # before are missing, keep the timings of the rest, so that the runs of a sweep make the
            # same choice.
            again = ["dense"] if missing == others and "dense" in timings else []
            timings |= _measure(compiled, [*again, *missing], qkv_shape, dtype, device)
            utils.write_json(path, timings)

    return timings


def _dense_seconds(timings: dict[str, float | None]) -> float:
    """Seconds of a forward and backward of dense attention; infinite if memory is too small."""
    return timings.get("dense", float("inf"))


def _measure(
    compiled: CompiledMask,
    candidates: list[str],
    qkv_shape: tuple,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float | None]:
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

    def measure(candidate: CompiledMask) -> float:
        def step():
            torch.autograd.grad(attend_packed(qkv, candidate), qkv, grad)

        return hardware.seconds_of(step, device)

    def measure_each_once() -> None:
        for backend in list(seconds):
            try:
                seconds[backend].append(measure(masks[backend]))
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

    measure_each_once()  # compiles; not counted below
    start = time.perf_counter()
    for _ in range(ROUNDS):
        measure_each_once()
        if time.perf_counter() - start > MAX_MEASURE_SECONDS:
            break

    medians = {name: statistics.median(measured[1:]) for name, measured in seconds.items()}
    return medians | broken


# --------------------------------------------------------------------------------------------------
# The cache


def _timings_path(
    compiled: CompiledMask, qkv_shape: tuple, dtype: torch.dtype, device: torch.device
) -> Path:
    """A file in the user's cache folder, named by everything that the timings depend on."""
    key = (
        hashlib.sha256(compiled.mask.numpy().tobytes()).hexdigest(),
        qkv_shape,
        str(dtype),
        hardware.device_name(device),
        torch.__version__,
        _kernels_hash(),
    )
    key_hash = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    return utils.cache_folder() / f"{key_hash}.json"


@functools.cache
def _kernels_hash() -> str:
    """Hash of the code that is measured, because other kernels take other times."""
    sources = [Path(module.__file__).read_bytes() for module in (compiled_mask, diagonal, native)]
    sources.append(build.SOURCE.read_bytes())
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _read_timings(path: Path) -> dict[str, float | None]:
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
