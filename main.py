"""Train one Vision Transformer with one attention pattern, and write its run folder.

    python main.py --mask_type 2d_cardinal --expansion_step 2 --dataset cifar10 --epochs 50

Run the same command again to resume an interrupted run; a finished one is left alone.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch

import data
import models
import utils
from pipeline import identity, sources
from report import figures, mask_pictures
from runtime import distributed, hardware
from runtime.stopping import StoppedAtOnce, StopRequest
from training import run_folder, starting
from training.building import build_model, choose_backends, describe_model, recorded_choices
from training.checkpoints import load_latest
from training.command_line import parse_args, resolve_settings
from training.settings import EVAL_SPLITS, Settings
from training.tracking import Tracker
from training.trainer import Stopped, Trainer


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
        if settings.run.dry_run:
            dry_run(settings, find_run(settings, args.dataset_name)[0])
            return 0
        return train(settings, args.dataset_name, argv)


def train(settings: Settings, dataset_name: str | None, argv: list[str]) -> int:
    """Train to the end, or until asked to stop, together with the other processes of the run."""
    stop = StopRequest()

    def say_stopped_early() -> None:
        say_stopped(f"stopped ({stop.reason}) before the training; the same command starts again")

    with stop.listening(before_leaving=say_stopped_early):
        try:
            with distributed.process_group(torch.device(settings.machine.device)) as device:
                return find_and_run(settings, dataset_name, device, stop, argv)
        except StoppedAtOnce:
            # Leave the group first: the others may wait in it until this process exits.
            say_stopped_early()
            return 130 if stop.by_keyboard else utils.EXIT_AGAIN


def find_and_run(
    settings: Settings,
    dataset_name: str | None,
    device: torch.device,
    stop: StopRequest,
    argv: list[str],
) -> int:
    """Find the run's folder and its data, and do what is left of the run."""
    with stop.at_once():
        # Only the first process looks. If it fails, the others notice that it left the group.
        found = find_run(settings, dataset_name) if distributed.IS_FIRST else None
        folder, known = distributed.from_first(found)
        settings = settings.changed(dataset_name=folder.parents[1].name)
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


def find_run(settings: Settings, dataset_name: str | None) -> tuple[Path, dict | None]:
    """The run's folder, and what file names and sizes tell: see `identity.describe`."""
    dataset, data_dir = settings.data.dataset, settings.data.data_dir
    known = identity.describe(dataset, data_dir, settings.data.layout)
    folder = identity.find_run_folder(
        settings.run.output_dir,
        dataset,
        data_dir,
        dataset_name,
        settings.run.run_name,
        settings.optimization.seed,
        known,
    )
    if folder.parents[1].name != settings.run.dataset_name and not settings.run.dry_run:
        print(
            f"the run began in {folder}, which all image folders used to share, and stays there",
            flush=True,
        )
    return folder, known


def load_dataset(settings: Settings, device: torch.device) -> data.Dataset:
    limit = settings.data.device_data_limit
    return data.load_dataset(
        settings.data.dataset,
        settings.data.data_dir,
        settings.model.image_size,
        device,
        None if limit is None else limit * 2**30,
        settings.data.holdout,
        **settings.data.reading_options,
    )


def run(
    settings: Settings,
    dataset: data.Dataset,
    folder: Path,
    device: torch.device,
    stop: StopRequest,
    argv: list[str],
) -> int:
    """Begin or resume the run, and finish it."""
    with contextlib.closing(Tracker(settings.run.track)) as tracker:
        with stop.at_once():
            # Another process may have finished it before this one got the folder.
            if run_folder.is_finished(folder, settings, dataset.describe()):
                return 0
            trainer = prepare(settings, dataset, folder, device, stop, argv)
            if distributed.IS_FIRST:
                tracker.begin(folder, trainer.config, trainer.progress.history)

        history = trainer.train(on_epoch=tracker.log_epoch)
        if distributed.IS_FIRST:
            summary = run_folder.summarize(history, trainer.config)
            utils.write_json(folder / utils.SUMMARY, summary)
            tracker.log_summary(summary)

    if distributed.IS_FIRST:
        images = f"{len(dataset.evaluated)} {EVAL_SPLITS[settings.data.eval_split]}"
        accuracy = f"{history[-1]['eval_accuracy']:.2f}%"
        print(f"finished: {accuracy} on {images}; results in {folder}")
    return 0


