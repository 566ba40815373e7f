"""What benchmark.py times: attention patterns by backend, other libraries, and whole models.

Shapes: B batch, N patches, G global tokens, T = G + N tokens, H heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import attention
import models
from attention import diagonal
from masks import MaskSpec
from runtime import hardware

FULL = "full SDPA"
WITHOUT = "no attention"
OURS = tuple(name for name in attention.BACKENDS if name not in ("auto", "measure"))
BACKENDS = ("auto", *OURS, "uncompiled", "local-attention", "natten")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Device -> grid side -> (batch size, heads): about as much as two CPU cores can handle, and enough
# to keep a large GPU busy.
SHAPES = {
    "cpu": {14: (8, 12), 28: (2, 12), 56: (1, 12), 112: (1, 3)},
    "cuda": {14: (128, 12), 28: (32, 12), 64: (8, 12), 128: (2, 12)},
}
PATCH_SIZE = 4  # of the models; their images have PATCH_SIZE * grid pixels per side
NUM_CHECKED_ROWS = 32

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


# -------------------------------------------------------------------------------------------------
# Checking attention


def largest_error(
    attend: Callable,
    qkv: Tensor,
    mask: Tensor | None,
    num_global: int,
    of_one_image: bool | None = None,
) -> float:
    """Largest error of outputs and gradients against dense attention in float64.

    Only some rows are compared and receive a gradient: a float64 matrix of all rows would be large.
    With `of_one_image`, the default on CUDA, where batches are large, these are rows of the last
    image's first and last head.
    """
    num_tokens = qkv.shape[1]
    on_cuda = qkv.device.type == "cuda"
    where = qkv.device if on_cuda else torch.device("cpu")  # Apple's GPUs have no float64
    images, heads = slice(None), slice(None)
    if on_cuda if of_one_image is None else of_one_image:
        images, heads = slice(-1, None), sorted({0, qkv.shape[3] - 1})

    def part(x: Tensor) -> Tensor:
        """What is compared of [B, T, ..., H, D]."""
        return x.detach()[images][..., heads, :].to(where, torch.float64)

    rows = checked_rows(num_tokens)
    generator = torch.Generator().manual_seed(1)
    grad = torch.zeros_like(qkv[:, :, 0])  # [B, T, H, D]
    part_grad = part(grad)  # [b, T, h, D]
    part_grad[:, rows] = torch.randn(part_grad[:, rows].shape, generator=generator).to(part_grad)
    # The rounding of `grad` must not count as an error of what is computed from it.
    part_grad = part_grad.to(grad.dtype).to(torch.float64)
    grad[images, :, heads] = part_grad.to(grad)
    out = attend(qkv)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)

    exact_qkv = part(qkv).requires_grad_()
    q, k, v = exact_qkv.permute(2, 0, 3, 1, 4)  # each [b, h, T, D]
    scores = q[:, :, rows] @ k.transpose(-1, -2) / qkv.shape[-1] ** 0.5  # [b, h, rows, T]
    if mask is not None:
        allowed = torch.ones(len(rows), num_tokens, dtype=torch.bool)
        is_patch = rows >= num_global
        allowed[is_patch, num_global:] = mask[rows[is_patch] - num_global]
        scores = scores.masked_fill(~allowed.to(where), float("-inf"))
    exact = (scores.softmax(-1) @ v).transpose(1, 2)  # [b, rows, h, D]
    (exact_grad,) = torch.autograd.grad(exact, exact_qkv, part_grad[:, rows])

    output_error = (part(out)[:, rows] - exact).abs().max()
    gradient_error = (part(grad_qkv) - exact_grad).abs().max()
    return largest([output_error, gradient_error])


def largest(errors: list[Tensor]) -> float:
    """The largest error, or NaN if any of them is NaN (which Python's max() would miss)."""
    return torch.stack(errors).max().item()


def checked_rows(num_tokens: int) -> Tensor:
    """Rows to compare: some spread out, the global token among them, and some consecutive ones.

    Consecutive rows share keys, so that sums of gradients are checked too.
    """
    half = NUM_CHECKED_ROWS // 2
    spread_out = torch.linspace(0, num_tokens - 1, min(num_tokens, half)).long()
    consecutive = num_tokens // 2 + torch.arange(min(num_tokens // 2, half))
    return torch.cat([spread_out, consecutive]).unique()


# -------------------------------------------------------------------------------------------------
# Whole models


def model_candidates(args, grid: int, backends: list[str], device: torch.device) -> list[Candidate]:
    """Standard ViTs with a class token: ours, with full attention and each pattern, and timm's."""
    batch_size, _ = shape_of(args, grid, device)
    img_size = PATCH_SIZE * grid
    config = {"img_size": img_size, "patch_size": PATCH_SIZE, "dropout": 0.0}
    config |= models.PRESETS[args.model]
    if args.depth:
        config["depth"] = args.depth
    if args.num_heads:
        config["num_heads"] = args.num_heads

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, img_size, img_size, generator=generator).to(device)
    labels = torch.arange(batch_size, device=device) % config.get("num_classes", 10)

    def build(spec: MaskSpec, backend: str) -> models.VisionTransformer:
        torch.manual_seed(0)
        masks = spec.build_layers(grid, grid, config["depth"])
        model = models.VisionTransformer(**config, attention_mask=masks, backend=backend)
        if args.compile != "off":
            model.compile_blocks(args.compile)
        return model.to(device)

    def step(model: torch.nn.Module) -> Tensor:
        model.zero_grad()
        with hardware.autocast(device, args.dtype):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss.detach()

    def candidate(
        backend: str,
        mask: MaskSpec,
        num_neighbors_mean: float,
        model: torch.nn.Module,
        reference: torch.nn.Module | None = None,
        ceiling: float = 1.0,
    ) -> Candidate:
        has_reference = reference is not None
        return Candidate(
            backend=backend,
            mask=mask,
            num_neighbors_mean=num_neighbors_mean,
            num_sequences=batch_size,
            ceiling=ceiling,
            run=lambda: step(model),
            check=(lambda: model_error(step, model, reference)) if has_reference else None,
        )

    full = build(MaskSpec(), "dense")
    full_flops = models.count_forward_flops(full)
    bare = without_attention(build(MaskSpec(), "dense"))
    bare_ceiling = full_flops["total"] / (full_flops["total"] - full_flops["attention"])
    candidates = [
        candidate(FULL, MaskSpec(), grid * grid, full),
        candidate(WITHOUT, MaskSpec(), 0, bare, ceiling=bare_ceiling),
    ]
    if "timm" in backends:
        twin = timm_twin(full).to(device)
        if args.compile != "off":
            twin = torch.compile(twin, mode=args.compile, dynamic=False)
        candidates.append(candidate("timm", MaskSpec(), grid * grid, twin, full))

    our_backends = [name for name in backends if name in attention.BACKENDS]
    for spec in masks_of(args):
        reference = build(spec, "dense")
        num_neighbors_mean = reference.layer_masks.mean_neighbors(grid * grid)
        ceiling = full_flops["total"] / models.count_forward_flops(reference)["total"]
        for backend in our_backends:
            model = build(spec, backend)
            if backend == "auto":
                choose_for_model(model, batch_size, DTYPES[args.dtype], device)
            if backend in ("auto", model.layer_masks.backend):
                candidates.append(
                    candidate(backend, spec, num_neighbors_mean, model, reference, ceiling)
                )
    return candidates


