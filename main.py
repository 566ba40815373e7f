"""Train one Vision Transformer with one attention pattern, and write its run folder.

    python main.py --mask_type 2d_cardinal --expansion_step 2 --dataset cifar10 --epochs 50

Run the same command again to resume an interrupted run; a finished one is left alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import attention
import data
import device as machine
import diagonal
import figures
import masks
import models
import utils
from checkpoint import load_checkpoint
from train import train
from utils import UsageError, UserError, number_type

CONFIG_FORMAT = 1
# Settings that say where a run lies or computes, not what it computes: a resumed run may change them.
NOT_PART_OF_THE_RESULT = ("data_dir", "output_dir", "device", "dry_run")


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Train one ViT with one attention pattern. Run it again to resume.")
    positive, fraction = number_type(int, minimum=1), number_type(float, minimum=0, below=1)

    group = parser.add_argument_group("attention pattern")
    group.add_argument("--mask_type", choices=masks.MASK_TYPES, default="full", help="who attends to whom")
    group.add_argument(
        "--expansion_step",
        type=number_type(int, minimum=0),
        default=1,
        metavar="S",
        help="reach, in patches; not for full",
    )
    group.add_argument("--backend", choices=attention.BACKENDS, default="auto", help="how masked attention is computed")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=data.DATASETS, default="cifar10", help="what to train on")
    group.add_argument("--data_dir", default="data", metavar="DIR", help="downloads go here; for imagefolder: its root")

    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=models.PRESETS, default="vit_base", help="size preset")
    group.add_argument("--img_size", type=positive, default=224, metavar="PX", help="images are resized to this side")
    group.add_argument("--patch_size", type=positive, default=16, metavar="PX", help="side of a patch")
    group.add_argument(
        "--pool", choices=models.POOLS, default="cls", help="class token (global), or mean of the patches"
    )
    group.add_argument(
        "--dropout", type=fraction, default=0.1, metavar="P", help="probability; not on attention weights"
    )

    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=positive, default=50, metavar="N", help="passes over the training images")
    group.add_argument("--batch_size", type=positive, default=64, metavar="N", help="images a step")
    group.add_argument("--lr", type=number_type(float, above=0), default=3e-4, help="peak learning rate of AdamW")
    group.add_argument(
        "--weight_decay", type=number_type(float, minimum=0), default=0.1, help="on weight matrices only"
    )
    group.add_argument(
        "--warmup_fraction", type=fraction, default=0.1, metavar="F", help="of all steps; then cosine to 0"
    )
    group.add_argument(
        "--label_smoothing", type=fraction, default=0.1, metavar="P", help="mass moved off the true class"
    )
    group.add_argument("--grad_clip", type=number_type(float, minimum=0), default=1.0, help="gradient norm; 0 = off")
    group.add_argument(
        "--seed", type=number_type(int, minimum=0, below=2**63), default=0, help="of weights, data order, dropout"
    )

    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=machine.DEVICES, default="auto", help="auto: CUDA, else MPS, else the CPU")
    group.add_argument("--precision", choices=machine.PRECISIONS, default="auto", help="auto: bf16 on CUDA from 8.0")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")

    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="experiments", metavar="DIR", help="root of all run folders")
    group.add_argument(
        "--run_name", metavar="NAME", help="folder name (default: <mask_type>_expansion_<step>, or full)"
    )
    group.add_argument("--dry_run", action="store_true", help="print the resolved configuration and stop")
    return parser.parse_args(argv)


def resolve_settings(args) -> dict:
    """Every setting, with nothing left to be decided: what config.json holds and a resumed run is compared by."""
    settings = vars(args).copy()
    if args.mask_type == "full":
        settings["expansion_step"] = None
    settings["device"] = machine.pick_device(args.device).type
    settings["precision"] = machine.resolve_precision(args.precision, torch.device(settings["device"]))
    settings["run_name"] = (
        utils.default_run_name(args.mask_type, settings["expansion_step"]) if args.run_name is None else args.run_name
    )
    if args.compile and (error := diagonal.compile_error(settings["device"])) is not None:
        raise UsageError(f"--compile: torch.compile does not work here: {error}; mend that, or leave --compile out")
    if Path(settings["run_name"]).name != settings["run_name"] or settings["run_name"] in ("", ".."):
        raise UsageError(f"--run_name must be a plain folder name, got {settings['run_name']!r}")
    return settings


def build_model(settings: dict, in_channels: int, num_classes: int) -> models.VisionTransformer:
    """The model with freshly drawn weights; the same seed gives the same weights whatever the mask."""
    torch.manual_seed(settings["seed"])
    with utils.usage_errors():
        side = settings["img_size"] // settings["patch_size"]
        mask = masks.build_attention_mask(settings["mask_type"], settings["expansion_step"], max(side, 1), max(side, 1))
        return models.VisionTransformer(
            img_size=settings["img_size"],
            patch_size=settings["patch_size"],
            in_channels=in_channels,
            num_classes=num_classes,
            dropout=settings["dropout"],
            pool=settings["pool"],
            attention_mask=mask,
            backend=settings["backend"],
            **models.PRESETS[settings["model"]],
        )


def choose_backend(model: models.VisionTransformer, settings: dict, num_train: int) -> None:
    """Settle how masked attention is computed in this run; not counted as training time."""
    num_steps = settings["epochs"] * data.num_steps(num_train, settings["batch_size"])
    config, dtype = model.config, torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    with utils.usage_errors():
        attention.choose_backend(
            model.plan,
            settings["batch_size"],
            config["num_heads"],
            config["embed_dim"] // config["num_heads"],
            dtype,
            torch.device(settings["device"]),
            num_calls=config["depth"] * num_steps,
        )


def describe_model(model: models.VisionTransformer, settings: dict) -> dict:
    """The number of parameters, the numbers of neighbors, and what share of the arithmetic the attention has."""
    num_patches, mask, flops = model.num_patches, model.plan.mask, models.count_forward_flops(model)
    mean = num_patches if mask is None else mask.sum(1, dtype=torch.float64).mean().item()
    nominal = masks.nominal_num_neighbors(settings["mask_type"], settings["expansion_step"], num_patches)
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "attention": {
            "grid": list(model.grid),
            "num_patches": num_patches,
            "num_neighbors_nominal": nominal,
            "num_neighbors_mean": mean,
            "density": mean / num_patches,
            "attention_share_of_flops": flops["attention"] / flops["total"],
            "forward_flops_per_image": flops["total"],
            "backend": model.plan.backend,
            "backend_reason": model.plan.reason,
            "backend_seconds": model.plan.timings,
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def read_config(folder: Path) -> dict | None:
    """What config.json says, or None if there is no run yet."""
    if not (folder / utils.CONFIG).exists():
        return None
    config = utils.read_json(folder / utils.CONFIG)
    if config.get("format") != CONFIG_FORMAT:
        raise UserError(f"{folder / utils.CONFIG} has format {config.get('format')}, expected {CONFIG_FORMAT}; move it")
    return config


def refuse_other(folder: Path, what: str, found: dict, asked: dict) -> None:
    """Raise UsageError if the folder's run was made with something else than what is asked for now."""
    differing = [
        f"{key} {found.get(key)!r} there, {value!r} asked for"
        for key, value in asked.items()
        if key not in NOT_PART_OF_THE_RESULT and found.get(key) != value
    ]
    if differing:
        raise UsageError(
            f"{folder} holds a run of other {what}: {'; '.join(differing)}. Choose another --run_name or --output_dir, "
            "or remove the folder"
        )


