"""The style of figures, saving them, and the pictures of masks."""

import itertools
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch

import masks
import utils
from report import figures, mask_pictures


def shown_cells(axes, color):
    """Bool [height, width]: which cells of a drawn grid have this color."""
    return np.all(np.isclose(axes.images[0].get_array(), figures.rgb(color)), axis=-1)


# -------------------------------------------------------------------------------------------------
# Style


def test_each_mask_type_differs_in_color_marker_and_line():
    styles = [figures.style_of(mask_type) for mask_type in masks.MASK_TYPES]
    for one, other in itertools.combinations(styles, 2):
        assert one["color"] != other["color"]
        assert one["marker"] != other["marker"]
    studied = [figures.style_of(mask_type) for mask_type in masks.STUDIED[1:]]
    for one, other in itertools.combinations(studied, 2):
        assert one["linestyle"] != other["linestyle"]


def test_the_families_of_a_mask_type_differ_in_color_marker_and_line():
    looks = [figures.style_of("2d_cardinal", family=family) for family in range(3)]
    for name in ("color", "marker", "linestyle"):
        assert len({str(look[name]) for look in looks}) == 3
    assert looks[0] == figures.style_of("2d_cardinal")


def test_a_new_pattern_changes_no_other_style(monkeypatch):
    before = {mask_type: figures.style_of(mask_type) for mask_type in masks.MASK_TYPES}
    monkeypatch.setitem(masks.PATTERNS, "mine", masks.PATTERNS["cardinal"])
    monkeypatch.setitem(masks.PATTERNS, "yours", masks.PATTERNS["cardinal"])
    assert before == {mask_type: figures.style_of(mask_type) for mask_type in before}

    new_types = ("1d_mine", "2d_mine", "1d_yours", "2d_yours")
    styles = [*before.values(), *map(figures.style_of, new_types)]
    looks = {(style["color"], style["marker"]) for style in styles}
    assert len(looks) == len(before) + len(new_types)


def test_the_variants_of_a_mask_type_go_from_light_to_dark():
    variants = [figures.style_of("2d_cardinal", i, 3) for i in range(3)]
    brightness = [figures.rgb(style["color"]).sum() for style in variants]
    assert brightness == sorted(brightness, reverse=True)
    assert variants[1]["color"] == figures.style_of("2d_cardinal")["color"]
    assert len({style["linestyle"] for style in variants}) == 3


@pytest.mark.parametrize(("amount", "mixed"), [(0, "#FF8000"), (1, "#000000"), (0.5, "#804000")])
def test_blend(amount, mixed):
    assert figures.blend("#FF8000", "#000000", amount) == mixed


# -------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("name", ["new/folder/a.png", "a.PNG", "a.svg", "a.pdf"])
def test_save_writes_the_format_of_the_suffix_and_leaves_nothing_else(tmp_path, name):
    path = tmp_path / name
    figures.save(figures.new_figure(2, 1), path)
    magic = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[path.suffix.lower()]
    assert path.read_bytes().startswith(magic)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["mask.xyz", "mask"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name):
    with pytest.raises(utils.UserError, match=r"mask.*: expected a name ending in .*\.png.*\.svg"):
        figures.save(figures.new_figure(2, 1), tmp_path / name)


# -------------------------------------------------------------------------------------------------
# The user's matplotlib configuration

HOSTILE = {
    "text.usetex": True,
    "image.origin": "lower",
    "font.family": "No Such Font",
    "axes.facecolor": "red",
    "savefig.dpi": 20,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",
}
TWO = {"full": ("full", None), "$own_{": ("own", None)}
DRAW = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from report import figures, mask_pictures
figure = mask_pictures.draw_mask_types({"full": ("full", None), "$own_{": ("own", None)}, 3, 5)
figures.save_as(figure, Path(sys.argv[2]) / "masks")
"""


@pytest.fixture
def expected(tmp_path):
    """What DRAW should write."""
    figure = mask_pictures.draw_mask_types(TWO, 3, 5)
    figures.save_as(figure, tmp_path / "expected" / "masks")
    return read_all(tmp_path / "expected")


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_configuration_of_matplotlib_changes_a_figure(tmp_path, expected):
    """Neither a notebook backend that isn't installed, nor files that are damaged or hostile."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "matplotlibrc").write_bytes(b"axes.facecolor: red  # caf\xe9\n")
    hostile = tmp_path / "hostile"
    hostile.write_text("".join(f"{name}: {value}\n" for name, value in HOSTILE.items()))
    environment = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(hostile),
    }

    command = [sys.executable, "-c", DRAW, str(utils.REPOSITORY), str(tmp_path / "drawn")]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_all(tmp_path / "drawn") == expected


