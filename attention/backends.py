"""The backends by name: where each can run, and a choice of one."""

from __future__ import annotations

from dataclasses import dataclass, field

from attention import build, flex, native, tiled, windows

# auto and measure are ways to choose one of the others.
BACKENDS = ("auto", "measure", "dense", "native", "diagonal", "flex", "tiled", "varlen")


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was chosen."""

    backend: str  # one of BACKENDS, but not auto or measure
    reason: str
    # backend -> seconds for a forward and backward, if measured; None = it does not work here
    timings: dict[str, float | None] = field(default_factory=dict)


def unusable(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run on this type of device, as "runs on the CPU, ..."; None if it can.

    `native` is built for this, if it is not yet.
    """
    if backend == "native":
        if device_type not in native.DEVICES:
            return f"runs on the CPU, not on {device_type}"
        reason = build.error()
        return None if reason is None else f"cannot be used: {reason}"
    if backend == "flex" and device_type not in flex.DEVICES:
        return f"runs on CUDA, not on {device_type}"
    if backend == "tiled":
        return tiled.error(device_type)
    if backend == "varlen":
        return windows.error(device_type)
    return None
