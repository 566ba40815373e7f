"""Optimizers, their learning rate schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.muon import Muon
from training.settings import OptimizationSettings

OPTIMIZERS = ("adamw", "muon")
# Beside these, vectors (norms and biases) do not decay.
NOT_DECAYED = ("cls_token", "reg_token", "pos_embed")


def is_decayed(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and name not in NOT_DECAYED


def build_optimizers(
    model: nn.Module, settings: OptimizationSettings
) -> list[torch.optim.Optimizer]:
    """AdamW, with weight decay on matrices only; with "muon", Muon for the matrices of the blocks.

    AdamW is that of Loshchilov & Hutter (2019, "Decoupled Weight Decay Regularization"). Muon
    (Jordan et al. 2024) orthogonalizes the update of a matrix. Both share one learning rate and
    weight decay.

    Frozen parameters are left out. With `layer_decay`, layers farther from the head have smaller
    learning rates, see `layer_of`; the first group of the first optimizer has that of the head.
    """
    parameters = {  # in a fixed order: states are saved by position
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    by_muon = {}
    if settings.optimizer == "muon":
        by_muon = {
            name: parameter
            for name, parameter in parameters.items()
            if name.startswith("blocks.") and parameter.ndim == 2
        }

    rest = {name: p for name, p in parameters.items() if name not in by_muon}
    decayed = {name: p for name, p in rest.items() if is_decayed(name, p)}
    others = {name: p for name, p in rest.items() if not is_decayed(name, p)}
    depth = len(model.blocks)
    groups = [
        *groups_by_layer(decayed, depth, settings, settings.weight_decay),
        *groups_by_layer(others, depth, settings, 0.0),
    ]
    optimizers = [torch.optim.AdamW(groups, lr=settings.lr, fused=True)]

    if by_muon:
        groups = groups_by_layer(by_muon, depth, settings, settings.weight_decay)
        optimizers.append(Muon(groups, settings.lr, settings.weight_decay))
    return optimizers


def groups_by_layer(
    parameters: dict[str, Tensor], depth: int, settings: OptimizationSettings, weight_decay: float
) -> list[dict]:
    """Parameter groups, those of the last layers first; a single one without layer decay.

    A group's learning rate is that of the head times `layer_decay` to the power of its distance
    (Clark et al. 2020, ELECTRA, section 3.1; for ViTs Bao et al. 2022, BEiT, appendix).
    """
    by_distance = {}
    for name, parameter in parameters.items():
        distance = depth + 1 - layer_of(name, depth) if settings.layer_decay < 1 else 0
        by_distance.setdefault(distance, []).append(parameter)

    return [
        {
            "params": group,
            "lr": settings.lr * settings.layer_decay**distance,
            "weight_decay": weight_decay,
        }
        for distance, group in sorted(by_distance.items(), key=lambda item: item[0])
    ]


def layer_of(name: str, depth: int) -> int:
    """Embeddings and tokens are layer 0, the blocks 1 to `depth`, norm and head `depth` + 1."""
    if name.startswith("blocks."):
        return 1 + int(name.split(".")[1])
    return depth + 1 if name.startswith(("norm.", "head.")) else 0


FIRST_STEPS = 10
LOWEST_WARMUP = 0.01  # so that the first step, at time 0, does something


def lr_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Linear warmup (Goyal et al. 2017), then cosine to zero (SGDR, Loshchilov & Hutter 2017)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return falling_cosine(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))


def lr_factor_by_clock(share_done: float, warmup_fraction: float, step: int) -> float:
    """The same where it is time that passes: after `share_done` of the training, in [0, 1].

    If there is a warmup, it takes FIRST_STEPS steps at least: the first one may compile for longer
    than the warmup lasts.
    """
    highest = min(1.0, (step + 1) / FIRST_STEPS) if warmup_fraction else 1.0
    if share_done < warmup_fraction:
        return min(highest, max(share_done / warmup_fraction, LOWEST_WARMUP))
    angle = math.pi * (share_done - warmup_fraction) / (1 - warmup_fraction)
    return min(highest, falling_cosine(angle))


def falling_cosine(angle: float) -> float:
    """From 1 at 0 to 0 at pi."""
    return 0.5 * (1 + math.cos(angle))


def build_schedulers(
    optimizers: list[torch.optim.Optimizer], factor: Callable[[int], float]
) -> list[LambdaLR]:
    """`factor`: steps that are done -> learning rate of the next step, as a share of its peak."""
    return [LambdaLR(optimizer, factor) for optimizer in optimizers]


class WeightAverage:
    """Exponential moving average of a model's weights, kept in a copy of the model.

    average = decay * average + (1 - decay) * new    (Polyak & Juditsky 1992)

    In the first steps the decay is smaller, (1 + step) / (10 + step) as in TensorFlow, so that the
    random start is soon forgotten. The arithmetic is torch's, but not its AveragedModel, which
    copies a counter to the device in every step and waits for it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.pairs = [list(self.model.parameters()), list(model.parameters())]

    def update(self, step: int) -> None:
        """Call after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(*self.pairs, None)
