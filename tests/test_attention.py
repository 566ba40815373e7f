"""Every backend against dense attention spelled out in float64: outputs and gradients."""

import functools
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attention
import main
import masks
import utils
from attention import (
    Choice,
    attend,
    attend_packed,
    choice,
    compile_mask,
    diagonal,
    dispatch,
    flex,
    native,
    timings,
)
from models import VisionTransformer
from runtime import hardware

LOCAL_TYPES = masks.MASK_TYPES[1:]


def oracle(qkv, mask, num_global=0):
    """Softmax over all scores in float64, forbidden pairs at minus infinity: -> [B, T, H, D]."""
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        num_tokens = len(mask) + num_global
        allowed = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        allowed[num_global:, num_global:] = mask
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)  # [B, T, H, D]


def random_qkv(num_tokens, batch=2, heads=2, head_dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, num_tokens, 3, heads, head_dim)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64)
    return qkv.to(dtype).requires_grad_()


def local_mask(backend="measure"):
    """A small local mask with a class token: 13 tokens."""
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    return compile_mask(mask, 1, backend)


def assert_matches_oracle(compiled, mask, qkv, tolerance=1e-10):
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(qkv[:, :, 0].shape, generator=generator, dtype=torch.float64)
    out = attend_packed(qkv, compiled)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad.to(out.dtype))

    exact = oracle(qkv, mask, compiled.num_global_tokens)
    (exact_grad,) = torch.autograd.grad(exact, qkv, grad)

    assert out.shape == qkv[:, :, 0].shape
    assert out.dtype == grad_qkv.dtype == qkv.dtype
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        grad_qkv.double(), exact_grad.double(), rtol=tolerance, atol=tolerance
    )


@pytest.fixture(autouse=True)
def no_native_kernel(monkeypatch):
    """As on a GPU; test_native.py has the native kernel, and test_settling.py the rule."""
    monkeypatch.setattr(native, "DEVICES", ())


@pytest.fixture
def compiled_here(monkeypatch):
    """As on a GPU, where the formulas of diagonal.py are compiled."""
    monkeypatch.setattr(diagonal, "EAGER_DEVICES", ())


# --------------------------------------------------------------------------------------------------
# The formulas, as they run on the CPU


@pytest.mark.parametrize("num_global", [0, 1, 3])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (4, 3), (3, 5)])
@pytest.mark.parametrize("mask_type", LOCAL_TYPES)
@pytest.mark.parametrize("backend", ["dense", "diagonal"])
def test_backends_match_the_oracle(backend, mask_type, grid, num_global):
    for step in (0, 1, 2, 7):
        mask = masks.build_attention_mask(mask_type, step, *grid)
        compiled = compile_mask(mask, num_global, backend)
        assert compiled.backend == backend
        assert_matches_oracle(compiled, mask, random_qkv(len(mask) + num_global))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_boolean_mask_matches_the_oracle(data):
    num_tokens = data.draw(st.integers(1, 9))
    num_pairs = num_tokens**2
    pairs = data.draw(st.lists(st.booleans(), min_size=num_pairs, max_size=num_pairs))
    # Every row needs a neighbor, not necessarily itself.
    shifted_diagonal = torch.eye(num_tokens, dtype=torch.bool).roll(data.draw(st.integers(0, 8)), 0)
    mask = torch.tensor(pairs).view(num_tokens, num_tokens) | shifted_diagonal
    num_global = data.draw(st.integers(0, 2))

    compiled = compile_mask(mask, num_global, "diagonal")
    qkv = random_qkv(num_tokens + num_global, batch=1, heads=3, head_dim=5)
    assert_matches_oracle(compiled, mask, qkv)


@pytest.mark.parametrize("num_global", [0, 2])
def test_gradients_pass_gradcheck(num_global):
    mask = masks.generate_2d_attention_mask_cardinal(1, 2, 3)
    compiled = compile_mask(mask, num_global, "diagonal")
    qkv = random_qkv(6 + num_global, batch=1, heads=2, head_dim=3)
    assert torch.autograd.gradcheck(lambda x: attend_packed(x, compiled), qkv)


def test_full_attention_is_sdpa_without_a_mask():
    compiled = compile_mask(None, 1)
    assert compiled.backend == "dense"
    assert compiled.token_mask is None
    assert_matches_oracle(compiled, None, random_qkv(7))


