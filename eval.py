"""Evaluate a checkpoint: loss, top-1 and top-5, per-class accuracy, confusion matrix, throughput.

python eval.py --checkpoint experiments/cifar10/full/seed_0/last.pt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import attention
import data
import utils
from runtime import distributed, hardware
from training.checkpoints import load_checkpoint, rebuild_model
from training.evaluation import evaluate
from training.settings import EVAL_SPLITS, Settings

SPLITS = {**EVAL_SPLITS, "train": "training images"}


def parse_args(argv=None):
    parser = utils.ArgumentParser(
        description="Evaluate a checkpoint; it holds all that is needed to rebuild the model."
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="last.pt of a run folder")
    split_help = "images to evaluate on; holdout: those that main.py --holdout kept from training"
    add("--split", choices=SPLITS, default="test", help=split_help)
    add(
        "--data_dir",
        type=utils.home_path,
        metavar="DIR",
        help="where the data is (default: as in training)",
    )
    batch_size = utils.number_type(int, minimum=1)
    add("--batch_size", type=batch_size, default=256, help="images per batch")
    add(
        "--device",
        choices=hardware.DEVICES,
        default="auto",
        help="auto: CUDA, else MPS, else the CPU",
    )
    add(
        "--precision",
        choices=hardware.PRECISIONS,
        help="of the model (default: as in training)",
    )
    add(
        "--backend",
        choices=attention.BACKENDS[2:],
        default="dense",
        help="how masked attention is computed",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON to write (default: eval_<split>.json beside the checkpoint)",
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    distributed.check_environment()
    if distributed.WORLD_SIZE > 1:
        raise utils.UsageError("eval.py runs on one process; start it without torchrun")
    hardware.keep_freed_memory()

    state = load_checkpoint(args.checkpoint)
    settings = Settings.from_dict(state["settings"])
    if args.split == "holdout" and not settings.data.holdout:
        raise utils.UsageError(
            f"--split holdout, but {args.checkpoint} was trained without --holdout; choose "
            "--split test or train"
        )
    device = hardware.pick_device(args.device)
    precision = hardware.resolve_precision(args.precision or settings.machine.precision, device)
    model = rebuild_model(state, args.backend).to(device)
    with utils.usage_errors():
        model.compiled_mask.check_device(device)

    dataset, is_as_trained = load_dataset(args.data_dir, args.split, state, settings, device)
    split = {"test": dataset.test, "holdout": dataset.held_out, "train": dataset.train}[args.split]
    batches = data.eval_batches(dataset, split, args.batch_size)
    result = evaluate(model, batches, dataset.num_classes, device, precision)

    report = {
        "checkpoint": str(args.checkpoint),
        "epoch": len(state["history"]),  # finished epochs
        "data": dataset.label,
        "data_as_trained": is_as_trained,
        "split": args.split,
        "holdout": settings.data.holdout,  # the fraction that was kept from training
        "precision": precision,
        "class_names": dataset.class_names,
        **result,
        "provenance": hardware.provenance(sys.argv[1:] if argv is None else argv, device),
    }
    output = args.output or args.checkpoint.with_name(f"eval_{args.split}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    utils.write_text(output, format_json(report))
    print(f"{describe(report)}\nwrote {output}")
    return 0


def load_dataset(
    data_dir: str | None, split: str, state: dict, settings: Settings, device: torch.device
) -> tuple[data.Dataset, bool | None]:
    """The data, and whether it is what the checkpoint was trained with (None if unknown).

    Its training images are divided as in training, unless only the test images are needed. Raises
    UserError if its classes differ from those of the checkpoint, or if it is other data and the
    images held out in training are asked for.
    """
    dataset = data.load_dataset(
        settings.data.dataset,
        data_dir or settings.data.data_dir,
        state["model_config"]["img_size"],
        device,
        held_out=0.0 if split == "test" else settings.data.holdout,
        **({"skip_unreadable": True} if settings.data.skip_unreadable else {}),
    )
    trained_on = state["data"]
    if dataset.class_names != trained_on["class_names"]:
        raise utils.UserError(
            f"the data has classes {dataset.class_names}, the checkpoint was trained on "
            f"{trained_on['class_names']}; point --data_dir at the data that it was trained on"
        )

    is_as_trained = None
    if trained_on.get("checksum") is not None:  # older checkpoints have none
        is_as_trained = dataset.checksum == trained_on["checksum"]
    if is_as_trained is False and split == "holdout":
        raise utils.UserError(
            f"{dataset.label} holds other images than the checkpoint was trained with, so none of "
            "them is known to be held out; choose --split test or train"
        )
    if is_as_trained is False:
        utils.warn(
            f"{dataset.label} holds other images than the checkpoint was trained and tested with; "
            'they are normalized as in training, and the JSON notes it ("data_as_trained")'
        )

    # Normalize as in training, whatever the folder contains now.
    dataset.mean, dataset.std = trained_on["mean"], trained_on["std"]
    return dataset, is_as_trained


def format_json(report: dict) -> str:
    """The report as JSON, with one line per row of the confusion matrix, not one per number."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in report["confusion_matrix"])
    text = json.dumps(report | {"confusion_matrix": []}, indent=2, allow_nan=False)
    return text.replace('"confusion_matrix": []', f'"confusion_matrix": [\n{rows}\n  ]') + "\n"


def describe(report: dict) -> str:
    """The report as text: totals, then one line per class with its most common confusion."""
    top5 = ""
    if report["top5_accuracy"] is not None:
        top5 = f", top-5 {report['top5_accuracy']:.2f}%"
    lines = [
        f"{report['data']}, {SPLITS[report['split']]}, epoch {report['epoch']}: "
        f"loss {report['loss']:.4f}, top-1 {report['top1_accuracy']:.2f}%{top5} "
        f"({report['num_images']} images, {report['images_per_second']:.0f} images/s)"
    ]

    names = report["class_names"]
    width = max(map(len, names))
    accuracies, matrix = report["per_class_accuracy"], report["confusion_matrix"]
    for name, accuracy, row in zip(names, accuracies, matrix, strict=True):
        if accuracy is None:
            lines.append(f"  {name:<{width}}  no images")
            continue
        line = f"  {name:<{width}}  {accuracy:6.2f}% of {sum(row)}"
        counts = zip(names, row, strict=True)
        wrong = {other: count for other, count in counts if other != name and count}
        if wrong:
            taken_for = max(wrong, key=wrong.get)
            line += f"   most often taken for {taken_for} ({wrong[taken_for]})"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    utils.run_cli(main)
