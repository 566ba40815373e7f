"""Weights of other libraries in our model: the logits are those of the library."""

import argparse
import json
import math

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn

from interop import layouts, weight_files, weights
from models import VisionTransformer
from utils import UsageError, UserError

SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 7, **SIZES}


def randomize(model, std=0.2):
    """Weights far from their initialization, so that biases, norms and positions all matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


def make_timm(**changed):
    return randomize(timm.models.VisionTransformer(**SMALL | changed))


def make_torchvision(num_classes=7):
    model = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=3,
        hidden_dim=48,
        mlp_dim=192,
        num_classes=num_classes,
    )
    return randomize(model)


def make_hugging_face(kind="ViTForImageClassification", **changed):
    import transformers  # deferred: takes seconds

    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        num_labels=7,
        **changed,
    )
    return randomize(getattr(transformers, kind)(config))


def save(path, model_or_state):
    """The file, as its suffix says."""
    state = model_or_state
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(
            {name: value.contiguous() for name, value in state.items()}, path
        )
    else:
        torch.save(state, path)
    return path


def load(path, **changed):
    """The file in our model -> the model and what became of its parts."""
    found, _ = weights.read_pretrained(str(path))
    model = VisionTransformer(**SMALL | changed, dropout=0.0, norm_eps=found.norm_eps)
    fitted = weights.fit(found, model)
    return model.eval(), fitted


def refusal(path, error=UserError, **changed):
    """The one line that says why."""
    with pytest.raises(error) as caught:
        load(path, **changed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------
# Each library's model, and ours with its weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"init_values": 0.1}, {}),  # LayerScale
        ({"no_embed_class": True}, {}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"pool": "mean"}),
        ({"img_size": (24, 40)}, {"img_size": (24, 40)}),
        ({"in_chans": 1}, {"in_channels": 1}),
    ],
)
def test_timm(tmp_path, suffix, theirs, ours):
    library = make_timm(**theirs)
    model, fitted = load(save(tmp_path / f"vit{suffix}", library), **ours)
    height, width = theirs.get("img_size", (32, 32))
    images = torch.randn(3, theirs.get("in_chans", 3), height, width)
    torch.testing.assert_close(model(images), library(images), rtol=1e-5, atol=1e-5)
    assert fitted.kept == []
    assert {what for what, _ in fitted.parts.values()} == {"loaded"}


def test_torchvision(tmp_path, images):
    library = make_torchvision()
    model, fitted = load(save(tmp_path / "vit.pth", library))
    torch.testing.assert_close(model(images), library(images), rtol=1e-5, atol=1e-5)
    assert fitted.kept == []


def test_torchvisions_older_names(tmp_path, images):
    library = make_torchvision()
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for name, value in library.state_dict().items()
    }
    assert old.keys() != library.state_dict().keys()
    model, _ = load(save(tmp_path / "vit.pth", old))
    torch.testing.assert_close(model(images), library(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("as_saved", [True, False])
def test_hugging_face(tmp_path, images, as_saved):
    """`save_pretrained` and `state_dict` use different names, depending on the version."""
    library = make_hugging_face()
    path = tmp_path / "model.safetensors"
    if as_saved:
        library.save_pretrained(tmp_path)
    else:
        save(path, library)
    model, fitted = load(path)
    assert model.norm.eps == 1e-12
    torch.testing.assert_close(model(images), library(images).logits, rtol=1e-5, atol=1e-5)
    assert fitted.kept == []


def test_hugging_faces_eps_counts(tmp_path, images):
    """With small activations, 1e-12 and 1e-6 give other logits; config.json says which it is."""
    for eps in (1e-12, 1e-3):
        library = make_hugging_face(layer_norm_eps=eps)
        with torch.no_grad():
            for name in ("position_embeddings", "cls_token"):
                getattr(library.vit.embeddings, name).mul_(1e-3)
            library.vit.embeddings.patch_embeddings.projection.weight.mul_(1e-4)
            library.vit.embeddings.patch_embeddings.projection.bias.mul_(1e-3)
        library.save_pretrained(tmp_path)
        model, _ = load(tmp_path / "model.safetensors")
        expected = library(images).logits
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)

        model.norm.eps = model.blocks[0].norm1.eps = 1e-6
        assert (model(images) - expected).abs().max() > 1e-2


def test_hugging_face_without_a_head(tmp_path, images):
    """The pooler is left out, the tokens are the same."""
    library = make_hugging_face("ViTModel")
    library.save_pretrained(tmp_path)
    model, fitted = load(tmp_path / "model.safetensors")
    assert fitted.parts["head"][0] == "new"
    assert fitted.parts["others"] == ("left out", "pooler.dense.bias, pooler.dense.weight")

    model.head = nn.Identity()
    expected = library(images).last_hidden_state[:, 0]
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_training_scripts_wrap_the_state_dict(tmp_path, images, wrapper):
    library = make_timm()
    state = {f"module._orig_mod.{name}": value for name, value in library.state_dict().items()}
    model, _ = load(save(tmp_path / "vit.pth", {wrapper: state, "epoch": 3}))
    torch.testing.assert_close(model(images), library(images), rtol=1e-5, atol=1e-5)


def test_half_precision_becomes_single(tmp_path):
    state = {name: value.bfloat16() for name, value in make_timm().state_dict().items()}
    model, _ = load(save(tmp_path / "vit.safetensors", state))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, state["head.weight"].float())


# --------------------------------------------------------------------------------------------------
# What has to change


@pytest.mark.parametrize("new_size", [(64, 64), (24, 40), (16, 56)])
@pytest.mark.parametrize("old_size", [(32, 32), (24, 40)])
def test_positions_are_resized_as_by_timm(tmp_path, old_size, new_size):
    library = make_timm(img_size=old_size)
    path = save(tmp_path / "vit.pth", library)
    found, _ = weights.read_pretrained(str(path))
    found.img_size = old_size  # a state dict does not say it; squares are recognized
    model = VisionTransformer(**SMALL | {"img_size": new_size})
    fitted = weights.fit(found, model)

    expected = resample_abs_pos_embed(
        library.pos_embed, list(model.grid), [side // 8 for side in old_size], 1
    )
    torch.testing.assert_close(model.pos_embed, expected, rtol=1e-5, atol=1e-6)
    assert fitted.parts["pos_embed"][0] == ("loaded" if old_size == new_size else "resized")


def test_registers_stay_apart(tmp_path):
    """Of three prefix tokens, the class token's position is taken, those of registers refused."""
    path = save(tmp_path / "vit.pth", make_timm(reg_tokens=2))
    message = refusal(path, UsageError)
    assert "has 2 register tokens, the model asked for 0; use --num_registers 2" in message


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"pool": "cls"}, {"pool": "mean", "num_registers": 2}),
        ({"pool": "mean", "num_registers": 2}, {"pool": "cls", "num_registers": 2}),
        ({"pool": "cls", "num_registers": 2}, {"pool": "mean", "num_registers": 2}),
    ],
)
def test_no_token_gets_the_position_of_another_one(there, here):
    old = randomize(VisionTransformer(**SMALL, **there))
    new = VisionTransformer(**SMALL, **here)
    drawn = positions_by_token(new)

    state = old.state_dict()
    weights.fit(layouts.Weights("old", "main.py", state, num_heads=3, img_size=(32, 32)), new)
    found, expected = positions_by_token(new), drawn | positions_by_token(old)
    for token, positions in found.items():
        torch.testing.assert_close(positions, expected[token], rtol=0, atol=0)


