"""End-to-end training speed: our training loop, the bare model, and a typical loop.

    python benchmark.py --level training

The typical loop is timm's ViT of the same size with PIL images, torchvision's transforms, a
DataLoader and fp32. All loops take turns in one process, an epoch of a few steps each, and ratios
are taken within each round:

- to the bare model on random data: what is missing to 1 is time the model waits for data and
  bookkeeping,
- to the typical loop,
- to the rate of a large matrix product.

    python benchmark.py --level training --model vit_base --img_size 224 --patch_size 16 \\
        --batch_size 256 --steps 10
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
import utils
from benchmarks import pipeline
from pipeline import sizes
from runtime import hardware
from runtime.stopping import StopRequest
from training.command_line import COMPILE, resolve_settings
from training.command_line import parse_args as parse_run
from training.progress import Progress
from training.settings import RECIPES
from training.trainer import Trainer

# Side of the matrices to multiply, by device and for all other devices.
MATRIX_SIZE = {"cuda": 8192}
SMALL_MATRIX = 2048

PRECISIONS = ("fp32", "bf16")
COMPILE_MODES = [mode for mode in COMPILE if mode != "auto"]

# Beginnings of the names of loops in the report.
OURS = "this repository"
BARE = "bare model"
USUAL = "timm, PIL, DataLoader, fp32"


def add_arguments(parser: utils.ArgumentParser) -> None:
    positive = utils.number_type(int, minimum=1)
    at_least_3 = utils.number_type(int, minimum=3)
    not_negative = utils.number_type(int, minimum=0)

    def add(flag: str, default, help: str, **options) -> None:
        parser.add_argument(flag, default=default, help=help, **options)

    side = pipeline.SIDE
    add("--model", "vit_tiny", "size preset", choices=models.PRESETS)
    add(
        "--img_size",
        side,
        f"resize {side}x{side} images to this, or to height x width",
        type=sizes.parse,
        metavar="PX",
    )
    add("--patch_size", 4, "side of a patch", type=positive, metavar="PX")
    add("--batch_size", 128, "images per step", type=positive, metavar="N")
    add("--compile", "off", "torch.compile mode of our and the bare model", choices=COMPILE_MODES)
    add("--steps", 4, "steps per epoch", type=positive)
    add("--rounds", 7, "timed rounds", type=at_least_3)
    add("--workers", 2, "processes of the DataLoader", type=not_negative)


# -------------------------------------------------------------------------------------------------
# The loops


def our_loop(
    args, pixels: torch.Tensor, precision: str, options: list[str], device: torch.device
) -> Callable:
    """A function that trains one epoch as main.py does, without evaluating or saving."""
    names = ("model", "img_size", "patch_size", "batch_size", "compile")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    flags += ["--device", device.type, "--precision", precision]
    flags += ["--checkpoint_every_minutes", "0", *options]
    settings = resolve_settings(parse_run(flags))

    dataset = pipeline.dataset_of(pixels, sizes.sides_of(args.img_size), device)
    folder = Path(tempfile.gettempdir())
    model = build_ours(args).to(device)
    trainer = Trainer(model, dataset, settings, {}, folder, device, StopRequest())

    def epoch() -> None:
        trainer.start_epoch(Progress())
        trainer.train_epoch()

    return epoch


def build_ours(args) -> models.VisionTransformer:
    preset = models.PRESETS[args.model]
    img_size = sizes.sides_of(args.img_size)
    return models.VisionTransformer(img_size, args.patch_size, dropout=0.1, **preset)


def bare_loop(model: torch.nn.Module, batches, precision: str, device: torch.device) -> Callable:
    """A function that does forward, backward and optimizer step per batch, and nothing else."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def epoch() -> None:
        for images, labels in batches:
            with hardware.autocast(device, precision):
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def timm_model(args) -> torch.nn.Module:
    from timm.models import VisionTransformer

    size = {"img_size": sizes.sides_of(args.img_size), "patch_size": args.patch_size}
    size |= models.PRESETS[args.model]
    return VisionTransformer(num_classes=10, proj_drop_rate=0.1, pos_drop_rate=0.1, **size)


def matrix_product(precision: str, device: torch.device) -> tuple[Callable, float]:
    """A function that multiplies two large matrices, and its FLOPs."""
    size = MATRIX_SIZE.get(device.type, SMALL_MATRIX)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return lambda: a @ b, 2.0 * size**3


