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
import models
import utils
from attention import Choice
from masks import MaskSpec
from pipeline import identity, sources
from report import figures, mask_pictures
from runtime import distributed, hardware
from runtime.stopping import StoppedAtOnce, StopRequest
from training import run_folder
from training.checkpoints import load_latest
from training.settings import parse_args, resolve_settings
from training.trainer import Stopped, Trainer, micro_batch_size


def build_model(settings: dict, in_channels: int, num_classes: int) -> models.VisionTransformer:
    """The model with freshly drawn weights; the same seed gives the same weights whatever the mask."""
    torch.manual_seed(settings["seed"])
    with utils.usage_errors():
        side = settings["img_size"] // settings["patch_size"]
        mask = MaskSpec.from_settings(settings).build(max(side, 1), max(side, 1))
        return models.VisionTransformer(
            img_size=settings["img_size"],
            patch_size=settings["patch_size"],
            in_channels=in_channels,
            num_classes=num_classes,
            dropout=settings["dropout"],
            drop_path=settings["drop_path"],
            pool=settings["pool"],
            attention_mask=mask,
            backend=settings["backend"],
            **{name: settings[name] for name in models.PRESETS[settings["model"]]},
        )


def choose_backend(model: models.VisionTransformer, settings: dict, num_train: int, device: torch.device) -> Choice:
    """How masked attention is to be computed in this run; not counted as training time."""
    num_steps = settings["epochs"] * data.steps_per_epoch(num_train, settings["batch_size"])
    config, dtype = model.config, torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    with utils.usage_errors():
        return attention.choose_backend(
            model.compiled_mask,
            micro_batch_size(settings),
            config["num_heads"],
            config["embed_dim"] // config["num_heads"],
            dtype,
            device,
            num_calls=config["depth"] * num_steps * settings["grad_accumulation"],
        )


def describe_model(model: models.VisionTransformer, settings: dict) -> dict:
    """The number of parameters, the numbers of neighbors, and what share of the arithmetic the attention has."""
    choice = model.compiled_mask.choice
    num_patches, mask, flops = model.num_patches, model.compiled_mask.mask, models.count_forward_flops(model)
    mean = num_patches if mask is None else mask.sum(1, dtype=torch.float64).mean().item()
    nominal = MaskSpec.from_settings(settings).num_neighbors(num_patches)
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
            "backend": choice.backend,
            "backend_reason": choice.reason,
            "backend_seconds": choice.timings,
        },
    }


def dry_run(settings: dict, folder: Path) -> None:
    in_channels, num_classes = sources.channels_and_classes(settings["dataset"], settings["data_dir"])
    model = build_model(settings, in_channels, num_classes)
    settings = settings | {"dataset_name": folder.parents[1].name}
    print(json.dumps({"run_folder": str(folder), "settings": settings, **describe_model(model, settings)}, indent=2))


def main(argv=None) -> int:
    distributed.die_with_parent()
    hardware.keep_freed_memory()
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    distributed.check_environment()
    with hardware.device_errors(args.grad_accumulation):
        if args.device in ("auto", "cuda"):
            distributed.take_own_gpu()
        settings = resolve_settings(args)
        if settings["dry_run"]:
            dry_run(settings, find_run(settings, args.dataset_name)[0])
            return 0
        return train(settings, args.dataset_name, argv)


def train(settings: dict, dataset_name: str | None, argv: list[str]) -> int:
    """Train to the end, or until asked to stop, together with the other processes of the run."""
    stop = StopRequest()

    def say_stopped_early() -> None:
        say_stopped(f"stopped ({stop.reason}) before the training; the same command starts again")

    with stop.listening(before_leaving=say_stopped_early):
        try:
            with distributed.process_group(torch.device(settings["device"])) as device:
                return find_and_run(settings, dataset_name, device, stop, argv)
        except StoppedAtOnce:  # out of the group: other processes may be waiting there, which ends as this one leaves
            say_stopped_early()
            return 130 if stop.by_keyboard else utils.EXIT_AGAIN


def find_and_run(
    settings: dict, dataset_name: str | None, device: torch.device, stop: StopRequest, argv: list[str]
) -> int:
    """Find the run's folder and the data, and do what is left of the run."""
    with stop.at_once():
        found = find_run(settings, dataset_name) if distributed.IS_FIRST else None  # where others hear of an error
        folder, known = distributed.from_first(found)
        settings["dataset_name"] = folder.parents[1].name
        if run_folder.is_finished(folder, settings, known):
            return 0
        dataset = load_dataset(settings, device)
    try:
        with run_folder.only_writer(folder):
            return run(settings, dataset, folder, device, stop, argv)
    except Stopped:
        reason = next(filter(None, distributed.from_all(stop.reason)))
        say_stopped(f"stopped ({reason}); all is saved in {folder}, the same command goes on")
        return 130 if distributed.any_rank(stop.by_keyboard) else utils.EXIT_AGAIN


