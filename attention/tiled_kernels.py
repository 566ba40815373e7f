"""The Triton kernels of tiled.py: imported only where Triton is there.

One program computes one tile of one head of one image: `TILE` tokens, and blocks of `BLOCK` tokens
that they attend to (or, in `keys_kernel`, that attend to them). tiles.py has the layout of the
lists. Softmax is in base 2: scores carry the factor log2(e).

A padded place in a tile reads token 0 and is never written. A padded place in a list repeats a
token of the list, and none of its bits is set. So nothing needs a mask but the stores.

Legend for shapes:
    M = TILE, N = BLOCK, P = the head dim padded to a power of two
"""

import triton
import triton.language as tl

LOG_2 = tl.constexpr(0.6931471805599453)
# Less than any score and finite: exp2(-inf - FLOOR) is 0, and not NaN.
FLOOR = tl.constexpr(-3.0e38)

# Another number of tokens, or of tiles, is no reason to compile again.
kernel = triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["STARTS"])


@triton.jit
def _read(pointer, tokens, stride, D: tl.constexpr, P: tl.constexpr):
    """Rows of an array of one head: tokens [n] -> [n, P], zero from channel D on."""
    d = tl.arange(0, P)
    where = pointer + tokens[:, None] * stride + d[None, :]
    if D == P:
        return tl.load(where)
    return tl.load(where, mask=d[None, :] < D, other=0.0)


@triton.jit
def _write(pointer, rows, tokens, stride, D: tl.constexpr, P: tl.constexpr):
    """Store rows [M, P] of an array of one head, except for those of padded tokens."""
    d = tl.arange(0, P)
    where = pointer + tokens[:, None] * stride + d[None, :]
    mask = (tokens >= 0)[:, None] & (d < D)[None, :]
    tl.store(where, rows.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _masked(scores, BITS, block, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Scores [M, N], and minus infinity where the bits of this block forbid the pair."""
    bits = tl.load(BITS + block * TILE + tl.arange(0, TILE))
    bit = 1 << tl.arange(0, BLOCK)
    return tl.where((bits[:, None] & bit[None, :]) != 0, scores, float("-inf"))


@kernel
def forward_kernel(
    Q, K, V, OUT, LSE, TOKENS, STARTS, COLUMNS, BITS, num_tokens, scale,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    out_image, out_token, out_head,
    D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, and the log-sum-exp of each query."""
    image, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    Q += image * q_image + head * q_head
    K += image * k_image + head * k_head
    V += image * v_image + head * v_head
    OUT += image * out_image + head * out_head
    LSE += (image * tl.num_programs(1) + head) * num_tokens

    tokens = tl.load(TOKENS + tile * TILE + tl.arange(0, TILE))
    q = _read(Q, tl.maximum(tokens, 0), q_token, D, P)  # [M, P]
    top = tl.full([TILE], FLOOR, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, P], tl.float32)

    for block in range(tl.load(STARTS + tile), tl.load(STARTS + tile + 1)):
        columns = tl.load(COLUMNS + block * BLOCK + tl.arange(0, BLOCK))
        k = _read(K, columns, k_token, D, P)  # [N, P]
        v = _read(V, columns, v_token, D, P)  # [N, P]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        scores = _masked(scores, BITS, block, TILE, BLOCK)

        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None]
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
        top = new_top

    _write(OUT, out / total[:, None], tokens, out_token, D, P)
    tl.store(LSE + tokens, top + tl.log2(total), mask=tokens >= 0)


@kernel
def queries_kernel(
    Q, K, V, OUT, GRAD, DQ, LSE, DELTA, TOKENS, STARTS, COLUMNS, BITS, num_tokens, scale,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    out_image, out_token, out_head, grad_image, grad_token, grad_head,
    dq_image, dq_token, dq_head,
    D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, and delta = grad . out, which `keys_kernel` needs."""
    image, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    Q += image * q_image + head * q_head
    K += image * k_image + head * k_head
    V += image * v_image + head * v_head
    OUT += image * out_image + head * out_head
    GRAD += image * grad_image + head * grad_head
    DQ += image * dq_image + head * dq_head
    LSE += (image * tl.num_programs(1) + head) * num_tokens
    DELTA += (image * tl.num_programs(1) + head) * num_tokens

    tokens = tl.load(TOKENS + tile * TILE + tl.arange(0, TILE))
    there = tl.maximum(tokens, 0)
    q = _read(Q, there, q_token, D, P)  # [M, P]
    grad = _read(GRAD, there, grad_token, D, P)  # [M, P]
    out = _read(OUT, there, out_token, D, P)  # [M, P]
    lse = tl.load(LSE + there)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + tokens, delta, mask=tokens >= 0)
    dq = tl.zeros([TILE, P], tl.float32)

    for block in range(tl.load(STARTS + tile), tl.load(STARTS + tile + 1)):
        columns = tl.load(COLUMNS + block * BLOCK + tl.arange(0, BLOCK))
        k = _read(K, columns, k_token, D, P)  # [N, P]
        v = _read(V, columns, v_token, D, P)  # [N, P]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        scores = _masked(scores, BITS, block, TILE, BLOCK)
        p = tl.exp2(scores * scale - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    _write(DQ, dq * (scale * LOG_2), tokens, dq_token, D, P)


@kernel
def keys_kernel(
    Q, K, V, GRAD, DK, DV, LSE, DELTA, TOKENS, STARTS, COLUMNS, BITS, num_tokens, scale,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    grad_image, grad_token, grad_head, dk_image, dk_token, dk_head, dv_image, dv_token, dv_head,
    D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values. Rows are keys here, and columns are queries.

    Scores are computed as k . q rather than transposed: on Hopper, Triton has compiled products
    with a transposed accumulator wrongly.
    """
    image, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    Q += image * q_image + head * q_head
    K += image * k_image + head * k_head
    V += image * v_image + head * v_head
    GRAD += image * grad_image + head * grad_head
    DK += image * dk_image + head * dk_head
    DV += image * dv_image + head * dv_head
    LSE += (image * tl.num_programs(1) + head) * num_tokens
    DELTA += (image * tl.num_programs(1) + head) * num_tokens

    tokens = tl.load(TOKENS + tile * TILE + tl.arange(0, TILE))
    there = tl.maximum(tokens, 0)
    k = _read(K, there, k_token, D, P)  # [M, P]
    v = _read(V, there, v_token, D, P)  # [M, P]
    dk = tl.zeros([TILE, P], tl.float32)
    dv = tl.zeros([TILE, P], tl.float32)

    for block in range(tl.load(STARTS + tile), tl.load(STARTS + tile + 1)):
        columns = tl.load(COLUMNS + block * BLOCK + tl.arange(0, BLOCK))
        q = _read(Q, columns, q_token, D, P)  # [N, P]
        grad = _read(GRAD, columns, grad_token, D, P)  # [N, P]
        lse = tl.load(LSE + columns)
        delta = tl.load(DELTA + columns)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [M, N]
        scores = _masked(scores, BITS, block, TILE, BLOCK)
        p = tl.exp2(scores * scale - lse[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    _write(DK, dk * (scale * LOG_2), tokens, dk_token, D, P)
    _write(DV, dv, tokens, dv_token, D, P)