def prepare(
    settings: Settings,
    dataset: data.Dataset,
    folder: Path,
    device: torch.device,
    stop: StopRequest,
    argv: list[str],
) -> Trainer:
    """Build the trainer, at the point where the run left off; write config.json and the mask."""
    found = None
    if distributed.IS_FIRST:
        found = run_folder.read_to_resume(folder), load_latest(folder)
    record, state = distributed.from_first(found)

    hardware.set_precision(settings.machine.precision)  # before backends are measured
    model, start = starting_model(settings, dataset, device, state)
    settle_backends(model, settings, dataset, device, record)

    provenance = hardware.provenance(argv, device)
    about_model = describe_model(model, settings) | start.describe()
    about_data = dataset.describe()
    config = run_folder.make_config(record, settings, about_model, about_data, provenance)
    if state is not None:  # config.json may have been removed, so check the checkpoint too
        run_folder.refuse_other_settings(folder, state["settings"], settings)
        run_folder.refuse_other_weights(folder, state.get("weights"), settings)
        run_folder.refuse_other_data(folder, state["data"], config["data"])

    trainer = Trainer(model, dataset, settings, config, folder, device, stop)
    if state is not None:
        trainer.load(state)

    if distributed.IS_FIRST:
        utils.write_json(folder / utils.CONFIG, config)
        draw_mask(model, settings, folder)
        say_what_starts(trainer, start, provenance["device"], is_resumed=state is not None)
    return trainer


def starting_model(
    settings: Settings, dataset: data.Dataset, device: torch.device, state: dict | None
) -> tuple[models.VisionTransformer, starting.Start]:
    """The model on its device, and what its weights start from; the same on all processes."""
    start = starting.read(settings, state) if distributed.IS_FIRST else None
    start = distributed.from_first(start)

    model = build_model(settings, dataset.in_channels, dataset.num_classes, start.norm_eps)
    start.apply(model, settings.start.freeze)
    return model.to(device), start


def settle_backends(
    model: models.VisionTransformer,
    settings: Settings,
    dataset: data.Dataset,
    device: torch.device,
    record: run_folder.RunRecord | None,
) -> None:
    """Give each mask its backend: that of the run's record, else the one chosen now."""
    if record is not None:
        choices = recorded_choices(record.config["attention"], model, settings, device)
    else:
        choices = None
        if distributed.IS_FIRST:
            choices = choose_backends(model, settings, len(dataset.train), device)
        choices = distributed.from_first(choices)

    with utils.usage_errors():
        model.layer_masks.apply_choices(choices)
        model.layer_masks.check_device(device)


# --------------------------------------------------------------------------------------------------
# What the user sees


def dry_run(settings: Settings, folder: Path) -> None:
    in_channels, num_classes = sources.channels_and_classes(
        settings.data.dataset, settings.data.data_dir, settings.data.layout
    )
    start = starting.read(settings, state=None)
    model = build_model(settings, in_channels, num_classes, start.norm_eps)
    start.apply(model, settings.start.freeze)
    model.layer_masks.settle(torch.device(settings.machine.device))
    settings = settings.changed(dataset_name=folder.parents[1].name)
    resolved = {
        "run_folder": str(folder),
        "settings": settings.to_dict(),
        **describe_model(model, settings),
        **start.describe(),
    }
    print(json.dumps(resolved, indent=2))


def say_what_starts(trainer: Trainer, start: starting.Start, device: str, is_resumed: bool) -> None:
    config, dataset = trainer.config, trainer.dataset
    about = f"{config['num_parameters']:,} parameters, {dataset.label}, {device}"
    if dataset.held_out is not None:
        about += f", evaluated on {len(dataset.held_out)} {EVAL_SPLITS['holdout']}"
    print("\n".join([f"{trainer.folder}: {about}", *start.lines]), flush=True)

    if is_resumed:
        place = f"epoch {trainer.progress.epoch} after step {trainer.step}"
        print(f"resuming in {place}", flush=True)


def draw_mask(model: models.VisionTransformer, settings: Settings, folder: Path) -> None:
    """Write the picture of the mask. If that fails, warn: the training does not need it."""
    path = folder / utils.MASK_PICTURE
    masks = {}  # title -> mask
    for number, compiled in enumerate(model.layer_masks.different):
        layer = model.layer_masks.number_of.index(number)
        is_only = len(model.layer_masks.different) == 1
        masks["" if is_only else f"from layer {layer} on"] = compiled.mask
    try:
        picture = mask_pictures.draw_attention_masks(masks, *model.grid, settings.mask.spec.label)
        figures.save(picture, path)
    except Exception as error:  # whatever matplotlib raises
        reason = utils.first_line(error)
        utils.warn(f"training goes on without {path}, which could not be drawn: {reason}")


def say_stopped(message: str) -> None:
    if distributed.IS_FIRST:
        try:
            print(message, flush=True)
        except BrokenPipeError:  # Ctrl-C in `main.py | tee log` has ended tee as well
            utils.drop_output()


if __name__ == "__main__":
    utils.run_cli(main, distributed.leave)
