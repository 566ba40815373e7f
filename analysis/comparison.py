"""Two trained models on the same images: `eval.py --compare A B`.

McNemar's test is about these two models and these images. Another seed of either training would
give another model, so it says nothing about the patterns that they were trained with; several seeds
of each do, see report/statistics.py.

Legend for shapes:
    n images of the split
"""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from torch import Tensor

import utils
from analysis import contact_sheet
from analysis.trained_model import SPLITS, TrainedModel
from report import figures, statistics
from runtime import hardware
from utils import UserError

FORMAT = 1
NUM_SHOWN = 24  # images on the contact sheet


def check_same_images(first: TrainedModel, second: TrainedModel) -> None:
    """Raise UserError unless both are evaluated on the same images, in the same order."""
    names = first.dataset.class_names, second.dataset.class_names
    if names[0] != names[1]:
        raise UserError(
            f"{first.checkpoint} has classes {names[0]}, {second.checkpoint} has {names[1]}; "
            "compare checkpoints that were trained on the same data"
        )

    if not have_same_images(first, second):
        raise UserError(
            f"{first.checkpoint} and {second.checkpoint} are not evaluated on the same images "
            f"({describe_images(first)}, and {describe_images(second)}); compare checkpoints of "
            "the same data and the same --holdout, or point --data_dir at images for both"
        )


def have_same_images(first: TrainedModel, second: TrainedModel) -> bool:
    # One of two datasets may be too large for the device.
    if not torch.equal(first.split.labels.cpu(), second.split.labels.cpu()):
        return False
    one, other = first.split.images, second.split.images
    if one.shape == other.shape:
        return torch.equal(one.cpu(), other.cpu())
    # Images of a folder are stored at each model's size. Their files tell if they are the same.
    files = first.dataset.files
    return files is not None and files == second.dataset.files


def describe_images(trained: TrainedModel) -> str:
    return f"{len(trained.split)} {SPLITS[trained.split_name]} of {trained.dataset.label}"


def names_of(first: TrainedModel, second: TrainedModel) -> tuple[str, str]:
    """What to call the two: their masks and seeds, or else whatever tells them apart."""

    def names(trained: TrainedModel) -> list[str]:
        run, seed = trained.settings.run.run_name, trained.settings.optimization.seed
        mask = trained.settings.mask.spec.label
        return [f"{mask}, seed {seed}", f"{run}, seed {seed}", str(trained.checkpoint)]

    pairs = list(zip(names(first), names(second), strict=True))
    return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])


# --------------------------------------------------------------------------------------------------
# The comparison


@torch.no_grad()
def predict(trained: TrainedModel, batch_size: int) -> Tensor:
    """Probabilities of the classes, fp32 [n, classes], on the CPU."""
    batches = []
    for images, _ in trained.batches(batch_size):
        with hardware.autocast(trained.device, trained.precision):
            logits = trained.model(images)
        batches.append(logits.float().softmax(-1).cpu())
    return torch.cat(batches)


def compare(first: TrainedModel, second: TrainedModel, batch_size: int) -> dict:
    """Everything about the two, for JSON; docs/analysis.md has the keys."""
    check_same_images(first, second)
    labels = first.split.labels.cpu()  # [n]
    one, other = predict(first, batch_size), predict(second, batch_size)
    guesses = one.argmax(1), other.argmax(1)
    is_right, is_other_right = guesses[0] == labels, guesses[1] == labels

    only_first = int((is_right & ~is_other_right).sum())
    only_second = int((~is_right & is_other_right).sum())
    test = statistics.mcnemar(only_first, only_second, len(labels))
    names = names_of(first, second)
    class_names = first.dataset.class_names
    return {
        "data": first.dataset.label,
        "split": first.split_name,
        "num_images": len(labels),
        "class_names": class_names,
        "first": describe_model(first, names[0], is_right, labels),
        "second": describe_model(second, names[1], is_other_right, labels),
        "both_right": int((is_right & is_other_right).sum()),
        "both_wrong": int((~is_right & ~is_other_right).sum()),
        "only_first": only_first,
        "only_second": only_second,
        "agreement": 100 * int((guesses[0] == guesses[1]).sum()) / len(labels),
        "difference": test.difference,
        "interval": test.interval._asdict(),
        "p": test.p,
        "images": differing_images(one, other, labels),
    }


