"""Evaluate checkpoints: accuracy, what the attention does, where two models differ.

python eval.py --checkpoint experiments/cifar10/full/seed_0/last.pt
python eval.py --checkpoint experiments/cifar10/full/seed_0/last.pt --analyze
python eval.py --compare experiments/cifar10/{full,2d_cardinal_expansion_2}/seed_0/last.pt
python eval.py --checkpoint experiments/pets/full/seed_0/last.pt --predict photos/new
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

import attention
import utils
from analysis import comparison, prediction, summary
from analysis.trained_model import SPLITS, TrainedModel, load_model
from interop import export
from pipeline import sizes
from runtime import distributed, hardware
from training.evaluation import evaluate
from training.settings import Settings
from utils import UsageError

OF_ANALYZE = ("limit", "images", "patch")  # flags that need --analyze
HOW = ("batch_size", "precision", "backend")  # how the model runs
ELSEWHERE = ("data_dir", "labels", "split_folder")  # settings of the data that a flag may replace
IMAGES = ("split", *ELSEWHERE)  # which images of which data


def parse_args(argv=None):
    parser = utils.ArgumentParser(
        description="Evaluate a checkpoint; it holds all that is needed to rebuild the model."
    )
    add_what(parser)
    add_where(parser)
    args = parser.parse_args(argv)
    if args.export:
        reason = "--export only writes the model of one --checkpoint"
        parser.refuse(args, ("compare", "analyze", "predict", "output", *HOW, *IMAGES), reason)
    if args.predict:
        reason = "--predict takes one --checkpoint and no data but its own"
        parser.refuse(args, ("compare", "analyze", *IMAGES), reason)
    return args


def add_what(parser: argparse.ArgumentParser) -> None:
    """Flags for what is done with which checkpoint."""
    checkpoints = parser.add_mutually_exclusive_group(required=True)
    checkpoints.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="last.pt of a run folder"
    )
    checkpoints.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="two checkpoints: McNemar's test, agreement, the images on which they differ most",
    )

    add = parser.add_argument
    add(
        "--analyze",
        action="store_true",
        help="measure attention distance, entropy, rollout and receptive field",
    )
    positive = utils.number_type(int, minimum=1)
    limit_help = "with --analyze: images to measure on, spread over the split (default: all)"
    add("--limit", type=positive, metavar="N", help=limit_help)
    images_help = (
        "with --analyze: images whose attention maps are kept, as 0,5,7 (default: the first of "
        f"each class, at most {summary.NUM_SHOWN})"
    )
    add("--images", type=index_list, metavar="I,J", help=images_help)
    patch_help = (
        "with --analyze: row x column of the patch whose receptive field and maps to show "
        "(default: the center, and maps of the class token if there is one)"
    )
    add("--patch", type=utils.parse_pair, metavar="RxC", help=patch_help)

    export_help = (
        "write the model for others: .safetensors (timm), .onnx (ONNX Runtime), .pt2 (torch.export)"
    )
    add("--export", type=Path, metavar="FILE", help=export_help)
    predict_help = (
        "classes of these images, and of those in and below these folders, as a CSV and a picture; "
        "needs no other data"
    )
    add("--predict", type=path_type, nargs="+", metavar="PATH", help=predict_help)

    split_help = "images to evaluate on; holdout: those that main.py --holdout kept from training"
    add("--split", choices=SPLITS, default="test", help=split_help)


def add_where(parser: argparse.ArgumentParser) -> None:
    """Flags for where and how the model runs, and where the result goes."""
    add = parser.add_argument
    add(
        "--data_dir",
        type=utils.home_path,
        metavar="DIR",
        help="where the data is (default: as in training)",
    )
    labels_help = "CSV with the columns file,class of that data (default: as in training)"
    add("--labels", type=utils.home_path, metavar="CSV", help=labels_help)
    share = utils.number_type(float, minimum=0, below=1)
    share_help = "fraction of that data for testing; 0: it has test/ (default: as in training)"
    add("--split_folder", type=share, metavar="F", help=share_help)
    size_help = (
        "run at this size, or height x width like 192x320: positions are interpolated, the mask is "
        "rebuilt (default: as in training)"
    )
    add("--img_size", type=sizes.parse, metavar="PX", help=size_help)
    batch_size = utils.number_type(int, minimum=1)
    batch_help = "images per batch; fewer at a time where --analyze needs much memory"
    add("--batch_size", type=batch_size, default=256, help=batch_help)
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
    output_help = (
        "JSON to write (default: eval_<split>.json, analysis_<split>.json or "
        "compare_<run of B>_seed_<n>_<split>.json beside the checkpoint); with --predict: CSV to "
        "write (default: predictions.csv there, at another size predictions_<size>.csv)"
    )
    add("--output", type=Path, metavar="FILE", help=output_help)


def path_type(text: str) -> Path:
    return Path(utils.home_path(text))


def index_list(text: str) -> list[int]:
    """An argparse type: `'0,5,7'` -> [0, 5, 7], without repetitions."""
    try:
        indices = [int(part) for part in text.split(",")]
        if min(indices) < 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers of images like 0,5,7, got {text!r}"
        ) from None
    return list(dict.fromkeys(indices))


def check_flags(args) -> None:
    """Raise UsageError for flags that do not go together."""
    if args.analyze and args.compare:
        raise UsageError("--analyze looks at one --checkpoint; leave out --compare")
    if args.export:
        export.check_suffix(args.export)
    given = [name for name in OF_ANALYZE if getattr(args, name) is not None]
    if given and not args.analyze:
        raise UsageError(f"--{given[0]} needs --analyze")
    if args.predict and args.output and args.output.suffix != ".csv":
        raise UsageError(f"--output {args.output} must end in .csv; a picture is written beside it")
    if (args.analyze or args.compare) and args.output and args.output.suffix != ".json":
        raise UsageError(
            f"--output {args.output} must end in .json; arrays and pictures are written beside it"
        )


def main(argv=None) -> int:
    args = parse_args(argv)
    check_flags(args)
    distributed.check_environment()
    if distributed.WORLD_SIZE > 1:
        raise UsageError("eval.py runs on one process; start it without torchrun")
    hardware.keep_freed_memory()
    device = hardware.pick_device(args.device)
    provenance = hardware.provenance(sys.argv[1:] if argv is None else argv, device)

    if args.compare:
        return run_comparison(args, device, provenance)
    if args.export:
        return run_export(args)
    if args.predict:
        return run_prediction(args, device)
    trained = load(args.checkpoint, args, device)
    if args.analyze:
        return run_analysis(trained, args, provenance)
    return run_evaluation(trained, args, provenance)


def load(
    checkpoint: Path, args, device: torch.device, earlier: TrainedModel | None = None
) -> TrainedModel:
    given = {name: getattr(args, name) for name in ELSEWHERE}
    elsewhere = {name: value for name, value in given.items() if value is not None}
    if args.split_folder == 0 and args.labels is None:  # a folder with test/ has class folders
        elsewhere["labels"] = None
    options = (args.precision, args.backend, size_of(args), elsewhere, earlier)
    return TrainedModel.load(checkpoint, args.split, device, *options)


def size_of(args) -> tuple[int, int] | None:
    return None if args.img_size is None else sizes.sides_of(args.img_size)


def run_evaluation(trained: TrainedModel, args, provenance: dict) -> int:
    batches = trained.batches(args.batch_size)
    num_classes = trained.dataset.num_classes
    result = evaluate(trained.model, batches, num_classes, trained.device, trained.precision)

    report = {**trained.describe(), **result, "provenance": provenance}
    output = args.output or args.checkpoint.with_name(f"eval_{trained.file_suffix}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    utils.write_text(output, format_json(report))
    print(f"{describe(report)}\nwrote {output}")
    return 0


def run_export(args) -> int:
    state, model = load_model(args.checkpoint, torch.device("cpu"), img_size=size_of(args))
    mask = dataclasses.asdict(Settings.from_dict(state["settings"]).mask)
    print("\n".join(export.write(args.export, model, state["data"], mask)))
    return 0


def run_analysis(trained: TrainedModel, args, provenance: dict) -> int:
    results = summary.analyze(trained, args.batch_size, args.limit, args.images, args.patch)
    output = args.output or args.checkpoint.with_name(f"analysis_{trained.file_suffix}.json")
    report = summary.write(output, trained, results, provenance)
    print(f"{summary.describe(report)}\nwrote {output} and {report['arrays']}")
    return 0


def run_comparison(args, device: torch.device, provenance: dict) -> int:
    first = load(args.compare[0], args, device)
    second = load(args.compare[1], args, device, earlier=first)
    result = comparison.compare(first, second, args.batch_size)

    output = args.output or comparison.default_output(first, second)
    report = comparison.write(output, first, result, provenance)
    picture = f" and {report['picture']}" if report["picture"] else ""
    print(f"{comparison.describe(report)}\nwrote {output}{picture}")
    return 0


def run_prediction(args, device: torch.device) -> int:
    """Exit code 1 if some of the files cannot be read."""
    files = prediction.find_files(args.predict)
    options = (args.precision, args.backend, size_of(args))
    predictor = prediction.Predictor.load(args.checkpoint, device, *options)
    found = predictor.predict(files, args.batch_size)

    output = args.output or args.checkpoint.with_name(predictor.file_name)
    picture = prediction.write(output, found, predictor.class_names)
    print(f"{prediction.describe(found, predictor.class_names)}\nwrote {output} and {picture}")
    if found.unreadable:
        reasons = prediction.reasons_of(found.unreadable)
        utils.warn(f"{len(found.unreadable)} of {len(files)} files cannot be read: {reasons}")
    return 1 if found.unreadable else 0


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
