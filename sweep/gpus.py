"""The GPUs that a sweep may use, found without CUDA: the sweep's process must hold none of them."""

from __future__ import annotations

import itertools
import os
import re
import subprocess

import utils


def to_use(num_gpus: int | None) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them: the first `num_gpus`, or all with None; [] = the CPU.

    Raises UsageError if there are fewer. GPUs are counted by CUDA_VISIBLE_DEVICES, else by nvidia-smi; where neither
    is there the number asked for is believed.
    """
    if num_gpus == 0:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found, counted_by = visible_gpus(visible), "CUDA_VISIBLE_DEVICES names"
        hides_all = visible.strip() in ("", "-1")
        if not found and not hides_all:
            raise utils.UsageError(
                f"CUDA_VISIBLE_DEVICES is {visible!r}, which names no GPU that CUDA can use (it takes none where one "
                "is there twice); correct or unset it, or run on the CPU with --gpus 0"
            )
    else:
        listed, counted_by = _list_gpus(), "nvidia-smi lists"
        found = None if listed is None else [name for index, slices in listed.items() for name in slices or [index]]
    if num_gpus is None:
        return found or []
    if found is None:
        return [str(index) for index in range(num_gpus)]
    if num_gpus > len(found):
        raise utils.UsageError(
            f"--gpus {num_gpus}, but {counted_by} {len(found)}; ask for at most that many, --gpus 0 runs on the CPU"
        )
    return found[:num_gpus]


def visible_gpus(visible: str) -> list[str]:
    """The GPUs that CUDA takes from CUDA_VISIBLE_DEVICES: those before the first name that is none.

    A name is an index, or the (beginning of the) UUID of a GPU or of a MIG slice. Warns of names that are passed over.
    Where one is there twice, CUDA takes none.
    """
    names = [name.strip() for name in visible.split(",")]
    listed = _list_gpus()

    def is_gpu(name: str) -> bool:
        is_beyond = name.isdecimal() and bool(listed) and int(name) >= len(listed)
        return _is_gpu_name(name) and not is_beyond

    found = list(itertools.takewhile(is_gpu, names))
    if len(set(found)) < len(found):
        return []
    rest = names[len(found) :]
    if found and rest and rest[0] != "-1":
        utils.warn(
            f"CUDA stops at {rest[0]!r} in CUDA_VISIBLE_DEVICES={visible}, which is no GPU; only {', '.join(found)} "
            "can be used"
        )
    return found


def _is_gpu_name(name: str) -> bool:
    return re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name) is not None


def _list_gpus() -> dict[str, list[str]] | None:
    """Index -> UUIDs of the MIG slices, for all GPUs of the machine. None without nvidia-smi."""
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
    """Whether nvidia-smi finds the GPU, or the MIG slice; True where there is no nvidia-smi."""
    if gpu.startswith("MIG-"):  # which -i does not take
        answer = _call_nvidia_smi("-L")
        return answer is None or gpu in answer.stdout
    answer = _call_nvidia_smi("-i", gpu, "-L")
    return answer is None or answer.returncode == 0


def _call_nvidia_smi(*options: str) -> subprocess.CompletedProcess | None:
    """What it answers; a failure if it does not within half a minute, None where there is none."""
    command = ["nvidia-smi", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, returncode=1, stdout="", stderr="")
    except OSError:
        return None


def make_slots(gpus: list[str], runs_per_gpu: int, gpus_per_run: int = 1) -> list[str]:
    """One entry per slot, its GPUs as in CUDA_VISIBLE_DEVICES ("" = the CPU); few runs spread over many GPUs.

    Raises UsageError if the GPUs are too few for one run, or slices, of which CUDA shows a process only one.
    """
    if not gpus:
        return [""] * runs_per_gpu
    if len(gpus) < gpus_per_run:
        raise utils.UsageError(
            f"--gpus_per_run {gpus_per_run}, but there are {len(gpus)} GPUs to use; ask for at most that many"
        )
    slices = [gpu for gpu in gpus if gpu.startswith("MIG-")]
    if slices and gpus_per_run > 1:
        raise utils.UsageError(
            f"--gpus_per_run {gpus_per_run}, but {slices[0]} is a slice of a GPU, of which CUDA gives a run only one; "
            "use --gpus_per_run 1, or name whole GPUs in CUDA_VISIBLE_DEVICES"
        )
    starts = range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)
    return [",".join(gpus[start : start + gpus_per_run]) for start in starts] * runs_per_gpu
