"""Evaluate a checkpoint: loss, top-1 and top-5, per-class accuracy, confusion matrix, throughput.

python eval.py --checkpoint experiments/cifar10/full/seed_0/last.pt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import attention
import data
import utils
from runtime import distributed, hardware
from training.checkpoints import load_checkpoint, rebuild_model
from training.evaluation import evaluate

SPLITS = ("test", "train")


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Evaluate a checkpoint; the model is rebuilt from what it says.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="last.pt of a run folder")
    parser.add_argument("--split", choices=SPLITS, default="test", help="images to evaluate on")
    parser.add_argument(
        "--data_dir", type=utils.home_path, metavar="DIR", help="where the data is (default: as in training)"
    )
    parser.add_argument("--batch_size", type=utils.number_type(int, minimum=1), default=256, help="images a batch")
    parser.add_argument("--device", choices=hardware.DEVICES, default="auto", help="auto: CUDA, else MPS, else the CPU")
    parser.add_argument("--precision", choices=hardware.PRECISIONS, help="of the model (default: as in training)")
    parser.add_argument(
        "--backend", choices=attention.BACKENDS[1:], default="dense", help="how masked attention is computed"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON to write (default: eval_<split>.json beside it)"
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    distributed.check_environment()
    if distributed.WORLD_SIZE > 1:
        raise utils.UsageError("eval.py runs on one process; start it without torchrun")
    hardware.keep_freed_memory()
    state = load_checkpoint(args.checkpoint)
    settings, config = state["settings"], state["model_config"]
    device = hardware.pick_device(args.device)
    precision = hardware.resolve_precision(args.precision or settings["precision"], device)
    model = rebuild_model(state, args.backend).to(device)
    with utils.usage_errors():
        model.compiled_mask.check_device(device)
    data_dir = args.data_dir or settings["data_dir"]
    options = {"skip_unreadable": True} if settings.get("skip_unreadable") else {}
    dataset = data.load_dataset(settings["dataset"], data_dir, config["img_size"], device, **options)
    if dataset.class_names != state["data"]["class_names"]:
        raise utils.UserError(
            f"the data has classes {dataset.class_names}, the checkpoint was trained on "
            f"{state['data']['class_names']}; point --data_dir at the data that it was trained on"
        )
    trained_on = state["data"].get("checksum")  # None in older checkpoints
    is_as_trained = None if trained_on is None else dataset.checksum == trained_on
    if is_as_trained is False:
        utils.warn(
            f"{dataset.label} holds other images than the checkpoint was trained and tested with; they are normalized "
            'as those were, and the JSON notes it ("data_as_trained")'
        )
    # Normalized as in training, whatever images lie in the folder now.
    dataset.mean, dataset.std = state["data"]["mean"], state["data"]["std"]
    split = getattr(dataset, args.split)
    batches = data.eval_batches(dataset, split, args.batch_size)
    result = evaluate(model, batches, config["num_classes"], device, precision)
    output = args.output or args.checkpoint.with_name(f"eval_{args.split}.json")
    report = {
        "checkpoint": str(args.checkpoint),
        "epoch": len(state["history"]),  # that were finished
        "data": dataset.label,
        "data_as_trained": is_as_trained,
        "split": args.split,
        "precision": precision,
        "class_names": dataset.class_names,
        **result,
        "provenance": hardware.provenance(sys.argv[1:] if argv is None else argv, device),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    utils.write_text(output, format_json(report))
    print(f"{describe(report)}\nwrote {output}")
    return 0


def format_json(report: dict) -> str:
    """The report as JSON, the confusion matrix one row per line: 1,000 classes are not a million lines."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in report["confusion_matrix"])
    text = json.dumps(report | {"confusion_matrix": []}, indent=2, allow_nan=False)
    return text.replace('"confusion_matrix": []', f'"confusion_matrix": [\n{rows}\n  ]') + "\n"


def describe(report: dict) -> str:
    """The report as text: totals, then one line per class with its most common confusion."""
    top5 = "" if report["top5_accuracy"] is None else f", top-5 {report['top5_accuracy']:.2f}%"
    lines = [
        f"{report['data']}, {report['split']}, epoch {report['epoch']}: loss {report['loss']:.4f}, "
        f"top-1 {report['top1_accuracy']:.2f}%{top5} ({report['num_images']} images, "
        f"{report['images_per_second']:.0f} images/s)"
    ]
    names, width = report["class_names"], max(map(len, report["class_names"]))
    for name, accuracy, row in zip(names, report["per_class_accuracy"], report["confusion_matrix"], strict=True):
        if accuracy is None:
            lines.append(f"  {name:<{width}}  no images")
            continue
        wrong = {other: count for other, count in zip(names, row, strict=True) if other != name and count}
        taken_for = max(wrong, key=wrong.get, default=None)
        confusion = f"   most often taken for {taken_for} ({wrong[taken_for]})" if taken_for else ""
        lines.append(f"  {name:<{width}}  {accuracy:6.2f}% of {sum(row)}{confusion}")
    return "\n".join(lines)


if __name__ == "__main__":
    utils.run_cli(main)
