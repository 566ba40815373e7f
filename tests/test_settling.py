"""How `auto` settles on a backend without measuring: on any device, and before any compilation."""

import time

import pytest
import torch
from test_attention import oracle, random_qkv

import attention
import masks
import utils
from attention import (
    Choice,
    attend,
    attend_packed,
    build,
    compile_mask,
    compiled_mask,
    flex,
    rule,
    tiled,
    timings,
)
from attention.compiled_mask import NOT_CHOSEN
from models import VisionTransformer
from runtime import hardware

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_native = pytest.mark.skipif(build.error() is not None, reason=str(build.error()))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(timings, "path_of", lambda *key: tmp_path / "timings.json")
    return tmp_path / "timings.json"


@pytest.fixture
def on_a_gpu_machine(monkeypatch):
    monkeypatch.setattr(compiled_mask, "has_accelerator", lambda: True)
    monkeypatch.setattr(tiled, "error", lambda device_type: None)


def local_mask(side=14):
    return masks.build_attention_mask("2d_all_neighbors", 2, side, side)


@needs_native
def test_without_an_accelerator_a_mask_is_settled_when_it_is_made():
    compiled = compile_mask(local_mask())
    assert compiled.backend == "native"
    assert compiled.choice.reason.startswith("by rule: ")


@needs_native
def test_a_model_that_is_compiled_before_its_first_call_is_not_dense():
    model = VisionTransformer(
        img_size=16, patch_size=2, embed_dim=32, depth=1, num_heads=2, pool="mean", dropout=0.0,
        attention_mask=masks.build_attention_mask("2d_cardinal", 1, 8, 8),
    )  # fmt: skip
    images = torch.randn(2, 3, 16, 16)
    logits = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    assert model.compiled_mask.backend == "native"
    torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)


@needs_native
def test_where_there_is_an_accelerator_the_first_call_settles(on_a_gpu_machine):
    compiled = compile_mask(local_mask())
    assert compiled.choice.reason == NOT_CHOSEN
    qkv = random_qkv(196, dtype=torch.float32)
    out = attend_packed(qkv, compiled)
    assert compiled.backend == "native"
    torch.testing.assert_close(out.double(), oracle(qkv, local_mask()), rtol=1e-4, atol=1e-5)


def test_arrival_on_a_gpu_settles(on_a_gpu_machine):
    compiled = compile_mask(local_mask())
    compiled.settle(CUDA)  # as `to` does
    assert compiled.backend == "tiled"
    assert compiled.choice.reason.startswith("by rule, an estimate: ")
    before = compiled.choice
    compiled.settle(CUDA)
    assert compiled.choice is before

    compiled.settle(CPU)
    assert compiled.backend != "tiled"
    compiled.settle(CUDA)
    assert compiled.backend == "tiled"


def test_a_move_settles_before_anything_is_traced(on_a_gpu_machine, monkeypatch):
    seen = []
    monkeypatch.setattr(compiled_mask.CompiledMask, "settle", lambda *call: seen.append(call[1]))
    compiled = compile_mask(local_mask())
    assert seen == []
    compiled.to(torch.float64)
    assert seen == []
    compiled.to("meta")
    assert seen == [torch.device("meta")]


@needs_native
def test_a_choice_from_outside_stays_where_it_can_run(on_a_gpu_machine):
    compiled = compile_mask(local_mask())
    compiled.apply_choice(Choice("diagonal", "as another rank chose"))
    for device in (CUDA, CPU):
        compiled.settle(device)
        assert compiled.choice.reason == "as another rank chose"

    compiled.apply_choice(Choice("native", "as another rank chose"))
    compiled.settle(CUDA)
    assert compiled.backend == "tiled"


@pytest.mark.parametrize("backend", ["dense", "measure", "diagonal"])
def test_what_was_asked_for_is_not_settled(on_a_gpu_machine, backend):
    compiled = compile_mask(local_mask(), backend=backend)
    before = compiled.choice
    for device in (CPU, CUDA):
        compiled.settle(device)
    assert compiled.choice is before


@pytest.mark.parametrize("separate", [False, True])
def test_the_first_call_takes_what_was_measured_before(own_cache, separate):
    utils.write_json(own_cache, {"dense": 2.0, "diagonal": 1.0})
    compiled = compile_mask(local_mask(6))
    qkv = random_qkv(36)
    if separate:
        attend(*qkv.permute(2, 0, 3, 1, 4), compiled)
    else:
        attend_packed(qkv, compiled)
    assert compiled.backend == "diagonal"
    assert compiled.choice.reason.startswith("the fastest measured: ")

    utils.write_json(own_cache, {"dense": 1.0, "diagonal": 2.0})
    attend_packed(qkv, compiled)
    assert compiled.backend == "diagonal"  # it looks once


def test_a_run_takes_what_was_measured_before_and_measures_nothing(own_cache, monkeypatch):
    monkeypatch.setattr(attention.choice, "_measure", None)
    utils.write_json(own_cache, {"dense": 2.0, "diagonal": 1.0})
    compiled = compile_mask(local_mask(6))
    chosen = attention.choose_backend(compiled, 2, 2, 8, torch.float32, CPU, num_calls=1)
    assert (chosen.backend, chosen.timings) == ("diagonal", {"dense": 2.0, "diagonal": 1.0})

    own_cache.unlink()
    chosen = attention.choose_backend(compiled, 2, 2, 8, torch.float32, CPU, num_calls=1)
    assert chosen.reason.startswith("by rule")


@needs_native
@pytest.mark.parametrize("side", [28, 40])
def test_a_fresh_mask_is_not_slower_than_dense_attention_from_the_second_call_on(side):
    """By so much that it shows on a machine that is doing other things."""
    qkv = random_qkv(side**2, heads=4, head_dim=32, dtype=torch.float32)
    seconds = {}
    for backend in ("auto", "dense"):
        compiled = compile_mask(local_mask(side), backend=backend)

        def step(compiled=compiled):
            torch.autograd.grad(attend_packed(qkv, compiled).sum(), qkv)

        step()
        seconds[backend] = min(hardware.seconds_of(step, CPU) for _ in range(3))
    assert seconds["auto"] < seconds["dense"]


# --------------------------------------------------------------------------------------------------
# Blocks of FlexAttention


@pytest.mark.parametrize(
    ("side", "step", "density"), [(64, 1, 0.092), (64, 2, 0.092), (128, 2, 0.039)]
)
def test_blocks_of_squares_on_large_grids(side, step, density):
    mask = masks.build_attention_mask("2d_all_neighbors", step, side, side)
    assert flex.share_of_blocks(mask) == pytest.approx(density, abs=6e-4)


def test_blocks_in_which_anything_is_allowed_are_counted(monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 2)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[0, 0] = mask[4, 4] = mask[1, 3] = True
    assert flex.share_of_blocks(mask) == pytest.approx(3 / 9)


def test_estimates_grow_with_heads_and_channels():
    few, many = (rule.estimate({"dense": 10**6}, 1000, heads, 64)["dense"] for heads in (12, 120))
    fixed = rule.FIXED_SECONDS["dense"]
    assert many - fixed == pytest.approx(10 * (few - fixed))


def test_a_duration_is_that_of_one_call():
    calls = []
    seconds = hardware.seconds_per_call(lambda: calls.append(time.sleep(0.01)), CPU, 5)
    assert len(calls) == 5
    assert 0.01 <= seconds < 0.05
