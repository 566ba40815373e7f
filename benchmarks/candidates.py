"""What benchmark.py times: attention patterns by backend, the peers of other libraries, and whole models.

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

FULL, WITHOUT = "full SDPA", "no attention"
BACKENDS = ("auto", "dense", "diagonal", "uncompiled", "flex", "local-attention", "natten")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Grid side -> (batch size, heads), as much as two cores can bear.
SHAPES = {14: (8, 12), 28: (2, 12), 56: (1, 12), 112: (1, 3)}
NUM_CHECKED_ROWS = 32
INEXACT = ("natten",)  # its windows are shifted, not truncated, at the border: as fast, but another pattern


@dataclass
class Candidate:
    """Something to be timed: `run()` is one forward and backward."""

    backend: str
    mask: MaskSpec
    num_neighbors_mean: float
    num_sequences: int  # heads times images, or images: what time and memory are divided by to compare grids
    ceiling: float  # the most that the arithmetic allows: FLOPs of full attention over those of the mask
    run: Callable[[], object]
    check: Callable[[], float] | None  # -> the largest error; None where there is nothing exact to compare with
    first_seconds: float = 0.0  # of the first run: compiling, caches, warm-up
    error: float | None = None

    @property
    def name(self) -> str:
        return f"{self.mask.label}: {self.backend}"


def usable_backends(asked: list[str], level: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Those that can run here, and why the others cannot."""
    reasons = {}
    if level == "model":
        asked = [*asked, "timm"]
        others = [name for name in asked if name != "timm" and name not in attention.BACKENDS]
        reasons |= dict.fromkeys(others, "attention alone, not a model")
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
        reasons["diagonal"] = "torch.compile does not work here; the backend `uncompiled` is the same formula"
    return [name for name in asked if name not in reasons], {k: v for k, v in reasons.items() if k in asked}


def attention_candidates(args, grid: int, backends: list[str], device: torch.device) -> list[Candidate]:
    """Full attention, and each pattern with each backend, on one packed qkv [B, T, 3, H, D]."""
    batch_size, num_heads = shape_of(args, grid)
    num_global, num_patches = int(args.class_token), grid * grid
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_global + num_patches, 3, num_heads, args.head_dim)
    qkv = torch.randn(shape, generator=generator).to(device, DTYPES[args.dtype]).requires_grad_()
    grad = torch.randn(*shape[:2], *shape[3:], generator=generator).to(device, DTYPES[args.dtype])

    def candidate(backend: str, spec: MaskSpec, mask: Tensor | None, attend: Callable) -> Candidate:
        pairs = [attention.count_pairs(allowed, num_patches, num_global) for allowed in (None, mask)]
        return Candidate(
            backend=backend,
            mask=spec,
            num_neighbors_mean=num_patches if mask is None else int(mask.sum()) / num_patches,
            num_sequences=batch_size * num_heads,
            ceiling=pairs[0] / pairs[1],
            run=lambda: torch.autograd.grad(attend(qkv), qkv, grad),
            check=None if backend in INEXACT else lambda: largest_error(attend, qkv, mask, num_global),
        )

    full = attention.compile_mask(None, num_global)
    candidates = [candidate(FULL, MaskSpec(), None, lambda x: attention.attend_packed(x, full))]
    for spec in masks_of(args):
        mask = spec.build(grid, grid)
        for backend in backends:
            attend = make_attend(backend, spec, mask, num_global, qkv)
            if attend is not None:
                candidates.append(candidate(backend, spec, mask, attend))
    return candidates


def make_attend(backend: str, spec: MaskSpec, mask: Tensor, num_global: int, qkv: Tensor) -> Callable | None:
    """qkv [B, T, 3, H, D] -> [B, T, H, D] by one backend; None if it does not know this pattern."""
    if backend == "local-attention":
        knows = spec.mask_type.startswith("1d") and not num_global and mask.sum() > len(mask)  # no window of one
        return local_attention_peer(mask) if knows else None
    if backend == "natten":
        return natten_peer(mask) if spec.mask_type == "2d_all_neighbors" and not num_global else None
    requested = "diagonal" if backend == "uncompiled" else backend
    compiled = attention.compile_mask(mask, num_global, requested).to(qkv.device)
    if backend == "auto":
        choose(compiled, qkv.shape[0], *qkv.shape[3:], qkv.dtype, qkv.device)
    elif compiled.backend != compiled.requested:
        return None
    if backend == "uncompiled":
        return lambda qkv: UncompiledDiagonal.apply(qkv, compiled.valid, compiled.offsets, num_global)
    return lambda qkv: attention.attend_packed(qkv, compiled)


