"""Patterns, edges and dilation against plain loops, NATTEN's and torchvision's definitions."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.models.swin_transformer import shifted_window_attention

import attention
import masks
from masks import MaskSpec
from patterns import files, offsets, spec

SIDES = st.integers(1, 7)
STEPS = st.integers(0, 5)
DILATIONS = st.integers(1, 4)


def from_loops(height, width, allows):
    """The mask of a condition on the rows and columns of two patches."""
    patches = list(itertools.product(range(height), range(width)))
    return np.array([[bool(allows(*query, *key)) for key in patches] for query in patches])


# -------------------------------------------------------------------------------------------------
# Sets of offsets

SHAPES = {
    "2d_cardinal": lambda dy, dx, s: (dy == 0 or dx == 0) and max(abs(dy), abs(dx)) <= s,
    "2d_all_neighbors": lambda dy, dx, s: max(abs(dy), abs(dx)) <= s,
    "2d_circle": lambda dy, dx, s: (dy**2 + dx**2) ** 0.5 <= s,
    "axial": lambda dy, dx, s: dy == 0 or dx == 0,
}


@given(st.sampled_from(sorted(SHAPES)), STEPS, DILATIONS, SIDES, SIDES)
@settings(max_examples=150, deadline=None)
def test_dilated_shapes_match_plain_loops(mask_type, step, dilation, height, width):
    def allows(y, x, key_y, key_x):
        dy, dx = key_y - y, key_x - x
        if dy % dilation or dx % dilation:
            return False
        return SHAPES[mask_type](dy // dilation, dx // dilation, step)

    mask = MaskSpec(mask_type, step, dilation=dilation).build_array(height, width)
    np.testing.assert_array_equal(mask, from_loops(height, width, allows))


def natten_window(position, length, step, dilation):
    """The keys of a query along one axis, by NATTEN's rule.

    Among the positions that are a multiple of the dilation away, the window of 2 * step + 1 that is
    centered on the query, moved as little as it takes to lie within the axis.
    """
    group = list(range(position % dilation, length, dilation))
    size = min(2 * step + 1, len(group))
    windows = [group[first : first + size] for first in range(len(group) - size + 1)]
    place = group.index(position)
    centers = [group.index(window[0]) + step for window in windows]
    nearest = min(abs(center - place) for center in centers)
    (window,) = [
        window
        for window, center in zip(windows, centers, strict=True)
        if abs(center - place) == nearest
    ]
    return window


@given(STEPS, DILATIONS, SIDES, SIDES)
@settings(max_examples=150, deadline=None)
def test_shifted_squares_are_those_of_natten(step, dilation, height, width):
    def allows(y, x, key_y, key_x):
        in_rows = key_y in natten_window(y, height, step, dilation)
        return in_rows and key_x in natten_window(x, width, step, dilation)

    found = MaskSpec("2d_all_neighbors", step, dilation=dilation, edge="shift")
    np.testing.assert_array_equal(
        found.build_array(height, width), from_loops(height, width, allows)
    )


@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 25))
@settings(max_examples=150, deadline=None)
def test_shifted_windows_in_1d_are_those_of_natten(radius, dilation, length):
    mask = offsets.windows_1d(2 * radius + 1, length, dilation, "shift")
    for i in range(length):
        assert mask[i].nonzero()[0].tolist() == natten_window(i, length, radius, dilation)


@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 25), st.sampled_from(offsets.EDGES))
@settings(max_examples=100, deadline=None)
def test_windows_in_1d_are_intervals_of_offsets(radius, dilation, length, edge):
    mask = offsets.windows_1d(2 * radius + 1, length, dilation, edge)
    all_offsets = offsets.axis_offsets(length, dilation, edge)
    np.testing.assert_array_equal(mask, abs(all_offsets) <= radius)


@given(STEPS, SIDES, SIDES)
@settings(max_examples=100, deadline=None)
def test_a_shifted_plus_consists_of_shifted_arms(step, height, width):
    def allows(y, x, key_y, key_x):
        in_row = key_y == y and key_x in natten_window(x, width, step, 1)
        return in_row or (key_x == x and key_y in natten_window(y, height, step, 1))

    mask = MaskSpec("2d_cardinal", step, edge="shift").build_array(height, width)
    np.testing.assert_array_equal(mask, from_loops(height, width, allows))


def test_the_offsets_from_a_corner_in_a_small_known_case():
    assert offsets.axis_offsets(5, 1, "shift")[0].tolist() == [0, 1, -1, 2, -2]
    assert offsets.axis_offsets(5, 1, "shift")[1].tolist() == [-1, 0, 1, 2, -2]
    assert offsets.axis_offsets(5, 1, "shift")[4].tolist() == [2, -2, 1, -1, 0][::1]
    far = offsets.FAR
    assert offsets.axis_offsets(5, 2)[1].tolist() == [far, 0, far, 1, far]


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "mask_type", ["1d_circle", "2d_cardinal", "2d_all_neighbors", "2d_circle", "random"]
)
def test_shift_gives_every_patch_the_nominal_number_of_neighbors(mask_type, step, dilation):
    """Wherever the pattern fits into the grid."""
    found = MaskSpec(mask_type, step, dilation=dilation, edge="shift")
    height, width = dilation * (2 * step + 1), dilation * (2 * step + 1) + 3
    mask = found.build_array(height, width)
    assert (mask.sum(1) == found.num_neighbors(height, width)).all()
    assert mask.diagonal().all()


def test_shift_keeps_the_number_of_any_set_of_offsets():
    """Also of one that is not symmetric: three ahead and one below."""
    dy, dx = np.arange(-4, 5)[:, None], np.arange(-4, 5)
    ahead = lambda dy, dx, s: ((dy == 0) & (dx >= 0) & (dx <= s)) | ((dy == 1) & (dx == 0))  # noqa: E731
    mask = offsets.neighborhoods(ahead, 3, 9, 11, edge="shift")
    assert set(mask.sum(1)) == {ahead(dy, dx, 3).sum()} == {5}


def test_the_circle_has_gauss_numbers():
    numbers = [1, 5, 13, 29, 49, 81, 113, 149, 197, 253, 317]  # OEIS A000328
    assert [offsets.count_circle(step) for step in range(11)] == numbers
    assert [MaskSpec("2d_circle", step).num_neighbors(5, 5) for step in range(11)] == numbers
    assert MaskSpec("2d_circle", 4).build_array(9, 9)[40].sum() == 49


def test_axial_is_the_whole_row_and_column():
    found = MaskSpec("axial", 3)
    assert found == MaskSpec("axial")
    assert found.label == found.run_name == "axial"
    assert found.num_neighbors(3, 5) == 7
    assert (found.build_array(3, 5).sum(1) == 7).all()


# -------------------------------------------------------------------------------------------------
# Windows that do not overlap


@pytest.mark.parametrize(
    ("step", "grid"), [(1, (6, 9)), (1, (9, 6)), (1, (3, 6)), (2, (15, 10)), (2, (5, 10))]
)
@pytest.mark.parametrize("layer", [0, 1, 2, 5])
def test_windows_attend_as_in_torchvisions_swin(step, grid, layer):
    """Where its windows fit; elsewhere it lets patches attend to padding."""
    side = 2 * step + 1
    generator = torch.Generator().manual_seed(0)
    dim, num_heads = 8, 2
    x = torch.randn(2, *grid, dim, generator=generator)
    weight = torch.randn(3 * dim, dim, generator=generator)
    expected = shifted_window_attention(
        x,
        weight,
        torch.eye(dim),
        torch.zeros(num_heads, side**2, side**2),
        window_size=[side, side],
        num_heads=num_heads,
        shift_size=[side // 2 if layer % 2 else 0] * 2,
        training=False,
    )

    mask = MaskSpec("2d_window", step).build(*grid, layer)
    qkv = (x.flatten(1, 2) @ weight.T).unflatten(-1, (3, num_heads, -1))  # [B, N, 3, H, D]
    out = attention.attend_packed(qkv, attention.compile_mask(mask, backend="dense"))
    torch.testing.assert_close(out.flatten(2).unflatten(1, grid), expected)


@given(st.integers(0, 4), SIDES, SIDES, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_windows_match_plain_loops(step, height, width, layer):
    side = 2 * step + 1

    def windows(length):
        """Positions from border to border; a smaller window first if the layer is shifted."""
        first = side // 2 if layer % 2 and side < length else side
        borders = [0, first or side, *range((first or side) + side, length + side, side)]
        return [range(*pair) for pair in itertools.pairwise(borders)]

    def allows(y, x, key_y, key_x):
        rows = [window for window in windows(height) if y in window]
        columns = [window for window in windows(width) if x in window]
        return key_y in rows[0] and key_x in columns[0]

    mask = MaskSpec("2d_window", step).build_array(height, width, layer)
    np.testing.assert_array_equal(mask, from_loops(height, width, allows))


# -------------------------------------------------------------------------------------------------
# Random patches


def test_random_patches_are_as_many_as_in_the_square():
    for edge in masks.EDGES:
        square = MaskSpec("2d_all_neighbors", 1, edge=edge).build_array(6, 9)
        found = MaskSpec("random", 1, edge=edge)
        mask = found.build_array(6, 9)
        np.testing.assert_array_equal(mask.sum(1), square.sum(1))
        assert mask.diagonal().all()
        assert not np.array_equal(mask, square)
        assert found.num_neighbors(6, 9) == 9


def test_a_seed_draws_one_mask_and_another_seed_another():
    first, again = (MaskSpec("random", 1).build_array(5, 6) for _ in range(2))
    other = MaskSpec("random", 1, mask_seed=1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other.build_array(5, 6))
    assert other.run_name == "random_expansion_1_draw_1"
    # Checkpoints rely on these very numbers.
    assert first[0].nonzero()[0].tolist() == [0, *sorted(drawn_by_hand(29, 3))]


def drawn_by_hand(num_others, number):
    """The first row: the others are numbered from 0, so one is added to skip the patch itself."""
    order = np.random.RandomState(0).permutation(num_others)
    return [int(other) + 1 for other in order[:number]]


def test_random_patches_lie_anywhere():
    """Over many patches, each distance is as frequent as among all pairs."""
    mask = MaskSpec("random", 3, edge="shift").build_array(24, 24)
    np.fill_diagonal(mask, False)
    rows, columns = np.divmod(np.arange(576), 24)
    distance = np.hypot(rows - rows[:, None], columns - columns[:, None])
    assert distance[mask].mean() == pytest.approx(distance[distance > 0].mean(), rel=0.01)
    received = mask.sum(0)
    assert received.std() == pytest.approx(np.sqrt(received.mean()), rel=0.2), "binomial"


# -------------------------------------------------------------------------------------------------
# Files


def write_mask(path, mask):
    if path.suffix == ".npy":
        np.save(path, mask)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(mask), path)
    else:
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return str(path)


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_a_mask_is_read_as_it_was_written(tmp_path, suffix):
    mask = np.random.default_rng(0).random((12, 12)) < 0.3
    mask[:, 0] = True
    path = write_mask(tmp_path / f"mine{suffix}", mask)
    found = MaskSpec("file", mask_file=path, expansion_step=5, dilation=3).with_hash()
    np.testing.assert_array_equal(found.build_array(3, 4), mask)
    assert found.num_neighbors(3, 4) == mask.sum(1).max()
    assert found.label == f"mine{suffix}"
    assert re.fullmatch(r"file_mine_[0-9a-f]{8}", found.run_name)
    assert found.is_known

    changed = mask.copy()
    changed[0, 1] = not changed[0, 1]
    write_mask(tmp_path / f"mine{suffix}", changed)
    assert not found.is_known
    with pytest.raises(ValueError, match="has changed since"):
        found.build_array(3, 4)
    assert MaskSpec("file", mask_file=path).with_hash().run_name != found.run_name


def test_numbers_and_bits_are_masks_too(tmp_path):
    mask = np.tri(4, dtype=bool)
    for kind in (np.uint8, np.float32, np.int64):
        np.testing.assert_array_equal(
            files.read(write_mask(tmp_path / "m.npy", mask.astype(kind))), mask
        )
    Image.fromarray(mask).convert("1").save(tmp_path / "bits.png")
    np.testing.assert_array_equal(files.read(tmp_path / "bits.png"), mask)
    Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "nearly_black.png")
    with pytest.raises(ValueError, match="values"):
        files.read(tmp_path / "nearly_black.png")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.ones((3, 4), bool), "has shape 3x4, expected NxN"),
        (np.ones(4, bool), "has shape 4, expected NxN"),
        (np.full((3, 3), 0.5), "holds more than two values"),
        (np.array([["a", "b"], ["c", "d"]]), "holds more than two values"),
        (np.tri(3, k=-1, dtype=bool), "row 0 of the mask .* is empty"),
        (np.array([{}, {}], dtype=object), "cannot read the mask"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path, content, words):
    np.save(tmp_path / "mask.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=words):
        files.read(tmp_path / "mask.npy")


@pytest.mark.parametrize("name", ["none.npy", "text.png", "text.pt", "text.npy", "mask.txt"])
def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, name):
    if not name.startswith("none"):
        (tmp_path / name).write_text("no mask\nat all")
    with pytest.raises(ValueError, match="cannot read the mask") as caught:
        files.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_grid_is_refused(tmp_path):
    path = write_mask(tmp_path / "m.npy", np.eye(12, dtype=bool))
    with pytest.raises(ValueError, match="is for 12 patches, but the grid of 4x4 has 16"):
        MaskSpec("file", mask_file=path).build_array(4, 4)


# -------------------------------------------------------------------------------------------------
# Specs


@pytest.mark.parametrize(
    ("found", "label", "run_name"),
    [
        (MaskSpec("2d_circle", 2), "2d_circle, step 2", "2d_circle_expansion_2"),
        (
            MaskSpec("2d_circle", 2, dilation=3, edge="shift", global_layers=(7, 3)),
            "2d_circle, step 2, dilation 3, edge shift, full in layers 3 7",
            "2d_circle_expansion_2_dilation_3_shift_global_3-7",
        ),
        (MaskSpec("axial", 9, edge="shift"), "axial", "axial"),
        (
            MaskSpec("2d_window", 3, dilation=2, mask_seed=4, global_layers="0"),
            "2d_window, step 3, full in layer 0",
            "2d_window_expansion_3_global_0",
        ),
        (MaskSpec("full", 3, dilation=2, global_layers=(1,)), "full", "full"),
    ],
)
def test_labels_and_run_names(found, label, run_name):
    assert (found.label, found.run_name) == (label, run_name)
    assert MaskSpec(**found.to_settings()) == found
    assert MaskSpec.of_flags(mask_file=None, **spec_values(found.to_flags())) == found


def spec_values(flags):
    """Flags as a parser reads them."""
    return {
        name: int(value) if value.isdecimal() and name != "global_layers" else value
        for name, value in flags.items()
    }


def test_specs_that_are_one_mask_are_equal():
    assert MaskSpec("axial", 1) == MaskSpec("axial", 2) != MaskSpec("axial", 2, dilation=2)
    assert MaskSpec("2d_window", 1, edge="shift") == MaskSpec("2d_window", 1)
    assert len({MaskSpec("random", 1, mask_seed=seed) for seed in (0, 1)}) == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"dilation": 1.5}, "dilation must be an integer"),
        ({"edge": "wrap"}, "unknown edge 'wrap'; expected one of truncate, shift"),
        ({"global_layers": "3,x"}, "each of global_layers must be an integer"),
        ({"expansion_step": 70_000}, "expansion_step must be at most 65,536"),
    ],
)
def test_bad_fields(fields, words):
    found = MaskSpec(**{"mask_type": "2d_circle", "expansion_step": 1} | fields)
    assert not found.is_known
    with pytest.raises(ValueError, match=words):
        found.build_array(3, 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"mask_type": "axial", "edge": "shift"},
            "--edge shift has no effect on --mask_type axial",
        ),
        ({"mask_type": "full", "global_layers": "1"}, "--global_layers 1 has no effect"),
        ({"mask_type": "2d_circle", "mask_seed": 1}, "--mask_seed 1 has no effect"),
        ({"mask_type": "axial", "mask_file": "m.npy"}, "--mask_file m.npy has no effect"),
    ],
)
def test_flags_without_effect_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        MaskSpec.of_flags(**{"mask_file": None, "expansion_step": 1} | flags)


def test_layers_in_words():
    assert spec.parse_layers("7,3,7") == spec.parse_layers([7, 3]) == (3, 7)
    assert spec.parse_layers(None) == spec.parse_layers("") == spec.parse_layers([]) == ()
    assert spec.format_layers((3, 7)) == "3,7"
    for bad in ("3,-1", "x", "3,,4", [1.5], 3):
        with pytest.raises(ValueError, match="expected layers like 3,7,11"):
            spec.parse_layers(bad)


# -------------------------------------------------------------------------------------------------
# Masks that differ by layer


def test_layers_with_the_same_mask_share_it():
    found = MaskSpec("2d_window", 1, global_layers=(3,))
    layers = found.build_layers(6, 7, 6)
    assert layers[3] is None
    assert layers[0] is layers[2] is layers[4]
    assert layers[1] is layers[5] is not layers[0]
    for layer, mask in enumerate(layers):
        expected = found.build(6, 7, layer)
        assert mask is None if expected is None else torch.equal(mask, expected)
    one = MaskSpec("2d_circle", 2).build_layers(4, 4, 3)
    assert one[0] is one[1] is one[2]


def test_a_global_layer_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="layer 4, but the model has 4 layers, 0 to 3"):
        MaskSpec("axial", global_layers=(0, 4)).build_layers(3, 3, 4)


def test_shifted_windows_reach_everything_where_others_stay_among_themselves():
    windows = MaskSpec("2d_window", 1)
    alternating = windows.build_layer_arrays(9, 12, 12)
    assert np.array_equal(masks.reachable(alternating[:1] * 12, 12), alternating[0])
    assert masks.reachable(alternating, 12).all()
    steps = np.eye(108, dtype=object)
    for layer in range(3):
        steps = alternating[layer].astype(object) @ steps
    assert np.array_equal(masks.reachable(alternating, 3), steps > 0)
    assert not masks.reachable(alternating, 3).all()


def test_reach_of_layers_goes_from_the_first_to_the_last():
    """First each patch hears of the one before, then of the one two before: 0, 1, 2, 3 of 3."""
    one, two = np.eye(4, k=-1, dtype=bool), np.eye(4, k=-2, dtype=bool)
    itself = np.eye(4, dtype=bool)
    found = masks.reachable([itself | one, itself | two], 2)
    assert found[3].tolist() == [True, True, True, True]
    # A layer that looks elsewhere keeps what the residual connection holds.
    assert masks.reachable([one | np.eye(4, k=3, dtype=bool)], 1)[2].tolist() == [
        *(False, True),
        *(True, False),
    ]
    assert masks.reachable([itself, None], 2).all()
    with pytest.raises(ValueError, match="masks for 2 layers"):
        masks.reachable([itself, one], 3)


# -------------------------------------------------------------------------------------------------
# Every pattern on every backend

SPECS = dict.fromkeys(
    MaskSpec(mask_type, 1, dilation=dilation, edge=edge)
    for mask_type in masks.MASK_TYPES[1:]
    for dilation in (1, 2)
    for edge in masks.EDGES
)
BUILT = [
    pytest.param(found, layer, id=f"{found.run_name}-{layer}")
    for found in SPECS
    for layer in range(masks.TYPES[found.mask_type].num_kinds)
]


@pytest.mark.parametrize(("found", "layer"), BUILT)
@pytest.mark.parametrize("num_global_tokens", [0, 3])
def test_every_backend_equals_dense_attention(found, layer, num_global_tokens):
    """Outputs and gradients on a grid that is not square, in float64 and in float32."""
    mask = found.build(5, 7, layer)
    generator = torch.Generator().manual_seed(0)
    shape = (2, num_global_tokens + 35, 3, 2, 8)  # [B, T, 3, H, D]
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(2, shape[1], 2, 8, generator=generator, dtype=torch.float64)
    expected = out_and_gradient(qkv, grad, mask, num_global_tokens, "dense")

    for backend, dtype in [
        ("native", torch.float32),
        ("diagonal", torch.float32),
        ("diagonal", torch.float64),
        ("auto", torch.float32),
    ]:
        results = out_and_gradient(qkv.to(dtype), grad.to(dtype), mask, num_global_tokens, backend)
        for result, value in zip(results, expected, strict=True):
            tolerance = 1e-12 if dtype == torch.float64 else 2e-5
            torch.testing.assert_close(result.double(), value, rtol=tolerance, atol=tolerance)


def out_and_gradient(qkv, grad, mask, num_global_tokens, backend):
    qkv = qkv.clone().requires_grad_()
    compiled = attention.compile_mask(mask, num_global_tokens, backend)
    out = attention.attend_packed(qkv, compiled)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]
