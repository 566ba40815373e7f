"""Whole models that benchmark.py times: ours with each pattern, and timm's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import attention
import models
from benchmarks.candidates import DTYPES, FULL, Candidate, choose, masks_of, shape_of
from benchmarks.errors import largest
from masks import MaskSpec
from runtime import hardware

WITHOUT = "no attention"
PATCH_SIZE = 4  # of the models; their images have PATCH_SIZE * grid pixels per side


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
