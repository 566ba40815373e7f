"""Datasets as one uint8 tensor on the device, and batches made from them there: crop, flip, augment, mix, resize.

Nothing is done image by image in Python. All random draws of an epoch are a pure function of (seed, epoch), made on the
CPU and whole: an exact resume needs no stored state, a rank of a parallel run takes its part of them, and nothing waits
for the device.

Shapes: n images of the split, b of the batch, C channels, H x W pixels as stored, h x w pixels as the model wants.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import augment, mixing, sources
from runtime import hardware

BYTES_AT_ONCE = 2**23  # of images that are augmented together, if that is more than a batch
FETCHES_AHEAD = 3  # of a dataset that streams


@dataclass
class Split:
    """Images and labels: both on the compute device, or both on the CPU, from where batches are then streamed."""

    images: Tensor  # uint8 [n, C, H, W]
    labels: Tensor  # int64 [n]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Dataset:
    name: str
    label: str  # display name in tables and plots
    class_names: list[str]
    train: Split
    test: Split
    mean: list[float]  # of each channel of the training images, in units of [0, 1]
    std: list[float]
    flip: bool  # whether a mirrored image is of the same class
    img_size: tuple[int, int]  # (h, w) of the batches
    device: torch.device  # of the batches
    streams: bool = False  # whether batches are fetched ahead, from images that are not on the device
    checksum: str = ""  # of all images and labels
    files: dict | None = None  # of an image folder: number, and a hash of names and sizes
    notes: dict = field(default_factory=dict)  # what was not as usual, for config.json

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def describe(self) -> dict:
        """What identifies the data, for config.json and checkpoints."""
        return {
            "name": self.name,
            "label": self.label,
            "num_train": len(self.train),
            "num_test": len(self.test),
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "image_shape": list(self.train.images.shape[1:]),
            "mean": self.mean,
            "std": self.std,
            "checksum": self.checksum,
            "files": self.files,
            **self.notes,
        }


def load_dataset(
    name: str,
    data_dir: str,
    img_size: tuple[int, int],
    device: torch.device,
    limit_bytes: float | None = None,
    **options,
) -> Dataset:
    """Read a dataset of sources.DATASETS; batches will be of `img_size` = (h, w) on `device`.

    Images of more than `limit_bytes` (by default half of a GPU's free memory) stay on the CPU, and their batches are
    streamed. `options` are the source's own. Raises UserError, with the remedy, if the data cannot be read.
    """
    source = sources.DATASETS[name]
    loaded = source.load(Path(data_dir), img_size, **options)
    mean, std = channel_statistics(loaded.train[0])
    num_bytes = sum(images.nbytes for images, _ in (loaded.train, loaded.test))
    streams = num_bytes > (_bytes_for_data(device) if limit_bytes is None else limit_bytes)
    storage = torch.device("cpu") if streams else device
    splits = [Split(images.to(storage), labels.to(storage)) for images, labels in (loaded.train, loaded.test)]
    about, crc = (name, loaded.label, loaded.class_names), checksum(loaded)
    return Dataset(*about, *splits, mean, std, source.flip, img_size, device, streams, crc, loaded.files, loaded.notes)


def checksum(loaded: sources.Images) -> str:
    """CRC-32 of all images and labels, in hexadecimal."""
    value = 0
    for tensor in (*loaded.train, *loaded.test):
        value = zlib.crc32(tensor.contiguous().numpy(), value)
    return f"{value:08x}"


def _bytes_for_data(device: torch.device) -> float:
    """Up to half of the free memory of a GPU; what the CPU has loaded already fits there."""
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else float("inf")


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel of uint8 images [n, C, H, W], in units of [0, 1]; from exact counts."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = share @ values
        means.append(mean.item())
        stds.append(max((share @ (values - mean).square()).sqrt().item(), 1 / 255))  # a constant channel stays finite
    return means, stds


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; the flags of main.py of the same names."""

    crop: bool = True
    flip: bool = True  # where the dataset allows it
    policy: str = "none"  # of augment.POLICIES
    random_erasing: float = 0.0  # probability
    mix: float = 0.0  # share of the batches that are mixed
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Batches an epoch; the last one may be smaller."""
    return -(-num_images // batch_size)


def train_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epoch: int,
    augmentation: Augmentation | None = None,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images float32 [b, C, h, w] and labels, each training image once, shuffled and augmented.

    Labels are int64 [b], or float32 [b, classes] in a batch that was mixed. `batch_size` is that of all ranks
    together, of which each takes its part (`rank_part`); a rank without a part gets one image that is not its own.
    """
    draws = EpochDraws(dataset, augmentation or Augmentation(), batch_size, seed, epoch)
    num_steps = steps_per_epoch(draws.num_images, batch_size)
    steps = [draws.positions_of(step, rank, world_size) for step in range(num_steps)]

    # Wherever the epoch goes on, the groups of batches that are augmented together are the same.
    at_once = batches_at_once(dataset.train.images, batch_size // world_size)
    first = start_step - start_step % at_once
    groups = [steps[start : start + at_once] for start in range(first, num_steps, at_once)]

    fetched = fetch(dataset.train, (draws.order[torch.cat(group)] for group in groups), dataset)
    step = first
    for group, (images, labels) in zip(groups, fetched, strict=True):
        images, sizes = draws.augment(images, torch.cat(group)), [len(positions) for positions in group]
        for positions, x, y in zip(group, images.split(sizes), labels.split(sizes), strict=True):
            if step >= start_step:
                yield draws.finish(x, y, positions, step)
            step += 1


def batches_at_once(images: Tensor, batch_size: int) -> int:
    """How many batches are fetched and augmented together: of small images a batch costs little more than its start."""
    return max(1, BYTES_AT_ONCE // (max(1, batch_size) * images[0].nbytes))


def eval_batches(dataset: Dataset, split: Split, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator:
    """Batches of (images float32 [b, C, h, w], labels int64 [b]) in order, as they are; a rank's are every n-th."""
    starts = range(rank * batch_size, len(split), world_size * batch_size)
    indices = (torch.arange(start, min(start + batch_size, len(split))) for start in starts)
    for images, labels in fetch(split, indices, dataset):
        yield resize(normalize(images, dataset.mean, dataset.std), dataset.img_size), labels


def rank_part(num_images: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, last + 1) of the images of a batch that a rank takes: as even as can be, none if there are too few."""
    return rank * num_images // world_size, (rank + 1) * num_images // world_size


def fetch(split: Split, indices: Iterable[Tensor], dataset: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    """(images uint8 [b, C, H, W], labels [b]) on the device for each of `indices`, int64 [b] on the CPU.

    Images that are not on the device are gathered ahead of their use, in a thread, into pinned memory.
    """
    if not dataset.streams:
        for index in indices:
            index = hardware.to_device(index, dataset.device)
            yield split.images.index_select(0, index), split.labels[index]  # images[index] goes byte by byte
        return

    def gather(index: Tensor) -> tuple[Tensor, Tensor]:
        parts = split.images.index_select(0, index), split.labels[index]
        return tuple(hardware.pinned(part, dataset.device) for part in parts)

    indices = iter(indices)
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(gather, index) for index in islice(indices, FETCHES_AHEAD))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(thread.submit(gather, index) for index in islice(indices, 1))
            yield tuple(part.to(dataset.device, non_blocking=True) for part in batch)


class EpochDraws:
    """Everything random about an epoch's batches, on the CPU: the order, and for each position in it the rest."""

    def __init__(self, dataset: Dataset, augmentation: Augmentation, batch_size: int, seed: int, epoch: int):
        self.num_images, self.batch_size = len(dataset.train), batch_size
        self.seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(self.seed)
        n, size, a = self.num_images, tuple(dataset.train.images.shape[-2:]), augmentation
        self.order = torch.randperm(n, generator=generator)
        self.padding = crop_padding(dataset.train.images)
        offsets = torch.randint(2 * self.padding + 1, (n, 2), generator=generator)
        self.offsets = offsets if a.crop else torch.full_like(offsets, self.padding)
        mirrored = torch.rand(n, generator=generator) < 0.5
        self.mirrored = mirrored if a.flip and dataset.flip else torch.zeros_like(mirrored)
        self.policy = augment.draw_policy(a.policy, n, size, generator)
        self.boxes = augment.draw_erasing(a.random_erasing, n, size, generator)
        self.alphas = {"mixup": a.mixup_alpha, "cutmix": a.cutmix_alpha}
        self.kinds = mixing.draw_kinds(a.mix, self.alphas, steps_per_epoch(n, batch_size), generator)
        self.erases, self.dataset = a.random_erasing > 0, dataset

    def positions_of(self, step: int, rank: int, world_size: int) -> Tensor:
        """Where in the epoch a rank's images of a batch are; those of a mixed batch with the partner of the first."""
        first = step * self.batch_size
        size = min(self.batch_size, self.num_images - first)
        start, stop = rank_part(size, rank, world_size)
        positions = torch.arange(start, max(stop, start + 1))
        if self.kinds[step] is not None:
            positions = torch.cat([positions[:1] - 1, positions])
        return first + positions % size

    def augment(self, images: Tensor, positions: Tensor) -> Tensor:
        """Images as stored, uint8 [b, C, H, W], of any batches -> the same, cropped, mirrored, and by the policy."""
        offsets, mirrored = (hardware.to_device(x[positions], images.device) for x in (self.offsets, self.mirrored))
        images = crop_and_flip(images, offsets, mirrored, self.padding)
        return augment.apply_policy(images, self.policy.at(positions))

    def finish(self, images: Tensor, labels: Tensor, positions: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A batch, uint8 [b, C, H, W], at `positions_of(step)` -> float32 [b, C, h, w], erased, mixed; and labels."""
        dataset, kind = self.dataset, self.kinds[step]
        images = normalize(images, dataset.mean, dataset.std)
        if self.erases:
            images = augment.erase(images, self.boxes[positions])
        if kind is not None:
            seed = self.seed + step
            images, labels = mixing.mix(kind, self.alphas[kind], images, labels, dataset.num_classes, seed)
        return resize(images, dataset.img_size), labels


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def crop_padding(images: Tensor) -> int:
    """Pixels of padding around an image before it is cropped: an eighth of its shorter side, 4 of 32."""
    return round(min(images.shape[-2:]) / 8)


def crop_and_flip(images: Tensor, offsets: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Pad images [b, C, H, W] with black, cut each out at its offset [b, 2] in [0, 2 * padding], mirror the `mirrored`.

    One gather for all images, channels and pixels.
    """
    b, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)  # [b, H]
    columns = torch.arange(width, device=images.device)
    columns = offsets[:, 1:] + torch.where(mirrored[:, None], width - 1 - columns, columns)  # [b, W]
    pixels = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]  # [b, H, W]
    pixels = pixels.view(b, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view_as(images)


def normalize(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 [b, C, H, W] -> float32 of zero mean and unit variance."""
    mean, std = (hardware.to_device(torch.tensor(values).view(-1, 1, 1), images.device) for values in (mean, std))
    return images.float().sub_(255 * mean).div_(255 * std)


def resize(images: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Float [b, C, H, W] -> [b, C, h, w], bilinear, antialiased to shrink. The last thing done: most images grow."""
    if images.shape[-2:] == img_size:
        return images
    height, width = images.shape[-2:]
    if img_size[0] % height == 0 and img_size[1] % width == 0:
        return enlarge(enlarge(images, img_size[1] // width, dim=3), img_size[0] // height, dim=2)
    shrinks = height > img_size[0] or width > img_size[1]
    return F.interpolate(images, img_size, mode="bilinear", antialias=shrinks)


def enlarge(x: Tensor, factor: int, dim: int) -> Tensor:
    """Linear interpolation by a whole factor along one dimension, as F.interpolate has it but three times as fast.

    All pixels between the same two neighbors are one broadcast operation; the border is repeated outwards.
    """
    size = x.shape[dim]
    x = torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, size - 1, 1)], dim).unsqueeze(dim + 1)
    phases = torch.arange(factor, device=x.device, dtype=x.dtype) / factor + (0 if factor % 2 else 0.5 / factor)
    phases = phases.view(-1, *[1] * (x.ndim - dim - 2))
    between = torch.lerp(x.narrow(dim, 0, size + 1), x.narrow(dim, 1, size + 1), phases)  # [..., size + 1, factor, ...]
    return between.flatten(dim, dim + 1).narrow(dim, (factor + 1) // 2, size * factor)