def positions_by_token(model):
    tokens = ["cls"] * (model.cls_token is not None)
    tokens += [f"register {number}" for number in range(model.config["num_registers"])]
    tokens += [f"patch {number}" for number in range(model.num_patches)]
    return dict(zip(tokens, model.pos_embed.detach().clone()[0], strict=True))


@pytest.mark.parametrize("patch_size", [4, 16])
def test_the_patch_embedding_is_resized_as_by_timm(tmp_path, patch_size):
    library = make_timm(img_size=32)
    path = save(tmp_path / "vit.pth", library)
    model, fitted = load(path, patch_size=patch_size, img_size=4 * patch_size)
    kernel = library.patch_embed.proj.weight.detach()
    expected = resample_patch_embed(kernel, [patch_size, patch_size])
    torch.testing.assert_close(model.patch_embed.proj.weight, expected, rtol=1e-4, atol=1e-4)
    assert fitted.parts["patch_embed"][0] == "resized"
    assert f"8x8 to {patch_size}x{patch_size}" in fitted.parts["patch_embed"][1]


def test_larger_patches_see_the_same_in_larger_images(tmp_path):
    """What the pseudoinverse is for: images upsampled by 2, and patches of twice the side."""
    library = make_timm()
    model, _ = load(save(tmp_path / "vit.pth", library), patch_size=16, img_size=64)
    patch = torch.randn(2, 3, 8, 8)
    larger = nn.functional.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    expected = library.patch_embed(patch.repeat(1, 1, 4, 4))[:, 0]
    torch.testing.assert_close(model.patch_embed(larger)[:, 0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("there", "here"), [(3, 1), (1, 3)])
def test_gray_images_give_the_same_logits(tmp_path, there, here):
    library = make_timm(in_chans=there)
    model, fitted = load(save(tmp_path / "vit.pth", library), in_channels=here)
    gray = torch.randn(2, 1, 32, 32)
    expected = library(gray.expand(-1, there, -1, -1))
    torch.testing.assert_close(model(gray.expand(-1, here, -1, -1)), expected, rtol=1e-4, atol=1e-4)
    assert fitted.parts["patch_embed"] == ("resized", f"{there} to {here} channels")


def test_another_number_of_classes_gets_a_new_head(tmp_path):
    path = save(tmp_path / "vit.pth", make_timm())
    torch.manual_seed(3)
    drawn = VisionTransformer(**SMALL | {"num_classes": 5})
    torch.manual_seed(3)
    model, fitted = load(path, num_classes=5)
    assert fitted.kept == ["head.weight", "head.bias"]
    assert fitted.parts["head"] == ("new", "7 classes there, 5 here")
    assert torch.equal(model.head.weight, drawn.head.weight)
    assert not torch.equal(model.norm.weight, drawn.norm.weight)


def test_pool_mean_leaves_out_the_class_token(tmp_path):
    library = make_timm()
    model, fitted = load(save(tmp_path / "vit.pth", library), pool="mean")
    assert fitted.parts["cls_token"][0] == "left out"
    assert fitted.parts["head"] == ("new", "read a class token there, the mean of the patches here")
    assert torch.equal(model.pos_embed, library.pos_embed[:, 1:])


def test_pool_cls_draws_a_class_token(tmp_path):
    library = make_timm(class_token=False, global_pool="avg", fc_norm=False)
    model, fitted = load(save(tmp_path / "vit.pth", library))
    assert fitted.kept == ["cls_token", "head.weight", "head.bias"]
    assert torch.equal(model.pos_embed[:, 1:], library.pos_embed)
    assert model.pos_embed[:, 0].abs().max() == 0


def test_the_table_names_every_part(tmp_path):
    _, fitted = load(save(tmp_path / "vit.pth", make_timm()), img_size=64, num_classes=5)
    assert fitted.table().splitlines() == [
        "  patch_embed  loaded",
        "  cls_token    loaded",
        "  pos_embed    resized   grid 4x4 to 8x8, bicubic",
        "  blocks       loaded    2, 24 tensors",
        "  norm         loaded",
        "  head         new       7 classes there, 5 here",
    ]


# --------------------------------------------------------------------------------------------------
# Wrong files


def test_a_vit_of_another_size_says_both(tmp_path):
    path = save(tmp_path / "vit.pth", make_timm(embed_dim=192, depth=12))
    message = refusal(path, UsageError)
    assert "is a ViT of width 192 and depth 12, the model asked for has width 48 and" in message
    assert message.endswith("pass --model vit_tiny")

    path = save(tmp_path / "odd.pth", make_timm(depth=3))
    assert "pass --embed_dim 48 --depth 3 and the --num_heads" in refusal(path, UsageError)
    path = save(tmp_path / "mlp.pth", make_timm(mlp_ratio=2.0))
    assert "has 96 units in its MLPs, our model has 192" in refusal(path)


def test_heads_are_checked_where_the_file_says_them(tmp_path):
    make_hugging_face().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert "is a ViT of 3 heads, the model asked for has 4" in refusal(
        path, UsageError, num_heads=4
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"global_pool": "avg"}, "normalizes after pooling (fc_norm)"),
        ({"qk_norm": True}, "no place for, as blocks.0.attn.q_norm.weight"),
        ({"pre_norm": True}, "lacks 1 tensors that our ViT needs, as patch_embed.proj.bias"),
        ({"qkv_bias": False}, "lacks 2 tensors that our ViT needs, as blocks.0.attn.qkv.bias"),
    ],
)
def test_variants_with_other_results_are_refused(tmp_path, changed, words):
    assert words in refusal(save(tmp_path / "vit.pth", make_timm(**changed)))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "hidden_act": "quick_gelu"},
        {"architecture": "vit_base_patch16_clip_quickgelu_224"},
        {"architecture": "vit_base_patch16_224", "model_args": {"act_layer": "gelu_tanh"}},
    ],
)
def test_another_gelu_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    library = make_timm() if "architecture" in config else make_hugging_face()
    message = refusal(save(tmp_path / "model.safetensors", library))
    assert "ours has the exact GELU" in message


