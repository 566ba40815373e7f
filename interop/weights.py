"""Starts a model from weights of another one: other library, resolution, classes, patches.

Legend for shapes:
    E embed dim, C channels, N patches, G prefix tokens (the class token and the like) before them
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from interop import layouts, weight_files
from interop.layouts import Weights
from models import PRESETS, VisionTransformer
from utils import UsageError, UserError

LOADED, RESIZED, NEW, LEFT_OUT = "loaded", "resized", "new", "left out"
TOKENS = ("cls_token", "reg_token")  # before the patches, in this order


@dataclass
class Fitted:
    """What became of each part of the model."""

    parts: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (LOADED, ..., detail)
    kept: list[str] = field(default_factory=list)  # parameters of the model that are as drawn

    def note(self, part: str, what: str, detail: str = "") -> None:
        self.parts[part] = (what, detail)

    def describe(self) -> dict[str, str]:
        """For JSON."""
        return {part: ", ".join(filter(None, row)) for part, row in self.parts.items()}

    def table(self) -> str:
        width = max(map(len, self.parts))
        rows = [
            f"  {part:<{width}}  {what:<8}  {detail}" for part, (what, detail) in self.parts.items()
        ]
        return "\n".join(row.rstrip() for row in rows)


def read_pretrained(path: str) -> tuple[Weights, str]:
    """The weights in a file of another library, and the hash of the file."""
    file = weight_files.read(Path(path))
    return layouts.recognize(file), file.sha256


def of_checkpoint(state: dict, origin: str) -> Weights:
    """The weights in a checkpoint of ours: the averaged ones, if the run had any."""
    config = state["model_config"]
    return Weights(
        origin=origin,
        source="main.py",
        tensors=dict(state.get("average") or state["model"]),
        norm_eps=config.get("norm_eps", layouts.EPS),
        num_heads=config["num_heads"],
        img_size=tuple(config["img_size"]),
    )


def fit(weights: Weights, model: VisionTransformer) -> Fitted:
    """Copy the weights into the model, resized where that makes sense; say what became of which.

    The head stays as drawn where the number of classes differs, or where it would read something
    else than it was trained on: the mean of the patches instead of a class token, or the other way.

    Raises UserError if the model has another width, depth, number of heads or MLP.
    """
    refuse_other_architecture(weights, model)
    ours, theirs = model.state_dict(), dict(weights.tensors)
    fitted, fits = Fitted(), {}

    patch, detail = fit_patch_embedding(
        theirs["patch_embed.proj.weight"], ours["patch_embed.proj.weight"].shape, weights.origin
    )
    fits["patch_embed.proj.weight"] = patch
    fits["patch_embed.proj.bias"] = theirs["patch_embed.proj.bias"]
    fitted.note("patch_embed", RESIZED if detail else LOADED, detail)

    for token in TOKENS:
        _fit_token(token, ours, theirs, fits, fitted)
    _fit_positions(weights, model, fits, fitted)

    blocks = {name: value for name, value in theirs.items() if name.startswith("blocks.")}
    fits |= blocks
    fitted.note("blocks", LOADED, f"{weights.depth}, {len(blocks)} tensors")
    fits |= {name: theirs[name] for name in ("norm.weight", "norm.bias")}
    fitted.note("norm", LOADED)

    _fit_head(ours, theirs, fits, fitted)
    if weights.left_out:
        fitted.note("others", LEFT_OUT, ", ".join(weights.left_out))

    fitted.kept = [name for name in ours if name not in fits]
    model.load_state_dict(ours | {name: value.float() for name, value in fits.items()})
    return fitted


def refuse_other_architecture(weights: Weights, model: VisionTransformer) -> None:
    config = model.config
    found = (weights.embed_dim, weights.depth)
    asked = (config["embed_dim"], config["depth"])
    if found != asked:
        raise UsageError(
            f"{weights.origin} is a ViT of width {found[0]} and depth {found[1]}, the model asked "
            f"for has width {asked[0]} and depth {asked[1]}; {_flags_for(weights)}"
        )
    if weights.num_heads is not None and weights.num_heads != config["num_heads"]:
        raise UsageError(
            f"{weights.origin} is a ViT of {weights.num_heads} heads, the model asked for has "
            f"{config['num_heads']}; pass --num_heads {weights.num_heads}"
        )

    _refuse_other_registers(weights, model)

    hidden, ours = (
        len(tensors["blocks.0.mlp.fc1.bias"]) for tensors in (weights.tensors, model.state_dict())
    )
    if hidden != ours:
        raise UserError(
            f"{weights.origin} has {hidden} units in its MLPs, our model has {ours} "
            f"({config['mlp_ratio']:g} times its width)"
        )


def _flags_for(weights: Weights) -> str:
    """The flags of main.py for a model of the size of these weights."""
    width, depth = weights.embed_dim, weights.depth
    for name, sizes in PRESETS.items():
        heads = weights.num_heads or sizes["num_heads"]
        if (width, depth, heads) == tuple(sizes.values()):
            return f"pass --model {name}"
    return f"pass --embed_dim {width} --depth {depth} and the --num_heads that it was trained with"


# --------------------------------------------------------------------------------------------------
# Part by part


def _fit_token(name: str, ours: dict, theirs: dict, fits: dict, fitted: Fitted) -> None:
    if name in ours and name in theirs and ours[name].shape == theirs[name].shape:
        fits[name] = theirs[name]
        fitted.note(name, LOADED)
    elif name in ours:
        fitted.note(name, NEW)
    elif name in theirs:
        fitted.note(name, LEFT_OUT, "the model has none")


def _refuse_other_registers(weights: Weights, model: VisionTransformer) -> None:
    """Registers are a memory that all blocks have learned to use."""
    there, here = (
        tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
        for tensors in (weights.tensors, model.state_dict())
    )
    if there and there != here:
        raise UsageError(
            f"{weights.origin} has {there} register tokens, the model asked for {here}; use "
            f"--num_registers {there}"
        )


def _fit_positions(weights: Weights, model: VisionTransformer, fits: dict, fitted: Fitted) -> None:
    positions, ours = weights.tensors["pos_embed"].float(), model.pos_embed.data
    grid = find_grid(weights, model.grid)
    prefix, patches = positions.split([positions.shape[1] - math.prod(grid), math.prod(grid)], 1)

    # Each token keeps its own position. Zeros say: none, as where timm has no_embed_class.
    there, here = num_tokens(weights.tensors), num_tokens(model.state_dict())
    if not prefix.shape[1]:
        prefix = positions.new_zeros(1, sum(there), positions.shape[2])
    pairs = zip(prefix.split(there, 1), ours[:, : sum(here)].split(here, 1), strict=True)
    new_prefix = [old if old.shape == new.shape else new for old, new in pairs]

    resized = models.resample_positions(patches, grid, model.grid, num_prefix=0)
    fits["pos_embed"] = torch.cat([*new_prefix, resized], dim=1)
    if grid == model.grid:
        fitted.note("pos_embed", LOADED, f"grid {_x(grid)}")
    else:
        fitted.note("pos_embed", RESIZED, f"grid {_x(grid)} to {_x(model.grid)}, bicubic")


def num_tokens(tensors: dict[str, Tensor]) -> list[int]:
    """How many of each of TOKENS there are."""
    return [tensors[name].shape[1] if name in tensors else 0 for name in TOKENS]


def find_grid(weights: Weights, grid_of_model: tuple[int, int]) -> tuple[int, int]:
    """The patch grid that the weights' positions [1, G + N, E] are of.

    Where the file does not say its image size, it is the model's own grid if the number fits, else
    a square. Raises UserError if neither does.
    """
    num_positions = weights.tensors["pos_embed"].shape[1]
    num_prefix = sum(num_tokens(weights.tensors))
    for count in (num_positions - num_prefix, num_positions):
        candidates = [grid_of_model, (math.isqrt(max(count, 0)),) * 2]
        if weights.img_size is not None:
            patch_height, patch_width = weights.tensors["patch_embed.proj.weight"].shape[2:]
            height, width = weights.img_size
            candidates.insert(0, (height // patch_height, width // patch_width))
        for grid in candidates:
            if math.prod(grid) == count > 0:
                return grid

    raise UserError(
        f"{weights.origin} has {num_positions} positions, {num_prefix} of them perhaps of tokens "
        "besides the patches; the others make no square grid, and the file does not say which"
    )


def fit_patch_embedding(kernel: Tensor, shape: torch.Size, origin: str) -> tuple[Tensor, str]:
    """Patch embedding [E, C, p, p] for other channels and another patch size, and what was done.

    Gray images go into one channel as well as into three equal ones: the sum over the channels of
    a kernel is the kernel for gray, and a kernel for gray is divided among three.
    """
    done = []
    channels, new_channels = kernel.shape[1], shape[1]
    if (channels, new_channels) == (3, 1):
        kernel = kernel.float().sum(1, keepdim=True)
    elif (channels, new_channels) == (1, 3):
        kernel = kernel.float().expand(-1, 3, -1, -1) / 3
    elif channels != new_channels:
        raise UserError(
            f"{origin} is for images of {channels} channels, the data has {new_channels}"
        )
    if channels != new_channels:
        done.append(f"{channels} to {new_channels} channels")

    size, new_size = tuple(kernel.shape[2:]), tuple(shape[2:])
    if size != new_size:
        kernel = resize_kernel(kernel, new_size)
        done.append(f"patches of {_x(size)} to {_x(new_size)} px, pseudoinverse")
    return kernel, ", ".join(done)


def resize_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch embedding [E, C, p, p] for patches of another size, [E, C, p', p'].

    PI-resize (Beyer et al. 2023, FlexiViT, section 3.4): the kernel that gives resized patches the
    embeddings closest to what the old one gives the patches themselves; as timm's
    `resample_patch_embed`.
    """
    height, width = kernel.shape[2:]
    pixels = torch.eye(height * width).view(-1, 1, height, width)
    # Resizing a patch is linear: a row for each old pixel, with what it gives to the new ones.
    resized = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).flatten(1)
    inverse = torch.linalg.pinv(resized)  # [p' * p', p * p]
    return (kernel.float().flatten(2) @ inverse.T).unflatten(2, size)


def _fit_head(ours: dict, theirs: dict, fits: dict, fitted: Fitted) -> None:
    num_classes = len(ours["head.bias"])
    if "head.weight" not in theirs or "head.bias" not in theirs:
        fitted.note("head", NEW, f"{num_classes} classes here, no head there")
    elif theirs["head.weight"].shape != ours["head.weight"].shape:
        there = len(theirs["head.weight"])
        fitted.note("head", NEW, f"{there} classes there, {num_classes} here")
    elif ("cls_token" in theirs) != ("cls_token" in ours):
        reads = ["the mean of the patches", "a class token"]
        there, here = reads["cls_token" in theirs], reads["cls_token" in ours]
        fitted.note("head", NEW, f"read {there} there, {here} here")
    else:
        fits |= {name: theirs[name] for name in ("head.weight", "head.bias")}
        fitted.note("head", LOADED, f"{num_classes} classes")


def _x(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"
