"""One run on many processes: what torchrun has set up, and what the processes tell each other.

    torchrun --nproc_per_node=8 main.py ...

Without torchrun everything here is for a world of one, and does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import UserError

# What torchrun tells each process.
RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
WORLD_SIZE = max(1, WORLD_SIZE)
IS_FIRST = RANK == 0  # the one that writes and prints
TIMEOUT = timedelta(minutes=60)  # the first rank may be compiling and measuring backends


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes of the run; yields this one's device. A process that died is a UserError in the rest."""
    if WORLD_SIZE == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield device
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise UserError(
            f"another process of this run has died (this is rank {RANK} of {WORLD_SIZE}); its own message says why. "
            "The same command resumes the run from its last checkpoint"
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because somebody else is gone; gloo and NCCL say so in their own words."""
    words = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo", "Gloo", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its gradients averaged over the processes."""
    if WORLD_SIZE == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


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