def say_stopped(message: str) -> None:
    if distributed.IS_FIRST:
        try:
            print(message, flush=True)
        except BrokenPipeError:  # in `| tee log` Ctrl-C has ended tee as well
            utils.drop_output()


def find_run(settings: dict, dataset_name: str | None) -> tuple[Path, dict | None]:
    """The run's folder, and what is known of the data before it is read: see `identity.describe`."""
    known = identity.describe(settings["dataset"], settings["data_dir"])
    where = (settings[name] for name in ("output_dir", "dataset", "data_dir"))
    folder = identity.find_run_folder(*where, dataset_name, settings["run_name"], settings["seed"], known)
    if folder.parents[1].name != settings["dataset_name"] and not settings["dry_run"]:
        print(f"the run was begun in {folder}, where all image folders once were, and stays there", flush=True)
    return folder, known


def load_dataset(settings: dict, device: torch.device) -> data.Dataset:
    limit, img_size = settings["device_data_limit"], (settings["img_size"],) * 2
    limit_bytes = None if limit is None else limit * 2**30
    options = {"skip_unreadable": True} if settings["skip_unreadable"] else {}
    return data.load_dataset(settings["dataset"], settings["data_dir"], img_size, device, limit_bytes, **options)


def run(
    settings: dict, dataset: data.Dataset, folder: Path, device: torch.device, stop: StopRequest, argv: list[str]
) -> int:
    """Begin the run or go on with it, to its end."""
    with stop.at_once():
        # Another process may have finished it before this one had the folder.
        if run_folder.is_finished(folder, settings, dataset.describe()):
            return 0
        trainer = prepare(settings, dataset, folder, device, stop, argv)
    history = trainer.train()
    if distributed.IS_FIRST:
        utils.write_json(folder / utils.SUMMARY, run_folder.summarize(history, trainer.config))
        print(f"finished: {history[-1]['eval_accuracy']:.2f}% on {len(dataset.test)} test images; results in {folder}")
    return 0


def prepare(
    settings: dict, dataset: data.Dataset, folder: Path, device: torch.device, stop: StopRequest, argv: list[str]
) -> Trainer:
    """The trainer, where the run was left; config.json and the picture of the mask are written."""
    mine = (run_folder.read_to_go_on(folder), load_latest(folder)) if distributed.IS_FIRST else None
    record, state = distributed.from_first(mine)
    model = build_model(settings, dataset.in_channels, dataset.num_classes).to(device)
    if record is None:
        choice = choose_backend(model, settings, len(dataset.train), device) if distributed.IS_FIRST else None
        choice = distributed.from_first(choice)
    else:  # what was chosen when the run began, so that a resume is exact
        choice = Choice(record.config["attention"]["backend"], record.config["attention"]["backend_reason"])
    with utils.usage_errors():
        model.compiled_mask.apply_choice(choice)
        model.compiled_mask.check_device(device)
    provenance = hardware.provenance(argv, device)
    config = run_folder.make_config(record, settings, describe_model(model, settings), dataset.describe(), provenance)
    if state is not None:  # config.json may have been removed
        run_folder.refuse_other_settings(folder, state["settings"], settings)
        run_folder.refuse_other_data(folder, state["data"], config["data"])
    trainer = Trainer(model, dataset, config, folder, device, stop)
    if state is not None:
        trainer.load(state)
    if distributed.IS_FIRST:
        utils.write_json(folder / utils.CONFIG, config)
        draw_mask(model, settings, folder)
        what = f"{config['num_parameters']:,} parameters, {dataset.label}, {provenance['device']}"
        print(f"{folder}: {what}", flush=True)
        if state is not None:
            print(f"resuming in epoch {trainer.epoch} after step {trainer.step}", flush=True)
    return trainer


def draw_mask(model: models.VisionTransformer, settings: dict, folder: Path) -> None:
    """Write the picture of the mask, or one warning: a training does not depend on it."""
    path = folder / utils.MASK_PICTURE
    try:
        picture = mask_pictures.draw_attention_mask(
            model.compiled_mask.mask, *model.grid, MaskSpec.from_settings(settings).label
        )
        figures.save(picture, path)
    except Exception as error:  # whatever matplotlib raises
        utils.warn(f"training goes on without {path}, which could not be drawn: {utils.first_line(error)}")


if __name__ == "__main__":
    utils.run_cli(main, distributed.leave)
