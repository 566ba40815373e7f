"""Recognizes whose weights they are, and gives them our names, which are timm's.

What differs between the libraries, and would change the logits:

    q, k, v          timm and torchvision keep them in one matrix, in this order; Hugging Face keeps
                     three, which are put one below the other.
    LayerNorm eps    1e-6 in timm and torchvision, 1e-12 in Hugging Face's ViT unless its
                     config.json says otherwise: our model takes that of the file.
    GELU             exact in all three; a config.json that asks for another is refused.
    LayerScale       (timm) multiplies a branch's output: that goes into its last matrix.
    fc_norm          (timm, average pooling) normalizes after pooling, ours before: refused.
    number of heads  stands in no state dict: checked where the file or its config.json says it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from interop.weight_files import WeightFile
from utils import UserError

NAMES_SHOWN = 3
EPS, EPS_OF_HUGGING_FACE = 1e-6, 1e-12
EXACT_GELU = ("gelu", "gelu_python")  # in config.json; None there means the default, exact as well


@dataclass
class Weights:
    """Weights under our names, and what is known about the model they come from."""

    origin: str  # where they come from, as messages name it
    source: str  # timm, torchvision, Hugging Face, or ours
    tensors: dict[str, Tensor]
    norm_eps: float = EPS
    num_heads: int | None = None  # None where the file does not say
    img_size: tuple[int, int] | None = None  # in pixels, None where the file does not say
    left_out: list[str] = field(default_factory=list)  # names that a classifier does not use

    @property
    def embed_dim(self) -> int:
        return len(self.tensors["patch_embed.proj.weight"])

    @property
    def depth(self) -> int:
        layers = [re.match(r"blocks\.(\d+)\.", name) for name in self.tensors]
        return 1 + max((int(found[1]) for found in layers if found), default=-1)


def recognize(file: WeightFile) -> Weights:
    """Raises UserError for weights of something else than a ViT that ours can be."""
    for marks, read in READERS:
        if all(any(mark in name for name in file.tensors) for mark in marks):
            weights = read(file)
            break
    else:
        shown = ", ".join([*file.tensors][:NAMES_SHOWN])
        raise UserError(
            f"{file.name} holds no ViT of timm, torchvision or Hugging Face: its "
            f"{len(file.tensors)} tensors are {shown}, ..."
        )
    _refuse_unknown(weights)
    return weights


# --------------------------------------------------------------------------------------------------
# timm


def _read_timm(file: WeightFile) -> Weights:
    about = _stated(file.config, "model_args", dict, {})
    _refuse_other_gelu(file, about.get("act_layer"), str(file.config.get("architecture", "")))
    if "fc_norm.weight" in file.tensors:
        raise UserError(
            f"{file.name} normalizes after pooling (fc_norm), our model before; use a file with "
            "`norm`, from a model with a class token or with fc_norm=False"
        )
    stated = about | file.timm_arguments
    return Weights(
        origin=file.name,
        source="timm",
        tensors=fold_layer_scale(file.tensors),
        norm_eps=_stated(file.notes, "norm_eps", float, EPS),
        num_heads=_stated(stated, "num_heads", int),
        img_size=_pair(stated.get("img_size")),
    )


def fold_layer_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LayerScale (Touvron et al. 2021, CaiT): gamma * (W x + b) = (gamma W) x + gamma b."""
    tensors = dict(tensors)
    for scale, last in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        for name in [name for name in tensors if name.endswith(f".{scale}.gamma")]:
            gamma = tensors.pop(name)  # [E]
            layer = name.removesuffix(f"{scale}.gamma") + last
            tensors[f"{layer}.weight"] = gamma[:, None] * tensors[f"{layer}.weight"]
            tensors[f"{layer}.bias"] = gamma * tensors[f"{layer}.bias"]
    return tensors


# --------------------------------------------------------------------------------------------------
# torchvision

