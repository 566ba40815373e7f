"""Small ViTs of other libraries with random weights, and these libraries' own masked attention."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers

from masks import MaskSpec

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
