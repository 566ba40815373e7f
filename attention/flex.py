"""FlexAttention with a block mask, on CUDA: it skips the blocks in which nothing is allowed.

Importing FlexAttention takes over a second, so the functions that need it import it themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import diagonal

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DEVICES = ("cuda",)  # elsewhere, FlexAttention has no backward

# Blocks of 64 would skip more of some masks, but torch 2.11 finds no backward kernel for them on an
# H200, whatever tiles it is given.
BLOCK = 128


def share_of_blocks(allowed: Tensor) -> float:
    """The share of the blocks of a bool [T, T] in which anything is allowed."""
    padding = -len(allowed) % BLOCK
    padded = F.pad(allowed, (0, padding, 0, padding))
    blocks = padded.unflatten(1, (-1, BLOCK)).any(2).unflatten(0, (-1, BLOCK)).any(1)
    return blocks.float().mean().item()


def make_block_mask(allowed: Tensor) -> BlockMask:
    """The block mask of a bool [T, T].

    It indexes the tensor, because arithmetic on the indices has been miscompiled.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    num_tokens = len(allowed)
    return create_block_mask(
        lambda batch, head, query, key: allowed[query, key],
        B=None,
        H=None,
        Q_LEN=num_tokens,
        KV_LEN=num_tokens,
        device=allowed.device,
        BLOCK_SIZE=BLOCK,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """Attention of q, k, v, each [B, H, T, D].

    Compiled by an outer torch.compile, or else here, once per configuration. The block mask is an
    argument of the compiled function: all masks of one size share it.
    """
    if torch.compiler.is_compiling():
        return _flex(q, k, v, block_mask)

    configuration = (q.shape, q.stride(), q.dtype, q.device)
    kernel = diagonal.compile_for(_flex, configuration)
    return kernel(q, k, v, block_mask)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=block_mask)
