"""Exact local attention on the non-zero diagonals of a mask, at a cost that grows with the neighbors, not the patches.

In the flattened sequence a relative offset on the patch grid is one diagonal j - i = o of the [N, N] mask, whatever the
shape of the neighborhood. So the scores of a patch with its neighbors are a handful of products with shifted keys, and
the gradients are the same products shifted back: everything is gathered, nothing scattered, and so deterministic.

    s_n = q . k[i + o_n],  p = softmax over n,  out = sum_n p_n v[i + o_n]
    ds = p (dp - g . out),  dq = sum_n ds_n k[i + o_n],  dk = sum_n (ds_n q)[i - o_n],  dv = sum_n (p_n g)[i - o_n]

Forward and backward are two plain functions, compiled by torch.compile once for each (offsets, shape, dtype), inside
one operator that is opaque to an outer torch.compile: a model is compiled without a graph break, and the kernel once,
not once a layer. Without a compiler the same functions run as they are.

Shapes: B batch, N patches, G global tokens, T = G + N tokens, H heads, D head dim, n diagonals (offsets).
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import utils

LOG2_E = math.log2(math.e)
MASKED_SCORE = -1e30  # finite: exp2 of it is 0 at full speed, that of -inf is slow on CPUs
# Offsets are unrolled in the compiled kernel; beyond this many, compiling takes minutes and gains little.
MAX_DIAGONALS = 64


def find_diagonals(mask: Tensor) -> tuple[tuple[int, ...], Tensor] | None:
    """The offsets j - i of a bool [N, N] mask, ascending, and where each is allowed, bool [n, N]; None if too many."""
    num_tokens = len(mask)
    if mask.sum() > MAX_DIAGONALS * num_tokens:
        return None
    query, key = mask.nonzero().unbind(1)
    offsets, diagonal = (key - query).unique(return_inverse=True)
    if len(offsets) > MAX_DIAGONALS:
        return None
    valid = torch.zeros(len(offsets), num_tokens, dtype=torch.bool)
    valid[diagonal, query] = True
    return tuple(offsets.tolist()), valid


def attend(qkv: Tensor, valid: Tensor, offsets: tuple[int, ...], num_global_tokens: int) -> Tensor:
    """Attention of packed qkv [B, T, 3, H, D], global tokens first -> [B, T, H, D]."""
    return _attend(qkv.contiguous(), valid, list(offsets), num_global_tokens)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The formulas. Probabilities are kept as [n + G, B, N, H]: of each patch to its neighbors, then to the global tokens.


def forward(qkv: Tensor, valid: Tensor, offsets: list[int], num_global: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> out [B, T, H, D], probabilities of the patches [n + G, B, N, H] and of the global queries [G, B, T, H]."""
    x = qkv.to(_accumulation_dtype(qkv))
    q, k, v = x[:, num_global:].unbind(2)  # each [B, N, H, D]
    global_q, global_k, global_v = _split_global(x, num_global)  # G of [B, 1, H, D] each
    scale = LOG2_E / math.sqrt(qkv.shape[-1])

    shifted_k, shifted_v = _shifter(k, offsets), _shifter(v, offsets)
    scores = [
        torch.where(valid[n][:, None], (q * shifted_k(o)).sum(-1) * scale, MASKED_SCORE) for n, o in enumerate(offsets)
    ]
    scores += [(q * k_g).sum(-1) * scale for k_g in global_k]
    p = _softmax2(torch.stack(scores), dim=0)  # [n + G, B, N, H]
    values = [shifted_v(o) for o in offsets] + global_v
    out = sum(p_n[..., None] * value for p_n, value in zip(p, values, strict=True))  # [B, N, H, D]

    keys, values = x[:, :, 1], x[:, :, 2]  # [B, T, H, D]
    global_p = [_softmax2((q_g * keys).sum(-1) * scale, dim=1) for q_g in global_q]  # each [B, T, H]
    global_out = [(p_g[..., None] * values).sum(1, keepdim=True) for p_g in global_p]  # each [B, 1, H, D]
    out = torch.cat([*global_out, out], dim=1).to(qkv.dtype)
    return out, p, torch.stack(global_p) if num_global else p.new_empty(0, *qkv.shape[:2], qkv.shape[3])


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, p: Tensor, global_p: Tensor, offsets: list[int], num_global: int
) -> Tensor:
    """Gradient of qkv, [B, T, 3, H, D], from that of the output, [B, T, H, D]."""
    dtype = _accumulation_dtype(qkv)
    x, grad, out = qkv.to(dtype), grad.to(dtype), out.to(dtype)
    q, k, v = x[:, num_global:].unbind(2)  # each [B, N, H, D]
    global_q, global_k, global_v = _split_global(x, num_global)  # G of [B, 1, H, D] each
    patch_grad = grad[:, num_global:]
    scale = 1 / math.sqrt(qkv.shape[-1])

    delta = (grad * out).sum(-1)  # [B, T, H]
    shifted_k, shifted_v = _shifter(k, offsets), _shifter(v, offsets)
    values = [shifted_v(o) for o in offsets] + global_v
    dp = torch.stack([(patch_grad * value).sum(-1) for value in values])
    ds = p * (dp - delta[:, num_global:]) * scale  # [n + G, B, N, H]
    keys = [shifted_k(o) for o in offsets] + global_k
    dq = sum(ds_n[..., None] * key for ds_n, key in zip(ds, keys, strict=True))

    back = [-o for o in offsets]
    shifted_q, shifted_grad = _shifter(q, back), _shifter(patch_grad, back)
    # Stacked first: so the compiled kernel checks the ends once a weight, not once for each 16 channels; 1.3x as fast.
    back_ds, back_p = (torch.stack([_shift_weights(w[n], o) for n, o in enumerate(back)]) for w in (ds, p))
    dk = sum(w[..., None] * shifted_q(o) for w, o in zip(back_ds, back, strict=True))
    dv = sum(w[..., None] * shifted_grad(o) for w, o in zip(back_p, back, strict=True))
    if not num_global:
        return torch.stack([dq, dk, dv], dim=2).to(qkv.dtype)

    # Keys and values of the global tokens gather from all patches; their queries reach all tokens.
    first = len(offsets)
    dk = torch.cat([*((ds[first + g][..., None] * q).sum(1, keepdim=True) for g in range(num_global)), dk], dim=1)
    dv = torch.cat(
        [*((p[first + g][..., None] * patch_grad).sum(1, keepdim=True) for g in range(num_global)), dv], dim=1
    )
    all_keys, all_values, global_dq = x[:, :, 1], x[:, :, 2], []
    for g, q_g in enumerate(global_q):
        grad_g = grad[:, g : g + 1]
        ds_g = global_p[g] * ((grad_g * all_values).sum(-1) - delta[:, g : g + 1]) * scale  # [B, T, H]
        global_dq.append((ds_g[..., None] * all_keys).sum(1, keepdim=True))
        dk = dk + ds_g[..., None] * q_g
        dv = dv + global_p[g][..., None] * grad_g
    return torch.stack([torch.cat([*global_dq, dq], dim=1), dk, dv], dim=2).to(qkv.dtype)


