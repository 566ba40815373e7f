"""torchrun that exits with the script's own exit code, and lets it save when asked to stop.

    python sweep/torchrun.py --standalone --nproc_per_node 4 main.py ...

A sweep acts on the exit code of a run; plain torchrun exits with 1 whatever went wrong.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

# This script is started by its path, so the repository can't be imported yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import utils
from runtime import exit_codes
from sweep import launch

# A rank that exits with one of these is the cause, and the other ranks fail because of it.
CAUSES = (utils.EXIT_OUT_OF_MEMORY, utils.EXIT_BUSY, utils.EXIT_AGAIN)


def main(argv=None) -> int:
    for number in launch.STOP_SIGNALS:
        signal.signal(number, pass_on_once)

    # With torchrun's own handlers, a second signal would interrupt the saving. It insists on one.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(launch.GRACE_SECONDS)
    # On several nodes, srun starts this script once on each.
    os.environ.setdefault("PET_NODE_RANK", os.environ.get("SLURM_NODEID", "0"))
    # The script reports its own errors, and better.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    try:
        with tempfile.TemporaryDirectory(prefix="torchrun_", ignore_cleanup_errors=True) as folder:
            os.environ[exit_codes.FOLDER] = folder
            # By default, torchrun makes its own folder and leaves it behind.
            os.environ.setdefault("PET_LOG_DIR", folder)
            return run_ranks(argv, Path(folder))
    except (DistError, OSError, RuntimeError, ValueError) as error:
        # They found no meeting place, or the port is in use.
        message = f"the processes cannot meet: {utils.first_line(error)}"
        print(f"torchrun.py: error: {message}", file=sys.stderr)
        return 1


def run_ranks(argv: list[str] | None, folder: Path) -> int:
    """Run torchrun to the end; returns the exit code. The ranks leave theirs in the folder."""
    try:
        run.main(argv)
        return 0
    except ChildFailedError as error:
        return after_failure(error)
    except SignalException:  # torchrun has passed the signal on, and the ranks have exited since
        return after_stop(exit_codes.collect(folder))


def pass_on_once(number: int, frame) -> None:
    """Have torchrun pass a signal on to the ranks, and ignore any further ones.

    Slurm, for example, sends several; they must not interrupt the saving.
    """
    for each in launch.STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SignalException(f"received {signal.Signals(number).name}", sigval=signal.Signals(number))


def after_failure(error: ChildFailedError) -> int:
    """The exit code after a rank has failed on its own."""
    rank, failure = error.get_first_failure()
    first = failure.exitcode
    if first < 0:
        how = launch.describe_exit(first)
        print(f"torchrun.py: error: rank {rank} was ended by {how}", file=sys.stderr)

    codes = [failure.exitcode for failure in error.failures.values()]
    for code in CAUSES:
        if code in codes:
            return code
    return first if first > 0 else 1


def after_stop(codes: list[int]) -> int:
    """The exit code after the ranks were asked to stop and have exited with `codes`."""
    for code in codes:
        if code not in (0, utils.EXIT_AGAIN, 130):
            return code if code > 0 else 128 - code
    return 130 if 130 in codes else utils.EXIT_AGAIN


if __name__ == "__main__":
    sys.exit(main())
