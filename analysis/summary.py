"""Everything `eval.py --analyze` finds out about one model: numbers for JSON, arrays for NPZ.

docs/analysis.md has the keys, the shapes and where the definitions are from.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import utils
from analysis import attention_maps, receptive_field
from analysis.observers import AttentionMeasures, MapsOfImages
from analysis.trained_model import SPLITS, TrainedModel
from models import VisionTransformer
from runtime import hardware
from training.evaluation import evaluate
from utils import UsageError

FORMAT = 1
NUM_SHOWN = 8  # images whose maps are kept, unless they are chosen


def analyze(
    trained: TrainedModel,
    batch_size: int,
    limit: int | None = None,
    images: list[int] | None = None,
    patch: tuple[int, int] | None = None,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Numbers and arrays.

    `limit`: how many images of the split to measure on (None = all), spread evenly over it.
    `images`: those whose maps are kept (None = the first few of different classes). `patch`: whose
    receptive field and maps, as (row, column). Without it that of the center, and the maps are
    those of the class token if there is one. Raises UsageError if these do not fit.
    """
    model, split = trained.model, trained.split
    is_of_class_token = patch is None and model.cls_token is not None
    patch = check_patch(model, patch)
    indices = spread_indices(len(split), limit)  # [measured on]
    chosen = choose_images(split.labels.cpu(), indices, images)  # [n]

    patch_token = model.num_global_tokens + patch[0] * model.grid[1] + patch[1]
    measured = AttentionMeasures(model, patch_token)
    size = min(batch_size, attention_maps.images_at_once(model))
    batches = with_bar(trained.batches(size, indices), "attention", len(indices))
    with attention_maps.watch_attention(model, measured.see):
        result = evaluate(
            model, batches, trained.dataset.num_classes, trained.device, trained.precision
        )

    maps = MapsOfImages(model, 0 if is_of_class_token else patch_token)
    shown, stored = run_chosen(trained, chosen, maps, size)

    numbers = {
        "num_images": len(indices),
        "num_images_in_split": len(split),
        **describe_model(model),
        **{key: result[key] for key in ("loss", "top1_accuracy", "top5_accuracy")},
        "per_class_accuracy": result["per_class_accuracy"],
        "per_class_images": [sum(row) for row in result["confusion_matrix"]],
        **measured.numbers(),
        "patch": list(patch),
        "maps_of": "class token" if is_of_class_token else "patch",
        "images": shown,
    }
    arrays = {
        "receptive_field": mean_receptive_field(trained, indices, patch, batch_size),
        **measured.arrays(),
        **maps.arrays(),
        "images": stored,
    }
    return numbers, arrays


def describe_model(model: VisionTransformer) -> dict:
    return {
        "grid": list(model.grid),
        "patch_size": model.config["patch_size"],
        "num_layers": model.config["depth"],
        "num_heads": model.config["num_heads"],
        "backend": model.layer_masks.backend,
    }


# --------------------------------------------------------------------------------------------------
# What to look at


def check_patch(model: VisionTransformer, patch: tuple[int, int] | None) -> tuple[int, int]:
    """(row, column) of the patch, by default that of the center."""
    height, width = model.grid
    row, column = patch or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise UsageError(
            f"--patch {row}x{column} lies outside the {height}x{width} grid of this model (rows "
            "and columns count from 0)"
        )
    return row, column


def spread_indices(num_images: int, limit: int | None) -> Tensor:
    """int64 [min(limit, num_images)]: spread evenly, since folders are sorted by class."""
    number = min(limit or num_images, num_images)
    return torch.arange(number) * num_images // number


def choose_images(labels: Tensor, indices: Tensor, images: list[int] | None) -> Tensor:
    """Indices into the split, int64 [n]: those asked for, or else the first of each class.

    At most NUM_SHOWN, among those that are measured on.
    """
    if images is None:
        first_of_class: dict[int, int] = {}
        for index in indices.tolist():
            first_of_class.setdefault(int(labels[index]), index)
        return torch.tensor(sorted(first_of_class.values())[:NUM_SHOWN])

    outside = [index for index in images if index >= len(labels)]
    if outside:
        raise UsageError(
            f"--images {outside[0]}: the split has {len(labels)} images, numbered from 0 to "
            f"{len(labels) - 1}"
        )
    return torch.tensor(images)


