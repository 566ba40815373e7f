"""Optimizers, their schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

OPTIMIZERS = ("adamw", "muon")
NOT_DECAYED = ("cls_token", "pos_embed")  # and all vectors: norms and biases


def is_decayed(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and name not in NOT_DECAYED


def build_optimizers(model: nn.Module, settings: dict) -> list[torch.optim.Optimizer]:
    """AdamW with weight decay on the weight matrices only; with "muon", the matrices of the blocks go to Muon.

    Muon (Jordan et al. 2024) orthogonalizes the update of a matrix; torch's is scaled to have AdamW's size (Liu et al.
    2025, "Muon is scalable for LLM training", section 2.2), so that both share one learning rate and weight decay.
    """
    lr, weight_decay = settings["lr"], settings["weight_decay"]
    parameters = dict(model.named_parameters())
    by_muon = {}  # in the model's order, as everything here: states are saved by position
    if settings["optimizer"] == "muon":
        by_muon = {name: p for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2}
    rest = {name: p for name, p in parameters.items() if name not in by_muon}
    groups = [
        {"params": [p for name, p in rest.items() if is_decayed(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in rest.items() if not is_decayed(name, p)], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=lr, fused=True)]
    if by_muon:
        matrices = list(by_muon.values())
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def lr_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Linear warmup, then cosine to zero (Loshchilov & Hutter 2017)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def build_schedulers(optimizers: list, settings: dict, total_steps: int) -> list[LambdaLR]:
    warmup_steps = round(settings["warmup_fraction"] * total_steps)
    return [LambdaLR(optimizer, lambda step: lr_factor(step, total_steps, warmup_steps)) for optimizer in optimizers]


class WeightAverage:
    """Exponential moving average of a model's weights, in a copy of it: average = decay * average + (1 - decay) * new.

    In the first steps the decay is smaller, (1 + step) / (10 + step), so that the random start is soon forgotten.
    The arithmetic is torch's; its AveragedModel copies a counter to the device in every step, and waits for it there.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.pairs = [list(self.model.parameters()), list(model.parameters())]

    def update(self, step: int) -> None:
        """After optimizer step number `step`, counted from 1."""
        get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(*self.pairs, None)
