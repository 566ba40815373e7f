"""The command line of main.py: flags, recipes, and the settings that they resolve to."""

from __future__ import annotations

import argparse

import torch

import attention
import masks
import models
import utils
from attention import diagonal
from masks import MaskSpec
from pipeline import augment, identity, sources
from runtime import hardware
from training import optimizers
from utils import UsageError, number_type

COMPILE = ("off", "auto", "default", "reduce-overhead")
EPOCHS_WORTH_COMPILING = 10

# Defaults by --recipe; a flag that is given overrides them. None for lr: by batch size, see `strong_lr`.
RECIPES = {
    "plain": {
        "pool": "cls",
        "dropout": 0.1,
        "drop_path": 0.0,
        "policy": "none",
        "mix": 0.0,
        "batch_size": 64,
        "lr": 3e-4,
        "weight_decay": 0.1,
        "label_smoothing": 0.1,
    },
    # What the literature trains small data with from scratch: Touvron et al. 2021 (DeiT), Lee et al. 2021 (SL-ViT).
    "strong": {
        "pool": "mean",
        "dropout": 0.0,
        "drop_path": 0.1,
        "policy": "rand",
        "mix": 0.5,
        "batch_size": 128,
        "lr": None,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
    },
}


def strong_lr(batch_size: int) -> float:
    """1e-3 at 128 to 256 images a step, scaled linearly below and above."""
    return 1e-3 * max(min(batch_size / 128, 1.0), batch_size / 256)


def build_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(description="Train one ViT with one attention pattern. Run it again to resume.")
    positive, fraction = number_type(int, minimum=1), number_type(float, minimum=0, below=1)
    share, at_least_0 = number_type(float, minimum=0, maximum=1), number_type(float, minimum=0)

    group = parser.add_argument_group("attention pattern")
    add = group.add_argument
    add("--mask_type", choices=masks.MASK_TYPES, default="full", help="who attends to whom")
    step = number_type(int, minimum=0)
    add("--expansion_step", type=step, default=1, metavar="S", help="reach, in patches; not for full")
    add("--backend", choices=attention.BACKENDS, default="auto", help="how masked attention is computed")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset", choices=sources.DATASETS, default="cifar10", help="what to train on")
    data_help = "downloads go here; for imagefolder: its root"
    add("--data_dir", type=utils.home_path, default=identity.DATA_DIR, metavar="DIR", help=data_help)
    add("--skip_unreadable", action="store_true", help="for imagefolder: leave out images that cannot be read")
    limit = "images of more than this stay on the CPU and are streamed (default: half of the GPU's free memory)"
    add("--device_data_limit", type=at_least_0, metavar="GIB", help=limit)

    group = parser.add_argument_group("recipe: the defaults of the flags marked with *")
    add = group.add_argument
    add("--recipe", choices=RECIPES, default="plain", help="plain: crop and flip; strong: made for small data")

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", choices=models.PRESETS, default="vit_base", help="size preset")
    width, blocks = number_type(int, minimum=1, maximum=65_536), number_type(int, minimum=1, maximum=1000)
    add("--embed_dim", type=width, metavar="E", help="width (default: by preset)")
    add("--depth", type=blocks, metavar="L", help="blocks (default: by preset)")
    add("--num_heads", type=width, metavar="H", help="heads (default: by preset)")
    add("--img_size", type=positive, default=224, metavar="PX", help="images are resized to this side")
    add("--patch_size", type=positive, default=16, metavar="PX", help="side of a patch")
    add("--pool", choices=models.POOLS, help="* class token (global), or mean of the patches")
    add("--dropout", type=fraction, metavar="P", help="* probability; not on attention weights")
    add("--drop_path", type=fraction, metavar="P", help="* stochastic depth: of skipping a branch, in the last block")

    group = parser.add_argument_group("augmentation of training images, drawn anew for each")
    add = group.add_argument
    switch = argparse.BooleanOptionalAction
    add("--crop", action=switch, default=True, help="pad by an eighth, cut out at random")
    add("--flip", action=switch, default=True, help="mirror half of them; never digits")
    add("--policy", choices=augment.POLICIES, help="* trivial: TrivialAugment Wide, rand: RandAugment")
    add("--random_erasing", type=share, default=0.0, metavar="P", help="probability of a blank box")
    add("--mix", type=share, metavar="P", help="* share of the batches with MixUp or CutMix")
    add("--mixup_alpha", type=at_least_0, default=0.8, metavar="A", help="of the beta distribution; 0 = no MixUp")
    add("--cutmix_alpha", type=at_least_0, default=1.0, metavar="A", help="of the beta distribution; 0 = no CutMix")
    add("--mix_off", type=share, default=0.1, metavar="F", help="the last share of the epochs is not mixed")

    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--epochs", type=positive, default=50, metavar="N", help="passes over the training images")
    add("--batch_size", type=positive, metavar="N", help="* images a step, over all GPUs")
    add("--optimizer", choices=optimizers.OPTIMIZERS, default="adamw", help="muon: for the matrices of the blocks")
    above_0 = number_type(float, above=0)
    add("--lr", type=above_0, help="* peak learning rate; strong: 1e-3 at batch 128 to 256, else scaled linearly")
    add("--weight_decay", type=at_least_0, help="* on weight matrices only")
    add("--warmup_fraction", type=fraction, default=0.1, metavar="F", help="of all steps; then cosine to 0")
    add("--label_smoothing", type=fraction, metavar="P", help="* mass moved off the true class")
    add("--grad_clip", type=at_least_0, default=1.0, help="gradient norm; 0 = off")
    add("--ema", type=fraction, default=0.0, metavar="D", help="evaluate the moving average of the weights; 0 = off")
    add("--seed", type=number_type(int, minimum=0, below=2**63), default=0, help="of weights, data order, dropout")

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", choices=hardware.DEVICES, default="auto", help="auto: CUDA, else MPS, else the CPU")
    add("--precision", choices=hardware.PRECISIONS, default="auto", help="auto: bf16 on CUDA from 8.0")
    compile_help = "torch.compile the model; auto: on CUDA, from 10 epochs on; reduce-overhead: with CUDA graphs"
    add("--compile", choices=COMPILE, nargs="?", const="default", default="auto", help=compile_help)
    add("--grad_accumulation", type=positive, default=1, metavar="N", help="micro-batches a step, to save memory")
    add("--checkpoint_activations", action="store_true", help="compute blocks twice, to save memory")

    group = parser.add_argument_group("run")
    add = group.add_argument
    root_help = "root of all run folders"
    add("--output_dir", type=utils.home_path, default="experiments", metavar="DIR", help=root_help)
    named = "folder of the dataset's runs (default: --dataset; for imagefolder the name of its root)"
    add("--dataset_name", metavar="NAME", help=named)
    add("--run_name", metavar="NAME", help="folder name (default: <mask_type>_expansion_<step>, or full)")
    every = number_type(int, minimum=0)
    add("--log_every", type=every, default=0, metavar="N", help="print the loss every N steps; 0 = every epoch")
    minutes = "save within long epochs too; 0 = after each epoch alone"
    add("--checkpoint_every_minutes", type=at_least_0, default=10.0, metavar="M", help=minutes)
    add("--dry_run", action="store_true", help="print the resolved configuration and stop")
    parser.set_defaults(**RECIPES["plain"])
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.recipe != "plain":
        parser.set_defaults(**RECIPES[args.recipe])
        args = parser.parse_args(argv)
    return args


