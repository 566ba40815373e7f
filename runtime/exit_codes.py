"""The exit codes of a parallel run's ranks, each left in a folder for the launcher, sweep/torchrun.py.

torchrun reports the exit codes of ranks that fail on their own, but not of ranks that it has stopped itself.
The launcher needs them: after a request to stop, the same command may go on only if every rank has saved.

A rank's file is empty and its name holds the code, so it is never half-written and recording needs no disk space.
Every function is a no-op in a process that the launcher has not started.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from pathlib import Path
from typing import NoReturn

# Environment variable: the folder, a new one for each start of the launcher, on its own machine.
FOLDER = "LOCAL_ATTENTION_EXIT_CODES"
KILLED = -signal.SIGKILL


def announce() -> None:
    """Tell the launcher that this rank will record its exit code: if none follows, the rank was killed.

    Call it once signals are handled. A rank that a signal ends before that has nothing to save.
    """
    if FOLDER in os.environ:
        _file("announced").touch()
        atexit.register(record, 1)  # an uncaught exception


def record(code: int) -> None:
    """Leave the exit code of this rank behind, just before it exits. Only the first call counts."""
    if FOLDER in os.environ:
        with contextlib.suppress(OSError):
            _file("announced").rename(_file(f"exit_{code}"))


def exit_now(code: int) -> NoReturn:
    """Record the exit code and end the process without any cleanup."""
    record(code)
    os._exit(code)


def collect(folder: Path) -> list[int]:
    """The exit codes in a folder, by rank: KILLED where a code was announced and is missing."""
    codes = {int(path.stem): KILLED for path in folder.glob("*.announced")}
    for path in folder.glob("*.exit_*"):
        rank, _, code = path.name.partition(".exit_")
        codes[int(rank)] = int(code)
    return [code for _, code in sorted(codes.items())]


def _file(state: str) -> Path:
    return Path(os.environ[FOLDER], f"{os.environ['RANK']}.{state}")
