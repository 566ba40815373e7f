"""How far attention is from the same in float64, outputs and gradients.

Shapes: B batch, T tokens, H heads, D head dim; b and h are those of them that are compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUM_CHECKED_ROWS = 32


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
