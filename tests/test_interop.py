"""Localized models of the installed libraries against these libraries' own masked attention."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers

import utils
from attention import CompiledMask, compile_mask
from interop import localize, unlocalize
from masks import MaskSpec, build_attention_mask

GRID, SQUARE = (4, 6), (4, 4)
PATCH = 8
HEIGHT, WIDTH = GRID[0] * PATCH, GRID[1] * PATCH
SPEC = MaskSpec("2d_all_neighbors", 1)
TOLERANCE = 1e-5


# --------------------------------------------------------------------------------------------------
# Small models with random weights: name -> (model, how many tokens precede those of the patches)


def timm_vit(**options):
    size = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.models.VisionTransformer((HEIGHT, WIDTH), PATCH, **size, **options)


def timm_eva(**options):
    size = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.models.Eva((HEIGHT, WIDTH), PATCH, **size, **options)


def torchvision_vit(**options):
    size = {"num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 48, "num_classes": 5}
    return torchvision.models.VisionTransformer(HEIGHT, PATCH, **size, **options)


def hugging_face(kind, grid=GRID, task="ForImageClassification", **options):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    image = {"image_size": [grid[0] * PATCH, grid[1] * PATCH], "patch_size": PATCH}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, **image, intermediate_size=48, num_labels=5, **options
    )
    return getattr(transformers, f"{kind}{task}")(config)


MODELS = {
    "timm": (timm_vit, 1),
    "timm, registers, qk_norm, LayerScale": (
        lambda: timm_vit(qk_norm=True, init_values=0.5, reg_tokens=4),
        5,
    ),
    "timm, only registers, norm after": (
        lambda: timm_vit(
            class_token=False,
            reg_tokens=2,
            global_pool="avg",
            block_fn=timm.models.vision_transformer.ResPostBlock,
        ),
        2,
    ),
    "timm, no prefix tokens": (lambda: timm_vit(class_token=False, global_pool="avg"), 0),
    "timm, formulas": (lambda: without_sdpa(timm_vit()), 1),
    "timm's Eva, rotary": (lambda: timm_eva(use_rot_pos_emb=True, scale_attn_inner=True), 1),
    "timm's Eva, separate q, k, v": (
        lambda: timm_eva(qkv_fused=False, use_rot_pos_emb=True, num_reg_tokens=2),
        3,
    ),
    "timm's Eva, as DINOv3": (
        lambda: timm_eva(
            attn_type="rope",
            use_rot_pos_emb=True,
            use_abs_pos_emb=False,
            num_reg_tokens=4,
            qk_norm=True,
            init_values=0.5,
        ),
        5,
    ),
    "torchvision": (torchvision_vit, 1),
    "transformers' ViT": (lambda: hugging_face("ViT"), 1),
    "transformers' DeiT": (lambda: hugging_face("DeiT"), 2),
    "transformers' I-JEPA": (lambda: hugging_face("IJepa"), 0),
    "transformers' ViTMSN": (lambda: hugging_face("ViTMSN"), 1),
    "transformers' DINOv2": (lambda: hugging_face("Dinov2", SQUARE), 1),
    "transformers' DINOv2, registers": (
        lambda: hugging_face("Dinov2WithRegisters", SQUARE, num_register_tokens=3),
        4,
    ),
    "transformers' DINOv3": (lambda: hugging_face("DINOv3ViT", task="Model"), 1),
    "transformers' DINOv3, registers": (
        lambda: hugging_face("DINOv3ViT", task="Model", num_register_tokens=4),
        5,
    ),
}
# Only images may be rectangular, and not the model's own grid.
SQUARE_MODELS = ("torchvision", "transformers' DINOv2", "transformers' DINOv2, registers")
# One of each library, for what does not depend on the model.
ONE_EACH = ["timm", "torchvision", "transformers' ViT"]
each_model = pytest.mark.parametrize("name", MODELS)
each_library = pytest.mark.parametrize("name", ONE_EACH)


def without_sdpa(model):
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def build(name):
    """The model with weights that make attention matter; many are 0 or tiny when they are new."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def grid_of(name):
    return SQUARE if name in SQUARE_MODELS else GRID


def images_for(name):
    height, width = grid_of(name)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, PATCH * height, PATCH * width, generator=generator)


