"""Every backend against dense attention written out in float64: outputs and gradients."""

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
from attention import Choice, attend, attend_packed, choice, compile_mask, compiled_mask, diagonal
from models import VisionTransformer
from runtime import hardware

LOCAL_TYPES = masks.MASK_TYPES[1:]


def oracle(qkv, mask, num_global=0):
    """Softmax of all scores, in float64, with forbidden pairs at minus infinity."""
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)  # [B, H, T, D]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        allowed = torch.ones(len(mask) + num_global, len(mask) + num_global, dtype=torch.bool)
        allowed[num_global:, num_global:] = mask
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)  # [B, T, H, D]


def random_qkv(num_tokens, batch=2, heads=2, head_dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, num_tokens, 3, heads, head_dim, generator=generator, dtype=torch.float64)
    return qkv.to(dtype).requires_grad_()


def assert_matches_oracle(plan, mask, qkv, tolerance=1e-10):
    grad = torch.randn(qkv[:, :, 0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = attend_packed(qkv, plan)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad.to(out.dtype))
    exact = oracle(qkv, mask, plan.num_global_tokens)
    (exact_grad,) = torch.autograd.grad(exact, qkv, grad)
    assert out.shape == qkv[:, :, 0].shape
    assert out.dtype == grad_qkv.dtype == qkv.dtype
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_qkv.double(), exact_grad.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(diagonal, "can_compile", lambda device_type: False)


# ---------------------------------------------------------------------------------------------------------------------
# The formulas, uncompiled


@pytest.mark.parametrize("num_global", [0, 1, 3])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (4, 3), (3, 5)])
@pytest.mark.parametrize("mask_type", LOCAL_TYPES)
@pytest.mark.parametrize("backend", ["dense", "diagonal"])
def test_backends_match_the_oracle(uncompiled, backend, mask_type, grid, num_global):
    for step in (0, 1, 2, 7):
        mask = masks.build_attention_mask(mask_type, step, *grid)
        plan = compile_mask(mask, num_global, backend)
        assert plan.backend == backend
        assert_matches_oracle(plan, mask, random_qkv(len(mask) + num_global))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_boolean_mask_matches_the_oracle(data):
    num_tokens = data.draw(st.integers(1, 9))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_tokens**2, max_size=num_tokens**2)))
    mask = mask.view(num_tokens, num_tokens) | torch.eye(num_tokens, dtype=torch.bool).roll(
        data.draw(st.integers(0, 8)), 0
    )
    num_global = data.draw(st.integers(0, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagonal, "can_compile", lambda device_type: False)
        plan = compile_mask(mask, num_global, "diagonal")
        assert_matches_oracle(plan, mask, random_qkv(num_tokens + num_global, batch=1, heads=3, head_dim=5))


@pytest.mark.parametrize("num_global", [0, 2])
def test_gradcheck(uncompiled, num_global):
    mask = masks.generate_2d_attention_mask_cardinal(1, 2, 3)
    plan = compile_mask(mask, num_global, "diagonal")
    qkv = random_qkv(6 + num_global, batch=1, heads=2, head_dim=3)
    assert torch.autograd.gradcheck(lambda x: attend_packed(x, plan), qkv)


def test_full_attention_is_sdpa_without_a_mask():
    plan = compile_mask(None, 1)
    assert plan.backend == "dense"
    assert plan.token_mask is None
    assert_matches_oracle(plan, None, random_qkv(7))


def test_diagonals_are_the_non_zero_ones():
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    offsets, valid = diagonal.find_diagonals(mask)
    assert offsets == (-4, -1, 0, 1, 4)
    for n, offset in enumerate(offsets):
        for i in range(12):
            assert valid[n, i] == (0 <= i + offset < 12 and mask[i, i + offset])


def test_plain_interface_and_non_contiguous_inputs(uncompiled):
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 3, 4)
    plan = compile_mask(mask, 1, "diagonal")
    packed = random_qkv(13)
    q, k, v = packed.permute(2, 0, 3, 1, 4)  # [B, H, T, D], strided
    expected = attend_packed(packed, plan)
    torch.testing.assert_close(attend(q, k, v, plan), expected.transpose(1, 2))
    strided = torch.cat([packed, packed], dim=-1)[..., : packed.shape[-1]]
    assert not strided.is_contiguous()
    torch.testing.assert_close(attend_packed(strided, plan), expected)
    (direct,) = torch.autograd.grad(expected.sum(), packed)
    (plain,) = torch.autograd.grad(attend(q, k, v, plan).transpose(1, 2).sum(), packed)
    torch.testing.assert_close(plain, direct)


