"""From a boolean mask to attention that pays for it: `compile_mask(mask) -> compiled`, `attend(q, k, v, compiled)`.

A boolean mask alone makes attention slower: every score is computed, then thrown away. Three backends give the numbers
of `scaled_dot_product_attention` with the dense mask:

    dense     SDPA with the mask, or without any for full attention. The reference.
    diagonal  only the mask's non-zero diagonals, see diagonal.py. Any device; few diagonals.
    flex      FlexAttention with a block mask, on CUDA. It skips blocks of 128x128 and so needs many tokens.

`auto` measures those that can work, on the real shape, and keeps the fastest (`choose_backend`); before, it is dense.

Shapes: B batch, N patches, G global tokens (the class token), T = G + N tokens, H heads, D head dim.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attention import diagonal

BACKENDS = ("auto", "dense", "diagonal", "flex")

FLEX_DEVICES = ("cuda",)  # elsewhere FlexAttention has no backward
# Where SDPA may hand a masked call to cuDNN, whose backward returns NaN for some masks: with a number of tokens that is
# 64 modulo 128, in rows of very negative scores (pytorch/pytorch#196678).
CUDNN_DEVICES = ("cuda",)
SAFE_WITH_A_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Choice:
    """A backend, and why."""

    backend: str  # of BACKENDS, but not auto
    reason: str
    # backend -> seconds of a forward and backward, where measured; None = it does not work here
    timings: dict[str, float | None] = field(default_factory=dict)


class CompiledMask(nn.Module):
    """A mask, and how it is attended with: made by `compile_mask`, settled by `apply`.

    Its tensors are non-persistent buffers: they move with the model that owns them, and are never saved.
    """

    def __init__(self, mask: Tensor | None, num_global_tokens: int, requested: str):
        super().__init__()
        self.mask = mask  # bool [N, N] on the CPU, None = full attention
        self.num_tokens = None if mask is None else len(mask)
        self.num_global_tokens = num_global_tokens
        self.requested = requested
        self.block_mask: BlockMask | None = None  # of the flex backend
        found = None if mask is None else diagonal.find_diagonals(mask)
        self.offsets, valid = found if found is not None else ((), None)
        self.register_buffer("valid", valid, persistent=False)  # bool [n, N]: where each diagonal is allowed
        self.register_buffer("token_mask", None, persistent=False)  # bool [T, T], of the dense and flex backends
        self.apply_choice(self._first_choice())

    def _first_choice(self) -> Choice:
        if self.mask is None:
            return Choice("dense", "full attention is SDPA without a mask")
        if self.requested == "diagonal" and not self.offsets:
            return Choice("dense", self.too_many_diagonals)
        if self.requested == "auto":
            return Choice("dense", "not measured yet")
        return Choice(self.requested, "asked for")

    @property
    def backend(self) -> str:
        return self.choice.backend

    @property
    def too_many_diagonals(self) -> str:
        return f"the mask has more than {diagonal.MAX_DIAGONALS} non-zero diagonals, too many for the diagonal backend"

    def apply_choice(self, choice: Choice) -> None:
        """Switch to a backend. Raises ValueError for `diagonal` if the mask has too many diagonals."""
        if choice.backend == "diagonal" and not self.offsets:
            raise ValueError(self.too_many_diagonals)
        self.choice = choice
        device = next((buffer.device for buffer in self.buffers()), None)
        needs_mask = self.mask is not None and choice.backend in ("dense", "flex")
        self.token_mask = self.with_global_tokens().to(device) if needs_mask else None
        self._prepare()

    def _prepare(self) -> None:
        """Make what the backend needs on this device now, so that a forward only reads it.

        A compiled forward would otherwise trace the making of the block mask.
        """
        ready = self.backend == "flex" and self.token_mask.device.type in FLEX_DEVICES
        self.block_mask = make_block_mask(self.token_mask) if ready else None

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self._prepare()
        return self

    def with_global_tokens(self) -> Tensor:
        """The mask over all tokens, bool [T, T]: a global token attends to all and is attended by all."""
        return F.pad(self.mask, (self.num_global_tokens, 0) * 2, value=True)

    def check(self, num_tokens: int, device: torch.device) -> None:
        """At the border of a model: move to where the tokens are. Raises ValueError if they do not fit the mask."""
        self.check_device(device)
        if self.num_tokens is not None and num_tokens != self.num_global_tokens + self.num_tokens:
            raise ValueError(
                f"got {num_tokens} tokens; the mask has {self.num_tokens}, after {self.num_global_tokens} global ones"
            )
        self.follow(device)

    def follow(self, device: torch.device) -> None:
        """Move to where the tokens are, if not there yet."""
        if any(buffer.device != device for buffer in self.buffers()):
            self.to(device)

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError if the backend cannot run there."""
        if self.backend == "flex" and device.type not in FLEX_DEVICES:
            raise ValueError(f"backend 'flex' runs on CUDA, not on {device.type}; use auto, diagonal or dense")


