"""MixUp and CutMix of whole batches with torchvision; every draw is a pure function of a seed.

Each image is mixed with the one before it in the epoch's shuffled order, and the first image of a
batch with the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("mixup", "cutmix")


def draw_kinds(
    share: float, alphas: dict[str, float], num_steps: int, generator: torch.Generator
) -> list[str | None]:
    """For each batch "mixup", "cutmix" or None.

    `share` of the batches are mixed. Kinds whose alpha is above 0 are equally likely.
    """
    draws = torch.rand(num_steps, generator=generator).tolist()
    kinds = [kind for kind in KINDS if alphas[kind] > 0]
    if not kinds:
        return [None] * num_steps
    return [kinds[int(u / share * len(kinds))] if u < share else None for u in draws]


def mix(
    kind: str, alpha: float, images: Tensor, labels: Tensor, num_classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix each image but the first with the one before it: [b + 1, C, h, w] -> [b, C, h, w].

    The labels come back as float32 [b, classes]. The whole batch shares one weight or box, drawn
    from `alpha` and `seed`. MixUp: Zhang et al. 2018; CutMix: Yun et al. 2019.
    """
    from torchvision.transforms.v2 import CutMix, MixUp  # deferred: takes seconds to import

    transform = {"mixup": MixUp, "cutmix": CutMix}[kind](alpha=alpha, num_classes=num_classes)

    # torchvision draws from the CPU's global generator, which is restored for everyone else.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        images, labels = transform(images, labels)
    return images[1:], labels[1:]
