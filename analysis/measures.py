"""Numbers about attention: how far it looks, how spread out it is, what it adds up to.

Legend for shapes:
    B batch, N patches, G global tokens (class token, registers), T = G + N tokens, H heads
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Distance


def patch_distances(grid: tuple[int, int], patch_size: int) -> Tensor:
    """Distances between the centers of patches in pixels, fp32 [N, N]."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    centers = patch_size * torch.stack([rows, columns], -1).flatten(0, 1).float()  # [N, 2]
    # A matrix product, as for larger grids by default, would round.
    return torch.cdist(centers, centers, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(probabilities: Tensor, distances: Tensor) -> Tensor:
    """Mean attention distance of each image and head, [B, H], in the unit of `distances` [N, N].

    The distance between query and key patch, weighted by attention, then averaged over the query
    patches (Dosovitskiy et al. 2021, figure 7 and appendix D.7). Probabilities are [B, H, T, T].
    Global tokens have no place, so they are left out, and what patches pay to each other is
    normalized to 1. A query that gives everything to global tokens does not count; NaN if none does
    not.
    """
    num_global = probabilities.shape[-1] - len(distances)
    among_patches = probabilities[:, :, num_global:, num_global:]  # [B, H, N, N]
    given = among_patches.sum(-1)  # [B, H, N]
    weighted = (among_patches * distances).sum(-1)
    return (weighted / given).nanmean(-1)  # 0 / 0 where nothing is given to patches


def mask_distances(mask: Tensor | None, distances: Tensor) -> tuple[float, float]:
    """(mean distance under uniform attention, ceiling), of a mask [N, N] or None for full.

    The ceiling is the largest distance that the mask allows to a query, averaged over the queries:
    no attention among patches can have a larger mean distance.
    """
    if mask is None:
        mask = torch.ones_like(distances, dtype=torch.bool)
    reach = torch.where(mask, distances, 0.0).double()  # [N, N]
    uniform = reach.sum(1) / mask.sum(1)
    return uniform.mean().item(), reach.amax(1).mean().item()


# --------------------------------------------------------------------------------------------------
# Entropy


def normalized_entropy(probabilities: Tensor, num_keys: Tensor) -> Tensor:
    """Entropy over the log of the number of keys, averaged over the queries; [B, H], from 0 to 1.

    1 is uniform attention over all keys that a query may attend to, 0 is attention to one key.
    Probabilities are [B, H, queries, T], `num_keys` [queries]. A query with one key has no choice
    and is left out; NaN if that leaves none.
    """
    has_choice = num_keys > 1
    entropy = torch.special.entr(probabilities[:, :, has_choice]).sum(-1)  # [B, H, queries]
    return (entropy / num_keys[has_choice].log()).mean(-1)


# --------------------------------------------------------------------------------------------------
# Rollout


def rollout_step(before: Tensor | None, probabilities: Tensor) -> Tensor:
    """Attention rollout up to this layer, [B, T, T], from that up to the layer before (or None).

    Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 4: the mean over
    heads plus the identity, for the residual connection, with rows normalized to 1, multiplied over
    the layers. Row i says how much of each input token is in token i.
    """
    attention = probabilities.mean(1)  # [B, T, T]
    identity = torch.eye(attention.shape[-1], device=attention.device)
    step = attention + identity
    step = step / step.sum(-1, keepdim=True)
    return step if before is None else step @ before


# --------------------------------------------------------------------------------------------------
# Means over images


class RunningMean:
    """The mean over images of a vector per layer, summed in float64; NaN counts as missing."""

    def __init__(self, num_layers: int):
        self.sums: list[Tensor | float] = [0.0] * num_layers
        self.counts: list[Tensor | float] = [0] * num_layers

    def add(self, layer: int, values: Tensor) -> None:
        """Values [B, ...] of B images."""
        values = values.cpu().double()
        self.sums[layer] = self.sums[layer] + values.nansum(0)
        self.counts[layer] = self.counts[layer] + (~values.isnan()).sum(0)

    def of_layer(self, layer: int) -> Tensor:
        """float64 [...]; NaN where no image had a value."""
        return self.sums[layer] / self.counts[layer]

    def to_list(self) -> list[list[float | None]]:
        """[layers][...]; None where no image had a value."""
        means = [self.of_layer(layer).tolist() for layer in range(len(self.sums))]
        return [[None if math.isnan(value) else value for value in mean] for mean in means]
