"""Training speed, end to end: this repository's loop, its bare model on random data, and the loop as often written.

    python training_benchmark.py

The often written one: timm's ViT of the same size, PIL images, torchvision's transforms, a DataLoader, fp32. All take
turns in one process, an epoch of a few steps each, and a ratio is taken within each turn.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import device as machine
import models
import pipeline_benchmark as pipeline
import utils
from settings import parse_args as parse_run
from settings import resolve_settings
from stop import StopRequest
from train import Trainer

BATCH_SIZE, SIDE, PATCH = 128, pipeline.SIDE, 4


def parse_args(argv=None):
    parser = utils.ArgumentParser(
        description="Training speed, end to end, of a ViT at 32x32 in 4x4 patches, batch 128."
    )
    positive = utils.number_type(int, minimum=1)
    parser.add_argument("--model", choices=models.PRESETS, default="vit_tiny", help="size preset")
    parser.add_argument("--device", choices=machine.DEVICES, default="auto", help="auto: CUDA, else MPS, else the CPU")
    parser.add_argument("--steps", type=positive, default=4, help="of each epoch")
    parser.add_argument("--rounds", type=utils.number_type(int, minimum=3), default=7, help="timed turns")
    parser.add_argument("--workers", type=utils.number_type(int, minimum=0), default=2, help="of the DataLoader")
    default = Path("experiments") / "benchmark" / "training.json"
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help="JSON to write")
    return parser.parse_args(argv)


def our_loop(args, pixels: torch.Tensor, precision: str, options: list[str], device: torch.device) -> Callable:
    """A function that trains one epoch as main.py does, without evaluating and saving."""
    run = ["--model", args.model, "--img_size", str(SIDE), "--patch_size", str(PATCH), "--batch_size", str(BATCH_SIZE)]
    run += ["--device", device.type, "--precision", precision, "--checkpoint_every_minutes", "0", *options]
    settings = resolve_settings(parse_run(run))
    model = build_ours(args.model).to(device)
    trainer = Trainer(
        *(model, pipeline.dataset_of(pixels, SIDE, device), {"settings": settings}),
        *(Path(tempfile.gettempdir()), device, StopRequest()),
    )

    def epoch() -> None:
        trainer.start_epoch(1)
        trainer.train_epoch()

    return epoch


def build_ours(preset: str) -> models.VisionTransformer:
    return models.VisionTransformer(SIDE, PATCH, dropout=0.1, **models.PRESETS[preset])


def bare_loop(args, model: torch.nn.Module, batches, precision: str, device: torch.device) -> Callable:
    """A function that does forward, backward and step for each of the batches, and nothing else."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def epoch() -> None:
        for images, labels in batches:
            with machine.autocast(device, precision):
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def timm_model(preset: str) -> torch.nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(
        SIDE, PATCH, num_classes=10, proj_drop_rate=0.1, pos_drop_rate=0.1, **models.PRESETS[preset]
    )


def main(argv=None) -> int:
    args = parse_args(argv)
    machine.keep_freed_memory()
    device = machine.pick_device(args.device)
    pixels = torch.randint(256, (args.steps * BATCH_SIZE, 3, SIDE, SIDE), dtype=torch.uint8)
    random_batch = (torch.randn(BATCH_SIZE, 3, SIDE, SIDE, device=device), torch.arange(BATCH_SIZE, device=device) % 10)
    loader = pipeline.pil_loader(pixels, SIDE, args.workers, device)
    epochs, peers = {}, {}
    for precision in ("fp32", "bf16"):
        bare = bare_loop(args, build_ours(args.model).to(device), [random_batch] * args.steps, precision, device)
        epochs[f"bare model, {precision}"] = bare
        for recipe in ("plain", "strong"):
            options = ["--recipe", recipe, "--pool", "cls", "--drop_path", "0"]  # the same model
            epochs[f"this repository, {recipe}, {precision}"] = our_loop(args, pixels, precision, options, device)
            peers[f"this repository, {recipe}, {precision}"] = f"bare model, {precision}"
    usual = "timm, PIL, DataLoader, fp32"
    epochs[usual] = bare_loop(args, timm_model(args.model).to(device), loader, "fp32", device)

    seconds = {name: [] for name in epochs}
    for turn in tqdm(range(args.rounds + 1), "turns", leave=False, disable=not sys.stderr.isatty()):
        for name, epoch in epochs.items():
            found = machine.seconds_of(epoch, device)
            if turn > 0:  # the first one warms up
                seconds[name].append(found)
    report = {"provenance": machine.provenance(sys.argv[1:] if argv is None else argv, device), "rows": []}
    for name, values in seconds.items():
        row = {"name": name, "images_per_second": [len(pixels) / value for value in values]}
        row["of_bare"] = ratio(values, seconds[peers[name]]) if name in peers else None
        row["of_usual"] = ratio(values, seconds[usual])
        report["rows"].append(row)
        low, median, high = statistics.quantiles(row["images_per_second"], n=4)
        of_bare = "" if row["of_bare"] is None else f", {row['of_bare']:.2f} of the bare model"
        print(
            f"{name:<32}{median:7.0f} images/s ({low:.0f} to {high:.0f}), {row['of_usual']:.2f} of the usual{of_bare}"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    utils.write_json(args.output, report)
    print(f"wrote {args.output}")
    return 0


def ratio(seconds: list[float], peer: list[float]) -> float:
    """Median over the turns of how many times as fast as the peer."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds, peer, strict=True))


if __name__ == "__main__":
    utils.run_cli(main)
