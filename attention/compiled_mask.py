"""From a boolean mask to attention that gets faster as the mask gets sparser.

A boolean mask alone makes attention slower: every score is computed, and most are thrown away.
Four backends give the same numbers as `scaled_dot_product_attention` (SDPA) with the dense mask:

    dense     SDPA with the mask, or without any for full attention. The reference.
    native    Only the listed neighbors of each token, see native.py. On the CPU, for any mask.
    diagonal  Only the non-zero diagonals of the mask, see diagonal.py. Runs on any device, but
              is slow on a CPU, and needs a mask with few diagonals.
    flex      FlexAttention with a block mask, on CUDA. It skips blocks of 128x128, so it needs
              many tokens to gain anything.

`auto` decides by a rule on the CPU, at the first call (rule.py). Elsewhere it is dense until
`choose_backend` has measured, on the real shape, those that can work.

    compiled = compile_mask(mask)       # bool [N, N]
    out = attend(q, k, v, compiled)     # [B, H, T, D]

Legend for shapes:
    B batch, N patches, G global tokens (the class token), T = G + N tokens, H heads, D head dim
    n diagonals
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attention import build, diagonal, native, rule
from attention.neighbors import find_neighbors

# auto and measure are ways to choose one of the others.
BACKENDS = ("auto", "measure", "dense", "native", "diagonal", "flex")

NATIVE_DEVICES = ("cpu",)

# Elsewhere, FlexAttention has no backward.
FLEX_DEVICES = ("cuda",)

# Where SDPA may hand a masked call to cuDNN. Its backward returns NaN for some masks: when the
# number of tokens is 64 modulo 128, in rows of very negative scores (pytorch/pytorch#196678).
CUDNN_DEVICES = ("cuda",)
SAFE_WITH_A_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was chosen."""

    backend: str  # one of BACKENDS, but not auto or measure
    reason: str
    # backend -> seconds for a forward and backward, if measured; None = it does not work here
    timings: dict[str, float | None] = field(default_factory=dict)


NOT_CHOSEN = "not measured yet"