def test_backward_is_deterministic(uncompiled):
    plan = compile_mask(masks.build_attention_mask("2d_all_neighbors", 2, 6, 5), 1, "diagonal")
    qkv = random_qkv(31, dtype=torch.float32)
    grads = [torch.autograd.grad(attend_packed(qkv, plan).square().sum(), qkv)[0] for _ in range(2)]
    assert torch.equal(*grads)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled

needs_compiler = pytest.mark.skipif(not diagonal.can_compile("cpu"), reason="torch.compile does not work here")


@needs_compiler
@pytest.mark.parametrize(
    ("mask_type", "step", "grid", "num_global", "head_dim"),
    [("2d_cardinal", 1, (4, 6), 0, 64), ("2d_all_neighbors", 1, (5, 3), 1, 7), ("1d_cardinal", 1, (2, 9), 2, 16)],
)
def test_compiled_kernels_match_the_oracle(mask_type, step, grid, num_global, head_dim):
    mask = masks.build_attention_mask(mask_type, step, *grid)
    qkv = random_qkv(len(mask) + num_global, heads=3, head_dim=head_dim, dtype=torch.float32)
    assert_matches_oracle(compile_mask(mask, num_global, "diagonal"), mask, qkv, tolerance=2e-5)


@needs_compiler
def test_each_configuration_is_compiled_however_many_there_are(monkeypatch):
    """Dynamo would fall back, or fail, at the recompile limit if the configurations shared a code object."""
    monkeypatch.setattr(diagonal, "_KERNELS", {})
    compiled_before = diagonal.compile_for.cache_info().currsize
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for num_tokens in (4, 5, 6):
            mask = torch.eye(num_tokens, dtype=torch.bool)
            assert_matches_oracle(
                compile_mask(mask, 0, "diagonal"), mask, random_qkv(num_tokens, dtype=torch.float32), 2e-5
            )
    assert diagonal.compile_for.cache_info().currsize == compiled_before + 6
    assert len(diagonal._KERNELS) == 6
    assert not {diagonal.forward, diagonal.backward} & {*diagonal._KERNELS.values()}  # none runs uncompiled