def choose_for_model(
    model: models.VisionTransformer, batch_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    num_heads = model.config["num_heads"]
    head_dim = model.config["embed_dim"] // num_heads
    for compiled in model.layer_masks.different:
        choose(compiled, batch_size, num_heads, head_dim, dtype, device)


def model_error(step: Callable, model: torch.nn.Module, reference: torch.nn.Module) -> float:
    """Largest relative difference of the losses and of the position embeddings' gradients.

    Differences are divided by the largest reference value, because these gradients are small.
    """
    pairs = [
        (step(model), step(reference)),
        (model.pos_embed.grad, reference.pos_embed.grad),
    ]
    return largest([(found - right).abs().max() / right.abs().max() for found, right in pairs])


class ValuesAlone(models.Attention):
    """An attention layer without the attention: values pass through unchanged."""

    def forward(self, x: Tensor, compiled: attention.CompiledMask) -> Tensor:
        _, _, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj_drop(self.proj(v))


def without_attention(model: models.VisionTransformer) -> models.VisionTransformer:
    """Remove attention from a model: no pattern and no backend can be faster than this."""
    size = {name: model.config[name] for name in ("embed_dim", "num_heads", "dropout")}
    for block in model.blocks:
        values_alone = ValuesAlone(**size)
        values_alone.load_state_dict(block.attn.state_dict())
        block.attn = values_alone.to(block.norm1.weight.device)
    return model


def timm_twin(model: models.VisionTransformer) -> torch.nn.Module:
    """timm's ViT with the same sizes and weights."""
    from timm.models import VisionTransformer

    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    twin = VisionTransformer(**{name: model.config[name] for name in names})
    twin.load_state_dict(model.state_dict())
    return twin
