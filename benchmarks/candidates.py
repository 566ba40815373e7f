"""The candidates of benchmark.py: attention patterns by backend, other libraries, and whole models.

Shapes: B batch, N patches, G global tokens, T = G + N tokens, H heads, D head dim.
"""

from __future__ import annotations

import importlib.util
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
BACKENDS = ("auto", "dense", "diagonal", "uncompiled", "flex", "local-attention", "natten")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Grid side -> (batch size, heads), as large as two CPU cores can handle.
SHAPES = {14: (8, 12), 28: (2, 12), 56: (1, 12), 112: (1, 3)}
NUM_CHECKED_ROWS = 32

# NATTEN shifts its windows at the border instead of truncating them: as fast, but another pattern.
INEXACT = ("natten",)


@dataclass
class Candidate:
    """Something to be timed: `run()` is one forward and backward pass."""

    backend: str
    mask: MaskSpec
    num_neighbors_mean: float

    # Heads times images, or images. Time and memory are divided by it to compare grids.
    num_sequences: int

    # Upper limit of the speedup: FLOPs of full attention over FLOPs with the mask.
    ceiling: float

    run: Callable[[], object]

    # Returns the largest error; None if there is nothing exact to compare with.
    check: Callable[[], float] | None

    first_seconds: float = 0.0  # of the first run: compilation, caches, warm-up
    error: float | None = None

    @property
    def name(self) -> str:
        return f"{self.mask.label}: {self.backend}"


