"""From a boolean mask to attention that gets faster as the mask gets sparser.

A boolean mask alone makes attention slower: every score is computed, and most are thrown away.
These backends give the same numbers as `scaled_dot_product_attention` (SDPA) with the dense mask:

    dense     SDPA with the mask, or without any for full attention. The reference.
    native    Only the listed neighbors of each token, see native.py. On the CPU, for any mask.
    diagonal  Only the non-zero diagonals of the mask, see diagonal.py. Runs on any device, but
              is slow on a CPU, and needs a mask with few diagonals.
    flex      FlexAttention with a block mask, on CUDA, see flex.py. It skips blocks of 128x128 or
              64x64, so it needs many tokens to gain anything.
    tiled     Tiles of 64 queries against lists of keys, in Triton, see tiled.py. On CUDA, for any
              mask.
    varlen    The flash kernel's own windows, on CUDA, see windows.py. For 1D windows without
              global tokens.

`auto` decides by a rule (rule.py), when the mask arrives on a device or at the first call.
`choose_backend` measures where it is asked to.

    compiled = compile_mask(mask)       # bool [N, N]
    out = attend(q, k, v, compiled)     # [B, H, T, D]

Legend for shapes:
    B batch, N patches, G global tokens (the class token), T = G + N tokens, H heads, D head dim
    n diagonals
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import build, diagonal, flex, native, rule, tiled, timings, windows
from attention.backends import BACKENDS, Choice, unusable
from attention.neighbors import find_neighbors
from attention.tiles import TileLists, find_tiles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NOT_CHOSEN = "not settled yet"
NO_WINDOW = "the mask is no 1D window without global tokens, as the varlen backend needs"

TILE_BUFFERS = ("tile_tokens", "tile_starts", "tile_columns", "tile_bits")  # TileLists.tensors


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

        # Empty, and always on the device on which the others are.
        self.register_buffer("place", torch.empty(0, device="cpu"), persistent=False)
        # diagonal: where each diagonal is allowed, bool [n, N]
        self.register_buffer("valid", valid, persistent=False)
        # dense and flex: the mask over all tokens, bool [T, T]
        self.register_buffer("token_mask", None, persistent=False)
        for name in TILE_BUFFERS:
            self.register_buffer(name, None, persistent=False)
        # native: NeighborLists.flat over all tokens, which stays on the CPU
        self.neighbors: Tensor | None = None
        # flex
        self.block_mask: BlockMask | None = None

        self.is_remembered = False  # whether timings of the first call's shape were looked for
        self.apply_choice(self._first_choice())
        if not has_accelerator():  # else the mask is probably on its way to it
            self.settle(self.place.device)

    def _first_choice(self) -> Choice:
        if self.mask is None:
            return Choice("dense", "full attention is SDPA without a mask")
        if self.requested == "diagonal" and not self.offsets:
            return Choice("dense", self.too_many_diagonals)
        if self.requested == "varlen" and self.window is None:
            return Choice("dense", NO_WINDOW)
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

        Raises ValueError for `diagonal` if there are too many diagonals, for `varlen` if the mask
        is no 1D window, and for `native` if it cannot be built here.
        """
        if choice.backend == "native" and (reason := build.error()) is not None:
            raise ValueError(f"backend 'native' cannot be used: {reason}; use auto or dense")
        if choice.backend == "diagonal" and not self.offsets:
            raise ValueError(self.too_many_diagonals)
        if choice.backend == "varlen" and self.window is None:
            raise ValueError(NO_WINDOW)

        self.choice = choice
        self.settled_on: str | None = None  # the type of device for which a rule made this choice
        device = self.place.device
        needs_mask = self.mask is not None and choice.backend in ("dense", "flex")
        self.token_mask = self.with_global_tokens().to(device) if needs_mask else None
        lists = self.tile_lists.tensors if choice.backend == "tiled" else [None] * 4
        for name, tensor in zip(TILE_BUFFERS, lists, strict=True):
            setattr(self, name, None if tensor is None else tensor.to(device))
        if choice.backend == "native" and self.neighbors is None:
            self.neighbors = find_neighbors(self.with_global_tokens()).flat
        self._prepare()

    def _prepare(self) -> None:
        """Build what the backend needs on this device now, so that a forward only reads it.

        Otherwise a compiled forward would trace the construction of the block mask.
        """
        self.block_mask = None
        if self.backend == "flex" and self.token_mask.device.type in flex.DEVICES:
            self.block_mask = flex.make_block_mask(self.token_mask)

    def _apply(self, *args, **kwargs):
        """Called by `to`, `cuda` and the like: settle for the device, before anything is traced.

        The block mask refers to tensors on the device.
        """
        before = self.place.device
        super()._apply(*args, **kwargs)
        if self.place.device != before:
            self.settle(self.place.device)
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

    @cached_property
    def tile_lists(self) -> TileLists:
        """For `tiled`: made once, on the CPU."""
        return find_tiles(self.mask, self.num_global_tokens)

    @property
    def tiles(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same on the device."""
        return self.tile_tokens, self.tile_starts, self.tile_columns, self.tile_bits

    @cached_property
    def window(self) -> tuple[int, int] | None:
        """For `varlen`: the reach (left, right) of a 1D window without global tokens."""
        is_possible = self.mask is not None and not self.num_global_tokens
        return windows.find_window(self.mask) if is_possible else None

    def check(
        self,
        num_tokens: int,
        device: torch.device,
        qkv_shape: tuple | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Before a forward: move to the tokens' device. Raises ValueError if they do not fit.

        A model calls this once for all of its layers. The first call settles `auto`; with the shape
        [B, T, 3, H, D] and data type, it takes what was measured for them before.
        """
        if not torch.compiler.is_compiling():
            self.settle(device, qkv_shape, dtype)
            self.check_device(device)
        if self.num_tokens is not None and num_tokens != self.num_global_tokens + self.num_tokens:
            raise ValueError(
                f"got {num_tokens} tokens, but the mask has {self.num_tokens} after "
                f"{self.num_global_tokens} global tokens"
            )
        self.follow(device)

    def settle(
        self,
        device: torch.device,
        qkv_shape: tuple | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Decide `auto` for this device: by what was measured before, else by rule.

        A choice that was applied from outside stays, if it can run on the device.
        """
        if self.requested != "auto" or self.mask is None or device.type == "meta":
            return

        by_rule = self.settled_on is not None or self.choice.reason == NOT_CHOSEN
        if by_rule and qkv_shape is not None and not self.is_remembered:
            self.is_remembered = True
            path = timings.path_of(self.mask, qkv_shape, dtype, device)
            if (measured := timings.fastest(timings.read(path))) is not None:
                self.apply_choice(measured)
                return

        is_elsewhere = by_rule and self.settled_on != device.type
        if is_elsewhere or self._unusable(device) is not None:
            fits = qkv_shape is None or tiled.takes(dtype, qkv_shape[-1])
            self.apply_choice(choose_by_rule(self, device, takes_tiles=fits))
            self.settled_on = device.type

    def _unusable(self, device: torch.device) -> str | None:
        return unusable(self.backend, device.type)

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError if the backend cannot run on this device."""
        if (reason := self._unusable(device)) is not None:
            raise ValueError(f"backend {self.backend!r} {reason}; use auto or dense")

    def follow(self, device: torch.device) -> None:
        """Move to the tokens' device, if not there yet."""
        if any(buffer.device != device for buffer in self.buffers()):
            self.to(device)


def has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def choose_by_rule(
    compiled: CompiledMask,
    device: torch.device,
    shape: tuple = (),
    num_calls: float = float("inf"),
    takes_tiles: bool = True,
) -> Choice:
    """The backend of a mask on a device, without measuring: see rule.py.

    `shape` is (B * H, D) if they are known, `num_calls` how often attention will run, and
    `takes_tiles` whether the backend `tiled` takes such tensors.
    """
    num_global, num_patches = compiled.num_global_tokens, compiled.num_tokens
    num_tokens = num_global + num_patches
    num_edges = count_pairs(compiled.mask, num_patches, num_global)
    num_diagonals = len(compiled.offsets)
    if device.type in native.DEVICES:
        return rule.choose(num_tokens, num_edges, num_diagonals)
    if device.type not in flex.DEVICES or unusable("tiled", device.type) is not None:
        missing = "the tiled backend"
        return rule.choose_uncompiled(num_tokens, num_edges, num_diagonals, missing)

    pairs = {"dense": num_tokens**2}
    if takes_tiles:
        pairs["tiled"] = compiled.tile_lists.num_pairs
    share = flex.share_of_blocks(compiled.with_global_tokens())
    pairs["flex"] = round(share * num_tokens**2)
    if num_diagonals:
        pairs["diagonal"] = num_edges
    return rule.choose_on_gpu(pairs, num_tokens, *shape, num_calls=num_calls)


def compile_mask(
    mask: Tensor | None, num_global_tokens: int = 0, backend: str = "auto"
) -> CompiledMask:
    """Prepare attention under a mask: bool [N, N], True = query i may attend to key j.

    None = full attention. `num_global_tokens` tokens come before the N tokens of the mask: they
    attend to all tokens, and all tokens attend to them, in one joint softmax.

    `diagonal` falls back to dense if the mask has too many diagonals, and `varlen` if it is no 1D
    window; `choice.reason` says so.

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

    mask = mask.detach().to("cpu", copy=True)  # whoever changes theirs does not change this one
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
