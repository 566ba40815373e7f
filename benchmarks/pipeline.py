"""Images per second of the data pipeline alone, compared with PIL, torchvision and a DataLoader.

Both resize and normalize the same random 32x32 images. Run by
`python benchmark.py --level pipeline`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

import data
import utils
from runtime import hardware

SIDE = 32
BATCH_SIZE = 128
ROUNDS = 7

# By the size to which images are resized. The slower PIL pipeline gets fewer.
NUM_IMAGES = {32: 12_800, 224: 2_560}
NUM_PIL_IMAGES = {32: 2_560, 224: 1_280}

AUGMENTATIONS = {
    "crop, flip": data.Augmentation(),
    "crop, flip, TrivialAugment": data.Augmentation(policy="trivial"),
    "crop, flip, RandAugment, mix": data.Augmentation(policy="rand", mix=0.5),
}
PIL = "PIL and DataLoader: "


def add_arguments(parser: utils.ArgumentParser) -> None:
    workers = utils.number_type(int, minimum=0)
    parser.add_argument("--workers", type=workers, default=2, help="processes of the DataLoader")


class PilImages(Dataset):
    """Random PIL images, transformed by torchvision."""

    def __init__(self, pixels: torch.Tensor, img_size: tuple[int, int], policy: str):
        from torchvision import transforms  # deferred: takes a second to import

        policies = {
            "none": [],
            "trivial": [transforms.TrivialAugmentWide()],
            "rand": [transforms.RandAugment()],
        }
        steps = [transforms.RandomCrop(SIDE, padding=SIDE // 8), transforms.RandomHorizontalFlip()]
        steps += policies[policy]
        if img_size != (SIDE, SIDE):
            steps.append(transforms.Resize(img_size))
        steps += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]

        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), 0


class Mix:
    """Collate batches for a DataLoader; torchvision's MixUp or CutMix mixes a share of them."""

    def __init__(self, share: float):
        from torchvision.transforms import v2

        self.share = share
        self.mix = v2.RandomChoice([v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)])

    def __call__(self, examples: list) -> tuple[torch.Tensor, torch.Tensor]:
        batch = default_collate(examples)
        return self.mix(*batch) if torch.rand(()) < self.share else batch


def pil_loader(
    pixels: torch.Tensor,
    img_size: tuple[int, int],
    num_workers: int,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    augmentation: data.Augmentation | None = None,
) -> DataLoader:
    augmentation = augmentation or data.Augmentation()
    return DataLoader(
        PilImages(pixels, img_size, augmentation.policy),
        batch_size,
        shuffle=True,
        collate_fn=Mix(augmentation.mix) if augmentation.mix else None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda",
    )


def dataset_of(
    pixels: torch.Tensor, img_size: tuple[int, int], device: torch.device
) -> data.Dataset:
    labels = torch.zeros(len(pixels), dtype=torch.int64, device=device)
    split = data.Split(pixels.to(device), labels)
    return data.Dataset(
        name="random",
        label="Random",
        class_names=[str(number) for number in range(10)],
        train=split,
        test=split,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        flip=True,
        img_size=img_size,
        device=device,
    )


def rate(epoch: Callable[[], Iterator], device: torch.device) -> float:
    """Images per second of one epoch, with each batch copied to the device."""
    hardware.synchronize(device)
    start = time.perf_counter()
    num_images = 0
    for images, _ in epoch():
        num_images += len(images.to(device, non_blocking=True))
    hardware.synchronize(device)
    return num_images / (time.perf_counter() - start)


def measure_size(img_size: int, device: torch.device, num_workers: int) -> dict[str, list[float]]:
    """Images per second of each pipeline in each round.

    The pipelines take turns in one process, so that noise affects all of them alike.
    """
    pixels = torch.randint(256, (NUM_IMAGES[img_size], 3, SIDE, SIDE), dtype=torch.uint8)
    pil_pixels = pixels[: NUM_PIL_IMAGES[img_size]]
    size = (img_size, img_size)
    dataset = dataset_of(pixels, size, device)

    epochs = {}
    for name, how in AUGMENTATIONS.items():
        loader = pil_loader(pil_pixels, size, num_workers, device, augmentation=how)
        epochs[name] = lambda how=how: data.train_batches(
            dataset, batch_size=BATCH_SIZE, seed=0, epoch=1, augmentation=how
        )
        epochs[PIL + name] = lambda loader=loader: loader

    rates = {name: [] for name in epochs}
    for round_number in range(ROUNDS + 1):
        for name, epoch in epochs.items():
            found = rate(epoch, device)
            if round_number > 0:  # the first round warms up
                rates[name].append(found)
    return rates


def measure(args, argv: list[str], output: Path) -> None:
    """Time all pipelines at each size; results are written to `output` before they are printed."""
    hardware.keep_freed_memory()
    device = hardware.pick_device(args.device)
    report = {
        "provenance": hardware.provenance(argv, device),
        "batch_size": BATCH_SIZE,
        "workers": args.workers,
    }
    for img_size in NUM_IMAGES:
        rates = measure_size(img_size, device, args.workers)
        report[f"images_per_second_at_{img_size}"] = rates
        utils.write_json(output, report)

        sizes = f"{SIDE}x{SIDE} -> {img_size}x{img_size}"
        print(f"{sizes}, batches of {BATCH_SIZE}, on {hardware.device_name(device)}")
        for name in rates:
            print_rates(name, rates)


def print_rates(name: str, rates: dict[str, list[float]]) -> None:
    low, median, high = statistics.quantiles(rates[name], n=4)
    peer = rates[name if name.startswith(PIL) else PIL + name]
    ratios = [ours / theirs for ours, theirs in zip(rates[name], peer, strict=True)]
    ratio = statistics.median(ratios)
    quartiles = f"({low:,.0f} to {high:,.0f})"
    print(f"  {name:<50}{median:>10,.0f} images/s {quartiles}{ratio:>7.1f} x PIL", flush=True)
