"""What benchmark.py times: attention patterns by backend, and other libraries.

Shapes: B batch, N patches, G global tokens, T = G + N tokens, H heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import attention
from attention import diagonal
from benchmarks.errors import largest_error
from masks import MaskSpec

FULL = "full SDPA"
OURS = tuple(name for name in attention.BACKENDS if name not in ("auto", "measure"))
BACKENDS = ("auto", *OURS, "uncompiled", "local-attention", "natten")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Device -> grid side -> (batch size, heads): about as much as two CPU cores can handle, and enough
# to keep a large GPU busy.
SHAPES = {
    "cpu": {14: (8, 12), 28: (2, 12), 56: (1, 12), 112: (1, 3)},
    "cuda": {14: (128, 12), 28: (32, 12), 64: (8, 12), 128: (2, 12)},
}

# At the border, NATTEN's windows are shifted instead of truncated: the speed is comparable, but the
# pattern is not the same and so cannot be checked.
INEXACT = ("natten",)


@dataclass
class Candidate:
    """Something to be timed: `run()` is one forward and backward pass."""

    backend: str
    mask: MaskSpec
    num_neighbors_mean: float

    # Images times heads, or images of a model. Time and memory are divided by it to compare grids.
    num_sequences: int

    # The highest speedup that arithmetic allows: FLOPs of full attention over those of the mask.
    ceiling: float

    run: Callable[[], object]

    # Returns the largest error; None if there is no exact result to compare with.
    check: Callable[[], float] | None

    first_seconds: float = 0.0  # duration of the first run: compiling, caches, warm-up
    error: float | None = None

    @property
    def name(self) -> str:
        return f"{self.mask.label}: {self.backend}"


def usable_backends(
    requested: list[str], level: str, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """The requested backends that can run here, and the reasons why the others cannot."""
    reasons = {}
    if level == "model":
        requested = [*requested, "timm"]
        for name in requested:
            if name != "timm" and name not in attention.BACKENDS:
                reasons[name] = "attention alone, not a model"
        if not _is_installed("timm"):
            reasons["timm"] = "not installed: pip install timm"

    for name in attention.BACKENDS:
        if (reason := attention.unusable(name, device.type)) is not None:
            reasons[name] = reason
    if device.type != "cuda":
        reasons["natten"] = "runs on CUDA only"
    elif not _is_installed("natten"):
        reasons["natten"] = "not installed: pip install natten"

    if level == "attention" and not _is_installed("local_attention"):
        reasons["local-attention"] = "not installed: pip install local-attention"
    if device.type != "cpu" and diagonal.compile_error(device.type) is not None:
        reasons["diagonal"] = (
            "torch.compile does not work here; the backend `uncompiled` is the same formula"
        )

    usable = [name for name in requested if name not in reasons]
    return usable, {name: reason for name, reason in reasons.items() if name in requested}


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def masks_of(args) -> list[MaskSpec]:
    """Each mask type at each step, or once if it has no step."""
    specs = itertools.product(args.mask_types, args.expansion_steps)
    return list(dict.fromkeys(itertools.starmap(MaskSpec, specs)))


def shapes_on(device: torch.device) -> dict[int, tuple[int, int]]:
    return SHAPES.get(device.type, SHAPES["cpu"])


def shape_of(args, grid: int, device: torch.device) -> tuple[int, int]:
    """(batch size, heads) of a grid: the flags if given, else those of the nearest in SHAPES."""
    shapes = shapes_on(device)
    nearest = min(shapes, key=lambda known: abs(known - grid))
    batch_size, num_heads = shapes[nearest]
    return args.batch_size or batch_size, args.num_heads or num_heads


# -------------------------------------------------------------------------------------------------
# Attention alone


def attention_candidates(
    args, grid: int, backends: list[str], device: torch.device
) -> list[Candidate]:
    """Full attention, and each pattern with each backend.

    All on one packed qkv [B, T, 3, H, D], or with `--separate` on q, k and v, each [B, H, T, D].
    """
    batch_size, num_heads = shape_of(args, grid, device)
    num_global = int(args.class_token)
    num_patches = grid * grid

    dtype = DTYPES[args.dtype]
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_global + num_patches, 3, num_heads, args.head_dim)
    qkv = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randn(*shape[:2], *shape[3:], generator=generator).to(device, dtype)
    inputs = (qkv,)
    if args.separate:
        inputs = tuple(x.detach().contiguous().requires_grad_() for x in unpack(qkv))
        grad = grad.transpose(1, 2).contiguous()

    def on_packed(attend: Callable) -> Callable:
        if not args.separate:
            return attend
        return lambda qkv: attend(*unpack(qkv)).transpose(1, 2)

    def candidate(backend: str, spec: MaskSpec, mask: Tensor | None, attend: Callable) -> Candidate:
        full_pairs = attention.count_pairs(None, num_patches, num_global)
        pairs = attention.count_pairs(mask, num_patches, num_global)
        exact = backend not in INEXACT

        def check() -> float:
            return largest_error(on_packed(attend), qkv, mask, num_global)

        return Candidate(
            backend=backend,
            mask=spec,
            num_neighbors_mean=num_patches if mask is None else int(mask.sum()) / num_patches,
            num_sequences=batch_size * num_heads,
            ceiling=full_pairs / pairs,
            run=lambda: torch.autograd.grad(attend(*inputs), inputs, grad),
            check=check if exact else None,
        )

    full = attention.compile_mask(None, num_global)
    candidates = [candidate(FULL, MaskSpec(), None, attend_with(full, args.separate))]
    for spec in masks_of(args):
        mask = spec.build(grid, grid)
        for backend in backends:
            attend = make_attend(backend, spec, mask, num_global, qkv, args.separate)
            if attend is not None:
                candidates.append(candidate(backend, spec, mask, attend))
    return candidates


def unpack(qkv: Tensor) -> Tensor:
    """[B, T, 3, H, D] -> q, k and v, each [B, H, T, D]."""
    return qkv.permute(2, 0, 3, 1, 4)


def attend_with(compiled: attention.CompiledMask, separate: bool) -> Callable:
    """Attention of packed qkv, or of separate q, k and v."""
    attend = attention.attend if separate else attention.attend_packed
    return lambda *inputs: attend(*inputs, compiled)


def make_attend(
    backend: str, spec: MaskSpec, mask: Tensor, num_global: int, qkv: Tensor, separate: bool = False
) -> Callable | None:
    """Attention by one backend; None if it does not support the mask or separate q, k and v.

    qkv [B, T, 3, H, D] -> [B, T, H, D], or q, k, v, each [B, H, T, D] -> [B, H, T, D].
    """
    if separate and backend not in attention.BACKENDS:
        return None
    if backend == "local-attention":
        attends_to_others = mask.sum() > len(mask)  # the package has no window of one
        supported = spec.mask_type.startswith("1d") and not num_global and attends_to_others
        return local_attention_peer(mask) if supported else None
    if backend == "natten":
        supported = spec.mask_type == "2d_all_neighbors" and not num_global
        return natten_peer(mask) if supported else None

    requested = "diagonal" if backend == "uncompiled" else backend
    compiled = attention.compile_mask(mask, num_global, requested).to(qkv.device)
    if backend == "auto":
        batch_size, _, _, num_heads, head_dim = qkv.shape
        choose(compiled, batch_size, num_heads, head_dim, qkv.dtype, qkv.device)
    elif compiled.backend != compiled.requested:
        return None

    if backend == "uncompiled":
        valid, offsets = compiled.valid, compiled.offsets
        return lambda qkv: UncompiledDiagonal.apply(qkv, valid, offsets, num_global)
    return attend_with(compiled, separate)


def choose(
    compiled: attention.CompiledMask,
    batch_size: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Let `auto` choose a backend as it would for a long run: by rule, or as measured before."""
    choice = attention.choose_backend(
        compiled, batch_size, num_heads, head_dim, dtype, device, num_calls=10**9
    )
    compiled.apply_choice(choice)


