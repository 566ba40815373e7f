"""The model of a run: built from its settings, its backends chosen, described for config.json."""

from __future__ import annotations

import torch

import attention
import data
import models
import utils
from attention import Choice, CompiledMask, LayerMasks
from runtime import distributed
from training.budget import DEFAULT_EPOCHS
from training.settings import Settings
from training.trainer import micro_batch_size


def build_model(
    settings: Settings, in_channels: int, num_classes: int, norm_eps: float = 1e-6
) -> models.VisionTransformer:
    """The model with newly drawn weights, which depend on the seed and not on the mask."""
    model = settings.model
    torch.manual_seed(settings.optimization.seed)
    with utils.usage_errors():
        # In patches; at least 1, so that the model reports an image that is too small.
        grid = [max(side // model.patch_size, 1) for side in model.image_size]
        return models.VisionTransformer(
            img_size=model.image_size,
            patch_size=model.patch_size,
            in_channels=in_channels,
            num_classes=num_classes,
            embed_dim=model.embed_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            dropout=model.dropout,
            drop_path=model.drop_path,
            pool=model.pool,
            attention_mask=settings.mask.spec.build_layers(*grid, model.depth),
            backend=settings.mask.backend,
            norm_eps=norm_eps,
            num_registers=model.num_registers,
        )


def choose_backends(
    model: models.VisionTransformer, settings: Settings, num_train: int, device: torch.device
) -> list[Choice]:
    """How to compute attention under each of the masks; not counted as training time."""
    config, optimization = model.config, settings.optimization
    num_epochs = optimization.epochs or DEFAULT_EPOCHS  # with --minutes, nobody knows
    num_steps = num_epochs * data.steps_per_epoch(num_train, optimization.batch_size)
    num_passes = num_steps * settings.machine.grad_accumulation
    is_bf16 = settings.machine.precision == "bf16"

    with utils.usage_errors():
        return [
            attention.choose_backend(
                compiled,
                micro_batch_size(settings),
                config["num_heads"],
                config["embed_dim"] // config["num_heads"],
                torch.bfloat16 if is_bf16 else torch.float32,
                device,
                num_calls=model.layer_masks.num_layers_with(compiled) * num_passes,
            )
            for compiled in model.layer_masks.different
        ]


def recorded_choices(
    about: dict, model: models.VisionTransformer, settings: Settings, device: torch.device
) -> list[Choice]:
    """The backends that the run began with, so that a resume is exact."""
    recorded = about.get("masks") or [about]
    masks = model.layer_masks.different
    return [
        recorded_choice(mask, compiled, settings, device)
        for mask, compiled in zip(recorded, masks, strict=True)
    ]


def recorded_choice(
    about: dict, compiled: CompiledMask, settings: Settings, device: torch.device
) -> Choice:
    """The backend that the run began with under one mask.

    Except for one that `auto` chose and that cannot run on this device, and for the diagonals that
    it once chose on the CPU: they are no longer compiled there, and would be many times as slow as
    the native kernel.
    """
    choice = Choice(about["backend"], about["backend_reason"])
    problem = attention.unusable(choice.backend, device.type)
    if problem is None and choice.backend == "diagonal" and device.type == "cpu":
        problem = "is slow on a CPU now"
    if problem is None or settings.mask.backend == choice.backend:
        return choice

    by_rule = attention.choose_by_rule(compiled, device)
    if by_rule.backend == choice.backend:  # there is no compiler
        return choice
    if distributed.IS_FIRST:
        print(f"attention goes on with backend {by_rule.backend}: {choice.backend} {problem}")
    return by_rule


def describe_model(model: models.VisionTransformer, settings: Settings) -> dict:
    """The number of parameters, the numbers of neighbors, and attention's share of the FLOPs."""
    num_patches, masks = model.num_patches, model.layer_masks
    mean_neighbors = masks.mean_neighbors(num_patches)
    flops = models.count_forward_flops(model)
    about = {
        "grid": list(model.grid),
        "num_patches": num_patches,
        "num_neighbors_nominal": settings.mask.spec.num_neighbors(*model.grid),
        "num_neighbors_mean": mean_neighbors,
        "density": mean_neighbors / num_patches,
        "attention_share_of_flops": flops["attention"] / flops["total"],
        "forward_flops_per_image": flops["total"],
    }
    if len(masks.different) == 1:
        about |= describe_choice(masks[0].choice)
    else:
        about |= describe_masks(masks, num_patches)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"num_parameters": num_parameters, "attention": about}


def describe_masks(masks: LayerMasks, num_patches: int) -> dict:
    """The backends in words, and everything about each of the different masks."""
    described = []
    for number, compiled in enumerate(masks.different):
        num_pairs = attention.count_pairs(compiled.mask, num_patches, 0)
        layers = [layer for layer, other in enumerate(masks.number_of) if other == number]
        about = {"layers": layers, "num_neighbors_mean": num_pairs / num_patches}
        described.append(about | describe_choice(compiled.choice))
    return {
        "backend": masks.backend,
        "backend_reason": "for each of the masks",
        "masks": described,
    }


def describe_choice(choice: Choice) -> dict:
    return {
        "backend": choice.backend,
        "backend_reason": choice.reason,
        "backend_seconds": choice.timings,
    }
