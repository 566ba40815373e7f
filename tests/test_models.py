"""The ViT equals timm's, and a mask really limits who can see whom."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import masks
import models
from models import VisionTransformer

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 7,
    "dropout": 0.0,
}


def test_images_of_another_shape_are_refused():
    """Even if they have as many patches, which would get the positions of another grid."""
    model = VisionTransformer(**{**SMALL, "img_size": (16, 24)})
    with pytest.raises(ValueError, match="got images of 24x16 pixels, but the model is for 16x24"):
        model(torch.zeros(1, 3, 24, 16))


def make_timm(config, **kwargs):
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    return timm.models.VisionTransformer(**{name: config[name] for name in names}, **kwargs).eval()


def randomize(model):
    """Set weights far from their initialization, so that biases, norms and positions all matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def shapes_of(state):
    return {name: value.shape for name, value in state.items()}


def tokens_of(model, *batches):
    """The tokens after the last norm, [B, T, E], for each batch of images."""
    tokens = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    for images in batches:
        model(images)
    hook.remove()
    return tokens


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_default_is_timms_vit_base_patch16_224():
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", num_classes=10).state_dict()
    ours = VisionTransformer().state_dict()
    assert shapes_of(ours) == shapes_of(theirs)


@pytest.mark.parametrize("preset", ["vit_small", "vit_tiny"])
def test_presets_have_timms_sizes(preset):
    with torch.device("meta"):
        theirs = timm.create_model(f"{preset}_patch16_224", num_classes=10).state_dict()
    ours = VisionTransformer(**models.PRESETS[preset]).state_dict()
    assert shapes_of(ours) == shapes_of(theirs)


