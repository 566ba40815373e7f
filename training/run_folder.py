"""The folder of a run: one process writes to it, other settings and other data are refused, a summary ends it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

import utils
from pipeline import identity
from runtime import distributed, locks
from training.run_record import FORMAT, RunRecord
from training.settings import complete
from utils import BusyError, UsageError


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock, which the system frees when a process dies. Raises BusyError if another holds it."""
    if not distributed.IS_FIRST:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = locks.acquire(folder / utils.LOCK, timeout=1)  # another process may hold it briefly while checking
    except Timeout:
        raise BusyError(f"another process is writing to {folder}; wait for it, or choose another --run_name") from None
    with lock:
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        yield


def read_to_go_on(folder: Path) -> RunRecord | None:
    """The run that is to go on, or None if there is none yet. Raises UserError for one of an older format."""
    record = RunRecord.read(folder, formats=(FORMAT,))
    if record is not None:
        needed = {"attention": {"backend": str, "backend_reason": str}}
        utils.check_sections(folder / utils.CONFIG, record.config, needed)
    return record


def is_finished(folder: Path, settings: dict, data: dict | None) -> bool:
    """Whether the folder holds this run, complete; says so then. Raises UsageError if it holds another run.

    `data` is what is known of it: by its name alone (None), by its files' names and sizes, or, once it is read, all. A
    run from before these were noted is only known to be of this data once that is read.
    """
    if not distributed.IS_FIRST:  # which may see the files later than the first process, or not at all
        return distributed.from_first(None)
    record, finished = read_to_go_on(folder), False
    if record is not None:
        refuse_other_settings(folder, record.settings, settings)
        if data is not None:
            refuse_other_data(folder, record.config["data"], data)
        is_compared = data is None or "checksum" in data or identity.is_known(record.config["data"])
        finished = is_compared and (folder / utils.SUMMARY).exists()
    if finished:
        needed = {"final": {"eval_accuracy": (int, float), "epoch": int}}
        utils.check_sections(folder / utils.SUMMARY, record.summary, needed)
        final = record.summary["final"]
        print(f"{folder} is finished: {final['eval_accuracy']:.2f}% after epoch {final['epoch']}; nothing to do")
    return distributed.from_first(finished)


# ---------------------------------------------------------------------------------------------------------------------
# Other runs


def result_of(value):
    """A setting as far as the result depends on it: a CUDA graph replays the same compiled kernels."""
    return "default" if value == "reduce-overhead" else value


def refuse_other(folder: Path, what: str, found: dict, asked: dict) -> None:
    """Raise UsageError if the folder's run was made with something else than what is asked for now."""
    differing = [
        f"{key} {found.get(key)!r} there, {value!r} asked for"
        for key, value in asked.items()
        if key not in utils.NOT_PART_OF_THE_RESULT and result_of(found.get(key)) != result_of(value)
    ]
    if differing:
        raise UsageError(
            f"{folder} holds a run of other {what}: {'; '.join(differing)}. Choose another --dataset_name, --run_name "
            "or --output_dir, or remove the folder"
        )


def refuse_other_settings(folder: Path, found: dict, asked: dict) -> None:
    refuse_other(folder, "settings", complete(found, asked), asked)


def refuse_other_data(folder: Path, found: dict, data: dict) -> None:
    """Raise UsageError if the folder's run was made with other data, as far as its `data` and ours both tell."""
    if data.get("files") is not None:
        identity.refuse_other_data(folder, identity.differences(found, data))
    refuse_other(folder, "data", found, {key: data[key] for key in data if key in found and key != "label"})


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def make_config(record: RunRecord | None, settings: dict, model: dict, data: dict, provenance: dict) -> dict:
    """What config.json is to hold, of a new run or of one that goes on.

    `model` has the number of parameters and the section on attention. Raises UsageError if the run was begun with
    other data.
    """
    config = {"format": FORMAT, "settings": settings, **model, "data": data, "provenance": provenance}
    if record is not None:
        found = record.config
        refuse_other_data(record.folder, found["data"], data)
        config["attention"]["backend_seconds"] = found["attention"].get("backend_seconds")
        earlier = found["resumed"] if isinstance(found.get("resumed"), list) else []
        config |= {"provenance": found["provenance"], "resumed": [*earlier, provenance]}
    return config


def summarize(history: list[dict], config: dict) -> dict:
    """The contents of summary.json. The final epoch is the result; the best one is there to be seen, not reported."""
    steady = history[1:] or history  # the first epoch carries warm-up and compilation
    best = max(history, key=lambda row: row["eval_accuracy"])
    num_train, peaks = config["data"]["num_train"], [row["peak_memory_bytes"] for row in history]
    train_seconds = sum(num_train / row["train_images_per_second"] for row in steady)
    return {
        "format": FORMAT,
        "final": history[-1],
        "best": {"epoch": best["epoch"], "eval_accuracy": best["eval_accuracy"]},
        "epochs": len(history),
        "total_seconds": sum(row["epoch_seconds"] for row in history),
        "train_images_per_second": len(steady) * num_train / train_seconds,
        "peak_memory_bytes": None if None in peaks else max(peaks),
    }