def choose(compiled: attention.CompiledMask, batch_size: int, num_heads: int, head_dim: int, dtype, device) -> None:
    """Let `auto` choose as for a long run."""
    choice = attention.choose_backend(compiled, batch_size, num_heads, head_dim, dtype, device, num_calls=10**9)
    compiled.apply_choice(choice)


class UncompiledDiagonal(torch.autograd.Function):
    """The formulas of diagonal.py as they run where there is no compiler."""

    @staticmethod
    def forward(ctx, qkv, valid, offsets, num_global):
        out, p, global_p = diagonal.forward(qkv, valid, offsets, num_global)
        ctx.save_for_backward(qkv, out, p, global_p)
        ctx.offsets, ctx.num_global = offsets, num_global
        return out

    @staticmethod
    def backward(ctx, grad):
        return diagonal.backward(grad, *ctx.saved_tensors, ctx.offsets, ctx.num_global), None, None, None


def local_attention_peer(mask: Tensor) -> Callable:
    """The package local-attention (1D windows only), with the exact window that our masks have."""
    from local_attention import LocalAttention

    radius = (int(mask.sum(1).max()) - 1) // 2
    layer = LocalAttention(window_size=radius, autopad=True, exact_windowsize=True, use_rotary_pos_emb=False)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in qkv.permute(2, 0, 3, 1, 4))  # each [B * H, T, D]
        real = torch.ones(1, qkv.shape[1], dtype=torch.bool, device=qkv.device)  # not what autopad adds at the end
        return layer(q, k, v, mask=real).unflatten(0, (qkv.shape[0], -1)).transpose(1, 2)

    return attend


def natten_peer(mask: Tensor) -> Callable:
    """The package NATTEN: 2D squares on CUDA."""
    from natten import na2d

    side, window = math.isqrt(len(mask)), math.isqrt(int(mask.sum(1).max()))

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (side, side)) for x in qkv.unbind(2))  # each [B, side, side, H, D]
        return na2d(q, k, v, kernel_size=window).flatten(1, 2)

    return attend


def largest_error(attend: Callable, qkv: Tensor, mask: Tensor | None, num_global: int) -> float:
    """Largest error of outputs and gradients against dense attention in float64, where all flows through some rows."""
    batch_size, num_tokens = qkv.shape[:2]
    rows = checked_rows(num_tokens)
    generator = torch.Generator().manual_seed(1)
    grad = torch.zeros_like(qkv[:, :, 0])
    grad[:, rows] = torch.randn(batch_size, len(rows), *qkv.shape[3:], generator=generator).to(grad)
    out = attend(qkv)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)

    exact_qkv = qkv.detach().cpu().double().requires_grad_()
    q, k, v = exact_qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    scores = q[:, :, rows] @ k.transpose(-1, -2) / qkv.shape[-1] ** 0.5  # [B, H, rows, T]
    if mask is not None:
        allowed = torch.ones(len(rows), num_tokens, dtype=torch.bool)
        patches = rows >= num_global
        allowed[patches, num_global:] = mask[rows[patches] - num_global]
        scores = scores.masked_fill(~allowed, float("-inf"))
    exact = (scores.softmax(-1) @ v).transpose(1, 2)  # [B, rows, H, D]
    (exact_grad,) = torch.autograd.grad(exact, exact_qkv, grad[:, rows].cpu().double())
    errors = (out[:, rows].cpu().double() - exact, grad_qkv.cpu().double() - exact_grad)
    return largest([error.abs().max() for error in errors])


def largest(errors: list[Tensor]) -> float:
    """The largest one, NaN if one is NaN: Python's max() would pass over it."""
    return torch.stack(errors).max().item()


