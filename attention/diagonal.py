"""Exact local attention on the non-zero diagonals of a mask: its cost grows with the neighbors.

On the flattened sequence, a relative offset on the patch grid is one diagonal j - i = o of the
[N, N] mask, whatever the shape of the neighborhood. So the scores of a patch with its neighbors are
a handful of products with shifted keys, and the gradients are the same products shifted back. Both
directions only gather and never scatter, so the result is deterministic.

With g the gradient of out, and the scale 1 / sqrt(D) left out:

    s_n = q . k[i + o_n]      p = softmax over n      out = sum_n p_n v[i + o_n]

    dp_n = g . v[i + o_n]     ds = p (dp - g . out)   dq = sum_n ds_n k[i + o_n]
    dk = sum_n (ds_n q)[i - o_n]                      dv = sum_n (p_n g)[i - o_n]

Forward and backward are two plain functions. On a GPU, torch.compile compiles each once per
configuration (offsets, shape, dtype, device), inside one operator that is opaque to an outer
torch.compile. So a model compiles without a graph break, and the kernel is compiled once rather
than once per layer. On the CPU, and without a compiler, the same functions run as they are.

Legend for shapes:
    B batch, N patches, G global tokens, T = G + N tokens, H heads, D head dim
    n diagonals (offsets)
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
# Finite, because exp2(-inf) is slow on CPUs. Here exp2 gives 0 as well, at full speed.
MASKED_SCORE = -1e30
# Offsets are unrolled in the compiled kernel; beyond this many, compiling takes minutes for little.
MAX_DIAGONALS = 64


def find_diagonals(mask: Tensor) -> tuple[tuple[int, ...], Tensor] | None:
    """The non-zero diagonals of a bool [N, N] mask; None if there are more than MAX_DIAGONALS.

    Returns the offsets j - i in ascending order, and where each is allowed, bool [n, N].
    """
    num_tokens = len(mask)
    if mask.sum() > MAX_DIAGONALS * num_tokens:  # a diagonal has at most N entries
        return None

    query, key = mask.nonzero().unbind(1)  # each [number of pairs]
    offsets, diagonal = (key - query).unique(return_inverse=True)
    if len(offsets) > MAX_DIAGONALS:
        return None

    valid = torch.zeros(len(offsets), num_tokens, dtype=torch.bool)
    valid[diagonal, query] = True
    return tuple(offsets.tolist()), valid


def attend(qkv: Tensor, valid: Tensor, offsets: tuple[int, ...], num_global_tokens: int) -> Tensor:
    """Attention of packed qkv [B, T, 3, H, D], global tokens first -> [B, T, H, D]."""
    out, _, _ = _attend(qkv.contiguous(), valid, list(offsets), num_global_tokens)
    return out


# --------------------------------------------------------------------------------------------------
# The formulas
#
# A patch attends to its n neighbors and to the G global tokens, in one joint softmax. Its
# probabilities are kept as p [n + G, B, N, H]. A global token attends to all T tokens.


def forward(
    qkv: Tensor, valid: Tensor, offsets: list[int], num_global: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, D], and the probabilities that the backward needs.

    The probabilities are those of the patches, [n + G, B, N, H], and those of the global queries,
    [G, B, T, H].
    """
    x = qkv.to(_accumulation_dtype(qkv))
    q, k, v = x[:, num_global:].unbind(2)  # each [B, N, H, D]
    global_q, global_k, global_v = _split_global(x, num_global)  # each G of [B, 1, H, D]
    scale = LOG2_E / math.sqrt(qkv.shape[-1])  # for a softmax in base 2

    # Patches as queries.
    shift_k = _make_shift(k, offsets)
    shift_v = _make_shift(v, offsets)
    scores = []  # n + G of [B, N, H]
    for n, o in enumerate(offsets):
        score = (q * shift_k(o)).sum(-1) * scale
        scores.append(torch.where(valid[n][:, None], score, MASKED_SCORE))
    scores += [(q * k_g).sum(-1) * scale for k_g in global_k]

    p = _softmax_base_2(torch.stack(scores), dim=0)  # [n + G, B, N, H]
    values = [shift_v(o) for o in offsets] + global_v  # n + G, each broadcasts to [B, N, H, D]
    out = sum(p_n[..., None] * value for p_n, value in zip(p, values, strict=True))  # [B, N, H, D]

    # Global tokens as queries: plain attention to all tokens.
    _, all_k, all_v = x.unbind(2)  # each [B, T, H, D]
    global_scores = [(q_g * all_k).sum(-1) * scale for q_g in global_q]  # each [B, T, H]
    global_p = [_softmax_base_2(scores_g, dim=1) for scores_g in global_scores]
    global_out = [(p_g[..., None] * all_v).sum(1, keepdim=True) for p_g in global_p]

    out = torch.cat([*global_out, out], dim=1).to(qkv.dtype)  # [B, T, H, D]
    if not num_global:
        batch_size, num_tokens, _, num_heads, _ = qkv.shape
        return out, p, p.new_empty(0, batch_size, num_tokens, num_heads)
    return out, p, torch.stack(global_p)


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    p: Tensor,
    global_p: Tensor,
    offsets: list[int],
    num_global: int,
) -> Tensor:
    """Gradient of qkv, [B, T, 3, H, D], from that of the output, [B, T, H, D]."""
    dtype = _accumulation_dtype(qkv)
    x, grad, out = qkv.to(dtype), grad.to(dtype), out.to(dtype)
    q, k, v = x[:, num_global:].unbind(2)  # each [B, N, H, D]
    global_q, global_k, global_v = _split_global(x, num_global)  # each G of [B, 1, H, D]
    patch_grad = grad[:, num_global:]  # [B, N, H, D]
    delta = (grad * out).sum(-1)  # [B, T, H]
    scale = 1 / math.sqrt(qkv.shape[-1])

    # Patches as queries.
    shift_k = _make_shift(k, offsets)
    shift_v = _make_shift(v, offsets)
    values = [shift_v(o) for o in offsets] + global_v
    dp = torch.stack([(patch_grad * value).sum(-1) for value in values])  # [n + G, B, N, H]
    ds = p * (dp - delta[:, num_global:]) * scale  # [n + G, B, N, H]
    keys = [shift_k(o) for o in offsets] + global_k
    dq = sum(ds_n[..., None] * key for ds_n, key in zip(ds, keys, strict=True))  # [B, N, H, D]

    # Patches as keys and values: the same products, shifted back. The shifted weights are stacked
    # first: the compiled kernel then checks the ends once per weight rather than once per 16
    # channels, and is 1.3x as fast.
    back = [-o for o in offsets]
    shift_q = _make_shift(q, back)
    shift_grad = _make_shift(patch_grad, back)
    back_ds = torch.stack([_shift_weights(ds[n], o) for n, o in enumerate(back)])  # [n, B, N, H]
    back_p = torch.stack([_shift_weights(p[n], o) for n, o in enumerate(back)])  # [n, B, N, H]
    dk = sum(w[..., None] * shift_q(o) for w, o in zip(back_ds, back, strict=True))
    dv = sum(w[..., None] * shift_grad(o) for w, o in zip(back_p, back, strict=True))
    if not num_global:
        return torch.stack([dq, dk, dv], dim=2).to(qkv.dtype)

    # Global tokens as keys and values: they gather from all patches.
    to_global = range(len(offsets), len(offsets) + num_global)  # their place in p and ds
    global_dk = [(ds[n][..., None] * q).sum(1, keepdim=True) for n in to_global]  # [B, 1, H, D]
    global_dv = [(p[n][..., None] * patch_grad).sum(1, keepdim=True) for n in to_global]
    dk = torch.cat([*global_dk, dk], dim=1)  # [B, T, H, D]
    dv = torch.cat([*global_dv, dv], dim=1)  # [B, T, H, D]

    # Global tokens as queries: they reach all tokens.
    _, all_k, all_v = x.unbind(2)  # each [B, T, H, D]
    global_dq = []  # G of [B, 1, H, D]
    for g, q_g in enumerate(global_q):
        grad_g = grad[:, g : g + 1]  # [B, 1, H, D]
        dp_g = (grad_g * all_v).sum(-1)  # [B, T, H]
        ds_g = global_p[g] * (dp_g - delta[:, g : g + 1]) * scale  # [B, T, H]
        global_dq.append((ds_g[..., None] * all_k).sum(1, keepdim=True))
        dk = dk + ds_g[..., None] * q_g
        dv = dv + global_p[g][..., None] * grad_g

    dq = torch.cat([*global_dq, dq], dim=1)  # [B, T, H, D]
    return torch.stack([dq, dk, dv], dim=2).to(qkv.dtype)


