"""One run on several processes: joining them, and what they tell each other.

    torchrun --nproc_per_node=8 main.py ...

Every function is a no-op in a single process.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import exit_codes
from utils import UsageError, UserError, first_line, says_no_memory

HOW_TO_FIX = "unset it, or start several processes with torchrun, which sets it"


def read_environment() -> tuple[int, int, int]:
    """(rank, local rank, number of processes) as set by torchrun, or (0, 0, 1) without it.

    Raises UsageError if the variables are incomplete or contradict each other.
    """
    numbers = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    for name, text in numbers.items():
        if text is not None and not text.isdecimal():
            raise UsageError(
                f"{name} is {text!r} in the environment, expected a whole number; {HOW_TO_FIX}"
            )

    rank, local_rank, world_size = (int(text or 0) for text in numbers.values())
    if world_size <= 1 and rank == 0 and local_rank == 0:
        return 0, 0, 1

    for name in (*numbers, "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            found = " ".join(f"{key}={text}" for key, text in numbers.items() if text is not None)
            raise UsageError(
                f"the environment has {found}, as for one of several processes, but no {name}; "
                f"{HOW_TO_FIX}"
            )
    if rank >= world_size:
        raise UsageError(
            f"RANK is {rank} in the environment, but WORLD_SIZE is only {world_size}; {HOW_TO_FIX}"
        )
    return rank, local_rank, world_size


try:
    RANK, LOCAL_RANK, WORLD_SIZE = read_environment()
except UsageError:  # check_environment reports it; an import should not fail
    RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1

IS_FIRST = RANK == 0  # the rank that writes and prints

# A rank that the others wait for counts as lost after this long: while gradients are exchanged, and
# otherwise, as the first rank may be compiling and measuring backends.
TIMEOUT = timedelta(minutes=10)
PATIENCE = timedelta(minutes=60)

# What the ranks tell each other on their CPUs; the default group exchanges what devices compute.
_hosts: dist.ProcessGroup | None = None


def check_environment() -> None:
    """Raise UsageError if the environment mentions other processes, but not how to reach them."""
    read_environment()


def die_with_parent() -> None:
    """Have Linux kill this rank when its torchrun dies.

    The rank has its own session and would survive. It might then hang in a collective, where no
    request to stop reaches it, and keep its GPU.
    """
    if WORLD_SIZE > 1 and sys.platform == "linux":
        pr_set_pdeathsig = 1  # from sys/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def take_own_gpu() -> None:
    """Make this rank's GPU the current one, before anything is put on another rank's.

    Raises UsageError if there are too few GPUs.
    """
    if WORLD_SIZE > 1 and torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if num_gpus <= LOCAL_RANK:
            raise UsageError(
                f"torchrun started process number {LOCAL_RANK} on this machine, but there are "
                f"{num_gpus} GPUs; use at most --nproc_per_node {num_gpus}"
            )
        torch.cuda.set_device(LOCAL_RANK)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes of the run; yields the device of this one.

    Raises UserError if the other processes are lost.
    """
    if WORLD_SIZE == 1:
        yield device
        return

    global _hosts
    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
        _hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield torch.device("cuda", LOCAL_RANK) if on_gpu else device
        dist.barrier(_hosts)  # nobody leaves while another rank still talks to it
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise UserError(
            f"rank {RANK} of {WORLD_SIZE} has lost the other processes of this run "
            f"({first_line(error)}); most likely one of them died, and its own message says why. "
            "Run the same command again to go on from the last checkpoint"
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def leave(code: int) -> None:
    """Exit. In a parallel run, skip Python's cleanup: a leftover thread of gloo may abort it."""
    exit_codes.record(code)
    if WORLD_SIZE > 1:
        with contextlib.suppress(OSError):  # the disk is full, or nobody reads our output
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone, as gloo and NCCL word it."""
    closed = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    words = (*closed, "NCCL", "gloo", "Gloo")
    in_collective = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    return in_collective and not says_no_memory(error)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, with its gradients averaged over all ranks."""
    if WORLD_SIZE == 1:
        return model
    devices = [device] if device.type == "cuda" else None

    # The blocks are compiled one by one, so that their gradients are exchanged one by one. Dynamo
    # would split each block once more, by DDP's buckets.
    torch._dynamo.config.optimize_ddp = False

    # The buffers are masks, which are the same on every rank. The switch has two names, by version.
    parameters = inspect.signature(DistributedDataParallel).parameters
    is_new = "forward_sync_buffers" in parameters
    switch = "forward_sync_buffers" if is_new else "broadcast_buffers"
    return DistributedDataParallel(model, device_ids=devices, **{switch: False})


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """For all micro-batches of a step but the last: gradients add up locally."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks."""
    if WORLD_SIZE > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


class Vote:
    """Whether a flag is set on any rank, known one call later: no rank waits for the slowest one.

    All ranks must call it the same number of times, and start anew with a new one together.
    """

    def __init__(self):
        self.earlier: tuple[Tensor, dist.Work] | None = None

    def cast(self, flag: bool) -> bool:
        """Vote; returns what was voted in the call before. In a single process: the flag."""
        if WORLD_SIZE == 1:
            return flag
        earlier = self.earlier
        votes = torch.tensor(int(flag))
        self.earlier = votes, dist.all_reduce(votes, group=_hosts, async_op=True)
        if earlier is None:
            return False
        votes, work = earlier
        work.wait()
        return votes.item() > 0


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if WORLD_SIZE == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, group=_hosts)
    return votes.item() > 0


def from_first(value):
    """The value of rank 0, on all ranks."""
    if WORLD_SIZE == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_hosts, device=torch.device("cpu"))
    return box[0]


def from_all(value) -> list:
    """The values of all ranks, by rank."""
    if WORLD_SIZE == 1:
        return [value]
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value, group=_hosts)
    return values
