"""The effective receptive field: which input pixels change a patch's final token, and how much."""

from __future__ import annotations

import torch
from torch import Tensor

from models import VisionTransformer

BYTES_OF_ACTIVATIONS = 2**30


def receptive_field(model: VisionTransformer, images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Mean absolute gradient of each image, averaged over its channels, fp32 [B, h, w].

    Of the token of `patch` (row, column) after the last block, summed over its channels, with
    respect to the normalized pixels of `images` [B, C, h, w] (Luo et al. 2016, "Understanding the
    Effective Receptive Field in Deep Convolutional Neural Networks", section 2). Before the final
    norm, since the sum of a normalized token hardly depends on anything.
    """
    tokens = []  # [B, T, E], after the last block
    handle = model.blocks[-1].register_forward_hook(lambda *args: tokens.append(args[-1]))
    images = images.detach().requires_grad_()
    try:
        with torch.enable_grad():
            model(images)
    finally:
        handle.remove()

    row, column = patch
    index = model.num_global_tokens + row * model.grid[1] + column
    # An image's token depends on no other image, so the sum has the gradient of each.
    (gradient,) = torch.autograd.grad(tokens[0][:, index].sum(), images)
    return gradient.abs().mean(1)


def images_at_once(model: VisionTransformer, limit_bytes: float = BYTES_OF_ACTIVATIONS) -> int:
    """How many images to run at a time, so that their activations roughly fit the limit."""
    c = model.config
    num_tokens = model.num_global_tokens + model.num_patches
    # Per block: about 16 values per channel of a token, and the scores of each head.
    values = num_tokens * (16 * c["embed_dim"] + c["num_heads"] * num_tokens)
    return max(1, int(limit_bytes // (4 * c["depth"] * values)))
