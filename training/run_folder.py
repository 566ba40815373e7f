"""The folder of a run: one writer at a time, no other settings or data, a summary at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

import utils
from interop import weight_files
from pipeline import identity
from runtime import distributed, locks
from training.command_line import complete
from training.run_record import FORMAT, RunRecord
from training.settings import EVAL_SPLITS, MAY_CHANGE, Settings
from utils import BusyError


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock, which the system frees when a process dies.

    Raises BusyError if another process holds it.
    """
    if not distributed.IS_FIRST:
        yield
        return

    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Another process may hold it briefly while checking.
        lock = locks.acquire(folder / utils.LOCK, timeout=1)
    except Timeout:
        raise BusyError(
            f"another process is writing to {folder}; wait for it, or choose another --run_name"
        ) from None

    with lock:
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)
        yield


def read_to_resume(folder: Path) -> RunRecord | None:
    """The run to resume, or None if there is none yet. Raises UserError for an older format."""
    record = RunRecord.read(folder, formats=(FORMAT,))
    if record is not None:
        needed = {"backend": str, "backend_reason": str}
        path, about = folder / utils.CONFIG, record.config["attention"]
        for mask in about.get("masks") or [about]:
            utils.check_sections(path, {"attention": mask}, {"attention": needed})
    return record


def is_finished(folder: Path, settings: Settings, data: dict | None) -> bool:
    """Whether the folder holds this run, complete; if so, says it.

    Raises UsageError if it holds another run. `data` is what is known so far: None (only the name
    of the dataset), the names and sizes of files, or everything once it is read. Runs from before
    file names were noted can only be compared once the data is read.
    """
    if not distributed.IS_FIRST:  # may see the files later than the first process, or not at all
        return distributed.from_first(None)

    record, finished = read_to_resume(folder), False
    if record is not None:
        refuse_other_settings(folder, record.config["settings"], settings)
        refuse_other_weights(folder, record.config.get("weights"), settings)
        if data is not None:
            refuse_other_data(folder, record.config["data"], data)
        is_read = data is None or "checksum" in data
        is_compared = is_read or identity.is_known(record.config["data"])
        finished = is_compared and (folder / utils.SUMMARY).exists()

    if finished:
        needed = {"final": {"eval_accuracy": (int, float), "epoch": int}}
        utils.check_sections(folder / utils.SUMMARY, record.summary, needed)
        final = record.summary["final"]
        result = f"{final['eval_accuracy']:.2f}% after epoch {final['epoch']}"
        if settings.data.holdout:
            result += f", on {EVAL_SPLITS['holdout']}"
        print(f"{folder} is finished: {result}; nothing to do")
    return distributed.from_first(finished)


# --------------------------------------------------------------------------------------------------
# Other runs


def refuse_other_settings(folder: Path, found: dict, asked: Settings) -> None:
    """Raise UsageError if the folder's run has other settings, as far as results depend on them."""
    result = {key: value for key, value in asked.to_dict().items() if key not in MAY_CHANGE}
    found = complete(found, asked)
    hint = ""
    if (asked.optimization.epochs or 0) > (found["epochs"] or 0):
        last = folder / utils.CHECKPOINT
        hint = f". To train on from its weights, start a new run with --init_from {last}"
    _refuse(folder, "settings", found, result, hint)


def refuse_other_weights(folder: Path, found: dict | None, asked: Settings) -> None:
    """Raise UsageError if the folder's run started from other weights.

    `found` is what it has noted, None for drawn weights. A file is the same if its content is,
    wherever it lies; if it is gone, which does not keep a run from resuming, if its path is.
    """
    there = found or {"file": "none", "sha256": None}
    path = asked.start.path
    here = path or "none"
    is_same = here == there["file"]
    if path is not None and Path(path).is_file():
        is_same = weight_files.hash_of(Path(path)) == there["sha256"]
        here = f"{path} as it is now"

    if not is_same:
        differing = [f"{there['file']} there, {here} asked for"]
        identity.refuse_other(folder, "starting weights", differing)


def refuse_other_data(folder: Path, found: dict, data: dict) -> None:
    """Raise UsageError if the folder's run was made with other data, as far as both notes tell."""
    if data.get("files") is not None:
        identity.refuse_other(folder, "data", identity.differences(found, data))
    asked = {key: data[key] for key in data if key in found and key != "label"}
    _refuse(folder, "data", found, asked)


def _refuse(folder: Path, what: str, found: dict, asked: dict, hint: str = "") -> None:
    differing = [
        f"{key} {found.get(key)!r} there, {value!r} asked for"
        for key, value in asked.items()
        if _result_of(found.get(key)) != _result_of(value)
    ]
    identity.refuse_other(folder, what, differing, hint)


def _result_of(value):
    """A setting as far as results depend on it: CUDA graphs replay the same compiled kernels."""
    return "default" if value == "reduce-overhead" else value


# --------------------------------------------------------------------------------------------------
# What is written


def make_config(
    record: RunRecord | None, settings: Settings, model: dict, data: dict, provenance: dict
) -> dict:
    """The content of config.json, for a new run or for one that is resumed.

    `model` has the number of parameters and the section on attention. Raises UsageError if the run
    was begun with other data.
    """
    config = {
        "format": FORMAT,
        "settings": settings.to_dict(),
        **model,
        "data": data,
        "provenance": provenance,
    }
    if record is None:
        return config

    found = record.config
    refuse_other_data(record.folder, found["data"], data)
    _keep_timings(config["attention"], found["attention"])
    earlier = found["resumed"] if isinstance(found.get("resumed"), list) else []
    return config | {"provenance": found["provenance"], "resumed": [*earlier, provenance]}


def _keep_timings(about: dict, found: dict) -> None:
    """What the choice of a backend was based on, which is not measured again."""
    pairs = zip(about.get("masks", [about]), found.get("masks", [found]), strict=True)
    for mask, mask_found in pairs:
        mask["backend_seconds"] = mask_found.get("backend_seconds")


def summarize(history: list[dict], config: dict) -> dict:
    """The content of summary.json.

    The result is the final epoch; the best one is only for information.
    """
    best = max(history, key=lambda row: row["eval_accuracy"])
    peaks = [row["peak_memory_bytes"] for row in history]

    steady = history[1:] or history  # the first epoch contains warm-up and compilation
    num_train = config["data"]["num_train"]
    images = [row.get("train_images", num_train) for row in steady]
    seconds = sum(n / row["train_images_per_second"] for n, row in zip(images, steady, strict=True))

    return {
        "format": FORMAT,
        "final": history[-1],
        "best": {"epoch": best["epoch"], "eval_accuracy": best["eval_accuracy"]},
        "epochs": len(history),
        "total_seconds": sum(row["epoch_seconds"] for row in history),
        "train_images_per_second": sum(images) / seconds,
        "peak_memory_bytes": None if None in peaks else max(peaks),
    }
