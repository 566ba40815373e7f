"""The GPUs that a sweep may use, found without CUDA: the sweep itself must not occupy them."""

from __future__ import annotations

import itertools
import os
import re
import subprocess

import utils


def to_use(num_gpus: int | None) -> list[str]:
    """The first `num_gpus` GPUs, or all with None, named as in CUDA_VISIBLE_DEVICES; [] is the CPU.

    GPUs are counted by CUDA_VISIBLE_DEVICES if it is set, else by nvidia-smi. Without either,
    `num_gpus` is taken at its word. Raises UsageError if there are fewer.
    """
    if num_gpus == 0:
        return []

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found, counted_by = visible_gpus(visible), "CUDA_VISIBLE_DEVICES names"
        hides_all = visible.strip() in ("", "-1")
        if not found and not hides_all:
            raise utils.UsageError(
                f"CUDA_VISIBLE_DEVICES is {visible!r}, which names no GPU that CUDA can use (if "
                "one is there twice, CUDA uses none); correct or unset it, or run on the CPU with "
                "--gpus 0"
            )
    else:
        found, counted_by = gpus_of_nvidia_smi(), "nvidia-smi lists"

    if num_gpus is None:
        return found or []
    if found is None:
        return [str(index) for index in range(num_gpus)]
    if num_gpus > len(found):
        raise utils.UsageError(
            f"--gpus {num_gpus}, but {counted_by} {len(found)}; ask for at most that many, or run "
            "on the CPU with --gpus 0"
        )
    return found[:num_gpus]


def visible_gpus(visible: str) -> list[str]:
    """The GPUs that CUDA uses given CUDA_VISIBLE_DEVICES: those before the first invalid name.

    A name is an index, or the beginning of the UUID of a GPU or a MIG slice. Warns about names
    that CUDA skips. If one is there twice, CUDA uses none.
    """
    names = [name.strip() for name in visible.split(",")]
    listed = _list_gpus()

    def is_valid(name: str) -> bool:
        is_beyond = name.isdecimal() and bool(listed) and int(name) >= len(listed)
        return _is_gpu_name(name) and not is_beyond

    found = list(itertools.takewhile(is_valid, names))
    if len(set(found)) < len(found):
        return []

    skipped = names[len(found) :]
    if found and skipped and skipped[0] != "-1":
        utils.warn(
            f"CUDA stops at {skipped[0]!r} in CUDA_VISIBLE_DEVICES={visible}, which is no GPU; "
            f"only {', '.join(found)} can be used"
        )
    return found


def gpus_of_nvidia_smi() -> list[str] | None:
    """All GPUs, by index, those that are sliced by the UUIDs of their MIG slices.

    None without nvidia-smi.
    """
    listed = _list_gpus()
    if listed is None:
        return None
    names = []
    for index, slices in listed.items():
        names += slices or [index]
    return names


def _is_gpu_name(name: str) -> bool:
    return re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name) is not None


def _list_gpus() -> dict[str, list[str]] | None:
    """The UUIDs of each GPU's MIG slices, by the GPU's index. None without nvidia-smi."""
    answer = _call_nvidia_smi("-L")
    if answer is None:
        return None

    slices_of: dict[str, list[str]] = {}
    for line in answer.stdout.splitlines():
        if line.startswith("GPU "):
            index = line.split()[1].rstrip(":")
            slices_of[index] = []
        elif slices_of and (uuid := re.search(r"\(UUID: (MIG-[^)]+)\)", line)):
            slices_of[index].append(uuid[1])
    return slices_of


def responds(gpu: str) -> bool:
    """Whether nvidia-smi finds the GPU or MIG slice. True if there is no nvidia-smi."""
    if gpu.startswith("MIG-"):  # nvidia-smi -i doesn't accept slices
        answer = _call_nvidia_smi("-L")
        return answer is None or gpu in answer.stdout
    answer = _call_nvidia_smi("-i", gpu, "-L")
    return answer is None or answer.returncode == 0


def _call_nvidia_smi(*options: str) -> subprocess.CompletedProcess | None:
    """Its answer, which is a failure if it takes over 30 seconds. None without nvidia-smi."""
    command = ["nvidia-smi", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, returncode=1, stdout="", stderr="")
    except OSError:
        return None


def make_slots(gpus: list[str], runs_per_gpu: int, gpus_per_run: int = 1) -> list[str]:
    """One entry per slot: its GPUs as in CUDA_VISIBLE_DEVICES, where "" is the CPU.

    The order spreads few runs over many GPUs. Raises UsageError if there are too few GPUs for a
    run, or if a run should get several MIG slices, since CUDA shows a process only one.
    """
    if not gpus:
        return [""] * runs_per_gpu

    if len(gpus) < gpus_per_run:
        raise utils.UsageError(
            f"--gpus_per_run {gpus_per_run}, but there are {len(gpus)} GPUs to use; "
            "ask for at most that many"
        )
    slices = [gpu for gpu in gpus if gpu.startswith("MIG-")]
    if slices and gpus_per_run > 1:
        raise utils.UsageError(
            f"--gpus_per_run {gpus_per_run}, but {slices[0]} is a slice of a GPU, and CUDA gives a "
            "run only one slice; use --gpus_per_run 1, or name whole GPUs in CUDA_VISIBLE_DEVICES"
        )

    starts = range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)
    return [",".join(gpus[start : start + gpus_per_run]) for start in starts] * runs_per_gpu
