"""Small runs in their own processes, to be killed, in which faults can be planted.

They are forked from a server that has imported everything, so one starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import utils
from training import checkpoints

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    # What a run imports on its way, after main.
    ["main", "torch._dynamo", "sklearn.datasets", "sklearn.model_selection", "matplotlib.figure"]
)

RUN = [
    *("--dataset", "digits", "--img_size", "8", "--patch_size", "4", "--device", "cpu"),
    *("--model", "vit_micro", "--mask_type", "2d_cardinal", "--policy", "trivial"),
    *("--batch_size", "64", "--lr", "2e-3", "--epochs", "3", "--mix", "0.5", "--ema", "0.9"),
    *("--checkpoint_every_minutes", "0.0005"),  # every 30 ms: many per epoch
]
NUM_EPOCHS = 3
# The state in a checkpoint, except for clocks.
STATE = ("model", "average", "optimizers", "schedulers", "ranks", "epoch")
# Words in the names of metrics that differ from run to run.
TIMES = ("seconds", "per_second", "memory")

# Where a run can be made to kill itself, the n-th time that it gets there.
FAULTS = (
    "in a step",
    "in the write of a checkpoint",
    "between the write of a checkpoint and its name",
    "between a checkpoint and its metrics line",
    "in the write of the metrics",
    "before summary.json",
    "in the write of config.json",
)


def start(
    output: Path,
    fault: tuple[str, int] | None = None,
    limit_bytes: int | None = None,
    log: Path | None = None,
):
    """A process that runs main.py and prints to log.txt in the folder `log`, or in `output`."""
    log = log or output
    log.mkdir(parents=True, exist_ok=True)
    arguments = [*RUN, "--output_dir", str(output)]
    process = CONTEXT.Process(target=_run, args=(arguments, log / "log.txt", fault, limit_bytes))
    process.start()
    return process


def finish(output: Path, **how) -> int:
    """Run to the end. Returns the exit code, negative for a signal."""
    process = start(output, **how)
    process.join()
    return process.exitcode


def folder_of(output: Path) -> Path:
    return output / "digits" / "2d_cardinal_expansion_1" / "seed_0"


def result_of(output: Path) -> tuple[list[dict], dict]:
    """The metrics and the final state, without anything that a clock measured."""
    rows = utils.read_json_lines(folder_of(output) / utils.METRICS)

    def is_reproducible(key: str) -> bool:
        return not any(word in key for word in TIMES)

    rows = [{key: row[key] for key in row if is_reproducible(key)} for row in rows]
    state = checkpoints.load_checkpoint(folder_of(output) / utils.CHECKPOINT)
    return rows, {name: state[name] for name in STATE}


def assert_same_result(output: Path, uninterrupted: Path) -> None:
    """Assert that a finished run equals `uninterrupted`, its weights bit for bit.

    Each epoch is logged once.
    """
    rows, state = result_of(output)
    expected_rows, expected_state = result_of(uninterrupted)
    assert [row["epoch"] for row in rows] == list(range(1, NUM_EPOCHS + 1))
    assert rows == expected_rows
    import torch

    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)  # bit for bit
    summary = utils.read_json(folder_of(output) / utils.SUMMARY)
    assert summary["epochs"] == NUM_EPOCHS
    assert not list(folder_of(output).glob(".*.tmp"))


def _run(
    arguments: list[str], log: Path, fault: tuple[str, int] | None, limit_bytes: int | None
) -> None:
    import torch

    import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    if fault is not None:
        _plant(*fault)
    if limit_bytes is not None:
        _limit_file_size(limit_bytes)
    sys.argv = ["main.py", *arguments]
    utils.run_cli(main.main)


def _limit_file_size(num_bytes: int) -> None:
    """Make writes beyond this size of a file fail, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def _plant(place: str, count: int) -> None:
    """Make this process kill itself when it gets to a place for the count-th time."""
    from training import run_folder, trainer

    left = [count]

    def die_when_due() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name: str, condition=lambda *args, **kwargs: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if condition(*args, **kwargs):
                die_when_due()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    if place == "in a step":
        before(trainer.Trainer, "loss_of")
    elif place == "in the write of a checkpoint":
        original = checkpoints.torch.save

        def half(state, path):
            original(state, path)
            os.truncate(path, os.path.getsize(path) // 2)
            die_when_due()
            original(state, path)

        checkpoints.torch.save = half
    elif place == "between the write of a checkpoint and its name":
        before(checkpoints, "keep_as")
    elif place == "between a checkpoint and its metrics line":
        before(trainer.Trainer, "write_metrics")
    elif place == "in the write of the metrics":
        before(utils.os, "replace", lambda source, target: Path(target).name == utils.METRICS)
    elif place == "before summary.json":
        before(run_folder, "summarize")
    elif place == "in the write of config.json":
        before(utils.os, "replace", lambda source, target: Path(target).name == utils.CONFIG)
    else:
        raise ValueError(place)
