"""Localized models are models like any other: saved, copied, compiled; and what is refused."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
import transformers
from foreign_models import (
    GRID,
    HEIGHT,
    SPEC,
    WIDTH,
    assert_close,
    build,
    each_library,
    each_model,
    gradients_of,
    hugging_face,
    images_for,
    output_of,
    timm_eva,
    timm_vit,
    torchvision_vit,
)

import utils
from attention import CompiledMask, compile_mask
from interop import localize, unlocalize

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
# What it refuses


def test_an_exported_program_computes_the_same():
    """With the sparse kernel: one operator of this repository in the graph."""
    model = localize(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval(), SPEC)
    images = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))
    operators = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("local_attention.") for name in operators)


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
