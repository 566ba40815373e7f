"""1D windows through the flash kernel of torch's `varlen_attn`, on CUDA.

Importing `varlen_attn` takes over a second, so the functions that need it import it themselves.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)  # those of flash attention
MAX_HEAD_DIM = 256


@functools.cache
def is_available() -> bool:
    """Whether this torch has varlen_attn, and it takes windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # a torch without it
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def error(device_type: str) -> str | None:
    """Why this cannot run on this type of device; None if it can."""
    if device_type not in DEVICES:
        return f"runs on CUDA, not on {device_type}"
    if not is_available():
        return f"needs varlen_attn with windows, which torch {torch.__version__} does not have"
    return None


def find_window(mask: Tensor) -> tuple[int, int] | None:
    """(left, right) if each token of a bool [N, N] mask attends to i - left, ..., i + right.

    None for any other mask.
    """
    first, last = mask[0].nonzero()[:, 0], mask[-1].nonzero()[:, 0]
    left, right = len(mask) - 1 - int(last[0]), int(first[-1])
    window = torch.ones_like(mask).triu_(-left).tril_(right)
    return (left, right) if torch.equal(mask, window) else None


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention can compute with these: others need another backend."""
    return dtype in DTYPES and head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0


def fits(qkv: Tensor) -> bool:
    """Whether flash attention takes packed qkv [B, T, 3, H, D]."""
    return takes(qkv.dtype, qkv.shape[-1])


def attend(qkv: Tensor, window: tuple[int, int]) -> Tensor:
    """Attention of packed qkv [B, T, 3, H, D] -> [B, T, H, D]: a batch of sequences of T tokens."""
    from torch.nn.attention.varlen import varlen_attn

    num_images, num_tokens, *_ = qkv.shape
    ends = torch.arange(
        0, (num_images + 1) * num_tokens, num_tokens, dtype=torch.int32, device=qkv.device
    )
    q, k, v = qkv.flatten(0, 1).unbind(1)  # each [B * T, H, D]
    out = varlen_attn(q, k, v, ends, ends, num_tokens, num_tokens, window_size=window)
    return out.unflatten(0, (num_images, num_tokens))
