"""torchrun, but that it exits as the script that it ran, and gives it time to save: a sweep acts on its exit codes.

python sweep/torchrun.py --standalone --nproc_per_node 4 main.py ...
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: it is started by its path

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

import utils
from sweep import launch

TELLING = (utils.EXIT_OUT_OF_MEMORY, utils.EXIT_BUSY, utils.EXIT_AGAIN)  # the others fail because this one does


def pass_on_once(number: int, frame) -> None:
    """A signal, to the processes; those that follow must not cut short the saving. Slurm sends it by several ways."""
    for each in launch.STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SignalException(f"received {signal.Signals(number).name}", sigval=signal.Signals(number))


def remember_processes() -> list[subprocess.Popen]:
    """A list to which torchrun's processes will be added: it does not tell how those that it has stopped have ended."""
    started, start = [], SubprocessHandler._popen

    def remembered(self, *args, **kwargs):
        started.append(start(self, *args, **kwargs))
        return started[-1]

    SubprocessHandler._popen = remembered
    return started


def code_of(codes: list[int], number: int) -> int:
    """What to exit with after processes, asked to stop by signal `number`, have ended with these codes."""
    for code in codes:
        if code not in (0, utils.EXIT_AGAIN, 130, -number):  # the signal, if it came before they were listening
            return code if code > 0 else 128 - code
    return 130 if 130 in codes else utils.EXIT_AGAIN


def main(argv=None) -> int:
    started = remember_processes()
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
    except SignalException as error:  # passed on to the processes, which have ended
        return code_of([process.wait() for process in started], error.sigval)
    except (DistError, OSError, RuntimeError, ValueError) as error:  # no meeting place, a port that is taken
        print(f"torchrun.py: error: the processes cannot meet: {utils.first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