def test_logits_and_gradients_equal_timms_with_its_weights(images):
    theirs = randomize(make_timm(SMALL))
    ours = VisionTransformer(**SMALL)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)

    for model in (ours, theirs):
        model(images).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = gradients[name]
        scale = expected.abs().max()
        torch.testing.assert_close(parameter.grad / scale, expected / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("img_size", [32, (24, 40)])
def test_masked_logits_equal_those_of_timm_masked_by_hand(img_size):
    config = {**SMALL, "img_size": img_size}
    height, width = (32, 32) if img_size == 32 else img_size

    mask = masks.generate_2d_attention_mask_cardinal(1, height // 8, width // 8)
    num_tokens = len(mask) + 1
    with_class_token = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
    with_class_token[1:, 1:] = mask

    def masked_attention(module):
        def forward(x, *args, **kwargs):
            b, t, e = x.shape
            qkv = module.qkv(x).reshape(b, t, 3, module.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
            scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
            weights = scores.masked_fill(~with_class_token, float("-inf")).softmax(-1)
            return module.proj((weights @ v).transpose(1, 2).reshape(b, t, e))

        return forward

    theirs = randomize(make_timm(config))
    for block in theirs.blocks:
        block.attn.forward = masked_attention(block.attn)

    ours = VisionTransformer(**config, attention_mask=mask).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, height, width)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", models.POOLS)
def test_a_mask_of_ones_changes_nothing(images, pool):
    ones = torch.ones(16, 16, dtype=torch.bool)
    model = randomize(VisionTransformer(**SMALL, pool=pool)).eval()
    masked = VisionTransformer(**SMALL, pool=pool, attention_mask=ones).eval()
    masked.load_state_dict(model.state_dict())
    torch.testing.assert_close(masked(images), model(images), rtol=1e-4, atol=1e-5)


def test_full_attention_passes_no_mask_to_sdpa(images, monkeypatch):
    seen = []
    original = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    VisionTransformer(**SMALL)(images)
    assert seen == [None] * SMALL["depth"]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("mask_type", ["2d_cardinal", "2d_all_neighbors", "1d_cardinal"])
def test_information_spreads_exactly_as_far_as_the_mask_allows(depth, mask_type):
    """After k layers, a changed patch has changed exactly the patches within k steps of the mask.

    There is no class token here.
    """
    height, width = 5, 7
    mask = masks.build_attention_mask(mask_type, 1, height, width)
    sizes = {"img_size": (height * 4, width * 4), "patch_size": 4, "depth": depth}
    model = VisionTransformer(**{**SMALL, **sizes}, pool="mean", attention_mask=mask)
    model = randomize(model).double().eval()

    images = torch.randn(1, 3, height * 4, width * 4, dtype=torch.float64)
    changed = images.clone()
    row, column = 1, 5
    changed[..., row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 1
    before, after = tokens_of(model, images, changed)
    differs = (before != after).any(-1)[0]  # [N]

    reach = torch.eye(height * width, dtype=torch.float64)
    for _ in range(depth):
        reach = ((mask.double() @ reach) > 0).double()
    assert torch.equal(differs, reach[:, row * width + column] > 0)
    assert not differs.all()


def test_the_class_token_links_all_patches_within_two_layers(images):
    mask = torch.eye(16, dtype=torch.bool)
    model = randomize(VisionTransformer(**{**SMALL, "depth": 2}, attention_mask=mask)).eval()
    changed = images.clone()
    changed[..., :8, :8] += 1
    before, after = tokens_of(model, images, changed)
    assert (before != after).any(-1).all()


@pytest.mark.parametrize("pool", models.POOLS)
def test_every_parameter_gets_a_gradient(images, pool):
    mask = masks.generate_2d_attention_mask_all_neighbors(1, 4, 4)
    model = VisionTransformer(**{**SMALL, "dropout": 0.1}, pool=pool, attention_mask=mask)
    F.cross_entropy(model(images), torch.tensor([1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("size", "channels"), [((12, 20), 3), ((4, 8), 1), ((20, 4), 2)])
def test_the_patch_embedding_is_a_convolution_without_overlap(size, channels):
    embed = models.PatchEmbedding(4, channels, 6).double()
    images = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    found = embed(images)  # [B, N, E]
    expected = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected)

    inputs = (images, embed.proj.weight, embed.proj.bias)
    grad = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


def test_dropout_acts_only_in_training(images):
    model = VisionTransformer(**{**SMALL, "dropout": 0.5})
    model.train()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_the_same_seed_gives_the_same_weights_whatever_the_mask():
    states = []
    for mask in (None, masks.generate_1d_attention_mask(3, 16)):
        torch.manual_seed(3)
        states.append(VisionTransformer(**SMALL, attention_mask=mask).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_positions_tell_patches_apart_and_are_similar_for_neighbors():
    positions = models.sincos_positions(5, 7, 48)
    similarity = F.cosine_similarity(positions[:, None], positions[None], dim=-1)  # [N, N]
    assert similarity.fill_diagonal_(0).max() < 0.999

    center = similarity[2 * 7 + 3].view(5, 7)
    assert center[2, 2] > center[2, 1] > center[2, 0]
    # A step to the left and a step up count alike.
    assert center[2, 2] == pytest.approx(center[1, 3].item(), abs=1e-6)

    assert models.sincos_positions(2, 3, 7).shape == (6, 7)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (3, 5)), ((3, 5), (6, 10)), ((6, 10), (5, 3)), ((3, 5), (5, 3))]
)
def test_positions_are_resampled_as_timm_does(old, new, num_prefix):
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(1, num_prefix + old[0] * old[1], 6, generator=generator)
    ours = models.resample_positions(positions, old, new, num_prefix)
    theirs = timm.layers.resample_abs_pos_embed(positions, list(new), list(old), num_prefix)
    assert ours.shape == (1, num_prefix + new[0] * new[1], 6)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[:, :num_prefix], positions[:, :num_prefix])


def test_resampled_positions_keep_rows_apart_from_columns():
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    positions = torch.stack([rows, columns], -1).view(1, 15, 2)  # [1, N, (row, column)]
    new = models.resample_positions(positions, (3, 5), (9, 20), 0).view(9, 20, 2)
    assert torch.allclose(new[..., 0], new[:, :1, 0]), "the row must not depend on the column"
    assert torch.allclose(new[..., 1], new[:1, :, 1]), "the column must not depend on the row"
    assert new[0, 0, 0] < 0.5 < 1.5 < new[-1, 0, 0]
    assert new[0, 0, 1] < 0.5 < 3.5 < new[0, -1, 1]

    half = positions.bfloat16()
    assert models.resample_positions(half, (3, 5), (3, 5), 0) is half
    assert models.resample_positions(half, (3, 5), (4, 4), 0).dtype == torch.bfloat16


def test_positions_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 16, 8\].*1 prefix tokens.*4x5.*\[1, 21, E\]"):
        models.resample_positions(torch.zeros(1, 16, 8), (4, 5), (2, 2), 1)


@pytest.mark.parametrize("pool", models.POOLS)
def test_flops_equal_what_torch_counts(pool):
    model = VisionTransformer(**SMALL, pool=pool).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 32, 32))
    assert models.count_forward_flops(model)["total"] == counter.get_total_flops()


def test_flops_of_masked_attention_count_the_allowed_pairs():
    mask = masks.generate_2d_attention_mask_cardinal(1, 4, 4)
    pairs = int(mask.sum()) + 2 * 16 + 1  # the class token's row and column
    flops = models.count_forward_flops(VisionTransformer(**SMALL, attention_mask=mask))
    assert flops["attention"] == 4 * pairs * SMALL["embed_dim"] * SMALL["depth"]

    base = models.count_forward_flops(VisionTransformer())
    assert base["attention"] / base["total"] == pytest.approx(0.04, abs=0.005)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_size": 33}, "33x33.*patch_size 8"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"num_heads": 5}, "embed_dim 48.*num_heads 5"),
        ({"pool": "max"}, "'max'.*cls"),
        ({"attention_mask": torch.ones(4, 4, dtype=torch.bool)}, r"\[4, 4\].*\[16, 16\]"),
        ({"backend": "magic"}, "'magic'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        VisionTransformer(**{**SMALL, **change})
