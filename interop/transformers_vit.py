"""ViTs of Hugging Face transformers, through its AttentionInterface.

The attention of these models looks up, by a name in their configuration, the function that gets q,
k and v. Each attention module of a localized model has a configuration with the name of ours; that
of the model stays as it is, and so does what `save_pretrained` writes.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from attention import CompiledMask
from interop import parts
from interop.parts import Parts

NAME = "local_attention"

# By the `model_type` of their configurations: ViTs whose tokens are the patches in row-major order
# after those of GLOBAL_TOKENS, and whose attention adds nothing to the scores.
MODEL_TYPES = (
    *("vit", "deit", "vit_msn", "ijepa"),
    *("dinov2", "dinov2_with_registers", "dinov3_vit"),
)
GLOBAL_TOKENS = ("cls_token", "distillation_token", "register_tokens")  # each [1, tokens, E]


def local_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_,
) -> tuple[Tensor, None]:
    """The function of the AttentionInterface: q, k, v [B, H, T, D] -> ([B, T, H, D], None)."""
    compiled = module.local.compiled_mask
    out = parts.attend(
        compiled, query, key, value, attention_mask, dropout, bool(is_causal), scaling
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, local_attention)


class Local(nn.Module):
    """What an attention module of a localized model has in addition.

    Being a class of this file, it makes a process that unpickles such a model register the function
    above.
    """

    def __init__(self, compiled: CompiledMask, config):
        super().__init__()
        self.compiled_mask = compiled
        self.config = config  # the module's own, to go back to


def find_parts(model: nn.Module) -> Parts:
    """Raises ValueError for another kind of model."""
    model_type = model.config.model_type if isinstance(model, PreTrainedModel) else None
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"of transformers' models, localize knows those of the types {', '.join(MODEL_TYPES)}, "
            f"not {model_type or type(model).__name__}"
        )

    # The model itself, or a part of it below a head.
    vit = next(module for module in model.modules() if hasattr(module, "embeddings"))
    tokens = [getattr(vit.embeddings, name, None) for name in GLOBAL_TOKENS]
    height, width = pair(vit.config.image_size)
    patch_height, patch_width = pair(vit.config.patch_size)
    return Parts(
        grid=(height // patch_height, width // patch_width),
        num_global_tokens=sum(token.shape[1] for token in tokens if token is not None),
        projection=next(m for m in vit.embeddings.modules() if isinstance(m, nn.Conv2d)),
        attentions=[module for module in vit.modules() if hasattr(module, "is_causal")],
    )


def pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def install(module: nn.Module, compiled: CompiledMask) -> None:
    module.local = Local(compiled, module.config)
    module.config = copy.copy(module.config)
    module.config._attn_implementation = NAME


def remove(module: nn.Module) -> None:
    module.config = module.local.config
    del module.local