@needs_compiler
def test_bf16_is_as_exact_as_sdpas():
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
def test_autocast_computes_in_its_dtype(uncompiled, backend):
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 3)
    plan, qkv = compile_mask(mask, 0, backend), random_qkv(9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_packed(qkv, plan)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(out.double(), oracle(qkv, mask), rtol=0.05, atol=0.05)


@needs_compiler
def test_a_whole_model_compiles_without_a_graph_break():
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 4, 4)
    config = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "dropout": 0.0}
    model = VisionTransformer(**config, attention_mask=mask, backend="diagonal")
    reference = VisionTransformer(**config, attention_mask=mask, backend="dense")
    reference.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 16, 16)
    logits = torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(logits, reference(images), rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    reference(images).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_operators_fake_and_autograd_registrations_hold(uncompiled):
    qkv = random_qkv(7, dtype=torch.float32)
    offsets, valid = diagonal.find_diagonals(masks.build_attention_mask("2d_cardinal", 1, 2, 3))
    torch.library.opcheck(diagonal._attend, (qkv, valid, list(offsets), 1))


def test_without_a_compiler_one_warning_and_the_same_numbers(tmp_path):
    program = (
        "import torch, attention, masks\n"
        "mask = masks.build_attention_mask('2d_cardinal', 1, 4, 5)\n"
        "plans = [attention.compile_mask(mask, 1, backend) for backend in ('dense', 'diagonal')]\n"
        "qkv = torch.randn(2, 21, 3, 2, 8)\n"
        "for _ in range(2):\n"
        "    torch.testing.assert_close(*[attention.attend_packed(qkv, compiled) for compiled in plans])\n"
        "print('same')"
    )
    environment = {**os.environ, "CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=utils.REPOSITORY, env=environment)
    assert done.stdout == "same\n", done.stderr
    assert done.stderr.count("runs uncompiled") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Plans: refusals, reasons, the measured choice


@pytest.mark.parametrize(
    ("mask", "options", "words"),
    [
        (torch.ones(3, 4, dtype=torch.bool), {}, r"\[N, N\], got \[3, 4\]"),
        (torch.ones(3, dtype=torch.bool), {}, r"\[N, N\], got \[3\]"),
        (torch.ones(3, 3), {}, "boolean mask.*float32"),
        (torch.tensor([[1, 0], [0, 0]]).bool(), {}, "row 1 of the mask has no neighbor"),
        (torch.eye(3).bool(), {"backend": "fast"}, "unknown backend 'fast'.*dense, diagonal, flex"),
        (torch.eye(3).bool(), {"num_global_tokens": -1}, "at least 0, got -1"),
    ],
)
def test_bad_masks(mask, options, words):
    with pytest.raises(ValueError, match=words):
        compile_mask(mask, **options)


def test_a_wrong_number_of_tokens():
    plan = compile_mask(torch.eye(4, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match="got 4 tokens"):
        attend_packed(random_qkv(4), plan)


def test_too_many_diagonals_fall_to_dense_and_say_why():
    mask = torch.ones(80, 80, dtype=torch.bool)
    plan = compile_mask(mask, 0, "diagonal")
    assert plan.backend == "dense"
    assert "more than 64 non-zero diagonals" in plan.choice.reason
    assert_matches_oracle(plan, mask, random_qkv(80))
    with pytest.raises(ValueError, match="more than 64"):
        plan.apply_choice(Choice("diagonal", ""))
    scattered = torch.eye(200, dtype=torch.bool)
    scattered[0] = True  # few entries, many diagonals
    assert compile_mask(scattered, 0, "diagonal").backend == "dense"


def test_flex_runs_on_cuda_only():
    plan = compile_mask(torch.eye(4, dtype=torch.bool), 0, "flex")
    with pytest.raises(ValueError, match="'flex' runs on CUDA, not on cpu"):
        attend_packed(random_qkv(4), plan)


@pytest.fixture
def flex_on_the_cpu(monkeypatch):
    """FlexAttention's forward runs on the CPU as well, slowly."""
    monkeypatch.setattr(compiled_mask, "FLEX_DEVICES", ("cpu",))


def test_the_block_mask_of_flex_is_the_mask(flex_on_the_cpu):
    mask = masks.build_attention_mask("2d_cardinal", 1, 12, 15)
    plan = compile_mask(mask, 1, "flex")
    allowed = plan.with_global_tokens()
    i, j = torch.meshgrid(torch.arange(181), torch.arange(181), indexing="ij")
    assert torch.equal(plan.block_mask.mask_mod(0, 0, i, j), allowed)
    blocks = [[allowed[r : r + 128, c : c + 128].any() for c in (0, 128)] for r in (0, 128)]
    assert torch.equal(plan.block_mask.to_dense()[0, 0].bool(), torch.tensor(blocks))


def test_the_block_mask_is_made_when_the_plan_gets_to_its_device_and_not_in_a_forward(flex_on_the_cpu, monkeypatch):
    mask = masks.build_attention_mask("2d_cardinal", 1, 4, 5)
    plan = compile_mask(mask, 1, "auto")
    assert plan.block_mask is None
    plan.apply_choice(Choice("flex", "as another rank has chosen"))
    before = plan.block_mask
    plan.to(torch.float32)  # as a move to another device: the block mask refers to tensors there
    assert plan.block_mask is not before
    monkeypatch.setattr(compiled_mask, "create_block_mask", lambda *args, **kwargs: pytest.fail("made in a forward"))
    qkv = random_qkv(21, dtype=torch.float32, head_dim=16).detach()
    compiled = torch.compile(lambda x: attend_packed(x, plan), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(qkv).double(), oracle(qkv, mask, 1), rtol=1e-5, atol=1e-5)


def test_each_configuration_of_flex_is_compiled_once_and_for_itself(flex_on_the_cpu, monkeypatch):
    """One compiled function for several shapes would turn dynamic at the second, and give up after some more."""
    compile_really, graphs = torch.compile, []

    def keep(graph, inputs):
        graphs.append(inputs)
        return graph

    def compile_quickly(function, *, options, **arguments):
        return compile_really(function, backend=keep, **arguments)

    monkeypatch.setattr(diagonal.torch, "compile", compile_quickly)
    monkeypatch.setattr(diagonal, "compile_for", functools.cache(diagonal.compile_for.__wrapped__))
    shapes = [(mask_type, width) for width in (3, 4) for mask_type in ("2d_cardinal", "2d_all_neighbors")]
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for mask_type, width in [*shapes, *shapes]:
            mask = masks.build_attention_mask(mask_type, 1, 3, width)
            qkv = random_qkv(3 * width, head_dim=16, dtype=torch.float32).detach()
            out = attend_packed(qkv, compile_mask(mask, 0, "flex"))
            torch.testing.assert_close(out.double(), oracle(qkv, mask), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2
    assert all(isinstance(x, torch.Tensor) for inputs in graphs for x in inputs)  # a dynamic size is a number


@pytest.mark.parametrize(("backend", "allowed"), [("dense", (False, True, True)), ("full", (True, True, True))])
def test_masked_attention_on_a_gpu_is_not_given_to_cudnn(backend, allowed, monkeypatch):
    """Its backward returns NaN for some masks. Full attention keeps whatever torch would take."""
    seen, sdpa = [], compiled_mask.F.scaled_dot_product_attention
    switches = [getattr(torch.backends.cuda, f"{name}_sdp_enabled") for name in ("cudnn", "mem_efficient", "math")]

    def record(*args, **kwargs):
        seen.append(tuple(enabled() for enabled in switches))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(compiled_mask, "CUDNN_DEVICES", ("cpu",))
    monkeypatch.setattr(compiled_mask.F, "scaled_dot_product_attention", record)
    mask = None if backend == "full" else masks.build_attention_mask("2d_cardinal", 1, 8, 8)
    plan = compile_mask(mask, 0, "dense")
    attend_packed(random_qkv(64), plan)
    assert seen == [allowed]


def test_the_restriction_to_some_kernels_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.setattr(compiled_mask, "CUDNN_DEVICES", ("cpu",))
    mask = masks.build_attention_mask("2d_cardinal", 1, 4, 4)
    plan, qkv = compile_mask(mask, 0, "dense"), random_qkv(16)
    compiled = torch.compile(lambda x: attend_packed(x, plan), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), oracle(qkv, mask))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_very_negative_scores_have_finite_gradients_on_cuda(dtype):
    """64 tokens, and log-sum-exps far below -88.7: what cuDNN's backward makes NaN of."""
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 8, 8)
    plan = compile_mask(mask, 0, "dense").cuda()
    qkv = random_qkv(64, heads=4, head_dim=64, dtype=torch.float32).detach()
    qkv[:, :, 0], qkv[:, :, 1] = 5 + qkv[:, :, 0].abs(), -5 - qkv[:, :, 1].abs()
    qkv = qkv.to(dtype).requires_grad_()
    out = attend_packed(qkv.cuda(), plan)
    exact = oracle(qkv, mask)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(x, qkv, grad.to(x))[0].float() for x in (out, exact))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["dense", "diagonal", "flex"])
