"""torch's Muon, with all matrices of one shape orthogonalized together."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch.optim.Muon with few launches: the same state, and the same numbers up to rounding.

    torch's takes one matrix after the other, 15 small products for each: 720 for the 48 matrices of
    a ViT-B. These have four shapes, so 60 batched products do.

    The update is scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM
    training", section 2.2), so that both can share one learning rate and weight decay.
    """

    def __init__(self, parameters: list[Tensor] | list[dict], lr: float, weight_decay: float):
        super().__init__(
            parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            parameters, grads, momenta = [], [], []
            self._init_group(group, parameters, grads, momenta)
            if parameters:
                update(parameters, grads, momenta, group)
        return loss


def update(
    parameters: list[Tensor], grads: list[Tensor], momenta: list[Tensor], group: dict
) -> None:
    """One step of all matrices of a parameter group, with Nesterov's momentum."""
    torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
    directions = torch._foreach_lerp(grads, momenta, group["momentum"])
    torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])

    by_shape = defaultdict(list)
    for parameter, direction in zip(parameters, directions, strict=True):
        by_shape[parameter.shape].append((parameter, direction))

    for shape, pairs in by_shape.items():
        own, stacked = zip(*pairs, strict=True)
        rows, columns = shape
        x = torch.stack(stacked).bfloat16()  # [n, rows, columns]
        x = x.mT if rows > columns else x
        x = orthogonalize(x, group["ns_coefficients"], group["ns_steps"], group["eps"])
        x = x.mT if rows > columns else x

        x = x.to(own[0].dtype).contiguous()  # as the parameters are, for one launch
        lr = group["lr"] * 0.2 * math.sqrt(max(shape))
        torch._foreach_add_(own, x.unbind(), alpha=-lr)


def orthogonalize(
    x: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> Tensor:
    """Roughly the nearest matrices with orthonormal rows; x is [n, rows, columns], rows <= columns.

    The quintic Newton-Schulz iteration of Jordan et al. 2024, "Muon".
    """
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.mT  # [n, rows, rows]
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
