"""Exact attention on tiles of a sparse mask, for CUDA: the operators around tiled_kernels.py.

Tensor cores multiply matrices. So 64 queries are computed together, against all tokens that any of
them attends to (tiles.py); pairs that the mask forbids are computed as well, and dropped. Forward
keeps nothing but the output and the log-sum-exp of each query. The backward computes the
probabilities anew: one kernel for the gradient of the queries, over the same lists, and one for
those of keys and values, over the transposed lists. Nothing is scattered, so the result is
deterministic. The online softmax and the recomputed backward are those of FlashAttention-2 (Dao
2023, section 3).

    s = q . k                p = exp(s - lse)                    out = sum_j p v[j]
    delta = grad . out       ds = p (grad . v - delta)
    dq = sum_j ds k[j]       dk = sum_i ds q[i]                  dv = sum_i p grad[i]

The kernels are compiled at their first call, whatever the mask, the grid
and the batch: again only for another head dim, data type, or alignment.

Legend for shapes:
    B batch, T tokens, global ones first, H heads, D head dim; `lists` is TileLists.tensors
"""

from __future__ import annotations

import contextlib
import functools
import math
import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import utils
from attention.tiles import BLOCK, TILE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128
MIN_PADDED_HEAD_DIM = 16  # the least that a matrix product takes

# Rows of an array that need the registers of eight warps, and those of which only one block fits
# into shared memory at a time.
WIDE_BYTES, WIDEST_BYTES = 256, 512

# Older GPUs have no tensor cores for bf16.
MIN_CAPABILITY = (8, 0)

Lists = tuple[Tensor, Tensor, Tensor, Tensor]


def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU: `TRITON_INTERPRET=1`, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def error(device_type: str) -> str | None:
    """Why the kernels cannot run on this type of device; None if they can."""
    if device_type != "cuda" and not (device_type == "cpu" and is_interpreted()):
        return f"runs on CUDA, not on {device_type}"
    if (reason := _import_error()) is not None:
        return f"needs Triton, which cannot be imported: {reason}"
    if device_type == "cuda" and _capability() < MIN_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or higher"
    return None


@functools.cache
def _capability() -> tuple[int, int]:
    """Of the GPU; without one, all questions about it are hypothetical."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else MIN_CAPABILITY


@functools.cache
def _import_error() -> str | None:
    try:
        from attention import tiled_kernels  # noqa: F401
    except Exception as reason:  # also whatever a broken installation raises
        return f"{utils.first_line(reason)} (it comes with torch on Linux)"
    return None


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels can compute with these: others need another backend."""
    return dtype in DTYPES and head_dim <= MAX_HEAD_DIM


def fits(x: Tensor) -> bool:
    """Whether the kernels take a tensor [B, T, ..., H, D]."""
    num_tokens, num_heads, head_dim = x.shape[1], x.shape[-2], x.shape[-1]
    # Within an image, the kernels count in int32.
    end = num_tokens * x.stride(1) + num_heads * x.stride(-2)
    return takes(x.dtype, head_dim) and end < 2**31


# --------------------------------------------------------------------------------------------------
# The work, on q, k, v, each [B, T, H, D] with any strides but that of D


def _forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists) -> tuple[Tensor, Tensor]:
    """The output [B, T, H, D], and log-sum-exps in base 2, [B, H, T]."""
    out, lse = _empty_results(q)
    _launch("forward_kernel", (q, k, v, out), (lse,), lists, starts=lists[1][0])
    return out, lse


def _backward(
    grad: Tensor, qkv: tuple, out: Tensor, lse: Tensor, gradients: tuple, lists: Lists
) -> None:
    """Fill the gradients of q, k and v, each [B, T, H, D] with any strides but that of D."""
    grad, delta = _with_dense_rows(grad), torch.empty_like(lse)
    dq, dk, dv = gradients
    _launch("queries_kernel", (*qkv, out, grad, dq), (lse, delta), lists, starts=lists[1][0])
    _launch("keys_kernel", (*qkv, grad, dk, dv), (lse, delta), lists, starts=lists[1][1])


def _launch(name: str, arrays: tuple, rows: tuple, lists: Lists, starts: Tensor) -> None:
    """Run a kernel on arrays [B, T, H, D] and rows [B, H, T], once per tile, head and image.

    A kernel takes the arrays, the rows, the lists, the number of tokens, the scale, and the strides
    of the arrays, in this order.
    """
    from attention import tiled_kernels

    num_images, num_tokens, num_heads, head_dim = arrays[0].shape
    if 0 in arrays[0].shape:
        return
    tokens, _, columns, bits = lists
    strides = [stride for array in arrays for stride in array.stride()[:3]]
    scale = math.log2(math.e) / math.sqrt(head_dim)

    # Tiles are the slowest index: the longest, those of global tokens, begin first.
    grid = (num_images, num_heads, len(tokens))
    with _on_device(arrays[0]):
        getattr(tiled_kernels, name)[grid](
            *(*arrays, *rows, tokens, starts, columns, bits, num_tokens, scale, *strides),
            **constants(head_dim, arrays[0].dtype),
        )


