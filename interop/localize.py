"""Give somebody else's ViT local attention: `localize(model, mask)`.

Each library has a file that finds the parts of its models and exchanges their attention. The rest
of a model stays as it is: the library's own code runs, with its own weights.
"""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor, nn

import attention
from interop.parts import Parts
from masks import MASK_TYPES, MaskSpec

KNOWN = (
    "timm's VisionTransformer and Eva, torchvision's VisionTransformer, and ViT, DeiT, I-JEPA and "
    "DINO models of transformers"
)


def localize(
    model: nn.Module,
    mask: Tensor | str | MaskSpec,
    expansion_step: int | None = None,
    *,
    grid: tuple[int, int] | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Let each patch of a ViT attend only where the mask allows. Changes the model, and returns it.

    Weights and state dict stay as they are. Tokens before the patches (class token, registers) are
    global: they attend to all tokens, and all tokens attend to them. A model that already is
    localized gets the new mask instead of the old one.

    Args:
        mask: bool [N, N] over patches in row-major order, True = query i may attend to key j; or
            the name of a pattern, one of MASK_TYPES; or a MaskSpec, whose mask may differ by layer.
        expansion_step: how far a pattern given by name reaches, in patches.
        grid: rows and columns of patches, if the images have another size than the model's own.
        backend: how attention is computed, see `attention.compile_mask`.

    Raises ValueError if the model is of an unknown kind, or if the mask does not fit the grid. The
    localized model raises it for images of another grid, for a further mask given to its forward,
    and for dropout on attention weights in training.
    """
    adapter = adapter_of(model)
    parts = adapter.find_parts(model)
    grid = parts.grid if grid is None else tuple(grid)
    masks = build_masks(mask, expansion_step, grid, len(parts.attentions))
    compiled = attention.LayerMasks(masks, parts.num_global_tokens, backend)

    # Settle the backend now: it cannot change while torch.compile traces the model.
    device = next(parts.projection.parameters()).device
    compiled.check(parts.num_global_tokens + grid[0] * grid[1], device)

    unlocalize(model)
    for module, compiled_mask in zip(parts.attentions, compiled, strict=True):
        adapter.install(module, compiled_mask)
    check = functools.partial(check_grid, grid)
    parts.projection.grid_check = parts.projection.register_forward_hook(check)
    return model


def unlocalize(model: nn.Module) -> nn.Module:
    """Give a model its own attention back. Changes the model, and returns it.

    Raises ValueError if the model is of an unknown kind.
    """
    adapter = adapter_of(model)
    parts = adapter.find_parts(model)
    if is_localized(parts):
        for module in parts.attentions:
            adapter.remove(module)
        parts.projection.grid_check.remove()
        del parts.projection.grid_check
    return model


def is_localized(parts: Parts) -> bool:
    return hasattr(parts.projection, "grid_check")


def adapter_of(model: nn.Module) -> ModuleType:
    """The file for the library that a model, or the class that it extends, is from.

    Only then is the library imported. Raises ValueError for a model of none of them.
    """
    for cls in type(model).__mro__:
        library = cls.__module__.partition(".")[0]
        if library == "timm":
            from interop import timm_vit

            return timm_vit
        if library == "torchvision":
            from interop import torchvision_vit

            return torchvision_vit
        if library == "transformers":
            from interop import transformers_vit

            return transformers_vit
    raise ValueError(f"localize does not know {type(model).__name__}; it knows {KNOWN}")


def build_masks(
    mask: Tensor | str | MaskSpec,
    expansion_step: int | None,
    grid: tuple[int, int],
    num_layers: int,
) -> list[Tensor | None]:
    """The mask of each layer, bool [N, N]; None for full attention.

    Raises ValueError if it does not fit.
    """
    if isinstance(mask, str):
        mask = MaskSpec(mask, expansion_step)
    elif expansion_step is not None:
        raise ValueError(
            f"expansion_step {expansion_step} belongs to a pattern's name, not to {type(mask)}"
        )
    if isinstance(mask, MaskSpec):
        return mask.build_layers(*grid, num_layers)
    if not isinstance(mask, Tensor):
        names = ", ".join(MASK_TYPES)
        raise ValueError(f"expected a boolean mask [N, N] or one of {names}, got {type(mask)}")

    num_patches = grid[0] * grid[1]
    if mask.shape != (num_patches, num_patches):
        raise ValueError(
            f"the mask has shape {list(mask.shape)}, but the {grid[0]}x{grid[1]} grid of "
            f"{num_patches} patches needs [{num_patches}, {num_patches}]"
        )
    return num_layers * [mask]


def check_grid(grid: tuple[int, int], projection: nn.Module, inputs: tuple, output: Tensor) -> None:
    """A forward hook: the patches [B, E, rows, columns] must be those that the mask is for."""
    rows, columns = output.shape[-2:]
    if (rows, columns) != grid:
        raise ValueError(
            f"the images have {rows}x{columns} patches, but the mask is for {grid[0]}x{grid[1]}; "
            f"call localize with grid=({rows}, {columns})"
        )
