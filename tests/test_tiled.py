"""The backend `tiled` as far as no GPU is needed: lists, machine code, and the interpreter."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import attention
import main
import masks
import utils
from attention import flex, rule, tiled, tiles
from attention.tiles import BLOCK, TILE, find_tiles
from benchmarks import machine_code

needs_triton = pytest.mark.skipif(tiled._import_error() is not None, reason="Triton is missing")

# --------------------------------------------------------------------------------------------------
# Tiles and lists


def mask_of(lists, num_tokens, which):
    """The mask that the lists of a kind describe, as the kernels read them: bool [T, T]."""
    found = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for tile, (start, end) in enumerate(lists.starts[which].unfold(0, 2, 1).tolist()):
        for block in range(start, end):
            for row in range(TILE):
                bits = int(lists.bits[block, row])
                columns = [c for c in range(BLOCK) if bits >> c & 1]  # Python's integers are long
                if columns:
                    token = int(lists.tokens[tile, row])
                    assert token >= 0
                    keys = lists.columns[block, columns].long()
                    assert not found[token, keys].any()
                    found[token, keys] = True
    return found


def assert_lists_hold(mask, num_global):
    allowed = F.pad(mask, (num_global, 0) * 2, value=True)
    lists = find_tiles(mask, num_global)
    assert torch.equal(mask_of(lists, len(allowed), 0), allowed)
    assert torch.equal(mask_of(lists, len(allowed), 1), allowed.T)
    tokens = lists.tokens[lists.tokens >= 0]
    assert torch.equal(tokens.sort().values, torch.arange(len(allowed)).int())
    assert int(lists.starts[1, -1]) == len(lists.columns) == len(lists.bits)


@given(st.integers(1, 90), st.integers(0, 2), st.floats(0, 0.5), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_lists_hold_exactly_the_pairs_of_the_mask(num_tokens, num_global, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_tokens, num_tokens, generator=generator) < density
    mask |= torch.eye(num_tokens, dtype=torch.bool)[torch.randperm(num_tokens, generator=generator)]
    assert_lists_hold(mask, num_global)


@pytest.mark.parametrize("mask_type", masks.MASK_TYPES[1:])
def test_lists_of_patterns_on_a_grid_that_tiles_do_not_fit(mask_type):
    assert_lists_hold(masks.build_attention_mask(mask_type, 2, 9, 20), 1)


def test_the_grid_is_found_whatever_its_shape():
    for grid in ((32, 64), (64, 32)):
        mask = masks.build_attention_mask("2d_all_neighbors", 2, *grid)
        lists = find_tiles(mask)
        row, column = lists.tokens.div(grid[1], rounding_mode="floor"), lists.tokens % grid[1]
        for position in (row, column):
            assert (position.amax(1) - position.amin(1) == 7).all()
        # Away from the border, 12x12 keys fit into five blocks.
        assert int(lists.starts[0].diff().max()) == -(-144 // BLOCK)


def test_a_tile_of_a_1d_window_is_64_tokens_in_a_row():
    lists = find_tiles(masks.build_attention_mask("1d_all_neighbors", 2, 16, 16), 1)
    assert torch.equal(lists.tokens[0, :1], torch.zeros(1).int())
    assert torch.equal(lists.tokens[1:], torch.arange(1, 257).view(4, 64).int())
    assert lists.starts[0].diff().tolist() == [9, 3, 3, 3, 3]  # 257; 64 + 12 or + 24, and 1


def test_global_tokens_join_a_tile_that_has_room():
    lists = find_tiles(masks.build_attention_mask("2d_all_neighbors", 1, 14, 14), 3)
    fullest = torch.arange(196).view(14, 14)[:8, 8:].flatten() + 3  # cut off to 8x6
    first = lists.tokens[0, lists.tokens[0] >= 0]
    assert torch.equal(first, torch.cat([torch.arange(3), fullest]).int())
    assert len(lists.tokens) == 4
    assert int(lists.starts[0, 1]) == -(-199 // BLOCK)
    assert len(find_tiles(masks.build_attention_mask("2d_cardinal", 1, 8, 8), 1).tokens) == 2


def test_a_dense_mask_is_not_searched_for_a_grid(monkeypatch):
    monkeypatch.setattr(tiles, "MAX_PAIRS_TO_COUNT", 100)
    monkeypatch.setattr(tiles, "count_blocks", None)
    assert len(find_tiles(torch.ones(128, 128, dtype=torch.bool)).tokens) == 2


# --------------------------------------------------------------------------------------------------
# Where it runs


def test_elsewhere_than_on_cuda_the_error_is_one_line(run_script, tmp_path):
    command = ["--dataset", "digits", "--mask_type", "2d_cardinal", "--device", "cpu"]
    command += ["--img_size", "8", "--patch_size", "2", "--output_dir", str(tmp_path)]
    code, _, errors = run_script(main.main, *command, "--backend", "tiled")
    assert code == 2
    assert "backend 'tiled' runs on CUDA, not on cpu; use auto or dense" in errors
    assert len(errors.splitlines()) == 1


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "attention.tiled_kernels", raising=False)
    monkeypatch.delattr(attention, "tiled_kernels", raising=False)
    monkeypatch.setattr(tiled, "_import_error", tiled._import_error.__wrapped__)
    assert "needs Triton, which cannot be imported" in attention.unusable("tiled", "cuda")


@needs_triton
def test_old_gpus_are_refused(monkeypatch):
    for capability, reason in (((7, 5), "compute capability 8.0"), ((8, 0), "None")):
        monkeypatch.setattr(tiled, "_capability", lambda value=capability: value)
        assert reason in str(attention.unusable("tiled", "cuda"))


def test_lists_move_with_the_model_and_are_not_saved():
    mask = masks.build_attention_mask("2d_cardinal", 1, 9, 8)
    compiled = attention.compile_mask(mask, 1, "tiled")
    assert compiled.state_dict() == {}
    assert all(x.device.type == "meta" for x in compiled.to("meta").tiles)


# --------------------------------------------------------------------------------------------------
# The kernels


@needs_triton
def test_the_kernels_in_the_interpreter():
    """Their own tests, in a process in which Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/interpreted"]
    done = subprocess.run(
        command,
        cwd=utils.REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


# Registers a thread: 65,536 for all threads of a multiprocessor. With 168, three programs of four
# warps run at a time.
REGISTERS = {"forward_kernel": 128, "queries_kernel": 168, "keys_kernel": 184}


@functools.cache
def compile_kernel(*arguments):
    return machine_code.compile_kernel(*arguments)


@needs_triton
@pytest.mark.parametrize("name", machine_code.KERNELS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_to_tensor_core_code_without_spills(capability, name):
    count = compile_kernel(name, capability, torch.bfloat16, 64)
    assert count.spilled_bytes == 0
    assert count.registers <= REGISTERS[name]
    assert count.tensor_core_instructions > 0
    assert count.shared_bytes <= 48 * 1024  # what any GPU has


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float16, 32), (torch.float32, 64)]
)
def test_the_largest_kernel_does_not_spill_with_other_types_and_head_dims(dtype, head_dim):
    count = compile_kernel("keys_kernel", 80, dtype, head_dim)
    assert count.spilled_bytes == 0
    assert count.shared_bytes <= 99 * 1024  # the least of the GPUs of capability 8 and more


