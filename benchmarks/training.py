"""Training speed, end to end: this repository's loop, its bare model on random data, and the loop as often written.

    python benchmark.py --level training

The often written one: timm's ViT of the same size, PIL images, torchvision's transforms, a DataLoader, fp32. All take
turns in one process, an epoch of a few steps each, and a ratio is taken within each turn: of the bare model (what is
missing to 1 is the time that the model waits for data and bookkeeping), of the often written loop, and of the rate of
a large matrix product.

    python benchmark.py --level training --model vit_base --img_size 224 --patch_size 16 --batch_size 256 --steps 10
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
from runtime import hardware
from runtime.stopping import StopRequest
from training.command_line import COMPILE, resolve_settings
from training.command_line import parse_args as parse_run
from training.progress import Progress
from training.settings import RECIPES
from training.trainer import Trainer

MATRIX_SIZE = {"cuda": 8192}  # of the matrix product, by device
SMALL_MATRIX = 2048  # elsewhere
PRECISIONS = ("fp32", "bf16")
OURS, BARE, USUAL = "this repository", "bare model", "timm, PIL, DataLoader, fp32"


def add_arguments(parser: utils.ArgumentParser) -> None:
    positive = utils.number_type(int, minimum=1)
    parser.add_argument("--model", choices=models.PRESETS, default="vit_tiny", help="size preset")
    size_help = f"to which images of {pipeline.SIDE}x{pipeline.SIDE} are resized"
    parser.add_argument("--img_size", type=positive, default=pipeline.SIDE, metavar="PX", help=size_help)
    parser.add_argument("--patch_size", type=positive, default=4, metavar="PX", help="side of a patch")
    parser.add_argument("--batch_size", type=positive, default=128, metavar="N", help="images per step")
    modes, compile_help = [mode for mode in COMPILE if mode != "auto"], "torch.compile our model and the bare one alike"
    parser.add_argument("--compile", choices=modes, default="off", help=compile_help)
    parser.add_argument("--steps", type=positive, default=4, help="of each epoch")
    parser.add_argument("--rounds", type=utils.number_type(int, minimum=3), default=7, help="timed rounds")
    parser.add_argument("--workers", type=utils.number_type(int, minimum=0), default=2, help="of the DataLoader")


def our_loop(args, pixels: torch.Tensor, precision: str, options: list[str], device: torch.device) -> Callable:
    """A function that trains one epoch as main.py does, without evaluating and saving."""
    run = [f"--{name}={getattr(args, name)}" for name in ("model", "img_size", "patch_size", "batch_size", "compile")]
    run += ["--device", device.type, "--precision", precision, "--checkpoint_every_minutes", "0", *options]
    settings = resolve_settings(parse_run(run))
    dataset, folder = pipeline.dataset_of(pixels, args.img_size, device), Path(tempfile.gettempdir())
    trainer = Trainer(build_ours(args).to(device), dataset, settings, {}, folder, device, StopRequest())

    def epoch() -> None:
        trainer.start_epoch(Progress())
        trainer.train_epoch()

    return epoch


def build_ours(args) -> models.VisionTransformer:
    return models.VisionTransformer(args.img_size, args.patch_size, dropout=0.1, **models.PRESETS[args.model])


def bare_loop(model: torch.nn.Module, batches, precision: str, device: torch.device) -> Callable:
    """A function that does forward, backward and step for each of the batches, and nothing else."""
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

    size = {"img_size": args.img_size, "patch_size": args.patch_size, **models.PRESETS[args.model]}
    return VisionTransformer(num_classes=10, proj_drop_rate=0.1, pos_drop_rate=0.1, **size)


def matrix_product(precision: str, device: torch.device) -> tuple[Callable, float]:
    """A function that multiplies two large matrices, and its FLOPs."""
    size = MATRIX_SIZE.get(device.type, SMALL_MATRIX)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return lambda: a @ b, 2.0 * size**3


def build_loops(args, device: torch.device) -> dict[str, Callable]:
    """What takes turns: name -> a function that trains an epoch of `args.steps` steps."""
    num_images, side = args.steps * args.batch_size, pipeline.SIDE
    pixels = torch.randint(256, (num_images, 3, side, side), dtype=torch.uint8)
    shape = (args.batch_size, 3, args.img_size, args.img_size)
    batches = [(torch.randn(shape, device=device), torch.arange(args.batch_size, device=device) % 10)] * args.steps
    loops = {}
    for precision in PRECISIONS:
        model = build_ours(args).to(device)
        compiled = model if args.compile == "off" else torch.compile(model, mode=args.compile, dynamic=False)
        loops[f"{BARE}, {precision}"] = bare_loop(compiled, batches, precision, device)
        for recipe in RECIPES:
            options = ["--recipe", recipe, "--pool", "cls", "--drop_path", "0"]  # the same model
            loops[f"{OURS}, {recipe}, {precision}"] = our_loop(args, pixels, precision, options, device)
    loader = pipeline.pil_loader(pixels, args.img_size, args.workers, device, args.batch_size)
    loops[USUAL] = bare_loop(timm_model(args).to(device), loader, "fp32", device)
    return loops


def measure(args, argv: list[str], output: Path) -> None:
    """Time all loops, write the report to `output`, and print it. Raises UserError without timm."""
    if importlib.util.find_spec("timm") is None:
        raise utils.UserError("the often written loop needs timm; pip install -r requirements-dev.txt")
    hardware.keep_freed_memory()
    device = hardware.pick_device(args.device)
    loops = build_loops(args, device)
    products = {precision: matrix_product(precision, device) for precision in PRECISIONS}
    seconds = time_in_turns(loops | {product: function for product, (function, _) in products.items()}, args, device)
    matmul = {product: [flops / value for value in seconds[product]] for product, (_, flops) in products.items()}
    report = {"provenance": hardware.provenance(argv, device)}
    report["matmul_flops_per_second"] = matmul
    report["rows"] = [make_row(name, seconds, matmul, args) for name in loops]
    utils.write_json(output, report)
    for row in report["rows"]:
        print_row(row)


def time_in_turns(functions: dict[str, Callable], args, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each function in each turn."""
    seconds = {name: [] for name in functions}
    for turn in tqdm(range(args.rounds + 1), "turns", leave=False, disable=not sys.stderr.isatty()):
        for name, function in functions.items():
            found = hardware.seconds_of(function, device)
            if turn > 0:  # the first one warms up
                seconds[name].append(found)
    return seconds


