"""torchrun, but that it exits as the script that it ran, and gives it time to save: a sweep acts on its exit codes.

python torchrun.py --standalone --nproc_per_node 4 main.py ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import launch
import utils

TELLING = (utils.EXIT_OUT_OF_MEMORY, utils.EXIT_BUSY, utils.EXIT_AGAIN)  # the others fail because this one does


def pass_on_once(number: int, frame) -> None:
    """A signal, to the processes; those that follow must not cut short the saving. Slurm sends it by several ways."""
    for each in launch.STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SignalException(f"received {signal.Signals(number).name}", sigval=signal.Signals(number))


def main(argv=None) -> int:
    for number in launch.STOP_SIGNALS:
        signal.signal(number, pass_on_once)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # of torchrun's own handler, which lets them cut it short
    os.environ.setdefault("PET_NODE_RANK", os.environ.get("SLURM_NODEID", "0"))  # if srun has started it
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(launch.GRACE_SECONDS)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # main.py has said it, and better
    try:
        run.main(argv)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        rank, failure = error.get_first_failure()
        first = failure.exitcode
        if first < 0:
            print(f"torchrun.py: error: rank {rank} was ended by {launch.describe_exit(first)}", file=sys.stderr)
        return next((code for code in TELLING if code in codes), first if first > 0 else 1)
    except SignalException:  # passed on to the processes, which have saved
        return utils.EXIT_AGAIN
    return 0


if __name__ == "__main__":
    sys.exit(main())