def test_only_the_non_zero_diagonals_are_found():
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    offsets, valid = diagonal.find_diagonals(mask)
    assert offsets == (-4, -1, 0, 1, 4)
    for n, offset in enumerate(offsets):
        for i in range(12):
            assert valid[n, i] == (0 <= i + offset < 12 and mask[i, i + offset])


def test_separate_and_non_contiguous_inputs_give_the_same_result():
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 3, 4)
    compiled = compile_mask(mask, 1, "diagonal")
    packed = random_qkv(13)
    expected = attend_packed(packed, compiled)

    q, k, v = packed.permute(2, 0, 3, 1, 4)  # each [B, H, T, D], strided
    torch.testing.assert_close(attend(q, k, v, compiled), expected.transpose(1, 2))

    strided = torch.cat([packed, packed], dim=-1)[..., : packed.shape[-1]]
    assert not strided.is_contiguous()
    torch.testing.assert_close(attend_packed(strided, compiled), expected)

    (direct,) = torch.autograd.grad(expected.sum(), packed)
    (separate,) = torch.autograd.grad(attend(q, k, v, compiled).transpose(1, 2).sum(), packed)
    torch.testing.assert_close(separate, direct)


def test_the_backward_is_deterministic():
    mask = masks.build_attention_mask("2d_all_neighbors", 2, 6, 5)
    compiled = compile_mask(mask, 1, "diagonal")
    qkv = random_qkv(31, dtype=torch.float32)

    def gradient():
        return torch.autograd.grad(attend_packed(qkv, compiled).square().sum(), qkv)[0]

    assert torch.equal(gradient(), gradient())


# --------------------------------------------------------------------------------------------------
# Compiled, as on a GPU

needs_compiler = pytest.mark.skipif(
    not diagonal.can_compile("cpu"), reason="torch.compile does not work here"
)


@needs_compiler
@pytest.mark.parametrize(
    ("mask_type", "step", "grid", "num_global", "head_dim"),
    [
        ("2d_cardinal", 1, (4, 6), 0, 64),
        ("2d_cardinal", 1, (5, 3), 1, 7),
        ("1d_cardinal", 1, (2, 9), 2, 16),
    ],
)
def test_compiled_kernels_match_the_oracle(
    compiled_here, mask_type, step, grid, num_global, head_dim
):
    mask = masks.build_attention_mask(mask_type, step, *grid)
    compiled = compile_mask(mask, num_global, "diagonal")
    qkv = random_qkv(len(mask) + num_global, heads=3, head_dim=head_dim, dtype=torch.float32)
    assert_matches_oracle(compiled, mask, qkv, tolerance=2e-5)


@needs_compiler
def test_each_configuration_is_compiled_however_many_there_are(compiled_here, monkeypatch):
    """If they shared a code object, Dynamo would fall back or fail at the recompile limit."""
    monkeypatch.setattr(diagonal, "_KERNELS", {})
    compiled_before = diagonal.compile_for.cache_info().currsize
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for num_tokens in (4, 5, 6):
            mask = torch.eye(num_tokens, dtype=torch.bool)
            qkv = random_qkv(num_tokens, dtype=torch.float32)
            assert_matches_oracle(compile_mask(mask, 0, "diagonal"), mask, qkv, tolerance=2e-5)

    assert diagonal.compile_for.cache_info().currsize == compiled_before + 6
    assert len(diagonal._KERNELS) == 6
    uncompiled_functions = {diagonal.forward, diagonal.backward}
    assert not uncompiled_functions & set(diagonal._KERNELS.values())


@needs_compiler
def test_bf16_is_as_exact_as_sdpa_in_bf16(compiled_here):
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 5, 6)
    qkv = random_qkv(31, head_dim=32, dtype=torch.bfloat16)
    exact = oracle(qkv, mask, 1)
    errors = {}
    for backend in ("dense", "diagonal"):
        out = attend_packed(qkv, compile_mask(mask, 1, backend))
        assert out.dtype == torch.bfloat16
        errors[backend] = (out.double() - exact).abs().max()
    assert errors["diagonal"] <= 1.2 * errors["dense"]


