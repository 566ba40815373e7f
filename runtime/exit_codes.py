"""The exit code of each rank of a parallel run, left in a file for sweep/torchrun.py, the launcher.

torchrun reports the exit codes of ranks that fail on their own, but not of ranks that it has
stopped. The launcher needs those too: after a request to stop, the same command may resume the run
only if every rank has saved.

A rank's file is empty and carries the code in its name, so it is never half-written, and recording
a code needs no disk space. Every function is a no-op in a process that the launcher didn't start.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from pathlib import Path
from typing import NoReturn

# Environment variable with the folder, which each start of the launcher creates on its own machine.
FOLDER = "LOCAL_ATTENTION_EXIT_CODES"
KILLED = -signal.SIGKILL


def announce() -> None:
    """Promise the launcher an exit code: if none follows, this rank was killed.

    Call it once signals are handled. A rank that a signal ends before that has nothing to save.
    """
    if FOLDER in os.environ:
        _file("announced").touch()
        atexit.register(record, 1)  # in case of an uncaught exception


def record(code: int) -> None:
    """Leave the exit code of this rank behind, before it exits. Only the first call counts."""
    if FOLDER in os.environ:
        with contextlib.suppress(OSError):
            _file("announced").rename(_file(f"exit_{code}"))


def exit_now(code: int) -> NoReturn:
    """Record the exit code and end the process without any cleanup."""
    record(code)
    os._exit(code)


def collect(folder: Path) -> list[int]:
    """The exit codes in a folder, by rank: KILLED where a code was announced but is missing."""
    codes = {int(path.stem): KILLED for path in folder.glob("*.announced")}
    for path in folder.glob("*.exit_*"):
        rank, _, code = path.name.partition(".exit_")
        codes[int(rank)] = int(code)

    return [code for _, code in sorted(codes.items())]


def _file(state: str) -> Path:
    return Path(os.environ[FOLDER], f"{os.environ['RANK']}.{state}")
