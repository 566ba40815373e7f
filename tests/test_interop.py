"""Localized models of the installed libraries against these libraries' own masked attention."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
import torchvision
from foreign_models import (
    GRID,
    HEIGHT,
    MODELS,
    PATCH,
    SPEC,
    SQUARE,
    WIDTH,
    assert_close,
    build,
    each_model,
    gradients_of,
    grid_of,
    hugging_face,
    images_for,
    output_of,
    timm_vit,
    token_mask_of,
    torchvision_vit,
    with_masked_sdpa,
)

from interop import localize, unlocalize
from masks import MaskSpec, build_attention_mask


@each_model
def test_outputs_and_gradients_are_those_of_the_masked_model(name, monkeypatch):
    model, images = build(name), images_for(name)
    full = output_of(model, images)
    localized = localize(copy.deepcopy(model), SPEC.mask_type, SPEC.expansion_step)
    found, gradients = output_of(localized, images), gradients_of(localized, images)

    mask = SPEC.build(*grid_of(name))
    if name == "timm, formulas":
        model = build("timm")
    with_masked_sdpa(monkeypatch, token_mask_of(name, mask))
    expected = output_of(model, images)
    assert (expected - full).abs().max() > 1e-2, "the mask matters"
    assert_close(found, expected)

    expected_gradients = gradients_of(model, images)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        assert_close(gradients[parameter], gradient)
    assert sum(gradient.abs().sum() > 1e-3 for gradient in gradients.values()) > 10


@each_model
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_full_mask_changes_nothing(name, backend):
    model, images = build(name), images_for(name)
    num_patches = grid_of(name)[0] * grid_of(name)[1]
    expected = output_of(model, images)
    mask = torch.ones(num_patches, num_patches, dtype=torch.bool)
    assert_close(output_of(localize(model, mask, backend=backend), images), expected)
    assert_close(output_of(localize(model, "full"), images), expected)


# The formulas of timm 1.0.22 add a boolean mask to the scores.
OF_TIMM = [name for name in MODELS if name.startswith("timm") and "formulas" not in name]


@pytest.mark.parametrize("name", OF_TIMM)
def test_timm_computes_the_same_with_its_attn_mask(name):
    model, images = build(name), images_for(name)
    if "attn_mask" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of timm has no attn_mask for this model")
    mask = build_attention_mask("2d_cardinal", 1, *GRID)
    expected = model(images, attn_mask=token_mask_of(name, mask))
    assert_close(localize(model, mask)(images), expected)


def test_masks_that_differ_by_layer(monkeypatch):
    model, images = build("timm"), images_for("timm")
    windows = MaskSpec("2d_window", 1)
    found = output_of(localize(copy.deepcopy(model), windows), images)

    own, moved = (token_mask_of("timm", mask) for mask in windows.build_layers(*GRID, 2))
    assert not torch.equal(own, moved)
    masks, sdpa = iter([own, moved]), F.scaled_dot_product_attention

    def masked(q, k, v, **_):
        return sdpa(q, k, v, attn_mask=next(masks))

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    assert_close(found, output_of(model, images))
    assert next(masks, None) is None


@pytest.mark.parametrize("name", ["transformers' ViT", "transformers' DINOv2, registers"])
def test_transformers_computes_the_same_with_its_attention_mask(name):
    model, images = build(name), images_for(name)
    if "attention_mask" not in inspect.signature(model.base_model.forward).parameters:
        pytest.skip("this version of transformers has no attention_mask for this model")
    mask = build_attention_mask("2d_cardinal", 1, *grid_of(name))
    model.set_attn_implementation("eager")
    expected = model(images, attention_mask=additive(token_mask_of(name, mask))).logits
    assert_close(localize(model, mask)(images).logits, expected)


def additive(allowed):
    """[T, T] -> [1, 1, T, T], 0 or minus infinity."""
    return torch.zeros(1, 1, *allowed.shape).masked_fill(~allowed, float("-inf"))


def test_torchvision_computes_the_same_with_the_mask_of_its_attention():
    model, images = build("torchvision"), images_for("torchvision")
    mask = build_attention_mask("2d_cardinal", 1, *SQUARE)
    localized = localize(copy.deepcopy(model), mask)
    hidden = ~token_mask_of("torchvision", mask)  # for torch's own attention, True = hidden
    for block in model.encoder.layers:
        own = block.self_attention.forward
        block.self_attention.forward = masked_forward(own, hidden)
    assert_close(localized(images), model(images))


def masked_forward(forward, hidden):
    return lambda *args, **options: forward(*args, attn_mask=hidden, **options)


def test_a_random_mask_and_the_feature_maps_of_timm():
    model, images = build("timm"), images_for("timm")
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(24, 24, generator=generator) < 0.2
    mask |= torch.eye(24, dtype=torch.bool)
    allowed = token_mask_of("timm", mask)
    expected = model.forward_intermediates(images, attn_mask=allowed, intermediates_only=True)
    found = localize(model, mask).forward_intermediates(images, intermediates_only=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["timm", "transformers' ViT"])
def test_training_with_dropout_draws_the_same(name, monkeypatch):
    """Dropout on embeddings, projections and in the MLP stays the library's.

    Torchvision's too, but torch draws in the order in memory, which there is another.
    """
    builders = {
        "timm": lambda: timm_vit(proj_drop_rate=0.3, pos_drop_rate=0.2, drop_path_rate=0.3),
        "transformers' ViT": lambda: hugging_face("ViT", hidden_dropout_prob=0.3),
    }
    monkeypatch.setitem(MODELS, name, (builders[name], 1))
    model, images = build(name).train(), images_for(name)
    localized = localize(copy.deepcopy(model), SPEC)
    torch.manual_seed(5)
    found = output_of(localized, images)

    with_masked_sdpa(monkeypatch, token_mask_of(name, SPEC.build(*grid_of(name))))
    torch.manual_seed(5)
    assert_close(found, output_of(model, images))
    assert (found - output_of(model, images)).abs().max() > 1e-2, "drawn anew"


# --------------------------------------------------------------------------------------------------
# Other grids


@pytest.mark.parametrize(
    ("builder", "options", "num_global"),
    [
        (lambda: timm_vit(dynamic_img_size=True), {}, 1),
        (lambda: hugging_face("ViT", SQUARE), {"interpolate_pos_encoding": True}, 1),
        (lambda: hugging_face("Dinov2", SQUARE), {}, 1),
        (lambda: hugging_face("DINOv3ViT", task="Model"), {}, 1),
    ],
    ids=["timm", "ViT", "DINOv2", "DINOv3"],
)
def test_images_of_another_size(builder, options, num_global, monkeypatch):
    torch.manual_seed(0)
    model = builder().eval()
    images = torch.randn(2, 3, 3 * PATCH, 8 * PATCH)
    localize(model, SPEC)
    with pytest.raises(ValueError, match=r"3x8 patches, but .* for 4x[46]; .*grid=\(3, 8\)"):
        model(images, **options)

    localize(model, SPEC, grid=(3, 8))
    found = output_of(lambda images: model(images, **options), images)
    unlocalize(model)
    allowed = F.pad(SPEC.build(3, 8), 2 * (num_global, 0), value=True)
    with_masked_sdpa(monkeypatch, allowed)
    assert_close(found, output_of(lambda images: model(images, **options), images))


def test_a_stem_of_convolutions_and_a_padded_image():
    conv = torchvision.models.vision_transformer.ConvStemConfig
    stem = [conv(8, 3, 4), conv(16, 3, 2)]
    model, images = torchvision_vit(conv_stem_configs=stem).eval(), images_for("torchvision")
    assert localize(model, SPEC)(images).shape == (2, 5)

    model = timm_vit(dynamic_img_size=True, dynamic_img_pad=True).eval()
    images = torch.randn(2, 3, HEIGHT - 3, WIDTH)
    expected = model(images, attn_mask=F.pad(SPEC.build(*GRID), (1, 0, 1, 0), value=True))
    assert_close(localize(model, SPEC)(images), expected)
