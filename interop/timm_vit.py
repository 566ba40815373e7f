"""timm's VisionTransformer and Eva (also DINOv3 and other models with rotary positions).

Their attention computes q, k and v in several ways, with norms, rotary positions and gates. All of
them call SDPA in the end, and only that call is replaced: whatever else they do stays theirs.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models import Eva, VisionTransformer
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attention import CompiledMask
from interop import parts
from interop.parts import Parts


class SDPAReplaced(TorchFunctionMode):
    """A context in which calls of SDPA run under a compiled mask."""

    def __init__(self, compiled: CompiledMask):
        super().__init__()
        self.compiled = compiled

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return parts.attend(self.compiled, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class Local:
    """Comes before a class of timm, and has a `compiled_mask`."""

    def forward(self, *args, **kwargs) -> Tensor:
        with SDPAReplaced(self.compiled_mask):
            return super().forward(*args, **kwargs)


class LocalAttention(Local, Attention):
    pass


class LocalAttentionRope(Local, AttentionRope):
    pass


class LocalEvaAttention(Local, EvaAttention):
    pass


LOCAL = {
    Attention: LocalAttention,
    AttentionRope: LocalAttentionRope,
    EvaAttention: LocalEvaAttention,
}
ORIGINAL = {local: original for original, local in LOCAL.items()}


def find_parts(model: nn.Module) -> Parts:
    """Raises ValueError for another kind of model, or for blocks with another kind of attention."""
    if not isinstance(model, (VisionTransformer, Eva)):
        raise ValueError(
            f"of timm's models, localize knows VisionTransformer and Eva, not "
            f"{type(model).__name__}"
        )

    attentions = []
    for number, block in enumerate(model.blocks):
        found = [module for module in block.modules() if type(module) in {**LOCAL, **ORIGINAL}]
        if not found:
            names = ", ".join(original.__name__ for original in LOCAL)
            raise ValueError(
                f"block {number}, a {type(block).__name__}, has none of the attention layers that "
                f"localize knows ({names})"
            )
        attentions += found

    return Parts(
        grid=tuple(model.patch_embed.grid_size),
        num_global_tokens=model.num_prefix_tokens,
        projection=model.patch_embed.proj,
        attentions=attentions,
    )


def install(module: nn.Module, compiled: CompiledMask) -> None:
    # Another class instead of another module, so that the names in the state dict stay the same.
    module.__class__ = LOCAL[type(module)]
    module.compiled_mask = compiled
    module.fused_attn = True  # call SDPA, and no formulas that write it out


def remove(module: nn.Module) -> None:
    module.__class__ = ORIGINAL[type(module)]
    del module.compiled_mask
