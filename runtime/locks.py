"""File locks, which the system releases when the process that holds them dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock

from utils import UserError, first_line, warn

FOREVER = -1.0
# Lustre without -o flock, NFS without its lock daemon.
NOT_SUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class NoLocksError(UserError):
    """The file system does not support locks."""


def acquire(path: Path, timeout: float = FOREVER) -> AbstractContextManager:
    """Lock a file until the returned context is left.

    Raises filelock.Timeout if another process still holds the lock after `timeout` seconds, and
    NoLocksError if the file system does not support locks. There, newer versions of filelock would
    fall back to marker files, which a killed process leaves behind forever.
    """
    try:
        _try_system_lock(path)
        return FileLock(path).acquire(timeout=timeout)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_SUPPORTED:
            raise
        raise NoLocksError(
            f"{path.parent} is on a file system without file locks ({first_line(error)}), so "
            "nothing keeps two processes from writing at once; choose another --output_dir, or "
            "mount it with locks (Lustre: -o flock)"
        ) from error


def acquire_if_possible(path: Path, risk: str) -> AbstractContextManager:
    """Like `acquire`, but where locks are not supported, warn of the risk and go on without one."""
    try:
        return acquire(path)
    except NoLocksError:
        warn(f"{path.parent} is on a file system without file locks, going on without: {risk}")
        return contextlib.nullcontext()


def _try_system_lock(path: Path) -> None:
    """Raise OSError if the system cannot lock this file, but not if another process holds it."""
    with open(path, "a") as file, contextlib.suppress(BlockingIOError, PermissionError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
