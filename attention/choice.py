"""Which backend is the fastest here: measured once on the real shape, then cached for the user."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

import utils
from attention import compiled_mask, diagonal
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
    """Resolve `auto`: time a forward and backward of each backend that can work, take the fastest.

    `num_calls` is how often attention will run with this shape. If dense attention takes less than
    CHOICE_SECONDS for all of them, nothing else is tried.

    Timings are cached in the user's cache folder by mask, shape, dtype, device and version, so that
    a sweep measures once and all of its runs make the same choice.

    A mask that was not compiled with `auto`, or that is None (full attention), keeps its choice.
    This only returns the choice; `compiled.apply_choice` applies it. Raises ValueError if the
    requested backend cannot run on the device.
    """
    compiled.check_device(device)
    if compiled.requested != "auto" or compiled.mask is None:
        return compiled.choice

    others = []
    if compiled.offsets:
        others.append("diagonal")
    if device.type in compiled_mask.FLEX_DEVICES:
        others.append("flex")
    if not others:
        return Choice("dense", compiled.too_many_diagonals)

    num_tokens = compiled.num_global_tokens + compiled.num_tokens
    qkv_shape = (batch_size, num_tokens, 3, num_heads, head_dim)  # [B, T, 3, H, D]
    timings = _get_timings(compiled, others, num_calls, qkv_shape, dtype, device)
    working = {backend: seconds for backend, seconds in timings.items() if seconds is not None}
    if not working:
        tried = ", ".join(["dense", *others])
        raise torch.OutOfMemoryError(
            f"attention alone runs out of memory with every backend tried ({tried})"
        )

    dense_seconds = _dense_seconds(timings, num_calls)
    if dense_seconds < CHOICE_SECONDS:
        reason = (
            f"dense attention takes {dense_seconds:.1f} s in the whole run, less than compiling "
            "another backend"
        )
        return Choice("dense", reason, timings)

    fastest = min(working, key=working.get)
    measured = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in working.items())
    return Choice(fastest, f"the fastest measured: {measured}", timings)


def _get_timings(
    compiled: CompiledMask,
    others: list[str],
    num_calls: int,
    qkv_shape: tuple,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float | None]:
    """Timings as `_measure` returns them: from the cache, or else measured now.

    `others` are only measured if dense attention takes long enough in the whole run.
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
        if missing and _dense_seconds(timings, num_calls) >= CHOICE_SECONDS:
            # Measure dense again, alternating with the others. If only those that ran out of memory
            # before are missing, keep the timings of the rest, so that the runs of a sweep make the
            # same choice.
            again = ["dense"] if missing == others and "dense" in timings else []
            timings |= _measure(compiled, [*again, *missing], qkv_shape, dtype, device)
            utils.write_json(path, timings)

    return timings


def _dense_seconds(timings: dict[str, float | None], num_calls: int) -> float:
    """Seconds of dense attention in the whole run; infinite if it does not fit into memory."""
    return timings.get("dense", float("inf")) * num_calls


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
    return _cache_folder() / f"{key_hash}.json"


@functools.cache
def _kernels_hash() -> str:
    """Hash of the code that is measured, because other kernels take other times."""
    sources = [Path(module.__file__).read_bytes() for module in (compiled_mask, diagonal)]
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _cache_folder() -> Path:
    """The user's cache folder, or a temporary one if that is not writable (in a container)."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for cache in (user_cache, tempfile.gettempdir()):
        folder = Path(cache) / "local-attention-vits"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder

    raise utils.UserError(
        "cannot write timings of the backends, neither to ~/.cache nor to the temporary folder; "
        "choose one with --backend"
    )


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