@pytest.mark.parametrize("make", [torchvision.models.resnet18, torchvision.models.swin_t])
def test_other_architectures_are_refused(tmp_path, make):
    with torch.device("meta"):
        state = make().state_dict()
    state = {name: torch.zeros(value.shape[:1]) for name, value in state.items()}
    message = refusal(save(tmp_path / "cnn.pth", state))
    assert "holds no ViT of timm, torchvision or Hugging Face: its" in message


def test_pickles_that_would_run_code_are_refused(tmp_path):
    path = tmp_path / "vit.pth"
    torch.save({"model": make_timm().state_dict(), "args": argparse.Namespace(lr=1)}, path)
    message = refusal(path)
    assert "holds pickled objects (argparse.Namespace), which could run any code" in message

    torch.save(make_torchvision(), path)  # a whole model
    assert "functools.partial" in refusal(path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"epoch": 3}, {}])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    path = tmp_path / "vit.pth"
    torch.save(content, path)
    assert "holds no state dict: expected tensors by name, found" in refusal(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02}q\x00."])
def test_damaged_files_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"vit{suffix}"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_cut_off_files_are_refused(tmp_path):
    for suffix in (".safetensors", ".pth"):
        path = save(tmp_path / f"vit{suffix}", make_timm())
        path.write_bytes(path.read_bytes()[:-1000])
        assert "is no readable" in refusal(path)


