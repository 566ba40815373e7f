"""One run on many processes: what torchrun has set up, and what the processes tell each other.

    torchrun --nproc_per_node=8 main.py ...

Without torchrun every function is a no-op in a single process.
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


def read_environment() -> tuple[int, int, int]:
    """(rank, local rank, number of processes) as torchrun tells each process; (0, 0, 1) without torchrun.

    Raises UsageError where only a part of it is there, or makes no sense.
    """
    numbers = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    for name, text in numbers.items():
        if text is not None and not text.isdecimal():
            raise UsageError(f"{name} is {text!r} in the environment, expected a whole number; {UNSET}")
    rank, local_rank, world_size = (int(text or 0) for text in numbers.values())
    if world_size <= 1 and rank == 0 and local_rank == 0:
        return 0, 0, 1
    for name in (*numbers, "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            there = " ".join(f"{key}={text}" for key, text in numbers.items() if text is not None)
            raise UsageError(f"{there} in the environment, as of one of several processes, but no {name}; {UNSET}")
    if rank >= world_size:
        raise UsageError(f"RANK is {rank} in the environment, and WORLD_SIZE only {world_size}; {UNSET}")
    return rank, local_rank, world_size


UNSET = "unset it, or start several processes with torchrun, which sets it"
try:
    RANK, LOCAL_RANK, WORLD_SIZE = read_environment()
except UsageError:  # said by check_environment, where it can be
    RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1
IS_FIRST = RANK == 0  # the one that writes and prints
TIMEOUT = timedelta(minutes=60)  # the first rank may be compiling and measuring backends


def check_environment() -> None:
    """Raise UsageError if the environment tells of other processes, but not how to meet them."""
    read_environment()


def die_with_parent() -> None:
    """Have the system kill this process of a parallel run when its torchrun dies: a session of its own would survive.

    On Linux. It might hang in a collective, where no request to stop is heard, and would keep its GPU.
    """
    if WORLD_SIZE > 1 and sys.platform == "linux":
        pr_set_pdeathsig = 1  # of sys/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def take_own_gpu() -> None:
    """Make this process's GPU the current one, before anything is put on another's. UsageError if there are too few."""
    if WORLD_SIZE > 1 and torch.cuda.is_available():
        if torch.cuda.device_count() <= LOCAL_RANK:
            raise UsageError(
                f"torchrun started a process number {LOCAL_RANK} here, and there are {torch.cuda.device_count()} GPUs; "
                "use --nproc_per_node of at most as many"
            )
        torch.cuda.set_device(LOCAL_RANK)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes of the run; yields this one's device. If they are lost, the rest get a UserError."""
    if WORLD_SIZE == 1:
        yield device
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        yield torch.device("cuda", LOCAL_RANK) if device.type == "cuda" else device
        dist.barrier()  # nobody leaves while another still talks to it
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise UserError(
            f"rank {RANK} of {WORLD_SIZE} has lost the other processes of this run ({first_line(error)}); most likely "
            "one has died, and its own message says why. The same command goes on from the last checkpoint"
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def leave(code: int) -> None:
    """Exit. A thread of gloo may outlive its group, and abort a process that takes its interpreter down in order."""
    exit_codes.record(code)
    if WORLD_SIZE > 1:
        with contextlib.suppress(OSError):  # a full disk, a reader that has gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because somebody else is gone; gloo and NCCL say so in their own words."""
    words = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo", "Gloo", "Broken pipe")
    communicating = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    return communicating and not says_no_memory(error)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its gradients averaged over the processes."""
    if WORLD_SIZE == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    # The buffers are masks, the same everywhere; older versions of torch call the switch broadcast_buffers.
    switches = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in switches else "broadcast_buffers"
    return DistributedDataParallel(model, device_ids=devices, **{name: False})


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """For all micro-batches of a step but the last: gradients add up here and are not exchanged yet."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    if WORLD_SIZE > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def any_rank(flag: bool) -> bool:
    """Whether it is true on any process."""
    if WORLD_SIZE == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes)
    return votes.item() > 0


def from_first(value):
    """The first process's value, on all."""
    if WORLD_SIZE == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def from_all(value) -> list:
    """Every process's value, by rank."""
    if WORLD_SIZE == 1:
        return [value]
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values
