"""Operations and the ranges of the draws against torchvision, which does one image at a time."""

import math

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from pipeline import augment
from pipeline.augment import OPS, Draws, apply_policy, draw_erasing, draw_policy, erase

SIZES = [(9, 14), (19, 30), (32, 32), (8, 8)]
THEIR_POLICIES = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}
THEIR_NAMES = {name.lower(): name for name in v2.TrivialAugmentWide._AUGMENTATION_SPACE}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*shape, seed=0):
    """Blocks of 2 x 2 equal pixels over half of the gray levels.

    So histograms and extremes are not trivial.
    """
    *batch, height, width = shape
    small_shape = (*batch, -(-height // 2), -(-width // 2))
    small = torch.randint(40, 170, small_shape, generator=seeded(seed)).byte()
    large = small.repeat_interleave(2, -2).repeat_interleave(2, -1)
    return large[..., :height, :width].contiguous()


def affine(image, translate=(0, 0), slopes=(0, 0), center=None):
    shear = [math.degrees(math.atan(slope)) for slope in slopes]
    return transforms.affine(
        image, angle=0, translate=list(translate), scale=1, shear=shear, center=center
    )


REFERENCE = {
    "shear_x": lambda image, value: affine(image, slopes=(value, 0), center=[0, 0]),
    "shear_y": lambda image, value: affine(image, slopes=(0, value), center=[0, 0]),
    "translate_x": lambda image, value: affine(image, translate=(int(value), 0)),
    "translate_y": lambda image, value: affine(image, translate=(0, int(value))),
    "rotate": transforms.rotate,
    "brightness": lambda image, value: transforms.adjust_brightness(image, 1 + value),
    "color": lambda image, value: transforms.adjust_saturation(image, 1 + value),
    "contrast": lambda image, value: transforms.adjust_contrast(image, 1 + value),
    "sharpness": lambda image, value: transforms.adjust_sharpness(image, 1 + value),
    "posterize": lambda image, value: transforms.posterize(image, int(value)),
    "solarize": lambda image, value: transforms.solarize(image, value),
    "autocontrast": lambda image, value: transforms.autocontrast(image),
    "equalize": lambda image, value: transforms.equalize(image),
    "identity": lambda image, value: image,
}


def all_magnitudes(op, image_size):
    """Every magnitude of TrivialAugment, with both signs if it is signed: float32 [m]."""
    values = augment.magnitude_table("trivial", image_size)[OPS.index(op)]
    is_signed = OPS.index(op) < augment.NUM_SIGNED
    return torch.cat((values, -values)) if is_signed else values


def draws_of(op, magnitudes):
    """The same operation for each image, with the magnitudes float32 [m]."""
    ops = torch.full((1, len(magnitudes)), OPS.index(op))
    return Draws(ops, magnitudes[None])


def one_at_a_time(op, images, magnitudes):
    """What torchvision makes of each image."""
    pairs = zip(images, magnitudes.tolist(), strict=True)
    return torch.stack([REFERENCE[op](image, value) for image, value in pairs])


# --------------------------------------------------------------------------------------------------
# Operations


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", SIZES)
def test_operation_against_torchvision(op, channels, image_size):
    magnitudes = all_magnitudes(op, image_size)
    images = random_images(len(magnitudes), channels, *image_size)
    images[0] = 77  # constant

    changed = apply_policy(images, draws_of(op, magnitudes))
    expected = one_at_a_time(op, images, magnitudes)
    assert changed.dtype == torch.uint8
    assert changed.shape == images.shape

    differing = (changed != expected).flatten(1).float().mean(1)  # share of the pixels, per image
    if op in augment.AFFINE_OPS:
        # At these angles pixels fall halfway between two others, and rounding errors decide. It is
        # worst for a quarter turn of an image with one odd side.
        tied = (magnitudes.round(decimals=3) % 45 == 0) & (op == "rotate")
        assert differing[~tied].mean() < 0.001
        assert not tied.any() or differing[tied].max() < 0.4
    elif op in augment.BLEND_OPS:
        assert (changed.int() - expected.int()).abs().max() <= 1
        assert differing.mean() < 0.01
    else:
        assert differing.sum() == 0

    # PIL equalizes in steps of pixels / 255, and leaves images with fewer pixels alone.
    too_small = image_size[0] * image_size[1] < 255
    has_no_effect = (
        op == "identity" or (op == "color" and channels == 1) or (op == "equalize" and too_small)
    )
    assert torch.equal(changed, images) == has_no_effect


def test_extreme_gray_levels_stay_in_range():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(2 * 3 * 8 * 4).view(2, 3, 8, 8)
    images = stripes.repeat(31, 1, 1, 1)
    for op in augment.BLEND_OPS:
        magnitudes = all_magnitudes(op, (8, 8))
        changed = apply_policy(images, draws_of(op, magnitudes))
        expected = one_at_a_time(op, images, magnitudes)
        assert (changed.int() - expected.int()).abs().max() <= 1  # nothing wraps around


def test_color_leaves_one_channel_alone():
    images = random_images(62, 1, 9, 14)
    draws = draws_of("color", all_magnitudes("color", (9, 14)))
    assert torch.equal(apply_policy(images, draws), images)


# --------------------------------------------------------------------------------------------------
# Draws and batches


@pytest.mark.parametrize("policy", THEIR_POLICIES)
@pytest.mark.parametrize("image_size", [(9, 14), (32, 32), (300, 200)])
def test_operations_and_ranges_are_torchvisions(policy, image_size):
    space = THEIR_POLICIES[policy]()._AUGMENTATION_SPACE
    assert {name.lower() for name in space} == {op.replace("_", "") for op in OPS}

    table = augment.magnitude_table(policy, image_size)
    for op, values in zip(OPS, table, strict=True):
        levels, signed = space[THEIR_NAMES[op.replace("_", "")]]
        expected = levels(augment.NUM_LEVELS, *image_size)
        expected = torch.zeros(31) if expected is None else expected.float()
        if op.startswith("translate"):
            expected = expected.trunc()  # torchvision's int()
        torch.testing.assert_close(values, 255 * expected if op == "solarize" else expected)
        assert signed == (OPS.index(op) < augment.NUM_SIGNED)


def test_rand_augment_is_torchvisions_default():
    theirs = v2.RandAugment()
    assert theirs.num_ops == augment.NUM_ROUNDS["rand"]
    assert (theirs.magnitude, theirs.num_magnitude_bins) == (augment.RAND_LEVEL, augment.NUM_LEVELS)
    assert v2.TrivialAugmentWide().num_magnitude_bins == augment.NUM_LEVELS


@pytest.mark.parametrize("policy", THEIR_POLICIES)
def test_draws_are_uniform(policy):
    draws = draw_policy(policy, 14_000, (32, 32), seeded())
    assert draws.ops.shape == draws.magnitudes.shape == (augment.NUM_ROUNDS[policy], 14_000)
    assert draws.ops.dtype == torch.int64
    assert draws.magnitudes.dtype == torch.float32

    table = augment.magnitude_table(policy, (32, 32))
    for ops, magnitudes in zip(draws.ops, draws.magnitudes, strict=True):
        counts = torch.bincount(ops, minlength=len(OPS))
        assert len(counts) == len(OPS)
        assert (counts - 1000).abs().max() < 150  # 5 standard deviations

        for op, values in enumerate(table):
            drawn = magnitudes[ops == op]
            allowed = values if policy == "trivial" else values[9:10]
            assert set(drawn.abs().tolist()) == set(allowed.tolist())
            if op < augment.NUM_SIGNED:
                assert 0.4 < (drawn[drawn != 0] < 0).float().mean() < 0.6
            else:
                assert (drawn >= 0).all()


@pytest.mark.parametrize("policy", augment.POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", SIZES)
def test_policy_keeps_shape_and_leaves_its_input_alone(policy, channels, image_size):
    images = random_images(50, channels, *image_size)
    before = images.clone()
    changed = apply_policy(images, draw_policy(policy, 50, image_size, seeded()))
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(images, before)
    assert torch.equal(changed, images) == (policy == "none")


def test_policy_none_draws_nothing():
    generator = seeded()
    before = generator.get_state()
    assert draw_policy("none", 10, (8, 8), generator).ops.shape == (0, 10)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("policy", THEIR_POLICIES)
def test_rounds_against_one_image_at_a_time(policy):
    """The order of the batch is kept, and a second round starts from the result of the first."""
    images = random_images(60, 3, 8, 12)
    draws = draw_policy(policy, 60, (8, 12), seeded())
    changed = apply_policy(images, draws)
    for i, image in enumerate(images):
        alone = image[None]
        for op, value in zip(draws.ops[:, i], draws.magnitudes[:, i], strict=True):
            alone = apply_policy(alone, Draws(op.view(1, 1), value.view(1, 1)))
        assert torch.equal(changed[i], alone[0])


@pytest.mark.parametrize("policy", THEIR_POLICIES)
def test_equal_images_come_out_different(policy):
    images = random_images(1, 3, 32, 32).expand(100, -1, -1, -1)
    changed = apply_policy(images, draw_policy(policy, 100, (32, 32), seeded()))
    assert len(changed.flatten(1).unique(dim=0)) > (60 if policy == "trivial" else 40)


def test_same_seed_same_batch():
    images = random_images(64, 3, 8, 8)

    def augmented(seed):
        return apply_policy(images, draw_policy("rand", 64, (8, 8), seeded(seed)))

    assert torch.equal(augmented(3), augmented(3))
    assert not torch.equal(augmented(3), augmented(4))


@pytest.mark.parametrize("policy", augment.POLICIES)
def test_batches_take_their_part_of_the_draws_of_the_epoch(policy):
    images = random_images(64, 3, 9, 14)
    draws = draw_policy(policy, 64, (9, 14), seeded())
    whole = apply_policy(images, draws)

    first, second = slice(32), slice(32, None)
    halves = [apply_policy(images[half], draws.at(half)) for half in (first, second)]
    assert torch.equal(torch.cat(halves), whole)

    positions = torch.randperm(64, generator=seeded(1))
    assert torch.equal(apply_policy(images[positions], draws.at(positions)), whole[positions])


@pytest.mark.parametrize("policy", augment.POLICIES)
def test_nothing_waits_for_the_device(policy):
    """On the meta device, anything that needs the value of a tensor raises."""
    images = torch.empty(100, 3, 8, 8, dtype=torch.uint8, device="meta")
    draws = draw_policy(policy, 100, (8, 8), seeded())
    assert apply_policy(images, draws).shape == images.shape
    boxes = draw_erasing(1.0, 100, (8, 8), seeded())
    assert erase(images.float(), boxes).shape == images.shape


@pytest.mark.cuda
@pytest.mark.parametrize("policy", augment.POLICIES)
def test_cuda_gives_the_same(policy):
    images = random_images(200, 3, 32, 32)
    draws = draw_policy(policy, 200, (32, 32), seeded())
    on_device = images.cuda()

    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = apply_policy(on_device, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (changed.cpu() != apply_policy(images, draws)).float().mean() < 0.01


def test_unknown_policy():
    with pytest.raises(ValueError, match="'auto'"):
        draw_policy("auto", 1, (8, 8), seeded())


# --------------------------------------------------------------------------------------------------
# Random erasing


@pytest.mark.parametrize("image_size", [(32, 32), (224, 160), (9, 14), (8, 8), (5, 40)])
def test_erased_boxes_are_inside(image_size):
    boxes = draw_erasing(1.0, 5000, image_size, seeded())
    assert boxes.dtype == torch.int64
    assert boxes.shape == (5000, 4)

    corner, size = boxes.split(2, 1)
    assert (corner >= 0).all()
    assert (size >= 0).all()
    assert (corner + size <= torch.tensor(image_size)).all()
    for side in range(2):  # both borders are reached
        assert (corner[:, side] == 0).any()
        assert (corner + size)[:, side].max() == image_size[side]


def test_erased_area_and_ratio_are_in_range():
    size = draw_erasing(1.0, 5000, (1000, 1200), seeded())[:, 2:].double()
    uncut = (size < torch.tensor((1000, 1200))).all(1)
    assert uncut.float().mean() > 0.98

    share = size.prod(1) / 1.2e6
    assert 0.0199 < share.min() < 0.021
    assert 0.32 < share.max() < 0.3301
    assert share.mean() == pytest.approx(0.175, abs=0.005)

    ratio = size[uncut, 0] / size[uncut, 1]
    assert 0.299 < ratio.min() < 0.31
    assert 3.2 < ratio.max() < 3.32
    assert ratio.log().mean() == pytest.approx(0, abs=0.06)


def test_erasing_probability():
    assert not draw_erasing(0.0, 1000, (32, 32), seeded()).any()
    for probability in (0.25, 1.0):
        erased = draw_erasing(probability, 4000, (32, 32), seeded())[:, 2:].prod(1) > 0
        assert erased.float().mean() == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_erase_against_a_loop(dtype):
    images = torch.randn(40, 3, 9, 14, generator=seeded()).to(dtype)
    boxes = draw_erasing(0.5, 40, (9, 14), seeded())
    expected = images.clone()
    for image, (top, left, height, width) in zip(expected, boxes.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = 0

    erased = erase(images, boxes)
    assert erased.dtype == dtype
    assert torch.equal(erased, expected)
    assert not torch.equal(erased, images)
