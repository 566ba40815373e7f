"""Helpers for tests that start processes and wait for what they do."""

import os
import time
from pathlib import Path


def alive(pid):
    """Whether a process with this id is running. A zombie is not."""
    try:
        os.kill(int(pid), 0)
        stat = Path(f"/proc/{pid}/stat")  # on Linux
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
