"""Full disks and read-only folders: one clear line, and what was saved stays valid."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import victims

import utils
from training import checkpoints


def errors_of(output):
    lines = (output / "log.txt").read_text().splitlines()
    return [line for line in lines if "error:" in line or "Traceback" in line]


@pytest.mark.parametrize("limit", [100, 20_000, 500_000, 2_000_000])
def test_files_that_cannot_grow(uninterrupted, tmp_path, limit, count):
    """All writes beyond the limit fail. After that, there is room again."""
    size = (victims.folder_of(uninterrupted) / utils.CHECKPOINT).stat().st_size
    assert limit < size
    assert victims.finish(tmp_path, limit_bytes=limit) == 1
    (error,) = errors_of(tmp_path)
    assert error.startswith("main.py: error: ")
    assert "too large" in error or "space" in error
    # It names the file. A log of 100 bytes has room for this much of the name.
    assert str(tmp_path.parent) in error
    assert not (victims.folder_of(tmp_path) / utils.SUMMARY).exists()
    count("full disks survived")
    assert victims.finish(tmp_path) == 0
    victims.assert_same_result(tmp_path, uninterrupted)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build quota.c")
@pytest.mark.parametrize("share_of_a_checkpoint", [0.001, 0.5, 1.5])
def test_a_quota_that_is_reached(uninterrupted, tmp_path, share_of_a_checkpoint, count):
    source, library = Path(__file__).with_name("quota.c"), tmp_path / "quota.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    size = (victims.folder_of(uninterrupted) / utils.CHECKPOINT).stat().st_size
    quota = {"LD_PRELOAD": str(library), "QUOTA": str(round(share_of_a_checkpoint * size))}
    command = [sys.executable, utils.REPOSITORY / "main.py", *victims.RUN, "--output_dir", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **quota}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    # If the picture didn't fit either, a warning comes first.
    assert done.stderr.count("main.py: error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "quota" in done.stderr
    checkpoint = victims.folder_of(tmp_path) / utils.CHECKPOINT
    assert checkpoint.exists() == (share_of_a_checkpoint > 1)
    count("full disks survived")
    assert victims.finish(tmp_path) == 0
    victims.assert_same_result(tmp_path, uninterrupted)


@contextlib.contextmanager
def small_disk(folder, megabytes):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_during_training(uninterrupted, tmp_path, count):
    """There is room for one checkpoint and a bit: the second doesn't fit next to the first."""
    size = (victims.folder_of(uninterrupted) / utils.CHECKPOINT).stat().st_size
    with small_disk(tmp_path / "disk", max(1, round(1.7 * size / 2**20))):
        output = tmp_path / "disk" / "runs"
        assert victims.finish(output) == 1
        (error,) = errors_of(output)
        assert "no space left on the disk" in error
        # The first checkpoint is still valid.
        state = checkpoints.load_checkpoint(victims.folder_of(output) / utils.CHECKPOINT)
        assert state["epoch"] == 1
        assert not (victims.folder_of(output) / utils.SUMMARY).exists()
        count("full disks survived")
        subprocess.run(["mount", "-o", "remount,size=50m", str(tmp_path / "disk")], check=True)
        assert victims.finish(output) == 0
        victims.assert_same_result(output, uninterrupted)


def test_a_folder_that_cannot_be_written(tmp_path):
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:  # permissions don't apply to root
            stack.enter_context(small_disk(tmp_path / "disk", 1))
            subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        else:
            (tmp_path / "disk").mkdir(mode=0o500)
        (tmp_path / "log").mkdir()
        assert victims.finish(tmp_path / "disk" / "runs", log=tmp_path / "log") == 1
        (error,) = errors_of(tmp_path / "log")
        assert "Read-only file system" in error or "Permission denied" in error
