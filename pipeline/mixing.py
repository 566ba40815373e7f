"""MixUp and CutMix of whole batches, by torchvision; every draw is a pure function of a seed.

Each image is mixed with the one before it in the epoch's shuffled order, the first of a batch with its last.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("mixup", "cutmix")


def draw_kinds(share: float, alphas: dict[str, float], num_steps: int, generator: torch.Generator) -> list[str | None]:
    """For each batch "mixup", "cutmix" or None: `share` of them are mixed, equally often by each kind of alpha > 0."""
    kinds = [kind for kind in KINDS if alphas[kind] > 0]
    draws = torch.rand(num_steps, generator=generator).tolist()
    return [kinds[int(u / share * len(kinds))] if kinds and u < share else None for u in draws]


def mix(kind: str, alpha: float, images: Tensor, labels: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mix each of the images [b + 1, C, h, w] but the first with the one before it -> [b, C, h, w], [b, classes].

    MixUp: Zhang et al. 2018; CutMix: Yun et al. 2019. One weight or box for the batch, from `alpha` and `seed`.
    """
    from torchvision.transforms.v2 import CutMix, MixUp  # deferred: takes seconds to import

    transform = {"mixup": MixUp, "cutmix": CutMix}[kind](alpha=alpha, num_classes=num_classes)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's generator; what others draw stays
        torch.default_generator.manual_seed(seed)
        images, labels = transform(images, labels)
    return images[1:], labels[1:]
