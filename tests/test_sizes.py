"""Rectangular images from training to report, and models at another size than in training."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from image_folders import make_classes, run_arguments

import data
import eval as evaluation
import main
import masks
import models
import plot_result
import utils
from pipeline import augment, mixing, pixels, sizes
from sweep import plan
from training import building, checkpoints
from training.command_line import parse_args, resolve_settings
from training.settings import Settings

# --------------------------------------------------------------------------------------------------
# The flag


@pytest.mark.parametrize(
    ("text", "value", "sides"),
    [
        ("224", 224, (224, 224)),
        ("192x320", "192x320", (192, 320)),
        ("192X320", "192x320", (192, 320)),
        ("32x32", 32, (32, 32)),
    ],
)
def test_a_size_is_a_number_or_height_x_width(text, value, sides):
    assert sizes.parse(text) == value
    assert sizes.sides_of(value) == sides
    assert sizes.of_sides(*sides) == value
    assert sizes.parse(str(value)) == value


@pytest.mark.parametrize("text", ["", "x", "2x", "2x3x4", "2.5", "192*320", "0", "0x5", "-3"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"192x320|at least 1"):
        sizes.parse(text)


def test_settings_keep_a_number_where_there_was_one():
    def settings_of(*flags):
        return resolve_settings(parse_args(["--device", "cpu", *flags]))

    assert settings_of().to_dict()["img_size"] == 224
    assert settings_of("--img_size", "64x64").to_dict()["img_size"] == 64
    wide = settings_of("--img_size", "192x320")
    assert wide.model.image_size == (192, 320)
    as_json = json.loads(json.dumps(wide.to_dict()))
    assert as_json["img_size"] == "192x320"
    assert Settings.from_dict(as_json) == wide


def test_a_size_that_does_not_fit_the_patches_is_refused(run_script):
    code, _, err = run_script(main.main, "--img_size", "192x330", "--dry_run")
    assert code == 2
    assert "192x330 is not a multiple of patch_size 16" in err


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ([], (14, 14)),
        (["--img_size", "24x40", "--patch_size=8"], (3, 5)),
        (["--img_size=40x24", "--patch_size", "8"], (5, 3)),
        (["--img_size", "4x40", "--patch_size", "8"], None),
        (["--img_size", "40xx4"], None),
    ],
)
def test_a_sweep_compares_masks_on_the_grid_of_the_run(options, grid):
    assert plan.grid_of(SimpleNamespace(main_options=options)) == grid


# --------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("img_size", [(24, 40), (40, 24), [16, 40]])
def test_the_model_is_timms_on_rectangles(img_size):
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    ours = models.VisionTransformer(img_size, **shape, dropout=0.0).eval()
    theirs = timm.models.VisionTransformer(img_size=tuple(img_size), **shape).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, *img_size)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


# Whether a patch attends to one that is this many rows and columns away, at step 1.
REACHES = {
    "full": lambda dy, dx: True,
    "2d_cardinal": lambda dy, dx: dy + dx <= 1,
    "2d_circle": lambda dy, dx: dy + dx <= 1,
    "2d_all_neighbors": lambda dy, dx: max(dy, dx) <= 1,
    "axial": lambda dy, dx: dy == 0 or dx == 0,
}


@pytest.mark.parametrize("mask_type", masks.MASK_TYPES)
def test_on_a_3x5_grid_a_patch_reaches_just_its_neighbors(mask_type):
    """Change the pixels of one patch, and see which tokens change after one layer."""
    flags = ["--img_size", "24x40", "--patch_size", "8", "--mask_type", mask_type]
    flags += ["--model", "vit_micro", "--depth", "1", "--pool", "mean", "--device", "cpu"]
    settings = resolve_settings(parse_args(flags))
    model = building.build_model(settings, 3, 4).eval()
    assert model.grid == (3, 5)

    tokens = []
    model.blocks[0].register_forward_hook(lambda *args: tokens.append(args[-1][0]))  # [N, E]
    images = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    row, column = 1, 3
    changed = images.clone()
    changed[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    with torch.no_grad():
        model(images)
        model(changed)
    differs = (tokens[0] - tokens[1]).abs().amax(1) > 1e-6  # [N]

    spec, place = settings.mask.spec, 5 * row + column
    for query in range(15):
        if mask_type in REACHES:
            dy, dx = abs(query // 5 - row), abs(query % 5 - column)
            expected = REACHES[mask_type](dy, dx)
        elif mask_type.startswith("1d"):
            expected = abs(query - place) <= spec.num_neighbors(3, 5) // 2
        else:  # by no rule on offsets: what the mask says
            (mask,) = spec.build_layers(3, 5, 1)
            expected = bool(mask[query, place])
        assert differs[query] == expected, query


# --------------------------------------------------------------------------------------------------
# Rectangular images through the pipeline: transposed images must give transposed results


def transposed(images):
    return images.transpose(-1, -2).contiguous()


@pytest.fixture
def images():
    shape = (5, 3, 12, 21)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()


MIRROR = {"shear_x": "shear_y", "translate_x": "translate_y"}
MIRROR |= {other: op for op, other in MIRROR.items()}


@pytest.mark.parametrize("op", augment.OPS)
def test_each_operation_treats_rows_as_it_treats_columns(op):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(30, 220, (5, 3, 20, 33), generator=generator).byte()
    units = {"posterize": 5.0, "solarize": 100.0, "translate_x": 4.0, "translate_y": 4.0}
    magnitude = torch.full((1, 5), units.get(op, 0.4 if op != "rotate" else 24.0))

    def apply(images, op, magnitude):
        ops = torch.full((1, 5), augment.OPS.index(op))
        return augment.apply_policy(images, augment.Draws(ops, magnitude))

    expected = transposed(apply(images, op, magnitude))
    # Seen in a mirror along the diagonal, x is y, and clockwise is counterclockwise.
    turned = -magnitude if op == "rotate" else magnitude
    found = apply(transposed(images), MIRROR.get(op, op), turned)
    assert torch.equal(found, expected)
    assert op == "identity" or not torch.equal(found, transposed(images))


def test_crops_boxes_and_sizes_treat_rows_as_they_treat_columns(images):
    offsets = torch.tensor([[0, 3], [1, 2], [2, 2], [0, 0], [4, 1]])
    still = torch.zeros(5, dtype=torch.bool)
    cropped = pixels.crop_and_flip(images, offsets, still, 2)
    found = pixels.crop_and_flip(transposed(images), offsets.flip(1), still, 2)
    assert torch.equal(found, transposed(cropped))

    floats = images.float()
    boxes = torch.tensor([[0, 0, 12, 3], [4, 10, 2, 11], [1, 1, 0, 0], [3, 2, 1, 1], [0, 20, 9, 1]])
    erased = augment.erase(floats, boxes)
    found = augment.erase(transposed(floats), boxes[:, [1, 0, 3, 2]])
    assert torch.equal(found, transposed(erased))
    assert (erased[0, :, :, :3] == 0).all()

    for size in ((24, 42), (24, 21), (7, 30), (6, 5)):
        resized = pixels.resize(floats, size)
        assert resized.shape[-2:] == size
        found = pixels.resize(transposed(floats), size[::-1])
        torch.testing.assert_close(found, transposed(resized), atol=1e-3, rtol=0)


def test_erased_boxes_are_drawn_for_the_rows_and_columns_of_the_image():
    boxes = augment.draw_erasing(1.0, 4000, (12, 60), torch.Generator().manual_seed(0))
    top, left, height, width = boxes.T
    assert (top + height).max() == 12
    assert (left + width).max() == 60


def test_mixed_boxes_reach_all_of_a_rectangle():
    """CutMix pastes a box of one image into another; its far corner is at the last pixel."""
    black_and_white = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 12, 60)
    reached = torch.zeros(12, 60)
    for seed in range(200):
        labels = torch.tensor([0, 1])
        mixed, _ = mixing.mix("cutmix", 1.0, black_and_white.clone(), labels, 2, seed)
        reached += mixed[0, 0] != 1
    assert (reached > 0).all()


@pytest.mark.parametrize("policy", augment.POLICIES)
def test_batches_with_everything_have_the_size_of_the_model(images, policy):
    split = data.Split(images, torch.arange(5) % 2)
    dataset = data.Dataset(
        name="random", label="Random", class_names=["a", "b"], train=split, test=split,
        mean=[0.5] * 3, std=[0.25] * 3, flip=True, img_size=(24, 42), device=torch.device("cpu"),
    )  # fmt: skip
    how = data.Augmentation(policy=policy, random_erasing=0.5, mix=1.0)
    for epoch in (1, 2):
        batches = data.train_batches(dataset, batch_size=3, seed=0, epoch=epoch, augmentation=how)
        for batch, labels in batches:
            assert batch.shape[1:] == (3, 24, 42)
            assert batch.isfinite().all()
            assert len(labels) == len(batch)


# --------------------------------------------------------------------------------------------------
# From training to report


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder `pets` and two runs on it at 24x40; the one with full attention is in `full`."""
    root = tmp_path_factory.mktemp("wide")
    make_classes(root / "pets")
    for mask in (["--mask_type", "2d_cardinal"], []):
        assert main.main(run_arguments(root / "pets", root / "out", *mask)) == 0
    return root / "out" / "pets"