def _split_global(x: Tensor, num_global: int) -> list[list[Tensor]]:
    """The global tokens' queries, keys and values, from x [B, T, 3, H, D].

    Each is a list of G tensors [B, 1, H, D].
    """
    return [[x[:, g : g + 1, i] for g in range(num_global)] for i in range(3)]


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _softmax_base_2(scores: Tensor, dim: int) -> Tensor:
    """Softmax of scores that already carry the factor log2(e), so that exp2 serves as exp."""
    p = torch.exp2(scores - scores.amax(dim, keepdim=True))
    return p / p.sum(dim, keepdim=True)


def _make_shift(x: Tensor, offsets: list[int]) -> Callable[[int], Tensor]:
    """For x [B, N, ...], the function o -> x[:, i + o] for all i, for o in `offsets`.

    Beyond the ends, the values are arbitrary but finite.
    """
    num_tokens = x.shape[1]
    if torch.compiler.is_compiling():
        # In a compiled kernel, clamping the index costs neither a branch nor a copy.
        positions = torch.arange(num_tokens, device=x.device)
        return lambda o: x[:, (positions + o).clamp(0, num_tokens - 1)]

    # Uncompiled, all offsets are views of one padded copy.
    reach = max(map(abs, offsets))
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (reach, reach))  # [B, reach + N + reach, ...]
    return lambda o: padded[:, reach + o : reach + o + num_tokens]