def _split_global(x: Tensor, num_global: int) -> list[list[Tensor]]:
    """The global tokens' queries, keys and values, each a list of G tensors [B, 1, H, D]; x is [B, T, 3, H, D]."""
    return [[x[:, g : g + 1, i] for g in range(num_global)] for i in range(3)]


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _softmax2(scores: Tensor, dim: int) -> Tensor:
    """Softmax of scores that were scaled by log2(e)."""
    p = torch.exp2(scores - scores.amax(dim, keepdim=True))
    return p / p.sum(dim, keepdim=True)


def _shifter(x: Tensor, offsets: list[int]) -> Callable[[int], Tensor]:
    """For x [B, N, ...] the function o -> x[:, i + o] for all i; beyond the ends its value is anything finite.

    In a compiled kernel the index is clamped, which costs no branch and no copy; run as it is, one padded copy serves
    all offsets as views.
    """
    num_tokens = x.shape[1]
    if torch.compiler.is_compiling():
        positions = torch.arange(num_tokens, device=x.device)
        return lambda o: x[:, (positions + o).clamp(0, num_tokens - 1)]
    reach = max(map(abs, offsets))
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (reach, reach))
    return lambda o: padded[:, reach + o : reach + o + num_tokens]


def _shift_weights(weights: Tensor, offset: int) -> Tensor:
    """weights[:, i + offset] for all i, zero beyond the ends; weights [B, N, H]."""
    num_tokens = weights.shape[1]
    if torch.compiler.is_compiling():
        positions = torch.arange(num_tokens, device=weights.device) + offset
        inside = (positions >= 0) & (positions < num_tokens)
        return torch.where(inside[:, None], weights[:, positions.clamp(0, num_tokens - 1)], 0)
    return _shifter(weights, [offset])(offset)