def checked_rows(num_tokens: int) -> Tensor:
    """Some far apart, among them the global token, and a run of neighbors, so that gradients of shared keys add up."""
    apart = torch.linspace(0, num_tokens - 1, min(num_tokens, NUM_CHECKED_ROWS // 2)).long()
    run = num_tokens // 2 + torch.arange(min(num_tokens // 2, NUM_CHECKED_ROWS // 2))
    return torch.cat([apart, run]).unique()


def model_candidates(args, grid: int, backends: list[str], device: torch.device) -> list[Candidate]:
    """Standard ViTs of 4x4 patches with a class token: ours with full attention and with each pattern, and timm's."""
    batch_size, _ = shape_of(args, grid)
    config = {"img_size": 4 * grid, "patch_size": 4, "dropout": 0.0, **models.PRESETS[args.model]}
    if args.depth:
        config["depth"] = args.depth
    if args.num_heads:
        config["num_heads"] = args.num_heads
    images = torch.randn(batch_size, 3, 4 * grid, 4 * grid, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(batch_size, device=device) % config.get("num_classes", 10)

    def build(mask: Tensor | None, backend: str) -> models.VisionTransformer:
        torch.manual_seed(0)
        return models.VisionTransformer(**config, attention_mask=mask, backend=backend).to(device)

    def step(model: torch.nn.Module) -> Tensor:
        model.zero_grad()
        with hardware.autocast(device, args.dtype):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss.detach()

    full = build(None, "dense")
    full_flops = models.count_forward_flops(full)

    def candidate(backend, mask, num_neighbors_mean, model, reference=None, ceiling=1.0):
        return Candidate(
            backend=backend,
            mask=mask,
            num_neighbors_mean=num_neighbors_mean,
            num_sequences=batch_size,
            ceiling=ceiling,
            run=lambda: step(model),
            check=None if reference is None else lambda: model_error(step, model, reference),
        )

    bare = without_attention(build(None, "dense"))
    bare_ceiling = full_flops["total"] / (full_flops["total"] - full_flops["attention"])
    candidates = [
        candidate(FULL, MaskSpec(), grid * grid, full),
        candidate(WITHOUT, MaskSpec(), 0, bare, ceiling=bare_ceiling),
    ]
    if "timm" in backends:
        candidates.append(candidate("timm", MaskSpec(), grid * grid, timm_twin(full).to(device), full))
    for spec in masks_of(args):
        mask = spec.build(grid, grid)
        mean, reference = int(mask.sum()) / len(mask), build(mask, "dense")
        ceiling = full_flops["total"] / models.count_forward_flops(reference)["total"]
        for backend in (name for name in backends if name in attention.BACKENDS):
            model = build(mask, backend)
            if backend == "auto":
                heads = model.config["num_heads"]
                choose(
                    model.compiled_mask,
                    batch_size,
                    heads,
                    model.config["embed_dim"] // heads,
                    DTYPES[args.dtype],
                    device,
                )
            if backend in ("auto", model.compiled_mask.backend):
                candidates.append(candidate(backend, spec, mean, model, reference, ceiling))
    return candidates


def model_error(step: Callable, model: torch.nn.Module, reference: torch.nn.Module) -> float:
    """Largest difference of the losses and of the positions' gradients, which are small: relative to the largest."""
    pairs = [(step(model), step(reference)), (model.pos_embed.grad, reference.pos_embed.grad)]
    return largest([(found - right).abs().max() / right.abs().max() for found, right in pairs])


class ValuesAlone(models.Attention):
    """All of an attention layer but the attention: the values pass as they are."""

    def forward(self, x: Tensor, compiled: attention.CompiledMask) -> Tensor:
        return self.proj_drop(self.proj(self.qkv(x).chunk(3, dim=-1)[2]))


def without_attention(model: models.VisionTransformer) -> models.VisionTransformer:
    """The same model with attention left out: no pattern, and no backend, can make the model faster than this."""
    size = (model.config["embed_dim"], model.config["num_heads"], model.config["dropout"])
    for block in model.blocks:
        values_alone = ValuesAlone(*size)
        values_alone.load_state_dict(block.attn.state_dict())
        block.attn = values_alone.to(block.norm1.weight.device)
    return model


def timm_twin(model: models.VisionTransformer) -> torch.nn.Module:
    """timm's ViT of the same sizes and weights."""
    from timm.models import VisionTransformer

    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    twin = VisionTransformer(**{name: model.config[name] for name in names})
    twin.load_state_dict(model.state_dict())
    return twin


def masks_of(args) -> list[MaskSpec]:
    return [MaskSpec(mask_type, step) for mask_type in args.mask_types for step in args.expansion_steps]


def shape_of(args, grid: int) -> tuple[int, int]:
    """(batch size, heads) of a grid: as asked for, else as the nearest grid of SHAPES has it."""
    batch_size, num_heads = SHAPES[min(SHAPES, key=lambda known: abs(known - grid))]
    return args.batch_size or batch_size, args.num_heads or num_heads