def summarize(history: list[dict], config: dict) -> dict:
    """The contents of summary.json. The final epoch is the result; the best one is there to be seen, not reported."""
    steady = history[1:] or history  # the first epoch carries warm-up and compilation
    best = max(history, key=lambda row: row["eval_accuracy"])
    num_train, peaks = config["data"]["num_train"], [row["peak_memory_bytes"] for row in history]
    train_seconds = sum(num_train / row["train_images_per_second"] for row in steady)
    return {
        "format": CONFIG_FORMAT,
        "final": history[-1],
        "best": {"epoch": best["epoch"], "eval_accuracy": best["eval_accuracy"]},
        "epochs": len(history),
        "total_seconds": sum(row["epoch_seconds"] for row in history),
        "train_images_per_second": len(steady) * num_train / train_seconds,
        "peak_memory_bytes": None if None in peaks else max(peaks),
    }


def dry_run(settings: dict, folder: Path) -> None:
    in_channels, num_classes = data.channels_and_classes(settings["dataset"], settings["data_dir"])
    model = build_model(settings, in_channels, num_classes)
    print(json.dumps({"run_folder": str(folder), "settings": settings, **describe_model(model, settings)}, indent=2))


def main(argv=None) -> int:
    machine.keep_freed_memory()
    argv = sys.argv[1:] if argv is None else argv
    settings = resolve_settings(parse_args(argv))
    device = torch.device(settings["device"])
    folder = utils.run_folder(settings["output_dir"], settings["dataset"], settings["run_name"], settings["seed"])
    if settings["dry_run"]:
        dry_run(settings, folder)
        return 0

    found = read_config(folder)
    if found is not None:
        refuse_other(folder, "settings", found["settings"], settings)
        if (folder / utils.SUMMARY).exists():
            final = utils.read_json(folder / utils.SUMMARY)["final"]
            print(f"{folder} is finished: {final['eval_accuracy']:.2f}% after epoch {final['epoch']}; nothing to do")
            return 0

    dataset = data.load_dataset(settings["dataset"], settings["data_dir"], (settings["img_size"],) * 2, device)
    model = build_model(settings, dataset.in_channels, dataset.num_classes).to(device)
    if found is None:
        choose_backend(model, settings, len(dataset.train))
    else:  # what was chosen when the run began, so that a resume is exact
        model.plan.use(found["attention"]["backend"], found["attention"]["backend_reason"])
        with utils.usage_errors():
            model.plan.check_device(device)
    provenance = machine.provenance(argv, device)
    if found is not None:
        refuse_other(folder, "data", found["data"], dataset.describe())
        config = {**found, "settings": settings, "resumed": [*found.get("resumed", []), provenance]}
    else:
        config = {
            "format": CONFIG_FORMAT,
            "settings": settings,
            **describe_model(model, settings),
            "data": dataset.describe(),
            "provenance": provenance,
        }
    folder.mkdir(parents=True, exist_ok=True)
    utils.write_json(folder / utils.CONFIG, config)
    step = settings["expansion_step"]
    title = settings["mask_type"] if step is None else f"{settings['mask_type']}, expansion step {step}"
    figures.save(figures.draw_attention_mask(model.plan.mask, *model.grid, title), folder / utils.MASK_PICTURE)
    state = load_checkpoint(folder / utils.CHECKPOINT) if (folder / utils.CHECKPOINT).exists() else None
    if state is not None:  # config.json may have been removed
        refuse_other(folder, "settings", state["settings"], settings)
    print(f"{folder}: {config['num_parameters']:,} parameters, {dataset.label}, {provenance['device']}", flush=True)
    history = train(model, dataset, config, folder, state)
    utils.write_json(folder / utils.SUMMARY, summarize(history, config))
    print(f"finished: {history[-1]['eval_accuracy']:.2f}% on {len(dataset.test)} test images; results in {folder}")
    return 0


if __name__ == "__main__":
    utils.run_cli(main)