def _shift_weights(weights: Tensor, offset: int) -> Tensor:
    """weights[:, i + offset] for all i, and zero beyond the ends; weights are [B, N, H]."""
    num_tokens = weights.shape[1]
    if torch.compiler.is_compiling():
        positions = torch.arange(num_tokens, device=weights.device) + offset
        inside = (positions >= 0) & (positions < num_tokens)
        shifted = weights[:, positions.clamp(0, num_tokens - 1)]
        return torch.where(inside[:, None], shifted, 0)

    shift = _make_shift(weights, [offset])  # pads with zeros
    return shift(offset)


# --------------------------------------------------------------------------------------------------
# Compilation


@functools.cache
def compile_error(device_type: str) -> str | None:
    """Why torch.compile does not work here, or None if it works: tries it on a trivial function."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device_type))
        return None
    except Exception as error:  # no C++ compiler, no Triton, no headers: each fails in its own way
        return utils.first_line(error)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether local attention is compiled on this type of device. If not, warns once, with why."""
    error = compile_error(device_type)
    if error is not None:
        utils.warn(f"torch.compile does not work here, so local attention runs uncompiled: {error}")
    return error is None


@functools.cache
def compile_for(function: Callable, configuration: tuple) -> Callable:
    """`function`, compiled for one configuration (offsets, shapes, dtype, device) and no other.

    Dynamo limits recompilations per code object, so each configuration gets its own code object.
    """
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    options = {
        # Indices are clamped, so they need no bounds checks.
        "assert_indirect_indexing": False,
        # Allow fused multiply-adds, which round once instead of twice.
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    return torch.compile(own, dynamic=False, fullgraph=True, options=options)


# Here the formulas run as they are, and serve as a reference: native.py is faster than they are
# compiled, and nobody waits for it.
EAGER_DEVICES = ("cpu",)

# (function, configuration) -> the kernel to call: compiled, or the function itself
_KERNELS: dict[tuple, Callable] = {}


def _run(function: Callable, qkv: Tensor, *arguments):
    """Call `forward` or `backward` with these arguments, compiled on a GPU if possible."""
    if qkv.device.type in EAGER_DEVICES or not can_compile(qkv.device.type):
        return function(*arguments)

    *_, offsets, num_global = arguments
    configuration = (tuple(offsets), num_global, qkv.shape, qkv.dtype, qkv.device)
    kernel = _KERNELS.get((function, configuration))
    # Compiled code is compiled again under another autocast or grad mode.
    with torch.no_grad(), torch.autocast(qkv.device.type, enabled=False):
        if kernel is None:
            return _run_first(function, configuration, *arguments)
        return kernel(*arguments)


def _run_first(function: Callable, configuration: tuple, *arguments):
    """The first call of a configuration, which compiles it. If that fails, it stays uncompiled.

    A working compiler may still reject a kernel: Metal, for example, limits the number of buffers.
    """
    kernel = compile_for(function, configuration)
    try:
        result = kernel(*arguments)
    except Exception as error:  # each compiler fails in its own way
        if utils.says_no_memory(error):
            raise
        _warn_of_failed_compilation(utils.first_line(error))
        kernel = function
        result = kernel(*arguments)

    _KERNELS[function, configuration] = kernel
    return result


@functools.cache
def _warn_of_failed_compilation(error: str) -> None:
    what = "local attention could not be compiled for this mask and shape"
    utils.warn(f"{what} and runs uncompiled: {error}")


# --------------------------------------------------------------------------------------------------
# The operator
#
# Compiled models in torch's cache on disk call both operators by name: changing the signature of
# either one requires new names for both.


@torch.library.custom_op("local_attention::diagonals", mutates_args=())
def _attend(
    qkv: Tensor, valid: Tensor, offsets: list[int], num_global: int
) -> tuple[Tensor, Tensor, Tensor]:
    qkv = qkv.detach()
    return _run(forward, qkv, qkv, valid, offsets, num_global)


@_attend.register_fake
def _(qkv, valid, offsets, num_global):
    b, t, _, h, d = qkv.shape
    dtype = _accumulation_dtype(qkv)
    out = qkv.new_empty(b, t, h, d)
    p = qkv.new_empty(len(offsets) + num_global, b, t - num_global, h, dtype=dtype)
    global_p = qkv.new_empty(num_global, b, t, h, dtype=dtype)
    return out, p, global_p


@torch.library.custom_op("local_attention::diagonals_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    p: Tensor,
    global_p: Tensor,
    offsets: list[int],
    num_global: int,
) -> Tensor:
    grad = grad.contiguous()
    qkv, out = qkv.detach(), out.detach()
    return _run(backward, qkv, grad, qkv, out, p, global_p, offsets, num_global)


@_attend_backward.register_fake
def _(grad, qkv, out, p, global_p, offsets, num_global):
    return torch.empty_like(qkv)


def _save_for_backward(ctx, inputs, output) -> None:
    qkv, _, ctx.offsets, ctx.num_global = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)  # nobody differentiates the probabilities


def _differentiate(ctx, grad, grad_p, grad_global_p):
    if grad is None:  # nobody used the output
        return 4 * (None,)
    grad_qkv = _attend_backward(grad, *ctx.saved_tensors, ctx.offsets, ctx.num_global)
    return grad_qkv, None, None, None


_attend.register_autograd(_differentiate, setup_context=_save_for_backward)
