"""The command line of main.py: a flag for each setting, and the settings that flags resolve to."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields

import torch

import attention
import masks
import models
import utils
from attention import diagonal
from masks import MaskSpec
from pipeline import augment, identity, sources
from pipeline.layout import Layout
from runtime import hardware
from training import optimizers, tracking
from training.budget import Budget
from training.settings import FLAGS, MASK_FLAGS, RECIPES, SECTIONS, Settings, strong_lr
from utils import UsageError

COMPILE = ("off", "auto", "default", "reduce-overhead")
WORTH_COMPILING = 10  # epochs, or minutes

# The choices of a flag come from the module that implements them.
CHOICES = {
    "mask_type": masks.MASK_TYPES,
    "edge": masks.EDGES,
    "backend": attention.BACKENDS,
    "dataset": sources.DATASETS,
    "recipe": RECIPES,
    "model": models.PRESETS,
    "pool": models.POOLS,
    "policy": augment.POLICIES,
    "optimizer": optimizers.OPTIMIZERS,
    "device": hardware.DEVICES,
    "precision": hardware.PRECISIONS,
    "compile": COMPILE,
    "track": tracking.TRACKERS,
}


def build_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(
        description="Train one ViT with one attention pattern. Run it again to resume."
    )
    for section in SECTIONS.values():
        group = parser.add_argument_group(section.title)
        for setting in fields(section):
            # ArgumentParser adds --debug to every script.
            if setting.name in FLAGS and setting.name != "debug":
                group.add_argument(f"--{setting.name}", **_options(setting))
    return parser


def _options(setting: Field) -> dict:
    """Keyword arguments of `add_argument` for a setting."""
    about = setting.metadata
    options = {"default": about["default"], "help": about["help"]}
    if about["default"] is False:
        return options | {"action": "store_true"}
    if about["default"] is True:
        return options | {"action": argparse.BooleanOptionalAction}

    options |= {name: about[name] for name in ("type", "metavar") if about[name] is not None}
    if setting.name in CHOICES:
        options["choices"] = CHOICES[setting.name]
    if setting.name == "compile":  # without a value: on
        options |= {"nargs": "?", "const": "default"}
    return options


def parse_args(argv=None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.recipe != "plain":
        parser.set_defaults(**RECIPES[args.recipe])
        args = parser.parse_args(argv)
    return args


def resolve_settings(args: argparse.Namespace) -> Settings:
    """Every setting, with nothing left to decide; a resumed run is compared with these.

    Raises UsageError for flags that do not go together.
    """
    _check(args)
    settings = {name: getattr(args, name) for name in FLAGS}

    with utils.usage_errors():
        mask = MaskSpec.of_flags(**{name: getattr(args, name) for name in MASK_FLAGS})
        settings |= mask.with_hash().to_settings()
    for name, value in models.PRESETS[args.model].items():
        settings[name] = settings[name] or value
    if args.lr is None:
        settings["lr"] = strong_lr(args.batch_size)

    device = hardware.pick_device(args.device).type
    settings["device"] = device
    settings["precision"] = hardware.resolve_precision(args.precision, torch.device(device))

    budget = Budget.resolve(args.epochs, args.minutes)
    settings["epochs"] = budget.epochs
    settings["compile"] = resolve_compile(args.compile, device, budget)

    if args.run_name is None:
        settings["run_name"] = Settings.from_dict(settings).default_run_name
    if args.dataset_name is None:
        settings["dataset_name"] = identity.default_dataset_name(args.dataset, args.data_dir)
    for name in ("run_name", "dataset_name"):
        utils.check_folder_name(f"--{name}", settings[name])
    return Settings.from_dict(settings)


def _check(args: argparse.Namespace) -> None:
    if args.compile == "reduce-overhead" and args.grad_accumulation > 1:
        raise UsageError(
            "--compile reduce-overhead replays the memory of a step, where gradients cannot add "
            f"up; use --compile default with --grad_accumulation {args.grad_accumulation}"
        )
    if args.grad_accumulation > args.batch_size:
        raise UsageError(
            f"--grad_accumulation {args.grad_accumulation} asks for more micro-batches than "
            f"--batch_size {args.batch_size} has images; use at most {args.batch_size}"
        )
    for name in ("skip_unreadable", "split_folder", "labels"):
        if getattr(args, name) and args.dataset != identity.IMAGE_FOLDER:
            raise UsageError(
                f"--{name} is for --dataset {identity.IMAGE_FOLDER}, got --dataset {args.dataset}"
            )
    Layout(args.split_folder, args.labels)  # raises if these do not go together
    _check_start(args)
    tracking.check_installed(args.track)


def _check_start(args: argparse.Namespace) -> None:
    if args.pretrained is not None and args.init_from is not None:
        raise UsageError("--pretrained and --init_from both say what to start from; give one")
    if args.freeze is None:
        return
    if args.pretrained is None and args.init_from is None:
        raise UsageError(
            f"--freeze {args.freeze} keeps layers as they are, which needs weights that were "
            "trained: add --pretrained or --init_from"
        )
    depth = args.depth or models.PRESETS[args.model]["depth"]
    if args.freeze > depth:
        raise UsageError(f"--freeze {args.freeze}: the model has {depth} blocks")


def complete(found: dict, asked: Settings) -> dict:
    """A run's settings; flags that its older version lacked have their defaults."""
    arguments = ["--model", asked.model.model, "--device", asked.machine.device]
    return resolve_settings(parse_args(arguments)).to_dict() | found


def resolve_compile(mode: str, device: str, budget: Budget) -> str:
    """Turn `auto` into "default" where compiling soon pays, else into "off".

    It pays on CUDA in long runs. Raises UsageError where torch.compile does not work.
    """
    if mode == "auto":
        is_long = (budget.epochs or budget.minutes) >= WORTH_COMPILING
        may_pay = device == "cuda" and is_long
        return "default" if may_pay and diagonal.can_compile(device) else "off"

    if mode != "off" and (error := diagonal.compile_error(device)) is not None:
        raise UsageError(
            f"--compile: torch.compile does not work here: {error}; fix that, or use --compile off"
        )
    return mode