def output_of(model, images):
    """Logits, or of a model without a head the tokens."""
    found = model(images)
    if isinstance(found, torch.Tensor):
        return found
    return found.logits if "logits" in found else found.last_hidden_state


def token_mask_of(name, mask):
    """Over all tokens; those before the patches are global."""
    num_global = MODELS[name][1]
    allowed = torch.ones(2 * [num_global + len(mask)], dtype=torch.bool)
    allowed[num_global:, num_global:] = mask
    return allowed


def with_masked_sdpa(monkeypatch, mask):
    """From now on, every call of SDPA gets the mask."""
    sdpa = F.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        assert attn_mask is None
        assert not is_causal
        return sdpa(query, key, value, mask, dropout_p, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)


def gradients_of(model, images):
    """name -> gradient, for a loss that every output has a part in."""
    model.zero_grad()
    out = output_of(model, images)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()
    parameters = model.named_parameters()
    return {name: x.grad.clone() for name, x in parameters if x.grad is not None}


def assert_close(found, expected):
    """Within TOLERANCE of the largest value."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(1.0, largest))


# --------------------------------------------------------------------------------------------------
# The same numbers


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


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("timm")])
def test_timm_computes_the_same_with_its_attn_mask(name):
    model, images = build(name), images_for(name)
    if "attn_mask" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of timm has no attn_mask for this model")
    mask = build_attention_mask("2d_cardinal", 1, *GRID)
    expected = model(images, attn_mask=token_mask_of(name, mask))
    assert_close(localize(model, mask)(images), expected)


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
# A model like any other: saved, copied, compiled, in other precisions


@each_library
def test_the_state_dict_is_that_of_the_library(name, tmp_path):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    localized = localize(model, SPEC)
    assert localized is model
    after = localized.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    build(name).load_state_dict(after)
    localized.load_state_dict(before)

    parameters = {id(parameter) for parameter in localized.parameters()}
    assert len(parameters) == len(list(build(name).parameters()))
    masks = {module for module in localized.modules() if isinstance(module, CompiledMask)}
    assert len(masks) == 1, "shared by all blocks"


@each_library
def test_copies_and_pickles_compute_the_same(name):
    model, images = localize(build(name), SPEC), images_for(name)
    expected = output_of(model, images)
    duplicate = copy.deepcopy(model)
    unlocalize(model)
    assert torch.equal(output_of(duplicate, images), expected), "nothing is shared with the model"

    file = io.BytesIO()
    torch.save(duplicate, file)
    file.seek(0)
    assert torch.equal(output_of(torch.load(file, weights_only=False), images), expected)


def test_a_mask_with_a_function_is_pickled_without(monkeypatch):
    """The block mask of FlexAttention, which only CUDA has."""
    compiled = compile_mask(SPEC.build(*GRID))
    compiled.block_mask = lambda: None
    assert pickle.loads(pickle.dumps(compiled)).block_mask is None
    assert compiled.block_mask is not None

    monkeypatch.setattr(CompiledMask, "_prepare", lambda self: setattr(self, "block_mask", "new"))
    assert copy.deepcopy(compiled).block_mask == "new"


def test_a_pickle_works_in_another_process(tmp_path):
    """Where nobody has imported interop."""
    model = localize(build("transformers' ViT"), SPEC)
    images = images_for("transformers' ViT")
    (tmp_path / "model").write_bytes(pickle.dumps((model, images, output_of(model, images))))
    code = (
        "import pickle, sys, torch\n"
        "model, images, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert (model(images).logits - expected).abs().max() < 1e-5\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=utils.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_transformers_saves_and_loads_it_as_usual(tmp_path):
    name = "transformers' ViT"
    model, images = build(name), images_for(name)
    expected = output_of(model, images)
    localize(model, SPEC).save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert_close(output_of(loaded, images), expected)
    assert_close(output_of(localize(loaded, SPEC), images), output_of(model, images))


def test_models_that_share_a_configuration_are_independent():
    config = hugging_face("ViT").config
    first, second = (transformers.ViTForImageClassification(config).eval() for _ in range(2))
    images = images_for("transformers' ViT")
    expected = output_of(second, images)
    localize(first, SPEC)
    output_of(first, images)
    assert torch.equal(output_of(second, images), expected)


@each_model
def test_there_is_a_way_back_and_a_mask_replaces_another(name):
    model, images = build(name), images_for(name)
    full = output_of(model, images)
    once = output_of(localize(model, SPEC), images)
    wider = output_of(localize(model, "2d_all_neighbors", 2), images)
    assert (once - wider).abs().max() > 1e-3
    assert torch.equal(output_of(localize(model, SPEC), images), once)
    unlocalize(unlocalize(model))
    assert_close(output_of(model, images), full)
    assert repr(model) == repr(build(name))


@each_library
def test_bf16_and_autocast(name):
    model, images = localize(build(name), SPEC), images_for(name)
    expected = output_of(model, images)
    scale = expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (output_of(model, images) - expected).abs().max() < 0.1 * scale
    found = output_of(model.bfloat16(), images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.1 * scale


@each_library
def test_a_compiled_model_computes_the_same_without_a_break(name):
    """Traced as one graph, forward and backward."""
    model, images = localize(build(name), SPEC, backend="native"), images_for(name)
    expected, gradients = output_of(model, images), gradients_of(model, images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(output_of(compiled, images), expected)
    for parameter, gradient in gradients_of(compiled, images).items():
        assert_close(gradient, gradients[parameter.removeprefix("_orig_mod.")])


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


# --------------------------------------------------------------------------------------------------
# What it refuses


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "does not know Linear; it knows timm's VisionTransformer"),
        (lambda: torchvision.models.resnet18(), "knows VisionTransformer, not ResNet"),
        (lambda: timm.create_model("resnet10t"), "knows VisionTransformer and Eva, not ResNet"),
        (
            lambda: timm_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
            "block 0, a ParallelScalingBlock, has none of the attention layers that localize knows",
        ),
        (
            lambda: transformers.BeitModel(
                transformers.BeitConfig(
                    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
                )
            ),
            "knows those of the types vit, .*, not beit",
        ),
    ],
)
@pytest.mark.parametrize("function", [lambda model: localize(model, SPEC), unlocalize])
def test_unknown_models(builder, message, function):
    with pytest.raises(ValueError, match=message) as caught:
        function(builder())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [torch.ones(25, 25, dtype=torch.bool)],
            r"the mask has shape \[25, 25\], but the 4x6 grid of 24 patches needs \[24, 24\]",
        ),
        ([torch.ones(24, dtype=torch.bool)], r"shape \[24\], .* needs \[24, 24\]"),
        ([torch.ones(24, 24)], "expected a boolean mask .*, got torch.float32"),
        ([torch.zeros(24, 24, dtype=torch.bool)], "row 0 of the mask has no neighbor"),
        ([[[True]]], "expected a boolean mask .* or one of full, .*, got .*list"),
        (["2d_sphere", 1], "2d_sphere"),
        (["2d_cardinal"], "expansion_step must be an integer, got None"),
        ([torch.ones(24, 24, dtype=torch.bool), 2], "expansion_step 2 belongs to a pattern's name"),
    ],
)
def test_masks_that_do_not_fit(arguments, message):
    model = build("timm")
    with pytest.raises(ValueError, match=message) as caught:
        localize(model, *arguments)
    assert "\n" not in str(caught.value)
    assert repr(model) == repr(build("timm")), "unchanged"


@pytest.mark.parametrize(
    "builder",
    [
        lambda: timm_vit(attn_drop_rate=0.1),
        lambda: timm_eva(attn_drop_rate=0.1),
        lambda: torchvision_vit(attention_dropout=0.1),
        lambda: hugging_face("ViT", attention_probs_dropout_prob=0.1),
        lambda: hugging_face("DINOv3ViT", task="Model", attention_dropout=0.1),
    ],
    ids=["timm", "Eva", "torchvision", "ViT", "DINOv3"],
)
def test_dropout_on_attention_weights_is_refused_in_training(builder):
    model = localize(builder(), SPEC)
    height = HEIGHT if isinstance(model, torchvision.models.VisionTransformer) else WIDTH
    images = torch.randn(1, 3, HEIGHT, height)
    model.eval()
    model(images)
    with pytest.raises(ValueError, match=r"no dropout on attention weights, .* asks for 0\.1"):
        model.train()(images)


def test_a_further_mask_is_refused():
    name = "timm"
    model, images = localize(build(name), SPEC), images_for(name)
    with pytest.raises(ValueError, match="takes no further attention mask"):
        model(images, attn_mask=torch.ones(25, 25, dtype=torch.bool))
