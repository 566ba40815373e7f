"""What is common to the ViTs of all libraries: their parts, and attention in place of SDPA."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

import attention
from attention import CompiledMask


@dataclass(frozen=True)
class Parts:
    """What `localize` has to know of a model."""

    grid: tuple[int, int]  # rows and columns of patches, for the model's own image size
    num_global_tokens: int  # tokens before those of the patches: class token, registers
    projection: nn.Module  # images [B, C, height, width] -> patches [B, E, rows, columns]
    attentions: list[nn.Module]  # one for each block


def attend(
    compiled: CompiledMask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, but under the compiled mask.

    q, k, v [B, H, T, D] -> [B, H, T, D]. Raises ValueError for what `refuse` names.
    """
    refuse(attn_mask, dropout_p, is_causal)
    own_scale = query.shape[-1] ** -0.5
    if scale is not None and scale != own_scale:
        query = query * (scale / own_scale)
    return attention.attend(query, key, value, compiled)


def refuse(attn_mask: Tensor | None, dropout_p: float, is_causal: bool) -> None:
    """Raise ValueError for what local attention cannot do."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "a localized model takes no further attention mask; combine it with the mask that you "
            "give to localize"
        )
    if dropout_p > 0.0:
        raise ValueError(
            f"local attention has no dropout on attention weights, but the model asks for "
            f"{dropout_p}; build it with attention dropout 0, or call its eval()"
        )