def constants(head_dim: int, dtype: torch.dtype) -> dict:
    """What the kernels are compiled for, besides the types of their arguments."""
    padded = max(MIN_PADDED_HEAD_DIM, 2 ** (head_dim - 1).bit_length())
    row_bytes = padded * dtype.itemsize
    # fp32 is exact, and so does without tensor cores, unless TF32 is allowed.
    is_tf32_allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D": head_dim,
        "P": padded,
        "TILE": TILE,
        "BLOCK": BLOCK,
        "PRECISION": "tf32" if is_tf32_allowed else "ieee",
        "num_warps": 8 if row_bytes >= WIDE_BYTES else 4,
        "num_stages": 1 if row_bytes >= WIDEST_BYTES else 2,
    }


def _on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    num_images, num_tokens, num_heads, _ = q.shape
    lse = q.new_empty(num_images, num_heads, num_tokens, dtype=torch.float32)
    return q.new_empty(q.shape), lse


# --------------------------------------------------------------------------------------------------
# The same as operators, which torch.compile and fake tensors know: for packed qkv [B, T, 3, H, D],
# and for separate q, k, v. They are opaque to an outer torch.compile.


def _packed_forward(
    qkv: Tensor, tokens: Tensor, starts: Tensor, columns: Tensor, bits: Tensor
) -> tuple[Tensor, Tensor]:
    return _forward(*qkv.unbind(2), (tokens, starts, columns, bits))


def _packed_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor,
    tokens: Tensor, starts: Tensor, columns: Tensor, bits: Tensor,
) -> Tensor:  # fmt: skip
    gradient, lists = qkv.new_empty(qkv.shape), (tokens, starts, columns, bits)
    _backward(grad, qkv.unbind(2), out, lse, gradient.unbind(2), lists)
    return gradient


def _separate_forward(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, starts: Tensor, columns: Tensor, bits: Tensor
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, (tokens, starts, columns, bits))


def _separate_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tokens: Tensor, starts: Tensor, columns: Tensor, bits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = tuple(q.new_empty(q.shape) for _ in range(3))
    _backward(grad, (q, k, v), out, lse, gradients, (tokens, starts, columns, bits))
    return gradients


def _operator(name: str, function):
    return torch.library.custom_op(f"local_attention::{name}", function, mutates_args=())


_packed_operator = _operator("tiled_packed", _packed_forward)
_packed_backward_operator = _operator("tiled_packed_backward", _packed_backward)
_separate_operator = _operator("tiled", _separate_forward)
_separate_backward_operator = _operator("tiled_backward", _separate_backward)

_packed_operator.register_fake(lambda qkv, *lists: _empty_results(qkv.select(2, 0)))
_separate_operator.register_fake(lambda q, k, v, *lists: _empty_results(q))
_packed_backward_operator.register_fake(lambda grad, qkv, *others: qkv.new_empty(qkv.shape))
_separate_backward_operator.register_fake(
    lambda grad, q, *others: tuple(q.new_empty(q.shape) for _ in range(3))
)


def _save(ctx, inputs, output) -> None:
    *tensors, tokens, starts, columns, bits = inputs
    ctx.save_for_backward(*tensors, *output, tokens, starts, columns, bits)
    ctx.set_materialize_grads(False)  # nobody differentiates the log-sum-exps


def _differentiate_packed(ctx, grad, _):
    if grad is None:  # nobody used the output
        return 5 * (None,)
    return _packed_backward_operator(grad, *ctx.saved_tensors), *4 * (None,)


def _differentiate_separate(ctx, grad, _):
    if grad is None:  # nobody used the output
        return 7 * (None,)
    return *_separate_backward_operator(grad, *ctx.saved_tensors), *4 * (None,)


_packed_operator.register_autograd(_differentiate_packed, setup_context=_save)
_separate_operator.register_autograd(_differentiate_separate, setup_context=_save)


# --------------------------------------------------------------------------------------------------
# And as functions for eager mode: at few tokens an operator's machinery takes longer than a kernel


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _packed_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return 5 * (None,)
        return _packed_backward(grad, *ctx.saved_tensors), *4 * (None,)


class _Separate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _separate_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return 7 * (None,)
        return *_separate_backward(grad, *ctx.saved_tensors), *4 * (None,)


def attend_packed(qkv: Tensor, lists: Lists) -> Tensor:
    """Attention of packed qkv [B, T, 3, H, D] -> [B, T, H, D]."""
    call = _packed_operator if _needs_operator(qkv) else _Packed.apply
    return call(_with_dense_rows(qkv), *lists)[0]


def attend(q: Tensor, k: Tensor, v: Tensor, lists: Lists) -> Tensor:
    """Attention of q, k, v, each [B, T, H, D] -> [B, T, H, D]."""
    call = _separate_operator if _needs_operator(q) else _Separate.apply
    return call(*map(_with_dense_rows, (q, k, v)), *lists)[0]


def _needs_operator(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) is not Tensor  # e.g. a fake tensor
