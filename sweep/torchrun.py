"""torchrun that exits with the script's own exit code, and gives the ranks time to save when it is asked to stop.

    python sweep/torchrun.py --standalone --nproc_per_node 4 main.py ...

A sweep acts on the exit code of a run; plain torchrun exits with 1 whatever happened.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

# This script is started by its path, so the repository is not importable yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import utils
from runtime import exit_codes
from sweep import launch

# If one rank exits with one of these, it is the cause, and the other ranks fail because of it.
CAUSES = (utils.EXIT_OUT_OF_MEMORY, utils.EXIT_BUSY, utils.EXIT_AGAIN)


def main(argv=None) -> int:
    for number in launch.STOP_SIGNALS:
        signal.signal(number, pass_on_once)

    # torchrun's own handlers would let a second signal interrupt the saving, so give it one that nobody sends.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(launch.GRACE_SECONDS)
    # On several nodes, srun starts this script once on each.
    os.environ.setdefault("PET_NODE_RANK", os.environ.get("SLURM_NODEID", "0"))
    # The script has reported its error already, and better.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    try:
        with tempfile.TemporaryDirectory(prefix="torchrun_", ignore_cleanup_errors=True) as folder:
            os.environ[exit_codes.FOLDER] = folder
            os.environ.setdefault("PET_LOG_DIR", folder)  # or torchrun makes one that it leaves behind
            try:
                run.main(argv)
            except SignalException:  # passed on to the ranks, which have exited since
                return after_stop(exit_codes.collect(Path(folder)))
    except ChildFailedError as error:
        return after_failure(error)
    except (DistError, OSError, RuntimeError, ValueError) as error:  # no meeting place, a port in use
        print(f"torchrun.py: error: the processes cannot meet: {utils.first_line(error)}", file=sys.stderr)
        return 1
    return 0


def pass_on_once(number: int, frame) -> None:
    """Have torchrun pass a signal on to the ranks, and ignore all further ones, which must not interrupt the saving.

    Slurm, for one, sends several.
    """
    for each in launch.STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SignalException(f"received {signal.Signals(number).name}", sigval=signal.Signals(number))


def after_failure(error: ChildFailedError) -> int:
    """The exit code after a rank has failed on its own."""
    codes = [failure.exitcode for failure in error.failures.values()]
    rank, failure = error.get_first_failure()
    first = failure.exitcode
    if first < 0:
        print(f"torchrun.py: error: rank {rank} was ended by {launch.describe_exit(first)}", file=sys.stderr)

    for code in CAUSES:
        if code in codes:
            return code
    return first if first > 0 else 1


def after_stop(codes: list[int]) -> int:
    """The exit code after ranks that were asked to stop have exited with `codes`."""
    for code in codes:
        if code not in (0, utils.EXIT_AGAIN, 130):
            return code if code > 0 else 128 - code
    return 130 if 130 in codes else utils.EXIT_AGAIN


if __name__ == "__main__":
    sys.exit(main())
