"""What is kept of the attention probabilities while a model runs; see `watch_attention`.

Legend for shapes:
    B batch, N patches on a grid of gh x gw, G global tokens (class token, registers),
    T = G + N tokens, n images, L layers, H heads
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from analysis import attention_maps, measures
from analysis.measures import RunningMean
from attention import CompiledMask
from models import VisionTransformer


class AttentionMeasures:
    """Means over images; `see` takes the probabilities of each layer, one batch after another."""

    def __init__(self, model: VisionTransformer, patch_token: int):
        device = model.pos_embed.device
        depth, num_tokens = model.config["depth"], model.pos_embed.shape[1]
        self.grid, self.depth = model.grid, depth
        self.num_global = model.num_global_tokens
        self.has_class_token = model.cls_token is not None
        self.patch_token = patch_token

        distances = measures.patch_distances(model.grid, model.config["patch_size"])
        self.distances = distances.to(device)  # [N, N]
        layer_masks = model.layer_masks
        of_masks = [measures.mask_distances(m.mask, distances) for m in layer_masks.different]
        # Under uniform attention and at most, [L] each.
        self.uniform, self.ceiling = zip(
            *(of_masks[number] for number in layer_masks.number_of), strict=True
        )
        num_keys = [num_keys_of(model, m, num_tokens, device) for m in layer_masks.different]
        self.num_keys = [num_keys[number] for number in layer_masks.number_of]  # L of [T]

        self.distance, self.entropy = RunningMean(depth), RunningMean(depth)
        self.class_token_share, self.class_token_entropy = RunningMean(depth), RunningMean(depth)
        self.rollout, self.rollout_of_patch = RunningMean(1), RunningMean(1)
        self.mixed: Tensor | None = None  # rollout of the batch so far, [B, T, T]

    def see(self, layer: int, probabilities: Tensor) -> None:
        first = self.num_global
        self.distance.add(layer, measures.attention_distance(probabilities, self.distances))
        of_patches = probabilities[:, :, first:]  # [B, H, N, T]
        num_keys = self.num_keys[layer]
        entropy = measures.normalized_entropy(of_patches, num_keys[first:])
        self.entropy.add(layer, entropy)

        if self.has_class_token:
            self.class_token_share.add(layer, of_patches[..., 0].mean(-1))
            of_class_token = probabilities[:, :, :1]
            entropy = measures.normalized_entropy(of_class_token, num_keys[:1])
            self.class_token_entropy.add(layer, entropy)

        self.mixed = measures.rollout_step(self.mixed if layer else None, probabilities)
        if layer == self.depth - 1:
            self.rollout.add(0, rollout_of_output(self.mixed, first, self.has_class_token))
            self.rollout_of_patch.add(0, self.mixed[:, self.patch_token, first:])

    def numbers(self) -> dict:
        """For JSON, with lists [L][H]; distances are in pixels."""
        has_class_token = self.has_class_token
        return {
            "distance": self.distance.to_list(),
            "distance_uniform": sum(self.uniform) / self.depth,
            "distance_ceiling": sum(self.ceiling) / self.depth,
            "distance_uniform_by_layer": list(self.uniform),
            "distance_ceiling_by_layer": list(self.ceiling),
            "entropy": self.entropy.to_list(),
            "class_token_share": self.class_token_share.to_list() if has_class_token else None,
            "class_token_entropy": self.class_token_entropy.to_list() if has_class_token else None,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """`rollout` of what the model classifies from and `rollout_patch`, both [gh, gw]."""
        means = {"rollout": self.rollout, "rollout_patch": self.rollout_of_patch}
        return {
            name: mean.of_layer(0).unflatten(0, self.grid).float().numpy()
            for name, mean in means.items()
        }


def num_keys_of(
    model: VisionTransformer, compiled: CompiledMask, num_tokens: int, device: torch.device
) -> Tensor:
    """How many tokens each token may attend to, int64 [T]."""
    allowed = attention_maps.allowed_tokens(model, compiled)
    if allowed is None:
        return torch.full((num_tokens,), num_tokens, device=device)
    return allowed.sum(1)


def rollout_of_output(mixed: Tensor, num_global: int, has_class_token: bool) -> Tensor:
    """How much of each patch is in what the model classifies from: [B, T, T] -> [B, N].

    That is the class token or, without one, the mean of the patches.
    """
    of_patches = mixed[:, :, num_global:]  # [B, T, N]
    return of_patches[:, 0] if has_class_token else of_patches[:, num_global:].mean(1)


class MapsOfImages:
    """Attention of one query token in every layer and head, and the rollout, image by image."""

    def __init__(self, model: VisionTransformer, query: int):
        self.grid, self.depth = model.grid, model.config["depth"]
        self.num_global = model.num_global_tokens
        self.has_class_token = model.cls_token is not None
        self.query = query
        self.mixed: Tensor | None = None  # rollout of the batch so far, [B, T, T]
        self.maps: list[list[Tensor]] = []  # [batches][L], each [B, H, gh, gw]
        self.rollouts: list[Tensor] = []  # [batches], each [B, gh, gw]

    def see(self, layer: int, probabilities: Tensor) -> None:
        if layer == 0:
            self.maps.append([])
        row = probabilities[:, :, self.query, self.num_global :]  # [B, H, N]
        self.maps[-1].append(row.unflatten(-1, self.grid).cpu())

        self.mixed = measures.rollout_step(self.mixed if layer else None, probabilities)
        if layer == self.depth - 1:
            rollout = rollout_of_output(self.mixed, self.num_global, self.has_class_token)
            self.rollouts.append(rollout.unflatten(-1, self.grid).cpu())

    def arrays(self) -> dict[str, np.ndarray]:
        """`maps` [n, L, H, gh, gw] and `rollout_images` [n, gh, gw]."""
        maps = torch.cat([torch.stack(layers, 1) for layers in self.maps])  # [n, L, H, gh, gw]
        return {
            "maps": maps.numpy().astype(np.float16),
            "rollout_images": torch.cat(self.rollouts).numpy(),
        }
