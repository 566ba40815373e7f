"""torchrun, but that it exits as the script that it ran: a sweep acts on main.py's exit codes.

python torchrun.py --standalone --nproc_per_node 4 main.py ...
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import utils

TELLING = (utils.EXIT_OUT_OF_MEMORY, utils.EXIT_BUSY, utils.EXIT_AGAIN)  # the others fail because this one does


def main(argv=None) -> int:
    try:
        run.main(argv)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        first = error.get_first_failure()[1].exitcode
        return next((code for code in TELLING if code in codes), first if first > 0 else 1)
    except SignalException:  # passed on to the processes, which have saved
        return utils.EXIT_AGAIN
    return 0


if __name__ == "__main__":
    sys.exit(main())