def describe_model(trained: TrainedModel, name: str, is_right: Tensor, labels: Tensor) -> dict:
    num_correct, num_images = int(is_right.sum()), len(labels)
    of_classes = [is_right[labels == label] for label in range(trained.dataset.num_classes)]
    about = trained.describe()
    return {
        "name": name,
        **trained.describe_run(),
        **{key: about[key] for key in ("checkpoint", "epoch", "data_as_trained", "precision")},
        **{key: about[key] for key in ("holdout", "img_size", "img_size_in_training")},
        "num_correct": num_correct,
        "top1_accuracy": 100 * num_correct / num_images,
        "interval": statistics.proportion_interval(num_correct, num_images)._asdict(),
        "per_class_accuracy": [
            100 * int(right.sum()) / len(right) if len(right) else None for right in of_classes
        ],
    }


def differing_images(one: Tensor, other: Tensor, labels: Tensor) -> list[dict]:
    """Where the probabilities of the true class differ most, at most NUM_SHOWN, largest first.

    `one` and `other` are the models' probabilities [n, classes]. Images on which they do not differ
    are left out.
    """
    rows = torch.arange(len(labels))
    difference = (one[rows, labels] - other[rows, labels]).abs()  # [n]
    order = difference.argsort(descending=True, stable=True)[:NUM_SHOWN]
    return [
        {
            "index": index,
            "label": int(labels[index]),
            "first": describe_guess(one[index], int(labels[index])),
            "second": describe_guess(other[index], int(labels[index])),
        }
        for index in order.tolist()
        if difference[index] > 0
    ]


def describe_guess(probabilities: Tensor, label: int) -> dict:
    """`probability` is that of the true class; probabilities [classes]."""
    return {
        "prediction": int(probabilities.argmax()),
        "probability": probabilities[label].item(),
    }


# --------------------------------------------------------------------------------------------------
# Files


def default_output(first: TrainedModel, second: TrainedModel) -> Path:
    """Beside the first checkpoint, named after the second run."""
    run, seed = second.settings.run.run_name, second.settings.optimization.seed
    name = f"compare_{run}_seed_{seed}_{second.file_suffix}.json"
    return first.checkpoint.with_name(name)


def write(output: Path, first: TrainedModel, result: dict, provenance: dict) -> dict:
    """Write <output>.json and, if the models differ on any image, the contact sheet <output>.png.

    Returns what the JSON has.
    """
    picture = output.with_suffix(".png") if result["images"] else None
    report = {
        "format": FORMAT,
        **result,
        "picture": picture and picture.name,
        "command": shlex.join(["python", *provenance["command"]]),
        "provenance": provenance,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    if picture is not None:
        indices = torch.tensor([image["index"] for image in result["images"]])
        images = first.split.images[indices.to(first.split.images.device)]
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()  # uint8 [images, H, W, C]
        figures.save(contact_sheet.draw(pixels, report), picture)
    utils.write_json(output, report)
    return report


def describe(report: dict) -> str:
    """The result as text."""
    lines = [f"{report['data']}, {report['num_images']} {SPLITS[report['split']]}:"]
    for letter, key in (("A", "first"), ("B", "second")):
        model = report[key]
        lines.append(
            f"  {letter}  {model['top1_accuracy']:6.2f}% "
            f"({in_words(model['interval'])})   {model['name']}, epoch {model['epoch']}"
        )

    percent = 100 * report["interval"]["level"]
    lines += [
        f"A minus B: {report['difference']:+.2f} points, {percent:.0f}% interval "
        f"{in_words(report['interval'], '+')}; McNemar's exact test p = {report['p']:.3g}",
        f"only A is right on {report['only_first']} images, only B on {report['only_second']}, "
        f"both on {report['both_right']}, neither on {report['both_wrong']}; "
        f"they say the same on {report['agreement']:.1f}%",
        "This is about these two models on these images; other seeds would be other models.",
    ]
    return "\n".join(lines)


def in_words(interval: dict, sign: str = "") -> str:
    return f"{interval['low']:{sign}.2f} to {interval['high']:{sign}.2f}"