def resolve_settings(args) -> dict:
    """Every setting, with nothing left to be decided: what config.json holds and a resumed run is compared by."""
    settings = vars(args).copy()
    if args.mask_type == "full":
        settings["expansion_step"] = None
    for name, value in models.PRESETS[args.model].items():
        settings[name] = settings[name] or value
    if args.lr is None:
        settings["lr"] = strong_lr(args.batch_size)
    settings["device"] = hardware.pick_device(args.device).type
    settings["precision"] = hardware.resolve_precision(args.precision, torch.device(settings["device"]))
    if args.compile == "reduce-overhead" and args.grad_accumulation > 1:
        raise UsageError(
            "--compile reduce-overhead replays the memory of a step, where gradients cannot add up; use --compile "
            f"default with --grad_accumulation {args.grad_accumulation}"
        )
    settings["compile"] = resolve_compile(args.compile, settings["device"], args.epochs)
    if args.grad_accumulation > args.batch_size:
        raise UsageError(
            f"--grad_accumulation {args.grad_accumulation} asks for more micro-batches than --batch_size "
            f"{args.batch_size} has images"
        )
    settings["run_name"] = (
        MaskSpec(args.mask_type, args.expansion_step).run_name if args.run_name is None else args.run_name
    )
    if args.skip_unreadable and args.dataset != identity.IMAGE_FOLDER:
        raise UsageError(f"--skip_unreadable is for --dataset {identity.IMAGE_FOLDER}, got --dataset {args.dataset}")
    if args.dataset_name is None:
        settings["dataset_name"] = identity.default_dataset_name(args.dataset, settings["data_dir"])
    for name in ("run_name", "dataset_name"):
        utils.check_folder_name(f"--{name}", settings[name])
    return settings


def complete(found: dict, asked: dict) -> dict:
    """The settings of a run of an older checkout, with the default of every flag that there was not yet."""
    defaults = parse_args(["--model", asked["model"], "--device", asked["device"]])
    return resolve_settings(defaults) | found


def resolve_compile(mode: str, device: str, epochs: int) -> str:
    """`auto` is "default" where compiling is soon earned back: on CUDA, in a run of many epochs; else "off"."""
    if mode == "auto":
        pays = device == "cuda" and epochs >= EPOCHS_WORTH_COMPILING and diagonal.can_compile(device)
        return "default" if pays else "off"
    if mode != "off" and (error := diagonal.compile_error(device)) is not None:
        raise UsageError(f"--compile: torch.compile does not work here: {error}; fix that, or use --compile off")
    return mode
