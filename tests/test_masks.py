"""Every mask against a brute-force oracle with plain loops."""

import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import masks
from patterns import table

SIDES = st.integers(1, 6)
STEPS = st.integers(0, 8)  # also larger than every grid


def oracle_2d(step, height, width, allows):
    patches = [(row, column) for row in range(height) for column in range(width)]
    mask = torch.zeros(len(patches), len(patches), dtype=torch.bool)
    for i, (row, column) in enumerate(patches):
        for j, (other_row, other_column) in enumerate(patches):
            mask[i, j] = allows(abs(row - other_row), abs(column - other_column), step)
    return mask


def plus(dy, dx, step):
    return (dy == 0 and dx <= step) or (dx == 0 and dy <= step)


def square(dy, dx, step):
    return max(dy, dx) <= step


@given(STEPS, SIDES, SIDES)
@settings(max_examples=60, deadline=None)
def test_2d_masks_match_plain_loops(step, height, width):
    cardinal = masks.generate_2d_attention_mask_cardinal(step, height, width)
    all_neighbors = masks.generate_2d_attention_mask_all_neighbors(step, height, width)
    assert torch.equal(cardinal, oracle_2d(step, height, width, plus))
    assert torch.equal(all_neighbors, oracle_2d(step, height, width, square))


@given(st.integers(0, 12), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_1d_mask_matches_plain_loops(radius, num_tokens):
    mask = masks.generate_1d_attention_mask(2 * radius + 1, num_tokens)
    expected = [[abs(i - j) <= radius for j in range(num_tokens)] for i in range(num_tokens)]
    assert torch.equal(mask, torch.tensor(expected))


@pytest.mark.parametrize("mask_type", masks.MASK_TYPES[1:])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1), (3, 8), (8, 3)])
def test_every_mask_is_boolean_and_has_its_diagonal(mask_type, grid):
    for step in (0, 1, 2, 20):
        mask = masks.build_attention_mask(mask_type, step, *grid)
        assert mask.dtype == torch.bool
        assert mask.shape == (grid[0] * grid[1],) * 2
        assert mask.is_contiguous()
        assert mask.diagonal().all()
        if mask_type != "random":
            assert torch.equal(mask, mask.T)
        if step == 0 and mask_type != "axial":
            assert torch.equal(mask, torch.eye(len(mask), dtype=torch.bool))
    if mask_type not in ("2d_cardinal", "axial") or min(grid) == 1:
        assert mask.all()  # the last step, 20, is larger than the grid


def test_a_plus_larger_than_the_grid_is_the_whole_row_and_column():
    mask = masks.generate_2d_attention_mask_cardinal(100, 3, 5)
    assert mask.sum(1).eq(3 + 5 - 1).all()


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_patch_far_from_the_border_has_the_nominal_number_of_neighbors(step):
    center = 10 * 21 + 10
    for name in ("cardinal", "all_neighbors"):
        nominal = getattr(masks, f"compute_num_neighbors_{name}")(step)
        for prefix in ("1d", "2d"):
            spec = masks.MaskSpec(f"{prefix}_{name}", step)
            assert spec.build(21, 21)[center].sum() == nominal == spec.num_neighbors(21, 21)
    assert masks.compute_num_neighbors_cardinal(step) == 1 + 4 * step
    assert masks.compute_num_neighbors_all_neighbors(step) == (2 * step + 1) ** 2


def test_25_nominal_neighbors_are_fewer_on_average_on_the_14x14_grid():
    def mean(mask_type, step):
        mask = masks.build_attention_mask(mask_type, step, 14, 14)
        return mask.sum(1, dtype=float).mean().item()

    assert mean("2d_all_neighbors", 2) == pytest.approx(20.9, abs=0.05)
    assert mean("2d_cardinal", 6) == pytest.approx(19.0, abs=0.05)
    assert mean("1d_all_neighbors", 2) == pytest.approx(24.2, abs=0.05)


def test_a_1d_window_continues_past_the_end_of_a_row():
    mask = masks.build_attention_mask("1d_cardinal", 1, 3, 4)  # window of 5 on rows of 4
    assert mask[3].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]


def test_full_has_no_mask():
    assert masks.build_attention_mask("full", None, 3, 4) is None
    assert masks.MaskSpec("full").num_neighbors(3, 4) == 12


@pytest.mark.parametrize("value", [2, 0, -3, 2.5, "5", None, True])
def test_bad_window(value):
    with pytest.raises(ValueError, match=re.escape(str(value))):
        masks.generate_1d_attention_mask(value, 10)


@pytest.mark.parametrize("value", [-1, 1.0, "1", None, False])
@pytest.mark.parametrize("name", ["cardinal", "all_neighbors"])
def test_bad_step(name, value):
    function = getattr(masks, f"generate_2d_attention_mask_{name}")
    with pytest.raises(ValueError, match=f"expansion_step.*{re.escape(repr(value))}"):
        function(value, 3, 4)


@pytest.mark.parametrize("grid", [(0, 3), (3, 0), (-1, 2), (2.0, 2)])
def test_bad_grid(grid):
    for mask_type in ("2d_cardinal", "1d_cardinal"):
        with pytest.raises(ValueError, match=r"num_patches_(height|width) must be"):
            masks.build_attention_mask(mask_type, 1, *grid)


def test_numpy_integers_are_accepted():
    mask = masks.generate_1d_attention_mask(np.int64(3), np.int32(4))
    assert torch.equal(mask, masks.generate_1d_attention_mask(3, 4))