@pytest.mark.parametrize("backend", ["dense", "diagonal"])
def test_autocast_determines_the_dtype(backend):
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 3)
    compiled = compile_mask(mask, 0, backend)
    qkv = random_qkv(9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_packed(qkv, compiled)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(out.double(), oracle(qkv, mask), rtol=0.05, atol=0.05)


@needs_compiler
def test_a_whole_model_compiles_without_a_graph_break():
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 4, 4)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = {**sizes, "dropout": 0.0, "attention_mask": mask}
    model = VisionTransformer(**config, backend="diagonal")
    reference = VisionTransformer(**config, backend="dense")
    reference.load_state_dict(model.state_dict())

    images = torch.randn(3, 3, 16, 16)
    logits = torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(logits, reference(images), rtol=1e-4, atol=1e-5)

    logits.square().sum().backward()
    reference(images).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_operator_passes_torchs_checks():
    qkv = random_qkv(7, dtype=torch.float32)
    offsets, valid = diagonal.find_diagonals(masks.build_attention_mask("2d_cardinal", 1, 2, 3))
    torch.library.opcheck(diagonal._attend, (qkv, valid, list(offsets), 1))


def test_without_a_compiler_the_numbers_are_the_same_and_one_warning_is_printed(tmp_path):
    program = (
        "import torch, attention, masks\n"
        "from attention import diagonal as formulas\n"
        "formulas.EAGER_DEVICES = ()\n"  # as on a GPU
        "mask = masks.build_attention_mask('2d_cardinal', 1, 4, 5)\n"
        "dense = attention.compile_mask(mask, 1, 'dense')\n"
        "diagonal = attention.compile_mask(mask, 1, 'diagonal')\n"
        "qkv = torch.randn(2, 21, 3, 2, 8)\n"
        "for _ in range(2):\n"
        "    expected = attention.attend_packed(qkv, dense)\n"
        "    torch.testing.assert_close(attention.attend_packed(qkv, diagonal), expected)\n"
        "print('same')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=utils.REPOSITORY,
        env={**os.environ, "CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr
    assert done.stderr.count("runs uncompiled") == 1


# --------------------------------------------------------------------------------------------------
# Compiled masks: refusals, devices, kernels


@pytest.mark.parametrize(
    ("mask", "options", "words"),
    [
        (torch.ones(3, 4, dtype=torch.bool), {}, r"\[N, N\], got \[3, 4\]"),
        (torch.ones(3, dtype=torch.bool), {}, r"\[N, N\], got \[3\]"),
        (torch.ones(3, 3), {}, "boolean mask.*float32"),
        (torch.tensor([[1, 0], [0, 0]]).bool(), {}, "row 1 of the mask has no neighbor"),
        (
            torch.eye(3).bool(),
            {"backend": "fast"},
            "unknown backend 'fast'.*dense, native, diagonal, flex, tiled, varlen",
        ),
        (torch.eye(3).bool(), {"num_global_tokens": -1}, "at least 0, got -1"),
    ],
)
def test_bad_masks_are_refused(mask, options, words):
    with pytest.raises(ValueError, match=words):
        compile_mask(mask, **options)


def test_a_wrong_number_of_tokens_is_refused():
    compiled = compile_mask(torch.eye(4, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match="got 4 tokens"):
        attend_packed(random_qkv(4), compiled)


def test_too_many_diagonals_fall_back_to_dense_with_a_reason():
    mask = torch.ones(80, 80, dtype=torch.bool)
    compiled = compile_mask(mask, 0, "diagonal")
    assert compiled.backend == "dense"
    assert "more than 64 non-zero diagonals" in compiled.choice.reason
    assert_matches_oracle(compiled, mask, random_qkv(80))
    with pytest.raises(ValueError, match="more than 64"):
        compiled.apply_choice(Choice("diagonal", ""))

    scattered = torch.eye(200, dtype=torch.bool)
    scattered[0] = True  # few entries, many diagonals
    assert compile_mask(scattered, 0, "diagonal").backend == "dense"


def test_flex_runs_only_on_cuda():
    compiled = compile_mask(torch.eye(4, dtype=torch.bool), 0, "flex")
    with pytest.raises(ValueError, match="'flex' runs on CUDA, not on cpu"):
        attend_packed(random_qkv(4), compiled)


@pytest.fixture
def flex_on_the_cpu(monkeypatch):
    """The forward of FlexAttention runs on the CPU too, slowly."""
    monkeypatch.setattr(flex, "DEVICES", ("cpu",))


def test_the_block_mask_of_flex_equals_the_mask(flex_on_the_cpu):
    mask = masks.build_attention_mask("2d_cardinal", 1, 12, 15)
    compiled = compile_mask(mask, 1, "flex")
    allowed = compiled.with_global_tokens()
    i, j = torch.meshgrid(torch.arange(181), torch.arange(181), indexing="ij")
    assert torch.equal(compiled.block_mask.mask_mod(0, 0, i, j), allowed)
    blocks = [[allowed[r : r + 128, c : c + 128].any() for c in (0, 128)] for r in (0, 128)]
    assert torch.equal(compiled.block_mask.to_dense()[0, 0].bool(), torch.tensor(blocks))


def test_the_block_mask_is_built_on_arrival_at_a_device_not_in_a_forward(
    flex_on_the_cpu, monkeypatch
):
    mask = masks.build_attention_mask("2d_cardinal", 1, 4, 5)
    compiled = compile_mask(mask, 1, "auto")
    assert compiled.block_mask is None
    compiled.apply_choice(Choice("flex", "as another rank chose"))
    before = compiled.block_mask
    # Stands for a move to another device: the block mask refers to tensors there.
    compiled.to(torch.float32)
    assert compiled.block_mask is not before

    def fail(*args, **kwargs):
        pytest.fail("built in a forward")

    monkeypatch.setattr("torch.nn.attention.flex_attention.create_block_mask", fail)
    qkv = random_qkv(21, dtype=torch.float32, head_dim=16).detach()
    forward = torch.compile(lambda x: attend_packed(x, compiled), fullgraph=True, backend="eager")
    torch.testing.assert_close(forward(qkv).double(), oracle(qkv, mask, 1), rtol=1e-5, atol=1e-5)


def test_flex_is_compiled_once_per_configuration(flex_on_the_cpu, monkeypatch):
    """One function for several shapes would become dynamic at the second, and later give up."""
    real_compile = torch.compile
    graphs = []

    def keep(graph, inputs):
        graphs.append(inputs)
        return graph

    def compile_quickly(function, *, options, **arguments):
        return real_compile(function, backend=keep, **arguments)

    monkeypatch.setattr(diagonal.torch, "compile", compile_quickly)
    monkeypatch.setattr(diagonal, "compile_for", functools.cache(diagonal.compile_for.__wrapped__))
    mask_types = ("2d_cardinal", "2d_all_neighbors")
    shapes = [(mask_type, width) for width in (3, 4) for mask_type in mask_types]
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for mask_type, width in [*shapes, *shapes]:
            mask = masks.build_attention_mask(mask_type, 1, 3, width)
            qkv = random_qkv(3 * width, head_dim=16, dtype=torch.float32).detach()
            out = attend_packed(qkv, compile_mask(mask, 0, "flex"))
            torch.testing.assert_close(out.double(), oracle(qkv, mask), rtol=1e-5, atol=1e-5)

    assert len(graphs) == 2
    # A dynamic size would be a number.
    assert all(isinstance(x, torch.Tensor) for inputs in graphs for x in inputs)


@pytest.mark.parametrize(
    ("mask_type", "allowed"), [("2d_cardinal", (False, True, True)), ("full", (True, True, True))]
)
def test_masked_attention_on_a_gpu_does_not_use_cudnn(mask_type, allowed, monkeypatch):
    """Its backward returns NaN for some masks. Full attention keeps whatever torch would choose."""
    kernels = ("cudnn", "mem_efficient", "math")
    switches = [getattr(torch.backends.cuda, f"{name}_sdp_enabled") for name in kernels]
    sdpa = dispatch.F.scaled_dot_product_attention
    seen = []

    def record(*args, **kwargs):
        seen.append(tuple(enabled() for enabled in switches))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(dispatch, "CUDNN_DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch.F, "scaled_dot_product_attention", record)
    mask = masks.build_attention_mask(mask_type, 1, 8, 8)
    compiled = compile_mask(mask, 0, "dense")
    attend_packed(random_qkv(64), compiled)
    assert seen == [allowed]


def test_attention_without_cudnn_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.setattr(dispatch, "CUDNN_DEVICES", ("cpu",))
    mask = masks.build_attention_mask("2d_cardinal", 1, 4, 4)
    compiled = compile_mask(mask, 0, "dense")
    qkv = random_qkv(16)
    forward = torch.compile(
        lambda x: attend_packed(x, compiled), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(forward(qkv), oracle(qkv, mask))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_very_negative_scores_have_finite_gradients_on_cuda(dtype):
    """64 tokens, and log-sum-exps far below -88.7: here cuDNN's backward returned NaN."""
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 8, 8)
    compiled = compile_mask(mask, 0, "dense").cuda()
    qkv = random_qkv(64, heads=4, head_dim=64, dtype=torch.float32).detach()
    qkv[:, :, 0] = 5 + qkv[:, :, 0].abs()
    qkv[:, :, 1] = -5 - qkv[:, :, 1].abs()
    qkv = qkv.to(dtype).requires_grad_()

    out = attend_packed(qkv.cuda(), compiled)
    exact = oracle(qkv, mask)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(x, qkv, grad.to(x))[0].float() for x in (out, exact))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["dense", "diagonal", "flex", "tiled"])
def test_backends_match_the_oracle_on_cuda(backend):
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 12, 15)
    compiled = compile_mask(mask, 1, backend).cuda()
    qkv = random_qkv(181, head_dim=32, dtype=torch.float32)
    grad = torch.randn(2, 181, 2, 32)
    out = attend_packed(qkv.cuda(), compiled)
    exact = oracle(qkv, mask, 1)
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-3, atol=1e-3)
    ours, theirs = (torch.autograd.grad(x, qkv, grad.to(x))[0] for x in (out, exact))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ["dense", "diagonal"])
