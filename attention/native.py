"""Attention by neighbor lists on the CPU: the operators around native.cpp.

Forward and backward are exact, in fp32 or bf16 (with fp32 inside), for any mask, head dim and
batch, and run without a pause once the kernel is built: see build.py.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention import build

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16)
PADDING = 16  # floats at the end of the probabilities, which whole vectors may read

# After a fork, the threads of the OpenMP runtime are gone, and GNU's would be waited for forever.
_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_note_fork)


# --------------------------------------------------------------------------------------------------
# The C interface: struct Job of native.cpp, an array of integers

NUM_FIELDS = 42
NO_ARRAY = (0, 0, 0, 0)

# Python takes several times as long between two large kernels as in a loop of small ones, as they
# push it out of the caches. So a call makes few objects.


def _array(x: Tensor) -> tuple[int, ...]:
    """Where a tensor [B, T, H, D] lies: its address and the strides of B, T and H."""
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head


def _arrays_of_packed(qkv: Tensor) -> tuple[int, ...]:
    """The same for q, k and v of qkv [B, T, 3, H, D], one after the other."""
    batch, token, which, head, _ = qkv.stride()
    q, step = qkv.data_ptr(), which * qkv.element_size()
    return q, batch, token, head, q + step, batch, token, head, q + 2 * step, batch, token, head


def _run(
    arrays: tuple[int, ...],
    sizes: tuple[int, int, int, int],
    lists: Tensor,
    p: Tensor | None,
    dtype: torch.dtype,
    is_backward: bool,
) -> None:
    """Fill `out`, or `dq`, `dk` and `dv`, of the arrays of q, k, v, out, grad, dq, dk, dv.

    `sizes` are B, T, H, D.
    """
    values = (
        *arrays,
        0 if p is None else p.data_ptr(),
        lists.data_ptr(),
        *sizes,
        _num_edges(lists, sizes[1]),
        1 if _is_forked else torch.get_num_threads(),
        dtype == torch.bfloat16,
        is_backward,
    )
    if not build.load().run((ctypes.c_int64 * NUM_FIELDS)(*values)):
        raise MemoryError("not enough memory for the attention kernel")


# --------------------------------------------------------------------------------------------------
# The work: on packed qkv [B, T, 3, H, D], or on q, k, v, each [B, T, H, D]


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _num_edges(lists: Tensor, num_tokens: int) -> int:
    return (len(lists) - 5 * num_tokens - 2) // 4


def _empty_results(
    like: Tensor, sizes: tuple[int, int, int, int], lists: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """`out` [B, T, H, D], and what the backward needs: p [B * H * E] and padding, if kept."""
    num_images, num_tokens, num_heads, _ = sizes
    num_pairs = num_images * num_heads * _num_edges(lists, num_tokens)
    num_kept = num_pairs + PADDING if keep else 0
    return like.new_empty(sizes), like.new_empty(num_kept, dtype=torch.float32)


def _packed_forward(qkv: Tensor, lists: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    num_images, num_tokens, _, num_heads, head_dim = qkv.shape
    sizes = (num_images, num_tokens, num_heads, head_dim)
    out, p = _empty_results(qkv, sizes, lists, keep)
    arrays = (*_arrays_of_packed(qkv), *_array(out), *4 * NO_ARRAY)
    _run(arrays, sizes, lists, p if keep else None, qkv.dtype, is_backward=False)
    return out, p


def _packed_backward(grad: Tensor, qkv: Tensor, p: Tensor, lists: Tensor) -> Tensor:
    grad, gradient = _with_dense_rows(grad), qkv.new_empty(qkv.shape)
    arrays = (*_arrays_of_packed(qkv), *NO_ARRAY, *_array(grad), *_arrays_of_packed(gradient))
    _run(arrays, tuple(grad.shape), lists, p, qkv.dtype, is_backward=True)
    return gradient


def _forward(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    sizes = tuple(q.shape)
    out, p = _empty_results(q, sizes, lists, keep)
    arrays = (*_array(q), *_array(k), *_array(v), *_array(out), *4 * NO_ARRAY)
    _run(arrays, sizes, lists, p if keep else None, q.dtype, is_backward=False)
    return out, p


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, lists: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, gradients = _with_dense_rows(grad), tuple(q.new_empty(q.shape) for _ in range(3))
    given = (*_array(q), *_array(k), *_array(v), *NO_ARRAY, *_array(grad))
    dq, dk, dv = map(_array, gradients)
    _run((*given, *dq, *dk, *dv), tuple(q.shape), lists, p, q.dtype, is_backward=True)
    return gradients


# --------------------------------------------------------------------------------------------------
# The same as operators, which torch.compile and fake tensors know


_packed_operator = torch.library.custom_op(
    "local_attention::native_packed", _packed_forward, mutates_args=()
)
_packed_backward_operator = torch.library.custom_op(
    "local_attention::native_packed_backward", _packed_backward, mutates_args=()
)
_operator = torch.library.custom_op("local_attention::native", _forward, mutates_args=())
_backward_operator = torch.library.custom_op(
    "local_attention::native_backward", _backward, mutates_args=()
)


@_packed_operator.register_fake
def _(qkv, lists, keep):
    return _empty_results(qkv, qkv.select(2, 0).shape, lists, keep)


@_packed_backward_operator.register_fake
def _(grad, qkv, p, lists):
    return qkv.new_empty(qkv.shape)


@_operator.register_fake
def _(q, k, v, lists, keep):
    return _empty_results(q, q.shape, lists, keep)


@_backward_operator.register_fake
def _(grad, q, k, v, p, lists):
    return tuple(q.new_empty(q.shape) for _ in range(3))


def _save(ctx, inputs, output) -> None:
    *tensors, lists, _ = inputs
    ctx.save_for_backward(*tensors, output[1], lists)
    ctx.set_materialize_grads(False)  # p has none


def _differentiate_packed(ctx, grad, _):
    if grad is None:  # nobody used the output
        return 3 * (None,)
    return _packed_backward_operator(grad, *ctx.saved_tensors), None, None


def _differentiate(ctx, grad, _):
    if grad is None:  # nobody used the output
        return 5 * (None,)
    return *_backward_operator(grad, *ctx.saved_tensors), None, None


_packed_operator.register_autograd(_differentiate_packed, setup_context=_save)
_operator.register_autograd(_differentiate, setup_context=_save)


# --------------------------------------------------------------------------------------------------
# And as functions for eager mode, where an operator's machinery would take 5 to 10 % of the time


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
            return 3 * (None,)
        return _packed_backward(grad, *ctx.saved_tensors), None, None


class _Separate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return 5 * (None,)
        return *_backward(grad, *ctx.saved_tensors), None, None


def attend_packed(qkv: Tensor, lists: Tensor) -> Tensor:
    """Attention of packed qkv [B, T, 3, H, D] -> [B, T, H, D]. `lists` is NeighborLists.flat."""
    return _call(_packed_operator, _Packed.apply, _packed_forward, (qkv,), lists)


def attend(q: Tensor, k: Tensor, v: Tensor, lists: Tensor) -> Tensor:
    """Attention of q, k, v, each [B, T, H, D] with any strides -> [B, T, H, D]."""
    return _call(_operator, _Separate.apply, _forward, (q, k, v), lists)


def _call(
    operator: Callable, differentiable: Callable, forward: Callable, inputs: tuple, lists: Tensor
) -> Tensor:
    """The operator, or in eager mode what is faster: `differentiable`, or else `forward` alone."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    inputs = tuple(map(_with_dense_rows, inputs))
    if torch.compiler.is_compiling() or type(inputs[0]) is not Tensor:  # e.g. a fake tensor
        return operator(*inputs, lists, keep)[0]
    return (differentiable if keep else forward)(*inputs, lists, keep)[0]