def make_block_mask(allowed: Tensor) -> BlockMask:
    """For FlexAttention, of a bool [T, T]: it indexes the tensor, as arithmetic on indices has been miscompiled."""
    size = len(allowed)
    return create_block_mask(lambda b, h, i, j: allowed[i, j], None, None, size, size, device=allowed.device)


def compile_mask(mask: Tensor | None, num_global_tokens: int = 0, backend: str = "auto") -> CompiledMask:
    """Prepare attention for a mask: bool [N, N], True = query i may attend to key j, or None for full attention.

    `num_global_tokens` tokens come before the N: they attend to all and are attended by all, in one joint softmax.
    A mask with too many diagonals for `diagonal` falls to dense, and its `choice.reason` says so. Raises ValueError for
    an unknown backend, a mask of another shape or dtype, a row without a neighbor, a negative number of global tokens.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if num_global_tokens < 0:
        raise ValueError(f"num_global_tokens must be at least 0, got {num_global_tokens}")
    if mask is not None:
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or len(mask) == 0:
            raise ValueError(f"expected a mask of shape [N, N], got {list(mask.shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"expected a boolean mask (True = may attend), got {mask.dtype}")
        mask = mask.detach().cpu()
        alone = ~mask.any(dim=1)
        if alone.any():
            raise ValueError(f"row {int(alone.nonzero()[0])} of the mask has no neighbor: nothing to attend to")
    return CompiledMask(mask, num_global_tokens, backend)


def count_pairs(mask: Tensor | None, num_patches: int, num_global_tokens: int) -> int:
    """How many pairs (query, key) of tokens a mask allows, those of the global tokens included."""
    num_all = (num_global_tokens + num_patches) ** 2
    return num_all if mask is None else num_all - num_patches**2 + int(mask.sum())


def attend(q: Tensor, k: Tensor, v: Tensor, compiled: CompiledMask) -> Tensor:
    """Attention of q, k, v, each [B, H, T, D] with the global tokens first -> [B, H, T, D]."""
    packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)  # [B, T, 3, H, D]
    return attend_packed(packed, compiled).transpose(1, 2)


def attend_packed(qkv: Tensor, compiled: CompiledMask) -> Tensor:
    """Attention of packed qkv [B, T, 3, H, D], as one linear layer makes it -> [B, T, H, D]."""
    compiled.check(qkv.shape[1], qkv.device)
    return attend_checked(qkv, compiled)


def attend_checked(qkv: Tensor, compiled: CompiledMask) -> Tensor:
    """`attend_packed` for the layers of a model that has called `compiled.check` once for all of them."""
    if torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    if compiled.backend == "diagonal":
        return diagonal.attend(qkv, compiled.valid, compiled.offsets, compiled.num_global_tokens)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    if compiled.backend == "flex":
        return _attend_flex(q, k, v, compiled.block_mask).transpose(1, 2)
    return _attend_dense(q, k, v, compiled.token_mask).transpose(1, 2)


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA; a masked call, on a GPU, without cuDNN's kernels. Full attention may use them all."""
    restricted = mask is not None and q.device.type in CUDNN_DEVICES
    with sdpa_kernel(SAFE_WITH_A_MASK) if restricted else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """FlexAttention, compiled by an outer torch.compile, or here for this configuration alone.

    The mask is an argument of what is compiled: all of one size share it.
    """
    if torch.compiler.is_compiling():
        return _flex(q, k, v, block_mask)
    configuration = (q.shape, q.stride(), q.dtype, q.device)
    return diagonal.compile_for(_flex, configuration)(q, k, v, block_mask)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    return flex_attention(q, k, v, block_mask=block_mask)