def make_row(name: str, seconds: dict[str, list[float]], matmul: dict[str, list[float]], args) -> dict:
    """What the report says of a loop: images a second in each turn, and medians of its ratios to others."""
    values, precision, num_images = seconds[name], name.rpartition(", ")[2], args.steps * args.batch_size
    flops = 3 * models.count_forward_flops(build_ours(args))["total"] * num_images  # backward counts twice
    return {
        "name": name,
        "images_per_second": [num_images / value for value in values],
        "of_bare": ratio(values, seconds[f"{BARE}, {precision}"]) if name.startswith(OURS) else None,
        "of_usual": ratio(values, seconds[USUAL]),
        "of_matmul": ratio(values, [flops / rate for rate in matmul[precision]]),
    }


def print_row(row: dict) -> None:
    low, median, high = statistics.quantiles(row["images_per_second"], n=4)
    of_bare = "" if row["of_bare"] is None else f", {row['of_bare']:.2f} of the bare model"
    print(
        f"{row['name']:<32}{median:7.0f} images/s ({low:.0f} to {high:.0f}), {row['of_usual']:.2f} of the usual, "
        f"{row['of_matmul']:.2f} of the matrix product's rate{of_bare}"
    )


def ratio(seconds: list[float], peer: list[float]) -> float:
    """Median over the turns of how many times as fast as the peer."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds, peer, strict=True))