def usable_backends(
    asked: list[str], level: str, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """The backends that can run here, and for each of the others the reason why not."""
    reasons = {}
    if level == "model":
        asked = [*asked, "timm"]
        for name in asked:
            if name != "timm" and name not in attention.BACKENDS:
                reasons[name] = "attention alone, not a model"
        if importlib.util.find_spec("timm") is None:
            reasons["timm"] = "not installed: pip install timm"

    if device.type != "cuda":
        reasons["flex"] = "FlexAttention has no backward off CUDA"
        reasons["natten"] = "runs on CUDA only"
    elif importlib.util.find_spec("natten") is None:
        reasons["natten"] = "not installed: pip install natten"

    if level == "attention" and importlib.util.find_spec("local_attention") is None:
        reasons["local-attention"] = "not installed: pip install local-attention"
    if diagonal.compile_error(device.type) is not None:
        reasons["diagonal"] = (
            "torch.compile does not work here; the backend `uncompiled` is the same formula"
        )

    usable = [name for name in asked if name not in reasons]
    left_out = {name: reason for name, reason in reasons.items() if name in asked}
    return usable, left_out


def masks_of(args) -> list[MaskSpec]:
    steps = args.expansion_steps
    return [MaskSpec(mask_type, step) for mask_type in args.mask_types for step in steps]


def shape_of(args, grid: int) -> tuple[int, int]:
    """(batch size, heads) for a grid: as requested, or those of the nearest grid in SHAPES."""
    nearest = min(SHAPES, key=lambda known: abs(known - grid))
    batch_size, num_heads = SHAPES[nearest]
    return args.batch_size or batch_size, args.num_heads or num_heads


def let_auto_choose(
    compiled: attention.CompiledMask,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Let the backend `auto` choose as it would for a long run with this shape (B, H, D)."""
    choice = attention.choose_backend(compiled, *shape, dtype, device, num_calls=10**9)
    compiled.apply_choice(choice)


# -------------------------------------------------------------------------------------------------
# Attention alone


def attention_candidates(
    args, grid: int, backends: list[str], device: torch.device
) -> list[Candidate]:
    """Full attention, and each pattern with each backend, on one packed qkv [B, T, 3, H, D]."""
    batch_size, num_heads = shape_of(args, grid)
    num_global = int(args.class_token)
    num_patches = grid * grid
    num_tokens = num_global + num_patches
    dtype = DTYPES[args.dtype]

    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch_size, num_tokens, 3, num_heads, args.head_dim, generator=generator)
    qkv = qkv.to(device, dtype).requires_grad_()
    grad = torch.randn(batch_size, num_tokens, num_heads, args.head_dim, generator=generator)
    grad = grad.to(device, dtype)
    full_pairs = attention.count_pairs(None, num_patches, num_global)

    def candidate(
        backend: str, spec: MaskSpec, mask: Tensor | None, attend: Callable[[Tensor], Tensor]
    ) -> Candidate:
        def check() -> float:
            return largest_error(attend, qkv, mask, num_global)

        return Candidate(
            backend=backend,
            mask=spec,
            num_neighbors_mean=num_patches if mask is None else int(mask.sum()) / num_patches,
            num_sequences=batch_size * num_heads,
            ceiling=full_pairs / attention.count_pairs(mask, num_patches, num_global),
            run=lambda: torch.autograd.grad(attend(qkv), qkv, grad),
            check=None if backend in INEXACT else check,
        )

    full = attention.compile_mask(None, num_global)
    candidates = [
        candidate(FULL, MaskSpec(), None, lambda qkv: attention.attend_packed(qkv, full)),
    ]
    for spec in masks_of(args):
        mask = spec.build(grid, grid)
        for backend in backends:
            attend = make_attend(backend, spec, mask, num_global, qkv)
            if attend is not None:
                candidates.append(candidate(backend, spec, mask, attend))
    return candidates


def make_attend(
    backend: str, spec: MaskSpec, mask: Tensor, num_global: int, qkv: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """A function from qkv [B, T, 3, H, D] to the output [B, T, H, D] of one backend.

    Returns None if the backend does not support this pattern.
    """
    if backend == "local-attention":
        has_window = mask.sum() > len(mask)  # the package has no window of a single token
        supported = spec.mask_type.startswith("1d") and not num_global and has_window
        return local_attention_peer(mask) if supported else None

    if backend == "natten":
        supported = spec.mask_type == "2d_all_neighbors" and not num_global
        return natten_peer(mask) if supported else None

    requested = "diagonal" if backend == "uncompiled" else backend
    compiled = attention.compile_mask(mask, num_global, requested).to(qkv.device)
    if backend == "auto":
        batch_size, _, _, num_heads, head_dim = qkv.shape
        shape = (batch_size, num_heads, head_dim)
        let_auto_choose(compiled, shape, qkv.dtype, qkv.device)
    elif compiled.backend != compiled.requested:
        return None

    if backend == "uncompiled":
        valid, offsets = compiled.valid, compiled.offsets
        return lambda qkv: UncompiledDiagonal.apply(qkv, valid, offsets, num_global)
    return lambda qkv: attention.attend_packed(qkv, compiled)


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


def local_attention_peer(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The package local-attention (1D windows only), with exactly the window of the mask."""
    from local_attention import LocalAttention

    radius = (int(mask.sum(1).max()) - 1) // 2
    layer = LocalAttention(
        window_size=radius, autopad=True, exact_windowsize=True, use_rotary_pos_emb=False
    )

    def attend(qkv: Tensor) -> Tensor:
        batch_size, num_tokens = qkv.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in qkv.permute(2, 0, 3, 1, 4))  # each [B * H, T, D]

        # Tells the tokens from the padding that autopad appends.
        real = torch.ones(1, num_tokens, dtype=torch.bool, device=qkv.device)
        out = layer(q, k, v, mask=real)  # [B * H, T, D]
        return out.unflatten(0, (batch_size, -1)).transpose(1, 2)

    return attend


def natten_peer(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The package NATTEN: 2D square windows on CUDA."""
    from natten import na2d

    side = math.isqrt(len(mask))
    window = math.isqrt(int(mask.sum(1).max()))

    def attend(qkv: Tensor) -> Tensor:
        on_grid = qkv.unflatten(1, (side, side))  # [B, side, side, 3, H, D]
        q, k, v = on_grid.unbind(3)
        return na2d(q, k, v, kernel_size=window).flatten(1, 2)

    return attend


def largest_error(
    attend: Callable[[Tensor], Tensor], qkv: Tensor, mask: Tensor | None, num_global: int
) -> float:
    """Largest error of outputs and gradients against dense attention in float64.

    To keep this cheap, only `checked_rows` of the output are compared and have gradients.
    """
    batch_size, num_tokens = qkv.shape[:2]
    rows = checked_rows(num_tokens)
    generator = torch.Generator().manual_seed(1)
    grad = torch.zeros_like(qkv[:, :, 0])
    grad[:, rows] = torch.randn(batch_size, len(rows), *qkv.shape[3:], generator=generator).to(grad)

    out = attend(qkv)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)

    # On the CPU, because Apple's GPUs have no float64.
    exact_qkv = qkv.detach().cpu().double().requires_grad_()
    exact = exact_attention(exact_qkv, mask, rows, num_global)
    (exact_grad,) = torch.autograd.grad(exact, exact_qkv, grad[:, rows].cpu().double())

    error = (out[:, rows].cpu().double() - exact).abs().max()
    grad_error = (grad_qkv.cpu().double() - exact_grad).abs().max()
    return largest([error, grad_error])


def exact_attention(qkv: Tensor, mask: Tensor | None, rows: Tensor, num_global: int) -> Tensor:
    """Dense attention of some rows: qkv [B, T, 3, H, D] -> [B, rows, H, D]."""
    num_tokens, head_dim = qkv.shape[1], qkv.shape[-1]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    scores = q[:, :, rows] @ k.transpose(-1, -2) / head_dim**0.5  # [B, H, rows, T]

    if mask is not None:
        allowed = torch.ones(len(rows), num_tokens, dtype=torch.bool)
        patches = rows >= num_global
        allowed[patches, num_global:] = mask[rows[patches] - num_global]
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def largest(errors: list[Tensor]) -> float:
    """The largest error, or NaN if any is NaN (Python's max() can miss a NaN)."""
    return torch.stack(errors).max().item()


def checked_rows(num_tokens: int) -> Tensor:
    """Indices of the rows to compare: some spread over all tokens, and a run of neighbors.

    The spread ones include the global token. Neighbors share keys, whose gradients add up.
    """
    num_spread = min(num_tokens, NUM_CHECKED_ROWS // 2)
    spread = torch.linspace(0, num_tokens - 1, num_spread).long()

    middle = num_tokens // 2
    run = middle + torch.arange(min(middle, NUM_CHECKED_ROWS // 2))
    return torch.cat([spread, run]).unique()


# -------------------------------------------------------------------------------------------------
# Whole models


def model_candidates(args, grid: int, backends: list[str], device: torch.device) -> list[Candidate]:
    """Standard ViTs with 4x4 patches and a class token.

    Ours with full attention, without attention and with each pattern, and timm's.
    """
    batch_size, _ = shape_of(args, grid)
    config = model_config(args, grid)
    step = make_step(args, grid, config, device)

    def build(mask: Tensor | None, backend: str) -> models.VisionTransformer:
        torch.manual_seed(0)  # the same weights for all
        model = models.VisionTransformer(**config, attention_mask=mask, backend=backend)
        return model.to(device)

    def candidate(
        backend: str,
        model: torch.nn.Module,
        *,
        mask: MaskSpec,
        num_neighbors_mean: float,
        ceiling: float = 1.0,
        reference: torch.nn.Module | None = None,
    ) -> Candidate:
        def check() -> float:
            return model_error(step, model, reference)

        return Candidate(
            backend=backend,
            mask=mask,
            num_neighbors_mean=num_neighbors_mean,
            num_sequences=batch_size,
            ceiling=ceiling,
            run=lambda: step(model),
            check=None if reference is None else check,
        )

    full = build(None, "dense")
    flops = models.count_forward_flops(full)
    without = without_attention(build(None, "dense"))
    without_ceiling = flops["total"] / (flops["total"] - flops["attention"])
    num_heads = full.config["num_heads"]
    shape = (batch_size, num_heads, full.config["embed_dim"] // num_heads)
    everything = {"mask": MaskSpec(), "num_neighbors_mean": grid * grid}

    candidates = [
        candidate(FULL, full, **everything),
        candidate(WITHOUT, without, mask=MaskSpec(), num_neighbors_mean=0, ceiling=without_ceiling),
    ]
    if "timm" in backends:
        twin = timm_twin(full).to(device)
        candidates.append(candidate("timm", twin, **everything, reference=full))

    for spec in masks_of(args):
        mask = spec.build(grid, grid)
        reference = build(mask, "dense")
        ceiling = flops["total"] / models.count_forward_flops(reference)["total"]
        for backend in backends:
            if backend not in attention.BACKENDS:
                continue

            model = build(mask, backend)
            if backend == "auto":
                let_auto_choose(model.compiled_mask, shape, DTYPES[args.dtype], device)
            elif model.compiled_mask.backend != backend:
                continue
            candidates.append(
                candidate(
                    backend,
                    model,
                    mask=spec,
                    num_neighbors_mean=int(mask.sum()) / len(mask),
                    ceiling=ceiling,
                    reference=reference,
                )
            )
    return candidates


def model_config(args, grid: int) -> dict:
    preset = models.PRESETS[args.model]
    config = {"img_size": 4 * grid, "patch_size": 4, "dropout": 0.0, **preset}
    if args.depth:
        config["depth"] = args.depth
    if args.num_heads:
        config["num_heads"] = args.num_heads
    return config


def make_step(
    args, grid: int, config: dict, device: torch.device
) -> Callable[[torch.nn.Module], Tensor]:
    """A function that does one forward and backward pass of a model, and returns the loss."""
    batch_size, _ = shape_of(args, grid)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, 4 * grid, 4 * grid, generator=generator).to(device)
    labels = torch.arange(batch_size, device=device) % config.get("num_classes", 10)

    def step(model: torch.nn.Module) -> Tensor:
        model.zero_grad()
        with hardware.autocast(device, args.dtype):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss.detach()

    return step


def model_error(step: Callable, model: torch.nn.Module, reference: torch.nn.Module) -> float:
    """Largest difference of the losses and of the gradients of the position embeddings.

    Both are relative to the largest value of the reference, because the gradients are small.
    """

    def relative_error(found: Tensor, expected: Tensor) -> Tensor:
        return (found - expected).abs().max() / expected.abs().max()

    loss_error = relative_error(step(model), step(reference))
    grad_error = relative_error(model.pos_embed.grad, reference.pos_embed.grad)
    return largest([loss_error, grad_error])


class ValuesAlone(models.Attention):
    """An attention layer without the attention: the values pass through unchanged."""

    def forward(self, x: Tensor, compiled: attention.CompiledMask) -> Tensor:
        _, _, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj_drop(self.proj(v))


def without_attention(model: models.VisionTransformer) -> models.VisionTransformer:
    """Take attention out of the model: no pattern and no backend can make it faster than this."""
    config = model.config
    for block in model.blocks:
        layer = ValuesAlone(config["embed_dim"], config["num_heads"], config["dropout"])
        layer.load_state_dict(block.attn.state_dict())
        block.attn = layer.to(block.norm1.weight.device)
    return model


def timm_twin(model: models.VisionTransformer) -> torch.nn.Module:
    """timm's ViT with the same sizes and weights."""
    from timm.models import VisionTransformer

    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    twin = VisionTransformer(**{name: model.config[name] for name in names})
    twin.load_state_dict(model.state_dict())
    return twin