@pytest.mark.parametrize("num_tokens", [4, 80])  # 80: too many diagonals
def test_a_compiled_mask_follows_its_tokens_to_their_device(backend, num_tokens):
    compiled = compile_mask(torch.ones(num_tokens, num_tokens, dtype=torch.bool), 0, backend)
    compiled.apply_choice(Choice(compiled.backend, "chosen after the model was moved"))
    compiled.follow(torch.device("meta"))
    assert {buffer.device.type for buffer in compiled.buffers()} <= {"meta"}


def test_compiled_masks_leave_no_trace_in_a_state_dict():
    for backend in ("dense", "diagonal", "auto"):
        compiled = local_mask(backend)
        assert compiled.state_dict() == {}


# --------------------------------------------------------------------------------------------------
# The measured choice


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """(log of what was measured, timings to return instead); each test has its own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    log = []
    pretended = {"dense": 1.0, "diagonal": 0.5}

    def measure(compiled, candidates, *args):
        log.append(candidates)
        return {name: pretended[name] for name in candidates if name in pretended}

    monkeypatch.setattr(choice, "_measure", measure)
    return log, pretended


def choose(compiled, num_calls=1000):
    cpu = torch.device("cpu")
    chosen = attention.choose_backend(compiled, 2, 2, 8, torch.float32, cpu, num_calls)
    compiled.apply_choice(chosen)
    return compiled


def test_measure_takes_the_fastest_and_measures_once(measured):
    log, _ = measured
    compiled = choose(local_mask())
    assert compiled.backend == "diagonal"
    assert compiled.choice.timings == {"dense": 1.0, "diagonal": 0.5}
    assert "dense 1000.00 ms, diagonal 500.00 ms" in compiled.choice.reason
    assert log == [["dense", "diagonal"]]
    assert choose(local_mask()).backend == "diagonal"
    assert len(log) == 1


def test_measure_keeps_dense_if_it_is_the_fastest(measured):
    measured[1]["diagonal"] = 2.0
    assert choose(local_mask()).backend == "dense"


def test_a_cache_that_is_not_writable_is_replaced_by_a_temporary_one(
    measured, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(utils.tempfile, "gettempdir", lambda: str(tmp_path))
    assert choose(local_mask()).backend == "diagonal"
    assert list(tmp_path.glob("cache-*/local-attention-vits/*.json"))


@pytest.mark.parametrize(
    "damaged", ['{"dense": ', '{"dense": "fast"}', '{"dense": null}', '{"magic": 1.0}']
)
def test_a_damaged_cache_is_measured_again(measured, tmp_path, damaged):
    choose(local_mask())
    for path in (tmp_path / "local-attention-vits").glob("*.json"):
        path.write_text(damaged)
    assert choose(local_mask()).backend == "diagonal"
    assert len(measured[0]) == 2


@pytest.mark.parametrize("backend", ["dense", "diagonal"])
def test_a_requested_backend_is_not_measured(measured, backend):
    assert choose(local_mask(backend)).backend == backend
    assert measured[0] == []


def test_full_attention_and_masks_without_an_alternative_are_not_measured(measured):
    assert choose(compile_mask(None, 1)).backend == "dense"
    compiled = choose(compile_mask(torch.ones(80, 80, dtype=torch.bool), 0, "measure"))
    assert (compiled.backend, measured[0]) == ("dense", [])
    assert "more than 64" in compiled.choice.reason


def test_a_real_measurement_leaves_out_what_does_not_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def broken(*args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(diagonal, "attend", broken)
    compiled = choose(local_mask(), num_calls=10**9)
    assert compiled.backend == "dense"
    assert compiled.choice.timings["diagonal"] is None
    warning = "backend diagonal does not work here and is left out: no such instruction"
    assert warning in capsys.readouterr().err

    # The failure is remembered, rather than tried in every run of a sweep.
    again = choose(local_mask(), num_calls=10**9)
    assert (again.backend, again.choice.timings) == ("dense", compiled.choice.timings)
    assert capsys.readouterr().err == ""


def test_running_out_of_memory_while_measuring_is_not_remembered(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attend = diagonal.attend

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(diagonal, "attend", out_of_memory)
    compiled = choose(local_mask(), num_calls=10**9)
    assert (compiled.backend, compiled.choice.timings.keys()) == ("dense", {"dense"})
    warning = "backend diagonal is left out of this choice: CUDA out of memory"
    assert warning in capsys.readouterr().err

    monkeypatch.setattr(diagonal, "attend", attend)
    again = choose(local_mask(), num_calls=10**9)
    assert again.choice.timings.keys() == {"dense", "diagonal"}


def test_another_backend_is_chosen_if_dense_attention_does_not_fit(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(dispatch.F, "scaled_dot_product_attention", out_of_memory)
    compiled = choose(local_mask(), num_calls=1)
    assert (compiled.backend, compiled.choice.timings.keys()) == ("diagonal", {"diagonal"})

    monkeypatch.setattr(diagonal, "attend", out_of_memory)
    another = compile_mask(masks.build_attention_mask("2d_cardinal", 2, 3, 4), 1, "measure")
    with pytest.raises(RuntimeError, match="out of memory with every backend tried") as caught:
        choose(another, num_calls=1)
    assert utils.says_no_memory(caught.value)


def test_a_backend_that_runs_out_of_memory_in_a_later_round_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attend = diagonal.attend
    calls = []

    def out_of_memory_later(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return attend(*args)

    monkeypatch.setattr(diagonal, "attend", out_of_memory_later)
    compiled = choose(local_mask(), num_calls=10**9)
    assert (compiled.backend, compiled.choice.timings.keys()) == ("dense", {"dense"})
    assert len(calls) == 3


def test_memory_is_freed_once_the_error_no_longer_holds_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    held = []
    alive_when_freed = []

    def out_of_memory(*args):
        scores = torch.zeros(3)
        held.append(weakref.ref(scores))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(diagonal, "attend", out_of_memory)
    monkeypatch.setattr(
        hardware, "free_unused_memory", lambda device: alive_when_freed.append(held[-1]())
    )
    choose(local_mask(), num_calls=10**9)
    assert alive_when_freed == [None]


def test_what_fits_is_measured_once_even_if_dense_attention_never_fits(measured):
    log, pretended = measured
    del pretended["dense"]
    for _ in range(2):
        assert choose(local_mask()).backend == "diagonal"
    assert log == [["dense", "diagonal"], ["dense"]]

    pretended["dense"] = 0.1  # now it fits
    assert choose(local_mask()).backend == "dense"
    assert log[2:] == [["dense"]]


def test_timings_of_other_kernels_are_not_reused(measured, monkeypatch):
    choose(local_mask())
    monkeypatch.setattr(timings, "_kernels_hash", lambda: "another version")
    choose(local_mask())
    assert len(measured[0]) == 2


def test_a_kernel_that_the_compiler_rejects_runs_uncompiled(compiled_here, monkeypatch, capsys):
    """Metal, for example, allows 31 buffers per kernel."""
    calls = []

    def reject(function, **options):
        def kernel(*arguments):
            calls.append(function.__name__)
            raise RuntimeError("too many buffers\nand more")

        return kernel

    monkeypatch.setattr(diagonal, "can_compile", lambda device_type: True)
    monkeypatch.setattr(diagonal, "_KERNELS", {})
    monkeypatch.setattr(diagonal.torch, "compile", reject)
    diagonal.compile_for.cache_clear()
    diagonal._warn_of_failed_compilation.cache_clear()

    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 7)
    compiled = compile_mask(mask, 1, "diagonal")
    for _ in range(2):
        assert_matches_oracle(compiled, mask, random_qkv(22))
    assert calls == ["forward", "backward"]  # each tried once
    assert capsys.readouterr().err.count("runs uncompiled: too many buffers\n") == 1
    diagonal.compile_for.cache_clear()


def test_a_mask_that_is_changed_later_does_not_change_what_was_compiled():
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4).clone()
    compiled = compile_mask(mask, 0, "dense")
    mask.fill_(True)
    assert compiled.mask.sum() < mask.sum()


def test_errors_are_computed_on_a_device_that_has_float64(monkeypatch):
    """Apple's GPUs lack it: tensors are copied to the CPU first."""
    from benchmarks import errors

    class OnApple(torch.Tensor):
        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return super().cpu().as_subclass(torch.Tensor)

    qkv = random_qkv(13, dtype=torch.float32).detach().as_subclass(OnApple).requires_grad_()
    compiled = local_mask("dense")
    error = errors.largest_error(lambda x: attend_packed(x, compiled), qkv, compiled.mask, 1)
    assert error < 1e-5


