"""The compiled masks of a model's layers: each different mask is compiled once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from attention.backends import Choice
from attention.compiled_mask import CompiledMask, compile_mask, count_pairs


class LayerMasks(nn.Module):
    """One compiled mask per layer; layers with equal masks share one.

    `masks` has one bool [N, N] or None (full attention) per layer. Iterating gives the compiled
    mask of each layer in turn. Raises ValueError like `compile_mask`.
    """

    def __init__(
        self, masks: Sequence[Tensor | None], num_global_tokens: int = 0, backend: str = "auto"
    ):
        super().__init__()
        self.num_global_tokens = num_global_tokens  # G

        different: list[Tensor | None] = []
        numbers = []
        for mask in masks:
            alike = [number for number, other in enumerate(different) if are_equal(mask, other)]
            if not alike:
                alike = [len(different)]
                different.append(mask)
            numbers.append(alike[0])

        self.different = nn.ModuleList(
            compile_mask(mask, num_global_tokens, backend) for mask in different
        )
        self.number_of = tuple(numbers)  # layer -> its place in `different`

    def __len__(self) -> int:
        return len(self.number_of)

    def __getitem__(self, layer: int) -> CompiledMask:
        return self.different[self.number_of[layer]]

    def __iter__(self) -> Iterator[CompiledMask]:
        return (self[layer] for layer in range(len(self)))

    def check(self, num_tokens: int, device: torch.device) -> None:
        """Before a forward, see `CompiledMask.check`."""
        for compiled in self.different:
            compiled.check(num_tokens, device)

    def check_device(self, device: torch.device) -> None:
        for compiled in self.different:
            compiled.check_device(device)

    def settle(self, device: torch.device) -> None:
        for compiled in self.different:
            compiled.settle(device)

    @property
    def choices(self) -> list[Choice]:
        """The backend of each different mask."""
        return [compiled.choice for compiled in self.different]

    def apply_choices(self, choices: Sequence[Choice]) -> None:
        for compiled, choice in zip(self.different, choices, strict=True):
            compiled.apply_choice(choice)

    @property
    def backend(self) -> str:
        """The backends of all layers in words."""
        return " and ".join(dict.fromkeys(compiled.backend for compiled in self))

    def num_layers_with(self, compiled: CompiledMask) -> int:
        return sum(other is compiled for other in self)

    def count_pairs(self, num_patches: int) -> int:
        """How many (query, key) pairs of tokens are allowed, summed over the layers."""
        num_global = self.num_global_tokens
        return sum(count_pairs(compiled.mask, num_patches, num_global) for compiled in self)

    def mean_neighbors(self, num_patches: int) -> float:
        """Patches that a patch attends to, itself included, mean over patches and layers."""
        num_pairs = sum(count_pairs(compiled.mask, num_patches, 0) for compiled in self)
        return num_pairs / (num_patches * len(self))


def are_equal(mask: Tensor | None, other: Tensor | None) -> bool:
    if mask is None or other is None:
        return mask is other
    return mask is other or (mask.shape == other.shape and torch.equal(mask.cpu(), other.cpu()))
