"""Which backend is the fastest here: measured on the real shape, once, and kept in the user's cache folder."""

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

# What compiling and measuring another backend takes; a run that spends less in dense attention stays dense.
CHOICE_SECONDS = 60.0
ROUNDS, SECONDS_A_MEASUREMENT = 7, 10.0


def choose_backend(
    compiled: CompiledMask,
    batch_size: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    num_calls: int,
) -> Choice:
    """Resolve `auto`: measure a forward and backward of each backend that can work here, and choose the fastest.

    `num_calls` is how often attention will run with this shape: where dense attention takes less than CHOICE_SECONDS
    in all, nothing else is tried. Timings are kept in the user's cache folder by mask, shape, dtype, device and
    version, so that a sweep measures once and all its runs choose alike. A mask that is not `auto`, or is full
    attention, keeps its choice. Nothing is changed: `compiled.apply_choice` does that. Raises ValueError if the
    backend asked for cannot run on the device.
    """
    compiled.check_device(device)
    if compiled.requested != "auto" or compiled.mask is None:
        return compiled.choice
    can_use_flex = device.type in compiled_mask.FLEX_DEVICES
    others = [*(["diagonal"] if compiled.offsets else []), *(["flex"] if can_use_flex else [])]
    if not others:
        return Choice("dense", compiled.too_many_diagonals)

    qkv_shape = (batch_size, compiled.num_global_tokens + compiled.num_tokens, 3, num_heads, head_dim)
    timings = _timings_of(compiled, others, num_calls, qkv_shape, dtype, device)
    working = {name: seconds for name, seconds in timings.items() if seconds is not None}
    if not working:
        names = ", ".join(["dense", *others])
        raise torch.OutOfMemoryError(f"attention alone runs out of memory with every backend tried ({names})")

    dense_seconds = _seconds_of_all(timings, num_calls)
    if dense_seconds >= CHOICE_SECONDS:
        measured = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in working.items())
        return Choice(min(working, key=working.get), f"the fastest measured: {measured}", timings)
    reason = f"all dense attention of this run takes {dense_seconds:.1f} s, less than compiling another"
    return Choice("dense", reason, timings)


def _timings_of(
    compiled: CompiledMask,
    others: list[str],
    num_calls: int,
    qkv_shape: tuple,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float | None]:
    """As `_measure` has them: those in the cache, else measured now. `others` only where dense takes long enough."""
    path = _timings_path(compiled, qkv_shape, dtype, device)
    lock = path.with_name(f"{path.name}.lock")
    with locks.acquire_if_possible(lock, "runs that start together each measure the backends, and disturb each other"):
        timings = _read_timings(path)
        if "dense" not in timings:
            timings |= _measure(compiled, ["dense"], qkv_shape, dtype, device)
            utils.write_json(path, timings)
        missing = [name for name in others if name not in timings]
        if missing and _seconds_of_all(timings, num_calls) >= CHOICE_SECONDS:
            # Dense once more, in turns with the others. Where only what did not fit before is missing, the rest
            # stays as it was measured, so that the runs of a sweep choose alike.
            again = ["dense"] if missing == others and "dense" in timings else []
            timings |= _measure(compiled, [*again, *missing], qkv_shape, dtype, device)
            utils.write_json(path, timings)
    return timings


def _seconds_of_all(timings: dict[str, float | None], num_calls: int) -> float:
    """What dense attention takes in the whole run; endless where it does not fit into memory."""
    return timings.get("dense", float("inf")) * num_calls


def _measure(
    compiled: CompiledMask, candidates: list[str], qkv_shape: tuple, dtype: torch.dtype, device: torch.device
) -> dict[str, float | None]:
    """Median seconds of a forward and backward, candidates interleaved.

    None for one that does not work here. One that ran out of memory is left out: the next time it may fit.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(qkv_shape, generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randn(*qkv_shape[:2], *qkv_shape[3:], generator=generator).to(device, dtype)

    def run(candidate: CompiledMask) -> float:
        return hardware.seconds_of(lambda: torch.autograd.grad(attend_packed(qkv, candidate), qkv, grad), device)

    masks = {name: compile_mask(compiled.mask, compiled.num_global_tokens, name) for name in candidates}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    broken: dict[str, None] = {}

    def take_turns() -> None:
        for backend in list(seconds):
            try:
                seconds[backend].append(run(masks[backend]))
                continue
            except Exception as error:  # a compiler's: whatever it is, dense is still there
                if utils.says_no_memory(error):
                    utils.warn(f"backend {backend} is left out of this choice: {utils.first_line(error)}")
                elif backend == "dense":
                    raise
                else:
                    utils.warn(f"backend {backend} does not work here and is left out: {utils.first_line(error)}")
                    broken[backend] = None
            del seconds[backend]
            hardware.free_unused_memory(device)  # not above, where the error still holds what was computed

    take_turns()  # compiles
    start = time.perf_counter()
    for _ in range(ROUNDS):
        take_turns()
        if time.perf_counter() - start > SECONDS_A_MEASUREMENT:
            break
    return {name: statistics.median(measured[1:]) for name, measured in seconds.items()} | broken


def _timings_path(compiled: CompiledMask, qkv_shape: tuple, dtype: torch.dtype, device: torch.device) -> Path:
    """In the user's cache folder, named by everything that the timings depend on."""
    mask_hash = hashlib.sha256(compiled.mask.numpy().tobytes()).hexdigest()
    depends_on = (mask_hash, qkv_shape, str(dtype), hardware.device_name(device), torch.__version__, _kernels_hash())
    return _cache_folder() / f"{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]}.json"


@functools.cache
def _kernels_hash() -> str:
    """Of the code that is measured: other kernels take other times."""
    sources = (Path(module_file).read_bytes() for module_file in (compiled_mask.__file__, diagonal.__file__))
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _cache_folder() -> Path:
    """The user's, or one that is gone with the next restart where that cannot be written (a container's home)."""
    for cache in (os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), tempfile.gettempdir()):
        folder = Path(cache) / "local-attention-vits"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise utils.UserError(
        "no folder for timings can be written, neither ~/.cache nor the temporary one; name a --backend"
    )


def _read_timings(path: Path) -> dict[str, float | None]:
    """What was measured before; {} if nothing, or if the file cannot be read."""
    try:
        timings = utils.read_json(path)
    except utils.UserError:
        return {}
    numbers = all(value is None or (isinstance(value, float) and value > 0) for value in timings.values())
    return timings if numbers and timings.keys() <= {*BACKENDS} and timings.get("dense", 1.0) else {}