@needs_triton
@pytest.mark.parametrize(("step", "microseconds"), [(1, 130), (2, 160), (3, 190)])
def test_few_enough_instructions_are_issued(step, microseconds):
    """A forward and backward at 64x64, 8 images and 12 heads; the number of keys is no constant."""
    mask = masks.build_attention_mask("2d_all_neighbors", step, 64, 64)
    counts = {name: compile_kernel(name, 90, torch.bfloat16, 64) for name in machine_code.KERNELS}
    seconds = machine_code.issue_bound_seconds(counts, find_tiles(mask), 96, 90)
    assert 0.5 * microseconds < 1e6 * seconds < microseconds


def test_instructions_of_a_loop_are_those_up_to_the_branch_back():
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/               @!P0 BRA `(.L_x_1) ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], !UPT ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   EXIT ;
        /*0050*/                   NOP ;
"""
    expected = {"instructions": 2, "loop_instructions": 3, "tensor_core_instructions": 1}
    assert machine_code._count(code) == expected


# --------------------------------------------------------------------------------------------------
# The rule


def choose_on_gpu(mask, num_global=0, **options):
    compiled = attention.compile_mask(mask, num_global, "measure")
    return attention.choose_by_rule(compiled, torch.device("cuda"), **options)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(tiled, "error", lambda device_type: None)


@pytest.mark.parametrize("side", [14, 28, 64])
def test_auto_takes_tiles_for_squares_on_a_gpu_and_says_that_it_is_an_estimate(on_a_gpu, side):
    choice = choose_on_gpu(masks.build_attention_mask("2d_all_neighbors", 2, side, side))
    assert choice.backend == "tiled"
    assert choice.reason.startswith("by rule, an estimate: dense ")
    for name in ("tiled", "flex", "diagonal"):
        assert f"{name} 0." in choice.reason or f"{name} 1" in choice.reason


@pytest.mark.parametrize("name", ["attention_cuda", "attention_cuda_patterns"])
def test_the_estimates_are_near_what_was_measured(name):
    report = utils.read_json(utils.REPOSITORY / f"experiments/benchmark/{name}.json")
    for row in report["rows"]:
        num_tokens, backend = row["num_patches"], row["backend"]
        if backend not in ("dense", "tiled", "flex") or row["grid"] > 64:  # larger masks take long
            continue
        mask = masks.build_attention_mask(
            row["mask_type"], row["expansion_step"], row["grid"], row["grid"]
        )
        pairs = {
            "dense": num_tokens**2,
            "tiled": find_tiles(mask).num_pairs,
            "flex": round(flex.share_of_blocks(mask) * num_tokens**2),
        }
        seconds = rule.estimate(pairs, num_tokens, row["num_sequences"], 64)
        measured = row["milliseconds"]["median"] / 1e3
        tolerance = 0.22 if backend == "flex" else 0.08
        assert seconds[backend] == pytest.approx(measured, rel=tolerance), row


def test_auto_stays_dense_where_compiling_costs_more_than_it_gains(on_a_gpu):
    mask = masks.build_attention_mask("2d_all_neighbors", 2, 28, 28)
    choice = choose_on_gpu(mask, num_calls=100)
    assert choice.backend == "dense"
    assert "less than compiling it takes" in choice.reason
    assert choose_on_gpu(mask, num_calls=10**6).backend == "tiled"


def test_auto_does_not_take_tiles_for_what_they_do_not_take(on_a_gpu):
    """Something else would run under their name."""
    assert tiled.takes(torch.bfloat16, 128)
    assert not tiled.takes(torch.bfloat16, 192)
    assert not tiled.takes(torch.float64, 64)

    mask = masks.build_attention_mask("2d_all_neighbors", 2, 28, 28)
    choice = choose_on_gpu(mask, takes_tiles=False)
    assert choice.backend == "flex"
    assert "tiled" not in choice.reason


def test_even_a_mask_that_allows_everything_takes_tiles_on_a_gpu(on_a_gpu):
    """With any mask, SDPA leaves its fast kernels."""
    assert choose_on_gpu(torch.ones(256, 256, dtype=torch.bool)).backend == "tiled"


def test_without_triton_the_formulas_or_dense_attention_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tiled, "error", lambda device_type: "needs Triton")
    sparse = masks.build_attention_mask("2d_cardinal", 1, 28, 28)
    assert choose_on_gpu(sparse).backend == "diagonal"
    assert choose_on_gpu(masks.build_attention_mask("2d_cardinal", 1, 7, 7)).backend == "dense"