# --------------------------------------------------------------------------------------------------
# In a run


def train_digits(output, *arguments):
    """Train for two epochs; returns the run's folder."""
    options = ["--dataset", "digits", "--img_size", "8", "--patch_size", "2"]
    options += ["--model", "vit_micro", "--mask_type", "2d_cardinal"]
    options += ["--batch_size", "256", "--epochs", "2"]
    options += ["--device", "cpu", "--output_dir", str(output)]
    assert main.main([*options, *arguments]) == 0
    return output / "digits" / "2d_cardinal_expansion_1" / "seed_0"


def test_training_with_each_backend_gives_the_same_losses(tmp_path):
    losses = []
    for backend in ("dense", "diagonal"):
        folder = train_digits(tmp_path / backend, "--backend", backend)
        chosen = json.loads((folder / "config.json").read_text())["attention"]
        assert (chosen["backend"], chosen["backend_reason"]) == (backend, "asked for")
        losses.append([row["eval_loss"] for row in utils.read_json_lines(folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_checkpoint_evaluates_the_same_with_another_backend(tmp_path):
    import eval as evaluation

    checkpoint = train_digits(tmp_path, "--backend", "diagonal") / "last.pt"
    reports = []
    for backend in ("dense", "diagonal"):
        output = tmp_path / f"{backend}.json"
        arguments = ["--checkpoint", str(checkpoint), "--backend", backend, "--device", "cpu"]
        assert evaluation.main([*arguments, "--output", str(output)]) == 0
        reports.append(utils.read_json(output))
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-5)


def test_a_run_measures_only_where_asked_and_a_resumed_run_keeps_the_recorded_choice(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_measure", lambda *args: {"dense": 0.5, "diagonal": 1.0})
    folder = train_digits(tmp_path / "auto")
    about = utils.read_json(folder / "config.json")["attention"]
    assert (about["backend"], about["backend_seconds"]) == ("dense", {})
    assert about["backend_reason"].startswith("by rule")

    folder = train_digits(tmp_path, "--backend", "measure")
    config = utils.read_json(folder / "config.json")
    assert config["attention"]["backend_seconds"] == {"dense": 0.5, "diagonal": 1.0}
    assert config["attention"]["backend_reason"].startswith("the fastest measured")

    def fail(*args, **kwargs):
        pytest.fail("chosen again")

    (folder / "summary.json").unlink()
    monkeypatch.setattr(attention, "choose_backend", fail)
    train_digits(tmp_path, "--backend", "measure")
    assert utils.read_json(folder / "config.json")["attention"] == config["attention"]
