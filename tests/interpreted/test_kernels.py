"""The Triton kernels of the backend `tiled` against attention spelled out in float64.

The interpreter computes bf16 wrongly; tests/test_cuda.py has it.
"""

import pytest
import torch
import torch.nn.functional as F

import masks
from attention import attend, attend_checked, attend_packed, compile_mask, tiled
from attention.tiles import find_tiles
from models import VisionTransformer

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # of the largest value


def oracle(qkv, mask, num_global=0):
    """Softmax over all scores in float64, forbidden pairs at minus infinity: -> [B, T, H, D]."""
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    allowed = F.pad(mask, (num_global, 0) * 2, value=True)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)  # [B, T, H, D]


def random_qkv(num_tokens, batch=1, heads=2, head_dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, num_tokens, 3, heads, head_dim, generator=generator)
    return qkv.to(dtype).requires_grad_()


def random_grad(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def assert_close(found, exact, dtype):
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error < TOLERANCE[dtype]


def assert_matches_oracle(mask, num_global=0, **shape):
    compiled = compile_mask(mask, num_global, "tiled")
    qkv = random_qkv(len(mask) + num_global, **shape)
    out = attend_packed(qkv, compiled)
    grad = random_grad(out)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)

    exact = oracle(qkv, mask, num_global)
    (exact_grad,) = torch.autograd.grad(exact, qkv, grad.double())
    assert out.dtype == grad_qkv.dtype == qkv.dtype
    assert_close(out, exact, qkv.dtype)
    assert_close(grad_qkv, exact_grad.double(), qkv.dtype)


# --------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("num_global", [0, 1, 3])
@pytest.mark.parametrize("mask_type", masks.MASK_TYPES[1:])
def test_every_mask_type_on_grids_that_tiles_do_not_fit(mask_type, num_global):
    for step, grid in ((1, (9, 13)), (2, (5, 20)), (3, (12, 7))):
        mask = masks.build_attention_mask(mask_type, step, *grid)
        assert_matches_oracle(mask, num_global)


@pytest.mark.parametrize("num_global", [0, 1])
def test_half_precision(num_global):
    mask = masks.build_attention_mask("2d_all_neighbors", 2, 9, 13)
    assert_matches_oracle(mask, num_global, dtype=torch.float16, batch=2)


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 65])
def test_few_tokens_that_all_attend_to_each_other(num_tokens):
    assert_matches_oracle(torch.ones(num_tokens, num_tokens, dtype=torch.bool), 1)