def test_settings_of_the_process_change_no_figure_and_are_kept(tmp_path, expected):
    with matplotlib.rc_context(HOSTILE):
        figure = mask_pictures.draw_mask_types(TWO, 3, 5)
        figures.save_as(figure, tmp_path / "drawn" / "masks")
        assert matplotlib.rcParams["image.origin"] == "lower"
    assert read_all(tmp_path / "drawn") == expected


def test_one_drawing_that_fails_does_not_stop_the_others(tmp_path):
    def fail():
        raise RuntimeError("no\nway")

    drawings = {"bad": fail, "good": lambda: figures.new_figure(2, 1)}
    failed = figures.save_drawings(tmp_path, drawings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.png", "good.svg"]
    with pytest.raises(utils.UserError, match=r"could not draw bad \(no\)"):
        figures.raise_failed(failed)
    figures.raise_failed({})


# -------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("mask_type", masks.MASK_TYPES)
def test_neighborhoods_are_rows_of_the_mask(mask_type):
    height, width = 5, 8
    mask = masks.build_attention_mask(mask_type, 1, height, width)
    figure = mask_pictures.draw_attention_mask(mask, height, width, "a title")
    matrix, *panels = figure.axes

    expected = torch.ones(40, 40, dtype=torch.bool) if mask is None else mask
    drawn = shown_cells(matrix, mask_pictures.ATTENDED)
    np.testing.assert_array_equal(np.broadcast_to(drawn, (40, 40)), expected)

    for axes, (row, column) in zip(panels, [(2, 4), (2, 0), (0, 0)], strict=True):
        neighbors = expected[row * width + column].reshape(height, width).numpy().copy()
        assert axes.get_title().endswith(f"{neighbors.sum()} neighbors")
        neighbors[row, column] = False  # it is drawn as the query
        np.testing.assert_array_equal(shown_cells(axes, mask_pictures.ATTENDED), neighbors)
        assert np.argwhere(shown_cells(axes, mask_pictures.QUERY)).tolist() == [[row, column]]


def test_all_mask_types_in_one_picture(tmp_path):
    by_type = {name: (name, masks.MaskSpec(name, 1).build_array(4, 6)) for name in masks.MASK_TYPES}
    figure = mask_pictures.draw_mask_types(by_type, 4, 6)
    assert len(figure.axes) == 3 * len(by_type)
    per_line = mask_pictures.MAX_COLUMNS
    assert per_line < len(by_type) < 2 * per_line, "two blocks of three lines"
    firsts = [*figure.axes[:per_line], *figure.axes[3 * per_line :][: len(by_type) - per_line]]
    assert [axes.get_title() for axes in firsts] == list(by_type)
    counts = [f"{n} neighbors" for n in (24, 5, 9, 5, 5, 9, 5, 9, 3, 9)]
    assert [axes.get_xlabel() for axes in firsts] == counts

    figures.save_as(figure, tmp_path / "masks.v2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks.v2.png", "masks.v2.svg"]


@pytest.mark.parametrize(("size", "block"), [(1, 1), (7, 1), (7, 2), (9, 3), (10, 4), (5, 9)])
def test_reduction_by_blocks_against_loops(size, block):
    mask = np.random.default_rng(0).random((size, size)) < 0.2
    reduced = mask_pictures.reduce_by_blocks(mask, block)
    num_blocks = -(-size // block)
    assert reduced.shape == (num_blocks, num_blocks)
    for i, j in itertools.product(range(num_blocks), repeat=2):
        square = mask[i * block : (i + 1) * block, j * block : (j + 1) * block]
        assert reduced[i, j] == square.any()


def test_a_large_mask_is_drawn_small():
    height = width = 50
    mask = masks.build_attention_mask("2d_all_neighbors", 2, height, width)
    figure = mask_pictures.draw_attention_mask(mask, height, width, "large")
    assert max(figure.axes[0].images[0].get_array().shape) <= mask_pictures.MAX_CELLS
    assert "6 × 6 to a dot" in figure.axes[0].get_title()

    full = mask_pictures.draw_attention_mask(None, 128, 128, "full")
    assert full.axes[0].images[0].get_array().shape == (1, 1, 3)


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"shape \(6, 6\), got \(4, 4\)"):
        mask_pictures.draw_attention_mask(torch.eye(4, dtype=torch.bool), 2, 3, "wrong")