class CompiledMask(nn.Module):
    """A mask, together with the backend that computes attention under it.

    Made by `compile_mask`; `apply_choice` switches the backend. Its tensors are non-persistent
    buffers: they move with the model that owns them, but are never saved.
    """

    def __init__(self, mask: Tensor | None, num_global_tokens: int, requested: str):
        super().__init__()
        self.mask = mask  # bool [N, N] on the CPU; None = full attention
        self.num_tokens = None if mask is None else len(mask)  # N
        self.num_global_tokens = num_global_tokens  # G
        self.requested = requested  # one of BACKENDS

        found = None if mask is None else diagonal.find_diagonals(mask)
        self.offsets, valid = ((), None) if found is None else found

        # diagonal: where each diagonal is allowed, bool [n, N]
        self.register_buffer("valid", valid, persistent=False)
        # dense and flex: the mask over all tokens, bool [T, T]
        self.register_buffer("token_mask", None, persistent=False)
        # native: NeighborLists.flat over all tokens, which stays on the CPU
        self.neighbors: Tensor | None = None
        # flex
        self.block_mask: BlockMask | None = None

        self.apply_choice(self._first_choice())

    def _first_choice(self) -> Choice:
        if self.mask is None:
            return Choice("dense", "full attention is SDPA without a mask")
        if self.requested == "diagonal" and not self.offsets:
            return Choice("dense", self.too_many_diagonals)
        if self.requested in ("auto", "measure"):
            return Choice("dense", NOT_CHOSEN)
        return Choice(self.requested, "asked for")

    @property
    def backend(self) -> str:
        return self.choice.backend

    @property
    def too_many_diagonals(self) -> str:
        """Why the diagonal backend is out, if there are no `offsets`."""
        return (
            f"the mask has more than {diagonal.MAX_DIAGONALS} non-zero diagonals, too many for "
            "the diagonal backend"
        )

    def apply_choice(self, choice: Choice) -> None:
        """Switch to a backend.

        Raises ValueError for `diagonal` if there are too many diagonals, and for `native` if it
        cannot be built here.
        """
        if choice.backend == "native" and (reason := build.error()) is not None:
            raise ValueError(f"backend 'native' cannot be used: {reason}; use auto or dense")
        if choice.backend == "diagonal" and not self.offsets:
            raise ValueError(self.too_many_diagonals)

        self.choice = choice
        device = next((buffer.device for buffer in self.buffers()), None)
        needs_mask = self.mask is not None and choice.backend in ("dense", "flex")
        self.token_mask = self.with_global_tokens().to(device) if needs_mask else None
        if choice.backend == "native" and self.neighbors is None:
            self.neighbors = find_neighbors(self.with_global_tokens()).flat
        self._prepare()

    def _prepare(self) -> None:
        """Build what the backend needs on this device now, so that a forward only reads it.

        Otherwise a compiled forward would trace the construction of the block mask.
        """
        self.block_mask = None
        if self.backend == "flex" and self.token_mask.device.type in FLEX_DEVICES:
            self.block_mask = make_block_mask(self.token_mask)

    def _apply(self, *args, **kwargs):
        """Called by `to`, `cuda` and the like: the block mask refers to tensors on the device."""
        super()._apply(*args, **kwargs)
        self._prepare()
        return self

    def __getstate__(self) -> dict:
        """A block mask holds a function, which cannot be pickled; it is built again."""
        return {**self.__dict__, "block_mask": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._prepare()

    def with_global_tokens(self) -> Tensor:
        """The mask over all tokens, bool [T, T].

        A global token attends to all tokens, and all tokens attend to it.
        """
        before = self.num_global_tokens
        return F.pad(self.mask, (before, 0, before, 0), value=True)

    def check(self, num_tokens: int, device: torch.device) -> None:
        """Before a forward: move to the tokens' device. Raises ValueError if they do not fit.

        A model calls this once for all of its layers. The first call settles `auto` on the CPU.
        """
        self.settle(device)
        self.check_device(device)
        if self.num_tokens is not None and num_tokens != self.num_global_tokens + self.num_tokens:
            raise ValueError(
                f"got {num_tokens} tokens, but the mask has {self.num_tokens} after "
                f"{self.num_global_tokens} global tokens"
            )
        self.follow(device)

    def settle(self, device: torch.device) -> None:
        """Decide `auto` by rule if the device is the CPU; drop such a decision on another device.

        Not while a model is being compiled: settle before, or call the model once.
        """
        is_auto = self.requested == "auto" and self.mask is not None
        if not is_auto or torch.compiler.is_compiling():
            return

        is_undecided = self.choice.reason == NOT_CHOSEN
        if device.type in NATIVE_DEVICES and is_undecided:
            self.apply_choice(choose_by_rule(self))
        elif device.type not in NATIVE_DEVICES and self.backend == "native":
            self.apply_choice(Choice("dense", NOT_CHOSEN))

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError if the backend cannot run on this device."""
        if self.backend == "native" and device.type not in NATIVE_DEVICES:
            raise ValueError(
                f"backend 'native' runs on the CPU, not on {device.type}; use auto or dense"
            )
        if self.backend == "flex" and device.type not in FLEX_DEVICES:
            raise ValueError(
                f"backend 'flex' runs on CUDA, not on {device.type}; use auto, diagonal or dense"
            )

    def follow(self, device: torch.device) -> None:
        """Move to the tokens' device, if not there yet."""
        if any(buffer.device != device for buffer in self.buffers()):
            self.to(device)


def choose_by_rule(compiled: CompiledMask) -> Choice:
    """The backend of a mask on the CPU, without measuring: see rule.py."""
    num_global, num_patches = compiled.num_global_tokens, compiled.num_tokens
    num_edges = count_pairs(compiled.mask, num_patches, num_global)
    num_diagonals = len(compiled.offsets)
    return Choice(*rule.choose(num_global + num_patches, num_edges, num_diagonals))


def make_block_mask(allowed: Tensor) -> BlockMask:
    """The block mask of a bool [T, T], for FlexAttention.

    It indexes the tensor, because arithmetic on the indices has been miscompiled.
    """
    num_tokens = len(allowed)
    return create_block_mask(
        lambda batch, head, query, key: allowed[query, key],
        B=None,
        H=None,
        Q_LEN=num_tokens,
        KV_LEN=num_tokens,
        device=allowed.device,
    )


def compile_mask(
    mask: Tensor | None, num_global_tokens: int = 0, backend: str = "auto"
) -> CompiledMask:
    """Prepare attention under a mask: bool [N, N], True = query i may attend to key j.

    None = full attention. `num_global_tokens` tokens come before the N tokens of the mask: they
    attend to all tokens, and all tokens attend to them, in one joint softmax.

    `diagonal` falls back to dense if the mask has too many diagonals, and `choice.reason` says so.

    Raises ValueError for an unknown backend, a mask of another shape or dtype, a row without a
    neighbor, or a negative number of global tokens.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if num_global_tokens < 0:
        raise ValueError(f"num_global_tokens must be at least 0, got {num_global_tokens}")
    if mask is not None:
        mask = _check_mask(mask)
    return CompiledMask(mask, num_global_tokens, backend)


def _check_mask(mask: Tensor) -> Tensor:
    """The mask on the CPU. Raises ValueError if attention cannot be computed under it."""
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or len(mask) == 0:
        raise ValueError(f"expected a mask of shape [N, N], got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a boolean mask (True = may attend), got {mask.dtype}")

    mask = mask.detach().cpu()
    alone = ~mask.any(dim=1)  # [N]
    if alone.any():
        row = int(alone.nonzero()[0])
        raise ValueError(f"row {row} of the mask has no neighbor: nothing to attend to")
    return mask


def count_pairs(mask: Tensor | None, num_patches: int, num_global_tokens: int) -> int:
    """How many (query, key) pairs of tokens a mask allows, including those with global tokens."""
    num_tokens = num_global_tokens + num_patches
    if mask is None:
        return num_tokens**2
    return num_tokens**2 - num_patches**2 + int(mask.sum())


def attend(q: Tensor, k: Tensor, v: Tensor, compiled: CompiledMask) -> Tensor:
    """Attention of q, k, v, each [B, H, T, D] with the global tokens first -> [B, H, T, D]."""
    compiled.check(q.shape[2], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # each [B, T, H, D]
    if compiled.backend == "native" and _fits_native(q, k, v):  # no need to pack them
        return native.attend(q, k, v, compiled.neighbors).transpose(1, 2)

    qkv = torch.stack([q, k, v], dim=2)  # [B, T, 3, H, D]
    return attend_checked(qkv, compiled).transpose(1, 2)


def attend_packed(qkv: Tensor, compiled: CompiledMask) -> Tensor:
    """Attention of packed qkv [B, T, 3, H, D], as one linear layer makes it -> [B, T, H, D]."""
    compiled.check(qkv.shape[1], qkv.device)
    return attend_checked(qkv, compiled)


def attend_checked(qkv: Tensor, compiled: CompiledMask) -> Tensor:
    """`attend_packed` without its check, for models that call `compiled.check` once per forward."""
    if torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))

    if compiled.backend == "native":
        return _attend_native(qkv, compiled)
    if compiled.backend == "diagonal":
        return diagonal.attend(qkv, compiled.valid, compiled.offsets, compiled.num_global_tokens)

    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    if compiled.backend == "flex":
        out = _attend_flex(q, k, v, compiled.block_mask)
    else:
        out = _attend_dense(q, k, v, compiled.token_mask)
    return out.transpose(1, 2)  # [B, T, H, D]


def _fits_native(*tensors: Tensor) -> bool:
    """Whether the native kernel takes these tensors as they are."""
    if torch.is_autocast_enabled(tensors[0].device.type):
        return False
    dtypes = {x.dtype for x in tensors}
    return len(dtypes) == 1 and dtypes <= {*native.DTYPES}


def _attend_native(qkv: Tensor, compiled: CompiledMask) -> Tensor:
    """The native kernel, which computes in fp32; float64 is left to the formulas, or to SDPA."""
    if qkv.dtype == torch.float64 and compiled.offsets:
        return diagonal.attend(qkv, compiled.valid, compiled.offsets, compiled.num_global_tokens)
    if qkv.dtype == torch.float64:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return _attend_dense(q, k, v, compiled.with_global_tokens()).transpose(1, 2)
    if qkv.dtype not in native.DTYPES:  # float16
        return native.attend_packed(qkv.float(), compiled.neighbors).to(qkv.dtype)
    return native.attend_packed(qkv, compiled.neighbors)


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA. Full attention may use any of its kernels; a masked call on a GPU avoids cuDNN's."""
    avoid_cudnn = mask is not None and q.device.type in CUDNN_DEVICES
    with sdpa_kernel(SAFE_WITH_A_MASK) if avoid_cudnn else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """FlexAttention, compiled by an outer torch.compile, or else here, once per configuration.

    The block mask is an argument of the compiled function: all masks of one size share it.
    """
    if torch.compiler.is_compiling():
        return _flex(q, k, v, block_mask)

    configuration = (q.shape, q.stride(), q.dtype, q.device)
    kernel = diagonal.compile_for(_flex, configuration)
    return kernel(q, k, v, block_mask)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    return flex_attention(q, k, v, block_mask=block_mask)
