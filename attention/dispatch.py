"""Attention under a compiled mask: every call goes to the mask's backend."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention import diagonal, flex, native, tiled, windows
from attention.compiled_mask import CompiledMask

# Where SDPA may hand a masked call to cuDNN. Its backward returns NaN for some masks: when the
# number of tokens is 64 modulo 128, in rows of very negative scores (pytorch/pytorch#196678).
CUDNN_DEVICES = ("cuda",)
SAFE_WITH_A_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q: Tensor, k: Tensor, v: Tensor, compiled: CompiledMask) -> Tensor:
    """Attention of q, k, v, each [B, H, T, D] with the global tokens first -> [B, H, T, D]."""
    batch_size, num_heads, num_tokens, head_dim = q.shape
    qkv_shape = (batch_size, num_tokens, 3, num_heads, head_dim)
    compiled.check(num_tokens, q.device, qkv_shape, q.dtype)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # each [B, T, H, D]
    # Where a kernel takes them as they are, there is no need to pack them.
    is_plain = q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type)
    if compiled.backend == "native" and is_plain and q.dtype in native.DTYPES:
        return native.attend(q, k, v, compiled.neighbors).transpose(1, 2)
    if compiled.backend == "tiled" and is_plain and all(map(tiled.fits, (q, k, v))):
        return tiled.attend(q, k, v, compiled.tiles).transpose(1, 2)

    qkv = torch.stack([q, k, v], dim=2)  # [B, T, 3, H, D]
    return attend_checked(qkv, compiled).transpose(1, 2)


def attend_packed(qkv: Tensor, compiled: CompiledMask) -> Tensor:
    """Attention of packed qkv [B, T, 3, H, D], as one linear layer makes it -> [B, T, H, D]."""
    compiled.check(qkv.shape[1], qkv.device, qkv.shape, qkv.dtype)
    return attend_checked(qkv, compiled)


def attend_checked(qkv: Tensor, compiled: CompiledMask) -> Tensor:
    """`attend_packed` without its check, for models that call `compiled.check` once per forward."""
    if torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))

    if compiled.backend == "native" and qkv.dtype in native.DTYPES:
        return native.attend_packed(qkv, compiled.neighbors)
    if compiled.backend == "native" and qkv.dtype == torch.float16:
        return native.attend_packed(qkv.float(), compiled.neighbors).to(qkv.dtype)
    if compiled.backend == "tiled" and tiled.fits(qkv):
        return tiled.attend_packed(qkv, compiled.tiles)
    if compiled.backend == "varlen" and windows.fits(qkv):
        return windows.attend(qkv, compiled.window)

    # What a kernel does not take, such as float64, is left to the formulas, or to SDPA.
    is_left_over = compiled.backend in ("native", "tiled", "varlen")
    if compiled.backend == "diagonal" or (is_left_over and compiled.offsets):
        return diagonal.attend(qkv, compiled.valid, compiled.offsets, compiled.num_global_tokens)

    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    if compiled.backend == "flex":
        return flex.attend(q, k, v, compiled.block_mask).transpose(1, 2)  # [B, T, H, D]
    mask = compiled.with_global_tokens().to(q.device) if is_left_over else compiled.token_mask
    return _attend_dense(q, k, v, mask).transpose(1, 2)


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA. Full attention may use any of its kernels; a masked call on a GPU avoids cuDNN's."""
    avoid_cudnn = mask is not None and q.device.type in CUDNN_DEVICES
    with sdpa_kernel(SAFE_WITH_A_MASK) if avoid_cudnn else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
