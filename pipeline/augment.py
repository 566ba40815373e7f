"""Augmentation of uint8 batches on any device: TrivialAugment, RandAugment and random erasing.

Each image of a batch gets its own operation and magnitude. The operations, ranges and conventions
are those of torchvision.transforms.v2, which handles one image at a time.

- TrivialAugment Wide: Müller & Hutter 2021, "TrivialAugment", section 3.
- RandAugment: Cubuk et al. 2020, "RandAugment", section 3.
- Random erasing: Zhong et al. 2020, "Random Erasing Data Augmentation", algorithm 1.

All draws are made on the CPU, and the images are grouped by operation there, so that nothing waits
for the device.

Shapes: n images in the epoch, b in the batch, m with the same operation, C channels (1 or 3),
H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import hardware

NUM_ROUNDS = {"none": 0, "trivial": 1, "rand": 2}  # operations applied to each image, in sequence
POLICIES = tuple(NUM_ROUNDS)
NUM_LEVELS = 31
RAND_LEVEL = 9  # RandAugment uses this level for every operation; TrivialAugment draws one

AFFINE_OPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLEND_OPS = ("brightness", "color", "contrast", "sharpness")
OTHER_OPS = ("posterize", "solarize", "autocontrast", "equalize", "identity")
OPS = AFFINE_OPS + BLEND_OPS + OTHER_OPS  # drawn uniformly
NUM_SIGNED = len(AFFINE_OPS + BLEND_OPS)  # the first ones; half of their magnitudes are negative


@dataclass(frozen=True)
class Draws:
    """What happens to each image, on the CPU."""

    ops: Tensor  # int64 [rounds, n], indices into OPS
    magnitudes: Tensor  # float32 [rounds, n], signed, in the units of `magnitude_table`

    def at(self, positions: Tensor | slice) -> Draws:
        """The draws of some of the images: int64 [b] on the CPU, or a slice."""
        return Draws(self.ops[:, positions], self.magnitudes[:, positions])


def magnitude_table(policy: str, image_size: tuple[int, int]) -> Tensor:
    """float32 [ops, levels]: the unsigned magnitude of each of OPS at each level; 0 if it has none.

    Units: slopes for shears, whole pixels for translations, degrees counterclockwise for rotations,
    the factor minus 1 for blends, the number of bits kept for posterize, and for solarize the gray
    level from which pixels are inverted.
    """
    height, width = image_size
    if policy == "trivial":
        shear, degrees, blend, dropped_bits = 0.99, 135.0, 0.99, 6
        move_x, move_y = 32.0, 32.0
    else:
        shear, degrees, blend, dropped_bits = 0.3, 30.0, 0.9, 4
        move_x, move_y = 150 / 331 * width, 150 / 331 * height

    largest = dict(zip(AFFINE_OPS, (shear, shear, move_x, move_y, degrees), strict=True))
    largest |= dict.fromkeys(BLEND_OPS, blend)
    table = {op: torch.linspace(0, largest.get(op, 0), NUM_LEVELS) for op in OPS}

    for op in ("translate_x", "translate_y"):
        table[op].trunc_()
    levels_per_bit = (NUM_LEVELS - 1) / dropped_bits
    table["posterize"] = (8 - torch.arange(NUM_LEVELS) / levels_per_bit).round()
    table["solarize"] = 255 * torch.linspace(1, 0, NUM_LEVELS)
    return torch.stack([table[op] for op in OPS])


def draw_policy(
    policy: str, num_images: int, image_size: tuple[int, int], generator: torch.Generator
) -> Draws:
    """Operations and magnitudes for images of (H, W) = `image_size`; "none" draws nothing."""
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")

    shape = (NUM_ROUNDS[policy], num_images)
    ops = torch.randint(len(OPS), shape, generator=generator)
    coin = torch.randint(2, shape, generator=generator).bool()
    negative = coin & (ops < NUM_SIGNED)

    levels = torch.full(shape, RAND_LEVEL)
    if policy == "trivial":
        levels = torch.randint(NUM_LEVELS, shape, generator=generator)

    magnitudes = magnitude_table(policy, image_size)[ops, levels]
    return Draws(ops, torch.where(negative, -magnitudes, magnitudes))


def apply_policy(images: Tensor, draws: Draws) -> Tensor:
    """Augment uint8 images [b, C, H, W] by the draws of these b images."""
    for ops, magnitudes in zip(draws.ops, draws.magnitudes, strict=True):
        images = _apply_round(images, ops, magnitudes)
    return images


def _apply_round(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """Sort the images by operation, change each operation's slice in place, and undo the sorting.

    The affine operations, which come first in OPS, share one slice: they are all matrices.
    """
    order = ops.argsort(stable=True)
    counts = torch.bincount(ops, minlength=len(OPS)).tolist()
    num_affine = sum(counts[: len(AFFINE_OPS)])
    sizes = [num_affine, *counts[len(AFFINE_OPS) :]]

    affine = order[:num_affine]
    matrices = affine_matrices(ops[affine], magnitudes[affine], images.shape[-2:])  # [m, 2, 3]

    there, back = hardware.to_device(torch.stack((order, order.argsort())), images.device)
    magnitudes = hardware.to_device(magnitudes[order], images.device)[:, None, None, None]
    magnitudes = magnitudes.split(sizes)  # each [m, 1, 1, 1]
    images = images.index_select(0, there)  # images[there] would copy one byte at a time
    parts = images.split(sizes)  # each uint8 [m, C, H, W], a view

    if num_affine:
        parts[0].copy_(warp(parts[0], hardware.to_device(matrices, images.device)))
    names = OPS[len(AFFINE_OPS) :]
    for op, part, values in zip(names, parts[1:], magnitudes[1:], strict=True):
        if op != "identity" and len(part):
            part.copy_(OP_FNS[op](part, values))
    return images.index_select(0, back)


# --------------------------------------------------------------------------------------------------
# Operations: uint8 [m, C, H, W], magnitudes float32 [m, 1, 1, 1] -> [m, C, H, W], uint8 or float
# in [0, 256)


def affine_matrices(ops: Tensor, magnitudes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """float32 [m, 2, 3]: maps a pixel's (column, row, 1) to the (column, row) it is taken from.

    Images rotate about their center and are sheared about their upper left corner, as in
    AutoAugment. `ops` are indices into AFFINE_OPS.
    """
    height, width = image_size
    center_y, center_x = (height - 1) / 2, (width - 1) / 2

    # Each parameter, [m], is 0 where the image has another operation.
    parameters = [magnitudes.double() * (ops == op) for op in range(len(AFFINE_OPS))]
    shear_x, shear_y, move_x, move_y, degrees = parameters
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()

    # The center of pixel 0 is half a pixel inside the image, hence half a shear.
    start_x = center_x - center_x * cos + center_y * sin + shear_x / 2 - move_x
    start_y = center_y - center_x * sin - center_y * cos + shear_y / 2 - move_y

    row_x = torch.stack((cos, shear_x - sin, start_x), -1)
    row_y = torch.stack((shear_y + sin, cos, start_y), -1)
    return torch.stack((row_x, row_y), 1).float()


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Take each pixel from the one nearest to where its image's matrix [2, 3] points.

    Pixels from outside the image are black.
    """
    height, width = images.shape[-2:]
    column = torch.arange(width, device=images.device)  # [W]
    row = torch.arange(height, device=images.device)[:, None]  # [H, 1]

    a, b, c, d, e, f = matrices.flatten(1).T[..., None, None]  # each [m, 1, 1]
    x = (a * column + (b * row + c)).round_()  # [m, H, W]
    y = (d * column + (e * row + f)).round_()
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)

    pixels = F.pad(images.flatten(2), (0, 1))  # [m, C, H * W + 1], the last one black
    source = torch.where(inside, y * width + x, height * width).long()
    source = source.flatten(1)[:, None].expand(-1, images.shape[1], -1)  # [m, C, H * W]
    return pixels.gather(2, source).view_as(images)


