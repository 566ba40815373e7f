"""Writes a trained model for others: timm, ONNX Runtime, torch.export. The logits are the same.

All three take normalized images, float32 [B, C, height, width], and say in their notes how to
normalize. timm knows no masks: there the model attends to everything until it is masked again.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from interop.layouts import EPS
from interop.weight_files import NOTES, SAFETENSORS, TIMM_ARGUMENTS
from models import VisionTransformer
from utils import UsageError, UserError, atomic_path, first_line

SUFFIXES = (SAFETENSORS, ".onnx", ".pt2")
ARCHITECTURE = "vit_base_patch16_224"  # timm's, whose sizes the arguments replace
NEEDED_FOR_ONNX = ("onnx", "onnxscript")

USE = {
    SAFETENSORS: f"the arguments of timm.create_model are in its metadata, {TIMM_ARGUMENTS!r}",
    ".onnx": "run it with onnxruntime: images [B, C, height, width], normalized -> logits",
    ".pt2": "torch.export.load(...).module() gives the model: images, normalized -> logits",
}


def check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"--export {path}: the name must end in {SAFETENSORS} (for timm), .onnx (for ONNX "
            "Runtime) or .pt2 (for torch.export)"
        )


def write(path: Path, model: VisionTransformer, data: dict, mask: dict) -> list[str]:
    """Write a trained model, whole or not at all -> what to tell the user, line by line.

    `data` is what the checkpoint says about it, `mask` are the settings of the pattern. The model
    is on the CPU, in eval mode, with the `dense` backend: others have operators that no file can
    hold.

    Raises UsageError for another suffix, UserError for weights that are not finite and where a
    package is missing.
    """
    check_suffix(path)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError("the checkpoint holds weights that are not finite; nothing was exported")

    notes = describe(model, data, mask)
    writers = {SAFETENSORS: _write_safetensors, ".onnx": _write_onnx, ".pt2": _write_pt2}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        writers[path.suffix](temporary, model, notes)
    return [f"wrote {path}; {USE[path.suffix]}", *caveats(path, model, notes)]


def describe(model: VisionTransformer, data: dict, mask: dict) -> dict:
    """What the user of a file has to know: the images it takes, the classes, the mask."""
    return {
        "img_size": list(model.config["img_size"]),
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "class_names": data["class_names"],
        "norm_eps": model.config["norm_eps"],
        "mask": mask,
    }


def timm_arguments(model: VisionTransformer) -> dict:
    """Keyword arguments of `timm.create_model` for a model with the same logits.

    timm normalizes before pooling, as we do, only where `fc_norm` is False.
    """
    config = model.config
    has_class_token = config["pool"] == "cls"
    return {
        "model_name": ARCHITECTURE,
        "img_size": list(config["img_size"]),
        "patch_size": config["patch_size"],
        "in_chans": config["in_channels"],
        "num_classes": config["num_classes"],
        "embed_dim": config["embed_dim"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "class_token": has_class_token,
        "global_pool": "token" if has_class_token else "avg",
        "fc_norm": False,
        **({"reg_tokens": config["num_registers"]} if config.get("num_registers") else {}),
    }


def caveats(path: Path, model: VisionTransformer, notes: dict) -> list[str]:
    """What differs once timm runs the file."""
    found = []
    if path.suffix != SAFETENSORS:
        return found
    mask_type = notes["mask"]["mask_type"]
    if mask_type != "full":
        found.append(f"  timm knows no masks: without {mask_type} again, the model attends to all")
    if model.config["norm_eps"] != EPS:
        eps = model.config["norm_eps"]
        found.append(f"  its LayerNorms have eps {eps:g}, timm's have {EPS:g}")
    return found


# --------------------------------------------------------------------------------------------------
# Formats


def _write_safetensors(path: Path, model: VisionTransformer, notes: dict) -> None:
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    metadata = {
        "format": "pt",
        TIMM_ARGUMENTS: json.dumps(timm_arguments(model)),
        NOTES: json.dumps(notes),
    }
    safetensors.torch.save_file(state, path, metadata=metadata)


def _write_pt2(path: Path, model: VisionTransformer, notes: dict) -> None:
    program = torch.export.export(
        model, (example_of(model),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={NOTES: json.dumps(notes)})


def _write_onnx(path: Path, model: VisionTransformer, notes: dict) -> None:
    for package in NEEDED_FOR_ONNX:
        _require(package)
    program = torch.onnx.export(
        model,
        (example_of(model),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    program.model.metadata_props[NOTES] = json.dumps(notes)
    # Weights inside the file: a second one beside it would be lost by the renaming.
    program.save(path, external_data=False)


def _require(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise UserError(
            f"--export to .onnx needs the packages {' and '.join(NEEDED_FOR_ONNX)} "
            f"({first_line(error)}); install them with `pip install {' '.join(NEEDED_FOR_ONNX)}`"
        ) from error


def example_of(model: VisionTransformer) -> torch.Tensor:
    """Two images [2, C, height, width]: of one, torch.export would take the number for fixed."""
    config = model.config
    return torch.zeros(2, config["in_channels"], *config["img_size"])
