"""From a boolean mask to attention: `compile_mask(mask) -> plan`, `attend(q, k, v, plan)`.

Shapes: B batch, N patches, G global tokens (the class token), T = G + N tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("auto", "dense")


class Plan(nn.Module):
    """How a mask is attended with. Its tensors are non-persistent buffers: they move with the model and are never saved."""

    def __init__(self, mask: Tensor | None, num_global_tokens: int, requested: str):
        super().__init__()
        self.num_global_tokens = num_global_tokens
        self.num_tokens = None if mask is None else len(mask)
        self.requested = requested
        self.backend = "dense"
        self.reason = "full attention is unmasked SDPA" if mask is None else "the dense mask in SDPA"
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("token_mask", None, persistent=False)  # [T, T]
        if mask is not None:
            self.token_mask = F.pad(mask, (num_global_tokens, 0, num_global_tokens, 0), value=True)


def compile_mask(mask: Tensor | None, num_global_tokens: int = 0, backend: str = "auto") -> Plan:
    """Prepare attention for a mask over patches: bool [N, N], or None for full attention."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    return Plan(mask, num_global_tokens, backend)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """q, k, v [B, H, T, D] -> [B, H, T, D]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.token_mask)


def attend_packed(qkv: Tensor, plan: Plan) -> Tensor:
    """qkv [B, T, 3, H, D] -> [B, T, H, D]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    return attend(q, k, v, plan).transpose(1, 2)