@pytest.fixture
def local(trained):
    return trained / "2d_cardinal_expansion_1" / "seed_0"


def test_what_a_rectangular_run_leaves(local, trained, run_script):
    config = utils.read_json(local / "config.json")
    assert config["settings"]["img_size"] == "24x40"
    assert config["attention"]["grid"] == [3, 5]
    assert config["data"]["image_shape"] == [3, 24, 40]
    expected = sum(
        abs(query // 5 - key // 5) + abs(query % 5 - key % 5) <= 1
        for query in range(15)
        for key in range(15)
    )
    assert config["attention"]["num_neighbors_mean"] == pytest.approx(expected / 15)

    arguments = run_arguments(trained.parents[1] / "pets", trained.parent)
    code, out, _ = run_script(main.main, *arguments, "--mask_type", "2d_cardinal")
    assert (code, "nothing to do" in out) == (0, True)
    code, _, err = run_script(main.main, *arguments, "--img_size", "40x24")
    assert code == 2
    assert "img_size '24x40' there, '40x24' asked for" in err


def test_a_rectangular_run_is_evaluated_analyzed_and_reported(local, trained, run_script):
    final = utils.read_json(local / "summary.json")["final"]
    options = ["--checkpoint", str(local / "last.pt"), "--device", "cpu"]
    assert run_script(evaluation.main, *options)[0] == 0
    report = utils.read_json(local / "eval_test.json")
    assert report["top1_accuracy"] == pytest.approx(final["eval_accuracy"])
    assert report["loss"] == pytest.approx(final["eval_loss"], rel=1e-5)
    assert report["img_size"] == report["img_size_in_training"] == [24, 40]

    assert run_script(evaluation.main, *options, "--analyze", "--patch", "2x4")[0] == 0
    with np.load(local / "analysis_test.npz") as arrays:
        field, maps = arrays["receptive_field"], arrays["maps"]
    assert field.shape == (24, 40)
    assert maps.shape[-2:] == (3, 5)
    # Two layers of a plus: nothing from further than two patches away, but from two patches away.
    blocks = field.reshape(3, 8, 5, 8).max((1, 3))  # [gh, gw]
    assert blocks[2, 4] > blocks[0, 4] > 0
    assert blocks[2, 2] > 0
    code, _, err = run_script(evaluation.main, *options, "--analyze", "--patch", "4x2")
    assert code == 2
    assert "outside the 3x5 grid" in err

    code, _, err = run_script(plot_result.main, "--results_path", str(trained))
    assert code == 0, err
    for name in ("results.md", "results.html"):
        text = (trained / name).read_text(encoding="utf-8")
        assert "24×40 images in 8×8 patches (grid 3×5)" in text
    assert (trained / "figures" / "receptive_field.png").exists()


# --------------------------------------------------------------------------------------------------
# Another size than in training


def test_at_another_size_positions_are_interpolated_and_the_mask_is_rebuilt(local):
    state = checkpoints.load_checkpoint(local / "last.pt")
    model = checkpoints.rebuild_model(state, "dense", (32, 48))
    assert model.grid == (4, 6)
    assert torch.equal(model.compiled_mask.mask, masks.MaskSpec("2d_cardinal", 1).build(4, 6))
    theirs = timm.layers.resample_abs_pos_embed(state["model"]["pos_embed"], [4, 6], [3, 5])
    torch.testing.assert_close(model.pos_embed.data, theirs)
    for name, weights in model.state_dict().items():
        assert name == "pos_embed" or torch.equal(weights, state["model"][name])
    with pytest.raises(ValueError, match="30x48 is not a multiple"):
        checkpoints.rebuild_model(state, "dense", (30, 48))

    same = checkpoints.rebuild_model(state, "dense", (24, 40))
    assert torch.equal(same.pos_embed, state["model"]["pos_embed"])


def test_evaluating_at_another_size_says_what_was_done(local, run_script):
    options = ["--checkpoint", str(local / "last.pt"), "--device", "cpu"]
    code, out, err = run_script(evaluation.main, *options, "--img_size", "32x48")
    assert (code, err) == (0, "")
    assert (
        "32x48 pixels instead of 24x40: positions interpolated from the 3x5 grid to 4x6, the mask "
        "2d_cardinal, step 1 rebuilt for it"
    ) in out
    report = utils.read_json(local / "eval_test_32x48.json")
    assert report["img_size"] == [32, 48]
    assert report["img_size_in_training"] == [24, 40]
    assert report["data_as_trained"] is True
    assert report["num_images"] == 6

    code, _, err = run_script(evaluation.main, *options, "--img_size", "30")
    assert code == 2
    assert "30x30 is not a multiple of patch_size 8" in err


def test_an_export_has_the_size_that_is_asked_for(local, tmp_path, run_script):
    path = tmp_path / "model.safetensors"
    options = ["--checkpoint", str(local / "last.pt"), "--export", str(path)]
    code, out, err = run_script(evaluation.main, *options, "--img_size", "32x48")
    assert (code, err) == (0, "")
    assert "positions interpolated from the 3x5 grid to 4x6" in out

    expected = checkpoints.rebuild_model(checkpoints.load_checkpoint(local / "last.pt"), "dense")
    written = safetensors.torch.load_file(path)
    theirs = timm.layers.resample_abs_pos_embed(expected.pos_embed.data, [4, 6], [3, 5])
    torch.testing.assert_close(written["pos_embed"], theirs)


def test_results_at_another_size_do_not_get_into_the_report(local, trained, run_script):
    full = trained / "full" / "seed_0" / "last.pt"
    both = ["--compare", str(local / "last.pt"), str(full), "--device", "cpu"]
    assert run_script(evaluation.main, *both, "--img_size", "32x48")[0] == 0
    written = local / "compare_full_seed_0_test_32x48.json"
    assert utils.read_json(written)["first"]["img_size"] == [32, 48]
    code, _, err = run_script(plot_result.main, "--results_path", str(trained))
    assert (code, err) == (0, "")
    assert "Disagree" not in (trained / "results.html").read_text(encoding="utf-8")
    written.unlink()


@pytest.mark.parametrize("size", [["--img_size", "8x16"], ["--img_size", "8"]])
def test_training_speed_is_measured_on_rectangles(size):
    import benchmark
    from benchmarks import training

    flags = ["--level", "training", *size, "--model", "vit_micro", "--patch_size", "4"]
    args = benchmark.parse_args([*flags, "--batch_size", "2", "--workers", "0", "--steps", "1"])
    loops = training.build_loops(args, torch.device("cpu"))
    for name in (training.USUAL, f"{training.BARE}, fp32", f"{training.OURS}, plain, fp32"):
        loops[name]()
