"""Augmentation of uint8 batches on any device, each image by its own operation and magnitude; and random erasing.

TrivialAugment Wide: Müller & Hutter 2021, "TrivialAugment", section 3. RandAugment: Cubuk et al. 2020, "RandAugment",
section 3. Random erasing: Zhong et al. 2020, "Random Erasing Data Augmentation", algorithm 1. Operations, ranges and
conventions are those of torchvision.transforms.v2, which does one image at a time.

All draws are made on the CPU, and grouping images by operation is done there: nothing waits for the device.

Shapes: n images of the epoch, b of the batch, m of one operation, C channels (1 or 3), H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import hardware

NUM_ROUNDS = {"none": 0, "trivial": 1, "rand": 2}  # operations applied to each image, one after the other
POLICIES = tuple(NUM_ROUNDS)
NUM_LEVELS = 31
RAND_LEVEL = 9  # the level of every operation of RandAugment; TrivialAugment draws it

AFFINE_OPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLEND_OPS = ("brightness", "color", "contrast", "sharpness")
OPS = AFFINE_OPS + BLEND_OPS + ("posterize", "solarize", "autocontrast", "equalize", "identity")  # drawn uniformly
NUM_SIGNED = len(AFFINE_OPS + BLEND_OPS)  # the magnitude of these is negative half of the time


@dataclass(frozen=True)
class Draws:
    """What happens to each image, on the CPU."""

    ops: Tensor  # int64 [rounds, n], indices into OPS
    magnitudes: Tensor  # float32 [rounds, n], signed, in the units of `magnitude_table`

    def at(self, positions: Tensor | slice) -> Draws:
        """Those of some of the images: int64 [b] on the CPU, or a slice."""
        return Draws(self.ops[:, positions], self.magnitudes[:, positions])


def magnitude_table(policy: str, image_size: tuple[int, int]) -> Tensor:
    """float32 [ops, levels]: the magnitude of each of OPS at each level, before its sign; 0 where it has none.

    Shears are slopes, translations whole pixels, rotations degrees counterclockwise, blends the factor less 1,
    posterize the bits that are kept, solarize the gray level from which pixels are inverted.
    """
    height, width = image_size
    if policy == "trivial":
        shear, move_x, move_y, degrees, blend, bits = 0.99, 32.0, 32.0, 135.0, 0.99, 6
    else:
        shear, move_x, move_y, degrees, blend, bits = 0.3, 150 / 331 * width, 150 / 331 * height, 30.0, 0.9, 4
    ends = dict(zip(AFFINE_OPS, (shear, shear, move_x, move_y, degrees), strict=True)) | dict.fromkeys(BLEND_OPS, blend)
    table = {op: torch.linspace(0, ends.get(op, 0), NUM_LEVELS) for op in OPS}
    for op in ("translate_x", "translate_y"):
        table[op].trunc_()
    table["posterize"] = (8 - torch.arange(NUM_LEVELS) / ((NUM_LEVELS - 1) / bits)).round()
    table["solarize"] = 255 * torch.linspace(1, 0, NUM_LEVELS)
    return torch.stack([table[op] for op in OPS])


def draw_policy(policy: str, num_images: int, image_size: tuple[int, int], generator: torch.Generator) -> Draws:
    """Operations and magnitudes for images of (H, W) = `image_size`; the policy "none" draws nothing."""
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    shape = (NUM_ROUNDS[policy], num_images)
    ops = torch.randint(len(OPS), shape, generator=generator)
    negative = torch.randint(2, shape, generator=generator).bool() & (ops < NUM_SIGNED)
    levels = torch.full(shape, RAND_LEVEL)
    if policy == "trivial":
        levels = torch.randint(NUM_LEVELS, shape, generator=generator)
    magnitudes = magnitude_table(policy, image_size)[ops, levels]
    return Draws(ops, torch.where(negative, -magnitudes, magnitudes))


def apply_policy(images: Tensor, draws: Draws) -> Tensor:
    """uint8 [b, C, H, W] -> the same, by the draws of these b images."""
    for ops, magnitudes in zip(draws.ops, draws.magnitudes, strict=True):
        images = _apply_round(images, ops, magnitudes)
    return images


def _apply_round(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """Sort the images by operation, change each operation's slice in place, and undo the permutation."""
    order = ops.argsort(stable=True)
    counts = torch.bincount(ops, minlength=len(OPS)).tolist()
    num_affine, others = sum(counts[: len(AFFINE_OPS)]), counts[len(AFFINE_OPS) :]
    affine = order[:num_affine]
    matrices = affine_matrices(ops[affine], magnitudes[affine], images.shape[-2:])  # [m, 2, 3]
    there, back = hardware.to_device(torch.stack((order, order.argsort())), images.device)
    images = images.index_select(0, there)  # images[there] goes byte by byte
    magnitudes = hardware.to_device(magnitudes[order], images.device)[:, None, None, None]  # [b, 1, 1, 1]
    slices, parts = magnitudes.split([num_affine, *others]), images.split([num_affine, *others])
    if num_affine:
        parts[0].copy_(warp(parts[0], hardware.to_device(matrices, images.device)))
    for op, part, values in zip(OPS[len(AFFINE_OPS) :], parts[1:], slices[1:], strict=True):
        if op != "identity" and len(part):
            part.copy_(OP_FNS[op](part, values))
    return images.index_select(0, back)


# ---------------------------------------------------------------------------------------------------------------------
# Operations: uint8 [m, C, H, W] and magnitudes float32 [m, 1, 1, 1] -> uint8 or float of [0, 256), [m, C, H, W]


