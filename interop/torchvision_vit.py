"""torchvision's VisionTransformer, such as `vit_b_16`, whose attention is torch's own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import attention
from attention import CompiledMask
from interop import parts
from interop.parts import Parts


class LocalMultiheadAttention(nn.MultiheadAttention):
    """Self-attention of x [B, T, E] -> ([B, T, E], None), under its `compiled_mask`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        parts.refuse(attn_mask, self.dropout if self.training else 0.0, is_causal)
        # torchvision's blocks call it so.
        assert query is key is value
        assert not need_weights

        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)  # [B, T, 3 * E]
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, T, 3, H, D]
        x = attention.attend_packed(qkv, self.compiled_mask).flatten(2)  # [B, T, E]
        return self.out_proj(x), None


def find_parts(model: nn.Module) -> Parts:
    """Raises ValueError for another kind of model."""
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"of torchvision's models, localize knows VisionTransformer, not {type(model).__name__}"
        )
    side = model.image_size // model.patch_size
    return Parts(
        grid=(side, side),
        num_global_tokens=1,
        projection=model.conv_proj,
        attentions=[block.self_attention for block in model.encoder.layers],
    )


def install(module: nn.Module, compiled: CompiledMask) -> None:
    # Another class instead of another module, so that the names in the state dict stay the same.
    module.__class__ = LocalMultiheadAttention
    module.compiled_mask = compiled


def remove(module: nn.Module) -> None:
    module.__class__ = nn.MultiheadAttention
    del module.compiled_mask