# --------------------------------------------------------------------------------------------------
# Running the model


@torch.no_grad()
def run_chosen(
    trained: TrainedModel, chosen: Tensor, maps: MapsOfImages, batch_size: int
) -> tuple[list[dict], np.ndarray]:
    """Let `maps` see the chosen images.

    Returns what they are and what the model says, one dict per image, and the images as stored:
    uint8 [n, H, W, C].
    """
    probabilities = []
    with attention_maps.watch_attention(trained.model, maps.see):
        for images, _ in trained.batches(batch_size, chosen):
            with hardware.autocast(trained.device, trained.precision):
                logits = trained.model(images)
            probabilities.append(logits.float().softmax(-1).cpu())  # [b, classes]

    split = trained.split
    where = chosen.to(split.labels.device)
    labels = split.labels[where].tolist()
    shown = [
        {
            "index": index,
            "label": label,
            "prediction": int(row.argmax()),
            "probability": row.max().item(),  # of the prediction
        }
        for index, label, row in zip(chosen.tolist(), labels, torch.cat(probabilities), strict=True)
    ]
    return shown, split.images[where].permute(0, 2, 3, 1).cpu().numpy()


def mean_receptive_field(
    trained: TrainedModel, indices: Tensor, patch: tuple[int, int], batch_size: int
) -> np.ndarray:
    """fp32 [h, w], the mean over these images, computed in fp32 whatever the precision."""
    hardware.set_precision("fp32")
    size = min(batch_size, receptive_field.images_at_once(trained.model))
    total = torch.zeros(trained.model.config["img_size"], dtype=torch.float64)
    for images, _ in with_bar(trained.batches(size, indices), "receptive field", len(indices)):
        field = receptive_field.receptive_field(trained.model, images, patch)  # [b, h, w]
        total += field.sum(0).cpu().double()
    hardware.set_precision(trained.precision)
    return (total / len(indices)).float().numpy()


def with_bar(
    batches: Iterable[tuple[Tensor, Tensor]], title: str, num_images: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, with a progress bar on a terminal."""
    with tqdm(
        total=num_images, desc=title, unit="img", leave=False, disable=not sys.stdout.isatty()
    ) as bar:
        for images, labels in batches:
            yield images, labels
            bar.update(len(labels))


# --------------------------------------------------------------------------------------------------
# Files


def write(output: Path, trained: TrainedModel, results: tuple, provenance: dict) -> dict:
    """Write <output>.json and, beside it, the arrays as <output>.npz; returns what the JSON has.

    The JSON is written last, so it never stands beside the arrays of another analysis.
    """
    numbers, arrays = results
    path = output.with_suffix(".npz")
    report = {
        "format": FORMAT,
        **trained.describe(),
        **trained.describe_run(),
        **numbers,
        "arrays": path.name,
        "array_shapes": {name: list(array.shape) for name, array in arrays.items()},
        "command": shlex.join(["python", *provenance["command"]]),
        "provenance": provenance,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    with utils.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    utils.write_json(output, report)
    return report


def describe(report: dict) -> str:
    """The main numbers as text: a line for the images, then one per layer."""
    lines = [
        f"{report['data']}, {SPLITS[report['split']]}, epoch {report['epoch']}: "
        f"top-1 {report['top1_accuracy']:.2f}%, {report['num_images']} of "
        f"{report['num_images_in_split']} images",
        f"mean attention distance in pixels: {report['distance_uniform']:.1f} if attention were "
        f"uniform, {report['distance_ceiling']:.1f} at most with this mask",
    ]
    layers = zip(report["distance"], report["entropy"], strict=True)
    for layer, (distances, entropies) in enumerate(layers):
        lines.append(
            f"  layer {layer:>2}: distance {in_words(distances, 1)}, "
            f"entropy {in_words(entropies, 2)}"
        )
    return "\n".join(lines)


def in_words(values: list[float | None], digits: int) -> str:
    """The mean over the heads, and their range."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    mean = sum(known) / len(known)
    return f"{mean:.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"