def build_loops(args, device: torch.device) -> dict[str, Callable]:
    """Name -> a function that trains for an epoch of `args.steps` steps."""
    shape = (args.steps * args.batch_size, 3, pipeline.SIDE, pipeline.SIDE)
    pixels = torch.randint(256, shape, dtype=torch.uint8)

    img_size = sizes.sides_of(args.img_size)
    images = torch.randn(args.batch_size, 3, *img_size, device=device)
    labels = torch.arange(args.batch_size, device=device) % 10
    batches = [(images, labels)] * args.steps

    loops = {}
    for precision in PRECISIONS:
        model = build_ours(args).to(device)
        if args.compile != "off":
            model.compile_blocks(args.compile)
        loops[f"{BARE}, {precision}"] = bare_loop(model, batches, precision, device)

        for recipe in RECIPES:
            # These options make the model the same for all recipes.
            options = ["--recipe", recipe, "--pool", "cls", "--drop_path", "0"]
            name = f"{OURS}, {recipe}, {precision}"
            loops[name] = our_loop(args, pixels, precision, options, device)

    loader = pipeline.pil_loader(pixels, img_size, args.workers, device, args.batch_size)
    loops[USUAL] = bare_loop(timm_model(args).to(device), loader, "fp32", device)
    return loops


# -------------------------------------------------------------------------------------------------
# Measuring


def measure(args, argv: list[str], output: Path) -> None:
    """Time all loops, write the report to `output`, and print it. Raises UserError without timm."""
    if importlib.util.find_spec("timm") is None:
        raise utils.UserError(
            "--level training needs timm for comparison: pip install -r requirements-dev.txt"
        )
    hardware.keep_freed_memory()
    device = hardware.pick_device(args.device)

    loops = build_loops(args, device)
    products = {}
    num_flops = {}
    for precision in PRECISIONS:
        products[precision], num_flops[precision] = matrix_product(precision, device)

    seconds = time_in_rounds(loops | products, args, device)
    matmul = {}
    for precision in PRECISIONS:
        matmul[precision] = [num_flops[precision] / value for value in seconds[precision]]

    report = {
        "provenance": hardware.provenance(argv, device),
        "matmul_flops_per_second": matmul,
        "rows": [make_row(name, seconds, matmul, args) for name in loops],
    }
    utils.write_json(output, report)
    for row in report["rows"]:
        print_row(row)


def time_in_rounds(
    functions: dict[str, Callable], args, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each function in each round."""
    seconds = {name: [] for name in functions}
    rounds = range(args.rounds + 1)
    hidden = not sys.stderr.isatty()
    for round_number in tqdm(rounds, "rounds", leave=False, disable=hidden):
        for name, function in functions.items():
            found = hardware.seconds_of(function, device)
            if round_number > 0:  # the first round warms up
                seconds[name].append(found)
    return seconds


def make_row(
    name: str, seconds: dict[str, list[float]], matmul: dict[str, list[float]], args
) -> dict:
    """What the report says about a loop.

    Images per second in each round, and the medians of its speed relative to other loops.
    """
    values = seconds[name]
    precision = name.rpartition(", ")[2]
    num_images = args.steps * args.batch_size
    forward_flops = models.count_forward_flops(build_ours(args))["total"]
    flops = 3 * forward_flops * num_images  # the backward pass costs twice the forward pass
    at_matmul_rate = [flops / rate for rate in matmul[precision]]

    of_bare = None
    if name.startswith(OURS):
        of_bare = ratio(values, seconds[f"{BARE}, {precision}"])
    return {
        "name": name,
        "images_per_second": [num_images / value for value in values],
        "of_bare": of_bare,
        "of_usual": ratio(values, seconds[USUAL]),
        "of_matmul": ratio(values, at_matmul_rate),
    }


def print_row(row: dict) -> None:
    low, median, high = statistics.quantiles(row["images_per_second"], n=4)
    facts = [
        f"{row['name']:<32}{median:7.0f} images/s ({low:.0f} to {high:.0f})",
        f"{row['of_usual']:.2f} of the typical loop",
        f"{row['of_matmul']:.2f} of the matrix product's rate",
    ]
    if row["of_bare"] is not None:
        facts.append(f"{row['of_bare']:.2f} of the bare model")
    print(", ".join(facts))


def ratio(seconds: list[float], peer: list[float]) -> float:
    """How many times as fast as the peer: the median over the rounds."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds, peer, strict=True))
