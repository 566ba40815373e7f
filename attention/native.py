"""Attention by neighbor lists on the CPU: the operators around native.cpp.

Forward and backward are exact, in fp32 or bf16 (with fp32 inside), for any mask, head dim and
batch, and run without a pause once the kernel is built: see build.py.
"""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

from attention import build

DTYPES = (torch.float32, torch.bfloat16)
PADDING = 16  # floats at the end of the probabilities, which whole vectors may read

# After a fork, the threads of the OpenMP runtime are gone, and GNU's would be waited for forever.
_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_note_fork)


# --------------------------------------------------------------------------------------------------
# The C interface: the structs of native.cpp


class Array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, x: Tensor) -> Array:
        """A tensor [B, T, H, D] whose last dimension is contiguous."""
        return cls(x.data_ptr(), *x.stride()[:3])


ARRAYS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
SIZES = ("B", "T", "H", "D", "edges", "threads")


class Job(ctypes.Structure):
    _fields_ = [
        *((name, Array) for name in ARRAYS),
        *((name, ctypes.c_void_p) for name in ("p", "scratch", "lists")),
        *((name, ctypes.c_int64) for name in SIZES),
    ]


def _run(arrays: dict[str, Tensor], lists: Tensor, p: Tensor | None) -> None:
    """Fill `out`, or `dq`, `dk` and `dv`, of the arrays [B, T, H, D]."""
    q = arrays["q"]
    num_images, num_tokens, num_heads, head_dim = q.shape
    job = Job(
        **{name: Array.of(x) for name, x in arrays.items()},
        p=0 if p is None else p.data_ptr(),
        lists=lists.data_ptr(),
        B=num_images,
        T=num_tokens,
        H=num_heads,
        D=head_dim,
        edges=_num_edges(lists, num_tokens),
        threads=1 if _is_forked else torch.get_num_threads(),
    )
    library = build.load()
    kind = (int(q.dtype == torch.bfloat16), int("grad" in arrays))
    library.scratch_size.restype = ctypes.c_int64
    scratch = torch.empty(library.scratch_size(ctypes.byref(job), *kind), dtype=torch.float32)
    job.scratch = scratch.data_ptr()
    library.run(ctypes.byref(job), *kind)


# --------------------------------------------------------------------------------------------------
# The operators: on packed qkv [B, T, 3, H, D], and on q, k, v, each [B, T, H, D]


def attend_packed(qkv: Tensor, lists: Tensor) -> Tensor:
    """Attention of packed qkv [B, T, 3, H, D] -> [B, T, H, D].

    `lists` is NeighborLists.flat.
    """
    keep = torch.is_grad_enabled() and qkv.requires_grad
    return _attend_packed(_with_dense_rows(qkv), lists, keep)[0]


def attend(q: Tensor, k: Tensor, v: Tensor, lists: Tensor) -> Tensor:
    """Attention of q, k, v, each [B, T, H, D] with any strides -> [B, T, H, D]."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _attend(*map(_with_dense_rows, (q, k, v)), lists, keep)[0]


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _num_edges(lists: Tensor, num_tokens: int) -> int:
    return (len(lists) - 5 * num_tokens - 2) // 4


def _probabilities(q: Tensor, lists: Tensor, keep: bool) -> Tensor:
    """What the backward needs, [B * H * E] and some padding; empty if it is not to be kept."""
    if not keep:
        return q.new_empty(0, dtype=torch.float32)
    num_pairs = q.shape[0] * q.shape[2] * _num_edges(lists, q.shape[1])
    p = q.new_empty(num_pairs + PADDING, dtype=torch.float32)
    p[num_pairs:] = 0
    return p


def _forward(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype)
    p = _probabilities(q, lists, keep)
    _run({"q": q, "k": k, "v": v, "out": out}, lists, p if keep else None)
    return out, p


def _backward(inputs: tuple, grad: Tensor, gradients: tuple, lists: Tensor, p: Tensor) -> None:
    q, k, v = inputs
    dq, dk, dv = gradients
    arrays = {"q": q, "k": k, "v": v, "grad": _with_dense_rows(grad), "dq": dq, "dk": dk, "dv": dv}
    _run(arrays, lists, p)


@torch.library.custom_op("local_attention::native_packed", mutates_args=())
def _attend_packed(qkv: Tensor, lists: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return _forward(*qkv.detach().unbind(2), lists, keep)


@_attend_packed.register_fake
def _(qkv, lists, keep):
    q = qkv.select(2, 0)
    return q.new_empty(q.shape), _probabilities(q, lists, keep)


@torch.library.custom_op("local_attention::native_packed_backward", mutates_args=())
def _attend_packed_backward(grad: Tensor, qkv: Tensor, p: Tensor, lists: Tensor) -> Tensor:
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype)
    _backward(qkv.detach().unbind(2), grad, gradient.unbind(2), lists, p)
    return gradient


@_attend_packed_backward.register_fake
def _(grad, qkv, p, lists):
    return qkv.new_empty(qkv.shape)


def _save_packed(ctx, inputs, output) -> None:
    qkv, lists, _ = inputs
    ctx.save_for_backward(qkv, output[1], lists)


def _differentiate_packed(ctx, grad, _):
    return _attend_packed_backward(grad, *ctx.saved_tensors), None, None


_attend_packed.register_autograd(_differentiate_packed, setup_context=_save_packed)


@torch.library.custom_op("local_attention::native", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return _forward(q.detach(), k.detach(), v.detach(), lists, keep)


@_attend.register_fake
def _(q, k, v, lists, keep):
    return q.new_empty(q.shape), _probabilities(q, lists, keep)


@torch.library.custom_op("local_attention::native_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, lists: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = tuple(torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    _backward((q.detach(), k.detach(), v.detach()), grad, gradients, lists, p)
    return gradients


@_attend_backward.register_fake
def _(grad, q, k, v, p, lists):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, lists, _ = inputs
    ctx.save_for_backward(q, k, v, output[1], lists)


def _differentiate(ctx, grad, _):
    return *_attend_backward(grad, *ctx.saved_tensors), None, None


_attend.register_autograd(_differentiate, setup_context=_save)
