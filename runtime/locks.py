"""File locks: the system frees those of a process that dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock

from utils import UserError, first_line, warn

FOREVER = -1.0
NOT_SUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFS without its lock daemon


class NoLocksError(UserError):
    """The file system has no locks."""


def acquire(path: Path, timeout: float = FOREVER) -> AbstractContextManager:
    """Lock a file; leaving the context unlocks it. Raises filelock.Timeout where another process keeps it too long.

    Raises NoLocksError where the file system has no locks. Newer versions of filelock fall back to files that stand
    for locks there, and a killed process would leave its behind for ever.
    """
    try:
        _try_system_lock(path)
        return FileLock(path).acquire(timeout=timeout)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_SUPPORTED:
            raise
        raise NoLocksError(
            f"{path.parent} is on a file system without file locks ({first_line(error)}), where nothing keeps two "
            "processes from writing at once; choose another --output_dir, or mount it with locks (Lustre: -o flock)"
        ) from error


def acquire_if_possible(path: Path, risk: str) -> AbstractContextManager:
    """As `acquire`, but with a warning that names the risk, and no lock, where the file system has none."""
    try:
        return acquire(path)
    except NoLocksError:
        warn(f"{path.parent} is on a file system without file locks, going on without: {risk}")
        return contextlib.nullcontext()


def _try_system_lock(path: Path) -> None:
    """Raise OSError where the system cannot lock this file; not where another process has locked it."""
    with open(path, "a") as file, contextlib.suppress(BlockingIOError, PermissionError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
