"""What only a CUDA device can show, in addition to the tests marked `cuda` in other files.

`pytest -m cuda` runs all of them.
"""

import pytest
import torch
import torch.nn.functional as F

import attention
import masks
from attention import windows
from models import VisionTransformer
from runtime import hardware

pytestmark = pytest.mark.cuda

TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # relative to the largest value
# 64 and 192 tokens are 64 modulo 128, at which cuDNN's backward has returned NaN. 180 are not.
GRIDS = [(8, 8), (12, 16), (12, 15)]


def exact(qkv, mask, num_global):
    """Attention in float64 on the CPU, [B, T, 3, H, D] -> [B, T, H, D]."""
    q, k, v = qkv.cpu().double().permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    allowed = F.pad(mask, (num_global, 0) * 2, value=True)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def assert_close(found, right, dtype):
    error = (found.cpu().double() - right).abs().max() / right.abs().max()
    assert error < TOLERANCES[dtype], error


@pytest.mark.parametrize("num_global", [0, 1])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("backend", ["dense", "diagonal", "flex", "tiled"])
def test_outputs_and_gradients_are_exact_with_64_channels_per_head(
    backend, dtype, grid, num_global
):
    mask = masks.build_attention_mask("2d_all_neighbors", 1, *grid)
    compiled = attention.compile_mask(mask, num_global, backend).cuda()

    generator = torch.Generator().manual_seed(0)
    shape = (2, len(mask) + num_global, 3, 2, 64)
    qkv = torch.randn(shape, generator=generator).cuda().to(dtype).requires_grad_()
    grad = torch.randn(*shape[:2], *shape[3:], generator=generator).to(dtype)
    out = attention.attend_packed(qkv, compiled)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad.cuda())

    leaf = qkv.detach().cpu().double().requires_grad_()
    right = exact(leaf, mask, num_global)
    (right_grad,) = torch.autograd.grad(right, leaf, grad.double())
    assert_close(out, right, dtype)
    assert_close(grad_qkv, right_grad, dtype)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("backend", ["dense", "diagonal", "flex", "tiled"])
def test_a_compiled_model_trains_like_the_eager_one(backend, mode):
    mask = masks.build_attention_mask("2d_cardinal", 1, 8, 8)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cuda()
    labels = torch.arange(16, device="cuda") % 10

    losses = {}
    for compiles in (False, True):
        torch.manual_seed(0)
        model = VisionTransformer(**sizes, dropout=0.0, attention_mask=mask, backend=backend).cuda()
        if compiles:
            model.compile_blocks(mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        losses[compiles] = []
        for _ in range(4):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiles].append(loss.item())

            with torch.no_grad():  # an evaluation between the steps
                logits = model.eval()(images)
                losses[compiles].append(F.cross_entropy(logits, labels).item())
            model.train()
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_tf32_is_coarser_than_fp32():
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double()
    errors = {}
    for precision in ("tf32", "fp32"):
        hardware.set_precision(precision)
        errors[precision] = ((x.cuda() @ x.cuda()).cpu() - exact).abs().max().item()
    assert errors["fp32"] < 1e-3 < errors["tf32"] < 0.5


# --------------------------------------------------------------------------------------------------
# Tiles


def compare(mask, num_global, backend, dtype, shape):
    """Outputs and gradients of a backend against float64; returns both."""
    compiled = attention.compile_mask(mask, num_global, backend).cuda()
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(shape, generator=generator).cuda().to(dtype).requires_grad_()
    grad = torch.randn(*shape[:2], *shape[3:], generator=generator).to(dtype)
    out = attention.attend_packed(qkv, compiled)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad.cuda())

    leaf = qkv.detach().cpu().double().requires_grad_()
    right = exact(leaf, mask, num_global)
    (right_grad,) = torch.autograd.grad(right, leaf, grad.double())
    assert_close(out, right, dtype)
    assert_close(grad_qkv, right_grad, dtype)
    return out, grad_qkv


@pytest.mark.parametrize("num_global", [0, 1, 3])
@pytest.mark.parametrize("mask_type", masks.MASK_TYPES[1:])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_tiles_of_every_mask_type_are_exact_and_deterministic(dtype, mask_type, num_global):
    mask = masks.build_attention_mask(mask_type, 2, 20, 27)
    shape = (2, len(mask) + num_global, 3, 3, 64)
    first, second = (compare(mask, num_global, "tiled", dtype, shape) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("head_dim", [16, 24, 32, 48, 80, 96, 128])
def test_tiles_of_every_head_dim_are_exact(head_dim, dtype):
    mask = torch.rand(150, 150, generator=torch.Generator().manual_seed(0)) < 0.1
    mask |= torch.eye(150, dtype=torch.bool)
    compare(mask, 1, "tiled", dtype, (1, 151, 3, 2, head_dim))


def test_tiles_take_separate_inputs():
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 12, 15)
    compiled = attention.compile_mask(mask, 1, "tiled").cuda()
    q, k, v = torch.randn(3, 2, 4, 181, 64, device="cuda", dtype=torch.bfloat16)
    packed = torch.stack([q, k, v], dim=2).permute(0, 3, 2, 1, 4)  # [B, T, 3, H, D]
    expected = attention.attend_packed(packed, compiled).transpose(1, 2)
    torch.testing.assert_close(attention.attend(q, k, v, compiled), expected)


@pytest.mark.skipif(not windows.is_available(), reason="this torch has no varlen_attn with windows")
def test_windows_of_the_flash_kernel_are_exact():
    mask = masks.build_attention_mask("1d_all_neighbors", 2, 20, 27)
    compare(mask, 0, "varlen", torch.bfloat16, (2, len(mask), 3, 3, 64))


def test_auto_on_a_gpu_is_settled_when_the_model_arrives():
    mask = masks.build_attention_mask("2d_all_neighbors", 2, 28, 28)
    compiled = attention.compile_mask(mask).cuda()
    assert compiled.backend != "dense"
    assert compiled.choice.reason.startswith("by rule, an estimate")


def test_measuring_times_every_backend_that_can_work(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mask = masks.build_attention_mask("1d_cardinal", 2, 28, 28)
    compiled = attention.compile_mask(mask, backend="measure")
    cuda = torch.device("cuda")
    chosen = attention.choose_backend(compiled, 8, 12, 64, torch.bfloat16, cuda, num_calls=1)
    assert {"dense", "tiled", "flex", "diagonal"} <= set(chosen.timings)
    assert None not in chosen.timings.values()