# ---------------------------------------------------------------------------------------------------------------------
# Compiling, and the operator


@functools.cache
def compile_error(device_type: str) -> str | None:
    """Why torch.compile does not work here, found by trying it on a trivial function; None if it works."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device_type))
        return None
    except Exception as error:  # no C++ compiler, no Triton, no headers: each fails in its own way
        return utils.first_line(error)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether local attention is compiled on such a device; where it is not, one warning says why."""
    error = compile_error(device_type)
    if error is not None:
        utils.warn(f"torch.compile does not work here, local attention runs uncompiled: {error}")
    return error is None


@functools.cache
def compiled(function: Callable, configuration: tuple) -> Callable:
    """`function` compiled for one configuration alone (offsets, shapes, dtype, device).

    Dynamo counts recompilations by code object, so each configuration gets a code object of its own.
    """
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # Indices are clamped by construction. Fused multiply-adds round once, not twice.
    options = {"assert_indirect_indexing": False, "cpp.enable_floating_point_contract_flag": "fast"}
    return torch.compile(own, dynamic=False, fullgraph=True, options=options)


_KERNELS: dict[tuple, Callable] = {}  # (function, configuration) -> what is called for it: compiled, or as it is


def _run(function: Callable, qkv: Tensor, *arguments):
    if not can_compile(qkv.device.type):
        return function(*arguments)
    *_, offsets, num_global = arguments
    configuration = (tuple(offsets), num_global, qkv.shape, qkv.dtype, qkv.device)
    kernel = _KERNELS.get((function, configuration))
    if kernel is not None:
        return kernel(*arguments)
    return _run_first(function, configuration, *arguments)


def _run_first(function: Callable, configuration: tuple, *arguments):
    """The first call of a configuration compiles it. Where that fails, it runs uncompiled from then on.

    A compiler that works may still refuse a kernel: Metal, for example, allows only so many buffers in one.
    """
    kernel = compiled(function, configuration)
    try:
        result = kernel(*arguments)
    except Exception as error:  # each compiler fails in its own way
        if utils.says_no_memory(error):
            raise
        _warn_of_a_failed_compile(utils.first_line(error))
        kernel = function
        result = kernel(*arguments)
    _KERNELS[function, configuration] = kernel
    return result


@functools.cache
def _warn_of_a_failed_compile(error: str) -> None:
    utils.warn(f"local attention could not be compiled for this mask and shape, and runs uncompiled: {error}")


# Compiled models in the cache on disk call both by name: a changed signature of either needs new names for both.
@torch.library.custom_op("local_attention::diagonals", mutates_args=())
def _attend(qkv: Tensor, valid: Tensor, offsets: list[int], num_global: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv = qkv.detach()
    return _run(forward, qkv, qkv, valid, offsets, num_global)


@_attend.register_fake
def _(qkv, valid, offsets, num_global):
    b, t, _, h, d = qkv.shape
    dtype = _accumulation_dtype(qkv)
    p = qkv.new_empty(len(offsets) + num_global, b, t - num_global, h, dtype=dtype)
    return qkv.new_empty(b, t, h, d), p, qkv.new_empty(num_global, b, t, h, dtype=dtype)


@torch.library.custom_op("local_attention::diagonals_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, p: Tensor, global_p: Tensor, offsets: list[int], num_global: int
) -> Tensor:
    return _run(backward, qkv, grad.contiguous(), qkv.detach(), out.detach(), p, global_p, offsets, num_global)


@_attend_backward.register_fake
def _(grad, qkv, out, p, global_p, offsets, num_global):
    return torch.empty_like(qkv)


def _save(ctx, inputs, output) -> None:
    qkv, _, ctx.offsets, ctx.num_global = inputs
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx, grad, grad_p, grad_global_p):
    grad_qkv = _attend_backward(grad, *ctx.saved_tensors, ctx.offsets, ctx.num_global)
    return grad_qkv, None, None, None


_attend.register_autograd(_differentiate, setup_context=_save)