def test_an_unknown_type_is_refused_with_the_list_of_known_ones():
    with pytest.raises(ValueError, match=r"'3d'.*2d_cardinal"):
        masks.build_attention_mask("3d", 1, 2, 2)


def test_your_own_pattern_comes_with_its_1d_twin(monkeypatch):
    diamond = masks.Pattern(
        offsets=lambda dy, dx, s: abs(dy) + abs(dx) <= s,
        num_neighbors=lambda s: 2 * s * (s + 1) + 1,
    )
    for name, mask_type in table.types_of("diamond", diamond).items():
        monkeypatch.setitem(masks.TYPES, name, mask_type)
    mask = masks.build_attention_mask("2d_diamond", 1, 5, 5)
    assert mask[12].nonzero().flatten().tolist() == [7, 11, 12, 13, 17]
    assert masks.build_attention_mask("1d_diamond", 1, 5, 5)[12].sum() == 5
    dilated = masks.MaskSpec("2d_diamond", 1, dilation=2, edge="shift").build(5, 5)
    assert dilated[0].nonzero().flatten().tolist() == [0, 2, 4, 10, 20]


def test_a_spec_has_a_label_and_a_run_name():
    spec = masks.MaskSpec("2d_cardinal", 2)
    assert (spec.label, spec.run_name) == ("2d_cardinal, step 2", "2d_cardinal_expansion_2")
    assert torch.equal(spec.build(3, 5), masks.generate_2d_attention_mask_cardinal(2, 3, 5))
    assert masks.MaskSpec("full", 3) == masks.MaskSpec() == masks.MaskSpec("full")
    assert (masks.MaskSpec().label, masks.MaskSpec().run_name) == ("full", "full")
    foreign = masks.MaskSpec("2d_of_another_checkout", 1)  # logs may name it
    assert foreign.label == "2d_of_another_checkout, step 1"
    with pytest.raises(ValueError, match="unknown mask type"):
        foreign.build(3, 3)


def test_masks_of_large_grids_are_built_in_seconds():
    start = time.perf_counter()
    for mask_type in masks.MASK_TYPES[1:]:
        masks.build_attention_mask(mask_type, 2, 128, 128)
    assert time.perf_counter() - start < 30  # takes 1 s in total; a loop over tokens takes minutes


def test_the_command_line_prints_a_neighborhood_as_characters(capsys):
    pattern = ["--mask_type", "2d_cardinal", "--expansion_step", "2"]
    assert masks.main([*pattern, "--grid", "3x5", "--patch", "0x1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == ["# @ # # .", ". # . . .", ". # . . ."]
    assert "9 neighbors nominal" in printed[0]
    assert "6 of patch 0x1" in printed[0]


@pytest.mark.parametrize(
    "flags",
    [
        "--picture p.png --dilation 2",
        "--picture p.png --mask_type axial",
        "--picture p.png --mask_file m.npy",
        "--picture p.png --layer 1",
        '--mask_types ["axial"]',
    ],
)
def test_the_command_line_refuses_flags_without_effect(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        masks.main(flags.split())
    assert stopped.value.code == 2
    assert f"leave out {flags.split()[-2]}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_command_line_shows_full_attention_and_draws_a_picture(capsys, tmp_path):
    masks.main(["--mask_type", "full", "--grid", "2x3"])
    assert capsys.readouterr().out.splitlines()[1:] == ["# # #", "# @ #"[::-1]]
    masks.main(["--picture", str(tmp_path / "masks.png"), "--grid", "5x6"])
    assert (tmp_path / "masks.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "7"], "7x10"),
        (["--grid", "0x3"], "at least 1, got 0"),
        (["--expansion_step", "-1"], "at least 0, got -1"),
        (["--patch", "9x0", "--grid", "3x3"], "outside the 3x3 grid"),
        (["--mask_type", "2d"], "invalid choice"),
    ],
)
def test_a_bad_command_line_ends_with_one_line_on_stderr(arguments, words, run_script):
    code, _, err = run_script(masks.main, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert words in err


# --------------------------------------------------------------------------------------------------
# What k layers can reach


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("mask_type", masks.MASK_TYPES[1:])
def test_reach_is_that_of_matrix_powers(mask_type, num_layers):
    mask = masks.build_attention_mask(mask_type, 1, 4, 7)
    paths = np.linalg.matrix_power(mask.numpy().astype(object), num_layers)  # exact integers
    reached = masks.reachable(mask, num_layers)
    assert reached.dtype == bool
    assert np.array_equal(reached, paths > 0)
    assert np.array_equal(masks.reachable(mask.numpy(), num_layers), reached)


def test_reach_goes_from_key_to_query():
    """Each patch attends to the one before: information moves forward only."""
    mask = np.eye(4, dtype=bool) | np.eye(4, k=-1, dtype=bool)
    assert masks.reachable(mask, 2)[3].tolist() == [False, True, True, True]
    assert masks.reachable(mask, 99)[0].tolist() == [True, False, False, False]


def test_a_global_token_joins_all_patches_within_two_layers():
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 5)
    assert np.array_equal(masks.reachable(mask, 1, num_global_tokens=1), mask.numpy())
    assert masks.reachable(mask, 2, num_global_tokens=1).all()
    assert not masks.reachable(mask, 2).all()
    with pytest.raises(ValueError, match="num_layers must be at least 0, got -1"):
        masks.reachable(mask, -1)