def test_missing_files_and_other_formats_are_refused(tmp_path):
    assert "there is no file of weights at" in refusal(tmp_path / "none.pth")
    assert "weights are read from .safetensors or" in refusal(tmp_path / "vit.npz", UsageError)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    library = make_timm()
    library.norm.bias.data[3] = math.nan
    message = refusal(save(tmp_path / "vit.pth", library))
    assert message.endswith("holds numbers that are not finite, in norm.bias")


def test_positions_of_no_known_grid_are_refused(tmp_path):
    path = save(tmp_path / "vit.pth", make_timm(img_size=(24, 56)))
    assert "make no square grid, and the file does not say which" in refusal(path)


def test_the_hash_is_that_of_the_content(tmp_path):
    import hashlib

    path = save(tmp_path / "vit.pth", make_timm())
    file = weight_files.read(path)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_layer_scale_is_folded_exactly():
    generator = torch.Generator().manual_seed(0)
    weight, bias, gamma, x = (
        torch.randn(*shape, generator=generator) for shape in ((4, 3), (4,), (4,), (3,))
    )
    folded = layouts.fold_layer_scale(
        {
            "blocks.0.ls1.gamma": gamma,
            "blocks.0.attn.proj.weight": weight,
            "blocks.0.attn.proj.bias": bias,
        }
    )
    result = folded["blocks.0.attn.proj.weight"] @ x + folded["blocks.0.attn.proj.bias"]
    torch.testing.assert_close(result, gamma * (weight @ x + bias))
    assert "blocks.0.ls1.gamma" not in folded