def affine_matrices(ops: Tensor, magnitudes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """float32 [m, 2, 3]: from a pixel's (column, row, 1) to the (column, row) it is taken from.

    Rotations are about the center of the image, shears about its upper left corner, as in AutoAugment.
    """
    center_y, center_x = ((side - 1) / 2 for side in image_size)
    shear_x, shear_y, move_x, move_y, degrees = (magnitudes.double() * (ops == op) for op in range(len(AFFINE_OPS)))
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    start_x = center_x - center_x * cos + center_y * sin + shear_x / 2 - move_x  # pixel 0 is half a pixel inside
    start_y = center_y - center_x * sin - center_y * cos + shear_y / 2 - move_y
    rows = (cos, shear_x - sin, start_x), (shear_y + sin, cos, start_y)
    return torch.stack([torch.stack(row, -1) for row in rows], 1).float()


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Take each pixel from the nearest one to where its image's matrix [2, 3] points, black outside."""
    height, width = images.shape[-2:]
    column = torch.arange(width, device=images.device)  # [W]
    row = torch.arange(height, device=images.device)[:, None]  # [H, 1]
    a, b, c, d, e, f = matrices.flatten(1).T[..., None, None]  # each [m, 1, 1]
    x, y = (a * column + (b * row + c)).round_(), (d * column + (e * row + f)).round_()  # [m, H, W]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    source = torch.where(inside, y * width + x, height * width).long()
    pixels = F.pad(images.flatten(2), (0, 1))  # [m, C, H * W + 1], the last one black
    return pixels.gather(2, source.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def _blend(images: Tensor, others: Tensor, magnitudes: Tensor) -> Tensor:
    """Move float images away from others where the magnitude is positive, towards them where it is negative.

    Without fused multiply-adds, here and below: a device may fuse or not, and the gray level would depend on that.
    """
    return (images - others).mul_(magnitudes).add_(images).clamp_(0, 255)


def _gray(images: Tensor) -> Tensor:
    """Luminance of float images in whole gray levels, [m, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()


def brightness(images: Tensor, magnitudes: Tensor) -> Tensor:
    return (images * (1 + magnitudes)).clamp_(0, 255)


def color(images: Tensor, magnitudes: Tensor) -> Tensor:
    images = images.float()
    return _blend(images, _gray(images), magnitudes)


def contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    images = images.float()
    return _blend(images, _gray(images).mean((1, 2, 3), keepdim=True), magnitudes)


def sharpness(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend with a blur of weights 1, and 5 at the center, of 13; pixels at the border stay."""
    images = images.float()
    center = images[..., 1:-1, 1:-1]
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    blurred = sums.add_(center, alpha=4).div_(13).round_()
    center.copy_(_blend(center, blurred, magnitudes))
    return images


def posterize(images: Tensor, magnitudes: Tensor) -> Tensor:
    dropped = (8 - magnitudes).to(torch.uint8)
    return (images >> dropped) << dropped


def solarize(images: Tensor, magnitudes: Tensor) -> Tensor:
    return torch.where(images >= magnitudes, 255 - images, images)


def autocontrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a constant channel stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = ((images - low) / ((high - low) * (1 / 255))).clamp_(max=255)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Flatten each channel's histogram, with the integer steps of PIL.ImageOps.equalize."""
    values = images.flatten(2).long()  # [m, C, H * W]
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(counts[..., :1]).expand_as(values))
    brightest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255  # [m, C, 1]
    darker = counts.cumsum(2) - counts  # pixels of lower values, [m, C, 256]
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))  # too few values: unchanged
    return table.to(torch.uint8).gather(2, values).view_as(images)


OP_FNS = {
    fn.__name__: fn for fn in (brightness, color, contrast, sharpness, posterize, solarize, autocontrast, equalize)
}


# ---------------------------------------------------------------------------------------------------------------------
# Random erasing

ERASED_SHARE = (0.02, 0.33)  # of the image's area, uniform
ERASED_RATIO = (0.3, 3.3)  # height / width, uniform in its logarithm


def draw_erasing(
    probability: float, num_images: int, image_size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Boxes int64 [n, 4] of (top, left, height, width) inside images of (h, w), of size 0 where nothing is erased.

    A side longer than the image's is cut to it, where the paper draws again.
    """
    sides = torch.tensor(image_size)
    chance, share, ratio, *corner = torch.rand(5, num_images, dtype=torch.float64, generator=generator)
    area = (ERASED_SHARE[0] + share * (ERASED_SHARE[1] - ERASED_SHARE[0])) * sides.prod()
    low, high = map(math.log, ERASED_RATIO)
    ratio = (low + ratio * (high - low)).exp()
    size = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), 1).round().long().minimum(sides)  # [n, 2]
    corner = (torch.stack(corner, 1) * (sides - size + 1)).long()  # [n, 2]
    return torch.cat((corner, size), 1) * (chance < probability)[:, None]


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set the boxes [b, 4] of normalized images float [b, C, h, w] to 0, their mean."""
    height, width = images.shape[-2:]
    row = torch.arange(height, device=images.device)[:, None]  # [h, 1]
    column = torch.arange(width, device=images.device)  # [w]
    top, left, rows, columns = hardware.to_device(boxes, images.device).T[..., None, None, None]  # each [b, 1, 1, 1]
    inside = (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns)  # [b, 1, h, w]
    return torch.where(inside, 0, images)
