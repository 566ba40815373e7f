"""Holding out a part of the training images, to evaluate on these instead of the test images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from utils import UsageError

SEED = 0  # of the split; never that of a training, since all runs of a sweep share one split


def split(labels: Tensor, class_names: list[str], fraction: float) -> tuple[Tensor, Tensor]:
    """(indices to train on, indices held out), int64, each in ascending order.

    `labels` are int64 [n]. Of each class, `fraction` of its images are held out, rounded to a whole
    number and at least one. Which ones depends on the labels and the fraction alone. Raises
    UsageError if a class would have no image left to train on.
    """
    # The stream of RandomState is frozen (NumPy's NEP 19), so a run that is resumed with another
    # version of NumPy still has the same split.
    random = np.random.RandomState(SEED)
    labels = labels.cpu().numpy()
    is_held_out = np.zeros(len(labels), dtype=bool)

    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        if len(members) == 0:
            continue

        number = max(1, round(fraction * len(members)))
        if number == len(members):
            raise UsageError(
                f"--holdout {fraction:g} would hold out every training image of class {name!r}, "
                f"which has {len(members)}; use a lower fraction, or add images to that class"
            )
        is_held_out[random.permutation(members)[:number]] = True

    held_out = torch.from_numpy(is_held_out)
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