def test_backends_match_the_oracle_on_cuda(backend):
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 12, 15)
    plan = compile_mask(mask, 1, backend).cuda()
    qkv = random_qkv(181, head_dim=32, dtype=torch.float32)
    grad = torch.randn(2, 181, 2, 32)
    out = attend_packed(qkv.cuda(), plan)
    exact = oracle(qkv, mask, 1)
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-3, atol=1e-3)
    ours, theirs = (torch.autograd.grad(x, qkv, grad.to(x))[0] for x in (out, exact))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ["dense", "diagonal"])
@pytest.mark.parametrize("num_tokens", [4, 80])  # 80: too many diagonals
def test_a_plan_follows_its_tokens_to_their_device(backend, num_tokens):
    plan = compile_mask(torch.ones(num_tokens, num_tokens, dtype=torch.bool), 0, backend)
    plan.apply_choice(Choice(plan.backend, "chosen after the model was moved"))
    plan.follow(torch.device("meta"))
    assert {buffer.device.type for buffer in plan.buffers()} <= {"meta"}


def test_plans_leave_no_trace_in_a_state_dict():
    for backend in ("dense", "diagonal", "auto"):
        plan = compile_mask(masks.build_attention_mask("2d_cardinal", 1, 3, 3), 1, backend)
        assert plan.state_dict() == {}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Timings to pretend, and a log of what was measured; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    log, pretended = [], {"dense": 1.0, "diagonal": 0.5}

    def measure(plan, candidates, *args):
        log.append(candidates)
        return {name: pretended[name] for name in candidates if name in pretended}

    monkeypatch.setattr(choice, "_measure", measure)
    return log, pretended


def choose(plan, num_calls=1000):
    plan.apply_choice(attention.choose_backend(plan, 2, 2, 8, torch.float32, torch.device("cpu"), num_calls))
    return plan


def local_plan(backend="auto"):
    return compile_mask(masks.build_attention_mask("2d_cardinal", 1, 3, 4), 1, backend)


