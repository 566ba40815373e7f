"""The attention probabilities of every layer, whatever backend the model runs on.

Sparse backends never form them, so they are recomputed from the model's own q and k with an
explicit softmax in fp32. One layer is in memory at a time.

Legend for shapes:
    B batch, N patches, G global tokens (class token, registers), T = G + N tokens, H heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from attention import CompiledMask
from models import VisionTransformer

BYTES_OF_PROBABILITIES = 2**28  # of one layer and batch


@contextmanager
def watch_attention(model: VisionTransformer, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, probabilities)` for each layer of every forward of the model.

    Layers count from 0. Probabilities are fp32 [B, H, T, T]: rows are queries and sum to 1, and
    what the mask forbids is exactly 0. `see` runs without autocast and without gradients.
    """
    different = [allowed_tokens(model, compiled) for compiled in model.layer_masks.different]

    def hook_of(layer: int, num_heads: int):
        allowed = different[model.layer_masks.number_of[layer]]

        @torch.no_grad()
        def hook(module, inputs, qkv):
            with torch.autocast(qkv.device.type, enabled=False):
                see(layer, attention_probabilities(qkv, num_heads, allowed))

        return hook

    handles = [
        block.attn.qkv.register_forward_hook(hook_of(layer, block.attn.num_heads))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def allowed_tokens(model: VisionTransformer, compiled: CompiledMask) -> Tensor | None:
    """Who may attend to whom, bool [T, T] on the model's device; None for full attention."""
    if compiled.mask is None:
        return None
    return compiled.with_global_tokens().to(model.pos_embed.device)


def attention_probabilities(qkv: Tensor, num_heads: int, allowed: Tensor | None) -> Tensor:
    """The softmax of a layer, fp32 [B, H, T, T], from what its `qkv` returns, [B, T, 3 * E]."""
    qkv = qkv.float().unflatten(-1, (3, num_heads, -1))  # [B, T, 3, H, D]
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, T, T]
    if allowed is not None:
        scores = scores.masked_fill_(~allowed, float("-inf"))
    return scores.softmax(-1)


def images_at_once(model: VisionTransformer, limit_bytes: float = BYTES_OF_PROBABILITIES) -> int:
    """How many images to run at a time, so that the probabilities of a layer fit the limit."""
    num_tokens = model.num_global_tokens + model.num_patches
    bytes_per_image = 4 * model.config["num_heads"] * num_tokens**2
    return max(1, int(limit_bytes // bytes_per_image))