TORCHVISION = [
    (r"class_token", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.head\.", "head."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.linear_(\d)\.", r".mlp.fc\1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),  # files from before torchvision 0.14
    (r"\.mlp\.3\.", ".mlp.fc2."),
]


def _read_torchvision(file: WeightFile) -> Weights:
    tensors = _rename(file.tensors, TORCHVISION)
    left_out = [name for name in tensors if name.startswith("heads.pre_logits.")]
    if left_out:  # the head reads what that layer makes of the token
        left_out += [name for name in tensors if name.startswith("head.")]
    return Weights(
        origin=file.name,
        source="torchvision",
        tensors={name: value for name, value in tensors.items() if name not in left_out},
        left_out=left_out,
    )


# --------------------------------------------------------------------------------------------------
# Hugging Face

HUGGING_FACE = [
    (r"^(vit|deit)\.", ""),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkvo])_proj\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.o."),
    (r"\.attn\.o\.", ".attn.proj."),
    (r"\.attn\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]
NOT_FOR_A_CLASSIFIER = ("pooler.", "decoder.", "embeddings.mask_token")


def _read_hugging_face(file: WeightFile) -> Weights:
    _refuse_other_gelu(file, file.config.get("hidden_act"))
    tensors = _rename(file.tensors, HUGGING_FACE)
    left_out = [name for name in tensors if name.startswith(NOT_FOR_A_CLASSIFIER)]
    tensors = {name: value for name, value in tensors.items() if name not in left_out}
    return Weights(
        origin=file.name,
        source="Hugging Face",
        tensors=_pack_qkv(tensors),
        norm_eps=_stated(file.config, "layer_norm_eps", float, EPS_OF_HUGGING_FACE),
        num_heads=_stated(file.config, "num_attention_heads", int),
        img_size=_pair(file.config.get("image_size")),
        left_out=left_out,
    )


def _pack_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """blocks.0.attn.q.weight, k and v, each [E, E] -> blocks.0.attn.qkv.weight [3 * E, E]."""
    packed = {}
    for name, value in tensors.items():
        if ".attn.q." in name:
            three = [tensors.get(name.replace(".attn.q.", f".attn.{x}.")) for x in "qkv"]
            if all(part is not None for part in three):
                packed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(three)
        elif not re.search(r"\.attn\.[kv]\.", name):
            packed[name] = value
    return packed


# --------------------------------------------------------------------------------------------------
# What all share

# What the names of a library contain, all of it.
READERS: list[tuple[tuple[str, ...], Callable[[WeightFile], Weights]]] = [
    (("conv_proj.weight", "encoder_layer_0.self_attention.in_proj_weight"), _read_torchvision),
    (("embeddings.patch_embeddings.projection.weight", "layernorm_before"), _read_hugging_face),
    (("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"), _read_timm),
]

OF_A_BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]
OUTSIDE_OF_BLOCKS = [
    *("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"),
    *("norm.weight", "norm.bias"),
]
OPTIONAL = ["cls_token", "reg_token", "head.weight", "head.bias"]


def _refuse_unknown(weights: Weights) -> None:
    """Raise UserError if the model is another one than ours, or if a tensor is missing."""
    blocks = [f"blocks.{layer}.{name}" for layer in range(weights.depth) for name in OF_A_BLOCK]
    needed = [*OUTSIDE_OF_BLOCKS, *blocks]
    lacking = [name for name in needed if name not in weights.tensors]
    if lacking:
        shown = ", ".join(lacking[:NAMES_SHOWN])
        raise UserError(
            f"{weights.origin} lacks {len(lacking)} tensors that our ViT needs, as {shown}; it is "
            "incomplete, or a variant that ours cannot be"
        )
    extra = [name for name in weights.tensors if name not in {*needed, *OPTIONAL}]
    if extra:
        shown = ", ".join(extra[:NAMES_SHOWN])
        raise UserError(
            f"{weights.origin} holds {len(extra)} tensors that our ViT has no place for, as "
            f"{shown}; without them its results would be others"
        )
    broken = [name for name, value in weights.tensors.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{weights.origin} holds numbers that are not finite, in {broken[0]}")


def _refuse_other_gelu(file: WeightFile, activation: object, architecture: str = "") -> None:
    if "quickgelu" in architecture:
        activation = "quick_gelu"
    if activation is not None and activation not in EXACT_GELU:
        raise UserError(
            f"{file.name} is of a model with the activation {activation!r}, as its config.json "
            "says; ours has the exact GELU, so its results would be others"
        )


def _rename(tensors: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _stated(values: dict, key: str, kind: type, default=None):
    """A value of somebody's JSON, or the default where it is missing or of another kind."""
    value = values.get(key)
    return value if isinstance(value, kind) else default


def _pair(size: object) -> tuple[int, int] | None:
    """(height, width) from one number or two; None for anything else."""
    sides = [size, size] if isinstance(size, int) else size
    is_pair = isinstance(sides, list) and [type(side) for side in sides] == [int, int]
    return tuple(sides) if is_pair else None