def _blend(images: Tensor, others: Tensor, magnitudes: Tensor) -> Tensor:
    """Move float images away from others if the magnitude is positive, toward them if negative.

    Here and below, no multiply-add may be fused: some devices would fuse it and others not, and the
    gray levels would differ.
    """
    return (images - others).mul_(magnitudes).add_(images).clamp_(0, 255)


def _gray(images: Tensor) -> Tensor:
    """Luminance of float images, rounded down to whole gray levels, [m, 1, H, W]."""
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
    mean_gray = _gray(images).mean((1, 2, 3), keepdim=True)
    return _blend(images, mean_gray, magnitudes)


def sharpness(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend with a 3x3 blur of weights 1/13, 5/13 at the center; pixels at the border stay."""
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
    low = images.amin((2, 3), keepdim=True)
    high = images.amax((2, 3), keepdim=True)
    stretched = ((images - low) / ((high - low) * (1 / 255))).clamp_(max=255)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Flatten each channel's histogram, with the same integer steps as PIL.ImageOps.equalize."""
    values = images.flatten(2).long()  # [m, C, H * W]
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(counts[..., :1]).expand_as(values))

    brightest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255  # [m, C, 1]
    darker = counts.cumsum(2) - counts  # number of darker pixels, [m, C, 256]
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)

    # Like PIL, leave a channel alone if it has too few pixels for a step.
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.to(torch.uint8).gather(2, values).view_as(images)


OP_FNS = {
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
}


# --------------------------------------------------------------------------------------------------
# Random erasing

ERASED_SHARE = (0.02, 0.33)  # of the image's area, uniform
ERASED_RATIO = (0.3, 3.3)  # height / width, log-uniform


def draw_erasing(
    probability: float, num_images: int, image_size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Boxes to erase in images of (h, w): int64 [n, 4] as (top, left, height, width).

    An image that is left alone gets a box of size 0. A side longer than the image's is cut to it,
    where the paper draws again.
    """
    sides = torch.tensor(image_size)
    draws = torch.rand(5, num_images, dtype=torch.float64, generator=generator)
    chance, share, ratio, top, left = draws

    share = ERASED_SHARE[0] + share * (ERASED_SHARE[1] - ERASED_SHARE[0])
    area = share * sides.prod()
    low, high = map(math.log, ERASED_RATIO)
    ratio = (low + ratio * (high - low)).exp()

    size = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), 1)
    size = size.round().long().minimum(sides)  # [n, 2]
    corner = (torch.stack((top, left), 1) * (sides - size + 1)).long()  # [n, 2]
    erased = (chance < probability)[:, None]
    return torch.cat((corner, size), 1) * erased


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set the boxes [b, 4] of normalized images float [b, C, h, w] to 0, their mean."""
    height, width = images.shape[-2:]
    row = torch.arange(height, device=images.device)[:, None]  # [h, 1]
    column = torch.arange(width, device=images.device)  # [w]

    boxes = hardware.to_device(boxes, images.device)
    top, left, rows, columns = boxes.T[..., None, None, None]  # each [b, 1, 1, 1]
    inside_rows = (row >= top) & (row < top + rows)
    inside_columns = (column >= left) & (column < left + columns)
    return torch.where(inside_rows & inside_columns, 0, images)  # mask [b, 1, h, w]