class UncompiledDiagonal(torch.autograd.Function):
    """The formulas of diagonal.py as they run without a compiler."""

    @staticmethod
    def forward(ctx, qkv, valid, offsets, num_global):
        out, p, global_p = diagonal.forward(qkv, valid, offsets, num_global)
        ctx.save_for_backward(qkv, out, p, global_p)
        ctx.offsets = offsets
        ctx.num_global = num_global
        return out

    @staticmethod
    def backward(ctx, grad):
        grad_qkv = diagonal.backward(grad, *ctx.saved_tensors, ctx.offsets, ctx.num_global)
        return grad_qkv, None, None, None


def local_attention_peer(mask: Tensor) -> Callable:
    """The package local-attention (1D windows only), with exactly the window of our mask."""
    from local_attention import LocalAttention

    radius = (int(mask.sum(1).max()) - 1) // 2
    layer = LocalAttention(
        window_size=radius, autopad=True, exact_windowsize=True, use_rotary_pos_emb=False
    )

    def attend(qkv: Tensor) -> Tensor:
        batch_size, num_tokens = qkv.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in unpack(qkv))  # each [B * H, T, D]
        # This mask hides the tokens that autopad appends.
        real = torch.ones(1, num_tokens, dtype=torch.bool, device=qkv.device)
        out = layer(q, k, v, mask=real)  # [B * H, T, D]
        return out.unflatten(0, (batch_size, -1)).transpose(1, 2)

    return attend


def natten_peer(mask: Tensor) -> Callable:
    """The package NATTEN: 2D squares on CUDA."""
    from natten import na2d

    side = math.isqrt(len(mask))
    window = math.isqrt(int(mask.sum(1).max()))

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(1, (side, side)) for x in qkv.unbind(2)
        )  # each [B, side, side, H, D]
        return na2d(q, k, v, kernel_size=window).flatten(1, 2)

    return attend