def test_auto_takes_the_fastest_and_measures_once(measured):
    log, _ = measured
    plan = choose(local_plan())
    assert plan.backend == "diagonal"
    assert plan.choice.timings == {"dense": 1.0, "diagonal": 0.5}
    assert "dense 1000.00 ms, diagonal 500.00 ms" in plan.choice.reason
    assert log == [["dense"], ["dense", "diagonal"]]
    assert choose(local_plan()).backend == "diagonal"
    assert len(log) == 2


def test_auto_keeps_dense_where_it_is_the_fastest(measured):
    measured[1]["diagonal"] = 2.0
    assert choose(local_plan()).backend == "dense"


def test_auto_stays_dense_in_a_short_run_whatever_was_measured_before(measured):
    choose(local_plan())
    plan = choose(local_plan(), num_calls=10)
    assert plan.backend == "dense"
    assert "10.0 s" in plan.choice.reason


def test_a_cache_that_cannot_be_written_is_replaced(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(choice.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    assert choose(local_plan()).backend == "diagonal"
    assert list((tmp_path / "temporary" / "local-attention-vits").glob("*.json"))


@pytest.mark.parametrize("damaged", ['{"dense": ', '{"dense": "fast"}', '{"dense": null}', '{"magic": 1.0}'])
def test_an_unreadable_cache_is_measured_again(measured, tmp_path, damaged):
    choose(local_plan())
    for path in (tmp_path / "local-attention-vits").glob("*.json"):
        path.write_text(damaged)
    assert choose(local_plan()).backend == "diagonal"
    assert len(measured[0]) == 4


@pytest.mark.parametrize("backend", ["dense", "diagonal"])
def test_what_was_asked_for_is_not_measured(measured, backend):
    assert choose(local_plan(backend)).backend == backend
    assert measured[0] == []


def test_full_and_hopeless_masks_are_not_measured(measured):
    assert choose(compile_mask(None, 1)).backend == "dense"
    plan = choose(compile_mask(torch.ones(80, 80, dtype=torch.bool)))
    assert (plan.backend, measured[0]) == ("dense", [])
    assert "more than 64" in plan.choice.reason


def test_a_real_measurement_leaves_out_what_does_not_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def broken(*args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(diagonal, "attend", broken)
    plan = choose(local_plan(), num_calls=10**9)
    assert plan.backend == "dense"
    assert plan.choice.timings["diagonal"] is None
    assert "backend diagonal does not work here and is left out: no such instruction" in capsys.readouterr().err
    again = choose(local_plan(), num_calls=10**9)  # the failure is remembered, and not tried in every run of a sweep
    assert (again.backend, again.choice.timings) == ("dense", plan.choice.timings)
    assert capsys.readouterr().err == ""


def test_running_out_of_memory_while_measuring_is_not_remembered(uncompiled, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attend = diagonal.attend

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(diagonal, "attend", out_of_memory)
    plan = choose(local_plan(), num_calls=10**9)
    assert (plan.backend, plan.choice.timings.keys()) == ("dense", {"dense"})
    assert "backend diagonal is left out of this choice: CUDA out of memory" in capsys.readouterr().err
    monkeypatch.setattr(diagonal, "attend", attend)
    assert choose(local_plan(), num_calls=10**9).choice.timings.keys() == {"dense", "diagonal"}


def test_another_backend_is_taken_where_dense_attention_does_not_fit(uncompiled, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(compiled_mask.F, "scaled_dot_product_attention", out_of_memory)
    plan = choose(local_plan(), num_calls=1)
    assert (plan.backend, plan.choice.timings.keys()) == ("diagonal", {"diagonal"})
    monkeypatch.setattr(diagonal, "attend", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory with every backend tried") as caught:
        choose(compile_mask(masks.build_attention_mask("2d_cardinal", 2, 3, 4), 1), num_calls=1)
    assert utils.says_no_memory(caught.value)


def test_memory_that_runs_out_in_a_later_turn_leaves_the_backend_out(uncompiled, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls, attend = [], diagonal.attend

    def out_of_memory_later(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return attend(*args)

    monkeypatch.setattr(diagonal, "attend", out_of_memory_later)
    plan = choose(local_plan(), num_calls=10**9)
    assert (plan.backend, plan.choice.timings.keys(), len(calls)) == ("dense", {"dense"}, 3)


def test_memory_is_given_back_when_the_error_holds_it_no_more(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    held, alive_when_freed = [], []

    def out_of_memory(*args):
        scores = torch.zeros(3)
        held.append(weakref.ref(scores))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(diagonal, "attend", out_of_memory)
    monkeypatch.setattr(hardware, "free_unused_memory", lambda device: alive_when_freed.append(held[-1]()))
    choose(local_plan(), num_calls=10**9)
    assert alive_when_freed == [None]


def test_what_fits_is_measured_once_though_dense_attention_never_fits(measured):
    log, pretended = measured
    del pretended["dense"]
    for _ in range(2):
        assert choose(local_plan()).backend == "diagonal"
    assert log == [["dense"], ["diagonal"], ["dense"]]
    pretended["dense"] = 0.1  # now it fits
    assert choose(local_plan()).backend == "dense"
    assert log[3:] == [["dense"]]


def test_timings_of_other_kernels_are_not_used_again(measured, monkeypatch):
    choose(local_plan())
    monkeypatch.setattr(choice, "_kernels_hash", lambda: "another version")
    choose(local_plan())
    assert len(measured[0]) == 4


def test_a_kernel_that_the_compiler_refuses_runs_uncompiled(monkeypatch, capsys):
    """Metal, for one, allows 31 buffers in a kernel."""
    calls = []

    def refuse(function, **options):
        def kernel(*arguments):
            calls.append(function.__name__)
            raise RuntimeError("too many buffers\nand more")

        return kernel

    monkeypatch.setattr(diagonal, "can_compile", lambda device_type: True)
    monkeypatch.setattr(diagonal, "_KERNELS", {})
    monkeypatch.setattr(diagonal.torch, "compile", refuse)
    diagonal.compile_for.cache_clear()
    diagonal._warn_of_failed_compilation.cache_clear()
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 7)
    plan = compile_mask(mask, 1, "diagonal")
    for _ in range(2):
        assert_matches_oracle(plan, mask, random_qkv(22))
    assert calls == ["forward", "backward"]  # tried once
    assert capsys.readouterr().err.count("runs uncompiled: too many buffers\n") == 1
    diagonal.compile_for.cache_clear()


def test_exact_errors_are_computed_where_there_is_float64(monkeypatch):
    """Apple's GPUs have none: tensors come to the CPU first."""
    from benchmarks import candidates

    class OnApple(torch.Tensor):
        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return super().cpu().as_subclass(torch.Tensor)

    qkv = random_qkv(13, dtype=torch.float32).detach().as_subclass(OnApple).requires_grad_()
    plan = local_plan("dense")
    assert candidates.largest_error(lambda x: attend_packed(x, plan), qkv, plan.mask, 1) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def train_digits(output, *arguments):
    options = ["--dataset", "digits", "--model", "vit_micro", "--img_size", "8", "--patch_size", "2", "--device", "cpu"]
    options += ["--batch_size", "256", "--epochs", "2", "--mask_type", "2d_cardinal", "--output_dir", str(output)]
    assert main.main([*options, *arguments]) == 0
    return output / "digits" / "2d_cardinal_expansion_1" / "seed_0"


def test_training_with_each_backend_gives_the_same_losses(uncompiled, tmp_path):
    losses = []
    for backend in ("dense", "diagonal"):
        folder = train_digits(tmp_path / backend, "--backend", backend)
        config = json.loads((folder / "config.json").read_text())
        assert (config["attention"]["backend"], config["attention"]["backend_reason"]) == (backend, "asked for")
        losses.append([row["eval_loss"] for row in utils.read_json_lines(folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_checkpoint_of_one_backend_evaluates_the_same_with_another(uncompiled, tmp_path):
    import eval as evaluation

    checkpoint = train_digits(tmp_path, "--backend", "diagonal") / "last.pt"
    reports = []
    for backend in ("dense", "diagonal"):
        output = tmp_path / f"{backend}.json"
        arguments = ["--checkpoint", str(checkpoint), "--backend", backend, "--device", "cpu", "--output", str(output)]
        assert evaluation.main(arguments) == 0
        reports.append(utils.read_json(output))
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-5)


def test_a_demo_stays_dense_and_a_resume_keeps_what_was_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = train_digits(tmp_path)
    config = utils.read_json(folder / "config.json")
    assert config["attention"]["backend"] == "dense"
    assert "less than compiling another" in config["attention"]["backend_reason"]
    (folder / "summary.json").unlink()
    monkeypatch.setattr(attention, "choose_backend", lambda *args, **kwargs: pytest.fail("chosen again"))
    train_digits(tmp_path)
    assert utils.read_json(folder / "config.json")["attention"] == config["attention"]
