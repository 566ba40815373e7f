"""Helpers for tests that start processes and wait for what they do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import utils


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


def start_torchrun(num_processes, *arguments, by=("-m", "torch.distributed.run")):
    """Start main.py with these arguments, on processes of one thread each."""
    launcher = [sys.executable, *by, "--standalone", "--nproc_per_node", str(num_processes)]
    return subprocess.Popen(
        [*launcher, "main.py", *arguments],
        cwd=utils.REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(num_processes, *arguments, **options):
    """The same, to the end -> (exit code, stdout, stderr)."""
    process = start_torchrun(num_processes, *arguments, **options)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err