@pytest.mark.parametrize("density", [0.01, 0.3])
def test_random_masks(density):
    """Asymmetric, without a grid, with many diagonals, and with keys that no query attends to."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(150, 150, generator=generator) < density
    mask |= torch.eye(150, dtype=torch.bool)[torch.randint(150, (150,), generator=generator)]
    assert not mask.any(0).all() or density > 0.1
    compiled = compile_mask(mask, 0, "tiled")
    assert not compiled.offsets
    assert_matches_oracle(mask, 2)


def test_a_whole_tile_that_no_query_attends_to():
    mask = torch.zeros(150, 150, dtype=torch.bool)
    mask[:, 3] = True
    assert_matches_oracle(mask)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("head_dim", [8, 17, 24, 48, 64, 80, 128])
def test_every_head_dim(head_dim, dtype):
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 5)
    assert_matches_oracle(mask, 1, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize(("head_dim", "dtype"), [(136, torch.float32), (8, torch.float64)])
@pytest.mark.parametrize("many_diagonals", [False, True])
def test_what_the_kernels_do_not_take_is_computed_otherwise(head_dim, dtype, many_diagonals):
    mask = torch.ones(40, 40, dtype=torch.bool)
    if not many_diagonals:
        mask = masks.build_attention_mask("2d_cardinal", 1, 4, 10)
    compiled = compile_mask(mask, 1, "tiled")
    qkv = random_qkv(41, head_dim=head_dim, dtype=dtype)
    torch.testing.assert_close(
        attend_packed(qkv, compiled).double(), oracle(qkv, mask, 1), rtol=1e-5, atol=1e-5
    )


def test_large_and_very_negative_scores():
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 9, 8)
    compiled = compile_mask(mask, 0, "tiled")
    for q, k in ((100, 100), (30, -30), (1e4, 1e4)):
        qkv = random_qkv(72).detach()
        qkv[:, :, 0] = q + qkv[:, :, 0].abs()
        qkv[:, :, 1] = k + qkv[:, :, 1]
        qkv.requires_grad_()
        out = attend_packed(qkv, compiled)
        (grad,) = torch.autograd.grad(out, qkv, random_grad(out))
        assert grad.isfinite().all()
        if abs(q) <= 100:
            torch.testing.assert_close(out.double(), oracle(qkv, mask), rtol=0.02, atol=0.02)


def test_results_are_the_same_bit_for_bit():
    mask = masks.build_attention_mask("2d_all_neighbors", 2, 9, 8)
    compiled = compile_mask(mask, 1, "tiled")
    qkv = random_qkv(73)

    def gradient():
        return torch.autograd.grad(attend_packed(qkv, compiled).square().sum(), qkv)[0]

    assert torch.equal(gradient(), gradient())


# --------------------------------------------------------------------------------------------------
# Layouts


def test_separate_and_strided_inputs_give_the_same():
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 9, 8)
    compiled = compile_mask(mask, 1, "tiled")
    packed = random_qkv(73, batch=2)
    expected = attend_packed(packed, compiled)
    (gradient,) = torch.autograd.grad(expected, packed, random_grad(expected))

    def assert_same(q, k, v):
        out = attend(q, k, v, compiled).transpose(1, 2)
        torch.testing.assert_close(out, expected)
        found = torch.autograd.grad(out, (q, k, v), random_grad(expected))
        for x, exact in zip(found, gradient.permute(2, 0, 3, 1, 4), strict=True):
            torch.testing.assert_close(x, exact)

    q, k, v = packed.detach().permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    assert_same(*(x.contiguous().requires_grad_() for x in (q, k, v)))
    assert_same(*(x.requires_grad_() for x in (q.contiguous(), k, v.mT.contiguous().mT)))

    strided = torch.cat([packed, packed], dim=-1)[..., :16]
    torch.testing.assert_close(attend_packed(strided, compiled), expected)


def test_a_gradient_without_memory_of_its_own():
    """That of a sum is one number, with strides of zero."""
    mask = masks.build_attention_mask("1d_cardinal", 1, 1, 70)
    qkv = random_qkv(70)
    (found,) = torch.autograd.grad(attend_packed(qkv, compile_mask(mask, 0, "tiled")).sum(), qkv)
    (exact,) = torch.autograd.grad(oracle(qkv, mask).sum(), qkv)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# In PyTorch


def test_the_operators_keep_their_contracts():
    lists = find_tiles(masks.build_attention_mask("2d_cardinal", 1, 3, 4)).tensors
    qkv = random_qkv(12)
    torch.library.opcheck(tiled._packed_operator, (qkv, *lists))
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    torch.library.opcheck(tiled._separate_operator, (q, k, v, *lists))


def test_torch_compile_gives_the_same_without_a_graph_break():
    mask = masks.build_attention_mask("2d_cardinal", 1, 9, 8)
    compiled = compile_mask(mask, 1, "tiled")
    qkv = random_qkv(73)

    def step(x):
        return attend_packed(x * 1.5, compiled).square().sum()

    (expected,) = torch.autograd.grad(step(qkv), qkv)
    forward = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(forward(qkv), qkv)[0], expected)


def test_autocast_determines_the_dtype():
    mask = masks.build_attention_mask("2d_cardinal", 1, 9, 8)
    compiled = compile_mask(mask, 0, "tiled")
    qkv = random_qkv(72)
    with torch.autocast("cpu", torch.float16):
        out = attend_checked(qkv, compiled)
        (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert (out.dtype, grad.dtype) == (torch.float16, torch.float32)
    assert torch.equal(out, attend_packed(qkv.half(), compiled))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_model_trains_like_the_dense_one(pool):
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 4, 4)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    losses = {}
    for backend in ("dense", "tiled"):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, dropout=0.0,
            pool=pool, attention_mask=mask, backend=backend,
        )  # fmt: skip
        model.checkpoint_activations = backend == "tiled"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[backend] = []
        for _ in range(3):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["tiled"] == pytest.approx(losses["dense"], rel=1e-5)


@pytest.mark.parametrize("apply", [tiled._Packed.apply, tiled._packed_operator])
def test_an_output_that_nobody_uses_has_no_gradient(apply):
    lists = find_tiles(masks.build_attention_mask("2d_cardinal", 1, 3, 4)).tensors
    qkv = random_qkv(12)
    _, lse = apply(qkv, *lists)
    assert torch.autograd.grad(lse.sum(), qkv, allow_unused=True) == (None,)
