"""Datasets as one uint8 tensor on the device, and the batches made from it.

Nothing loops over images in Python: whole batches are cropped, flipped, augmented, mixed and
resized on the device. All random draws of an epoch are a pure function of (seed, epoch), made up
front on the CPU. So an exact resume needs no stored state, each rank of a parallel run takes its
share of the same draws, and nothing waits for the device.

Shapes: n images in the split, b in the batch, C channels, H x W pixels as stored, h x w pixels as
the model expects them.
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
from torch import Tensor

from pipeline import augment, holdout, mixing, pixels, sources
from runtime import hardware

BYTES_AT_ONCE = 2**23  # Small batches are augmented together, up to this many bytes of images.
FETCHES_AHEAD = 3  # Batches gathered in advance when a dataset is streamed.


@dataclass
class Split:
    """Images and labels: both on the compute device or, if batches are streamed, on the CPU."""

    images: Tensor  # uint8 [n, C, H, W]
    labels: Tensor  # int64 [n]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(kw_only=True)
class Dataset:
    name: str
    label: str  # display name in tables and plots
    class_names: list[str]
    train: Split
    test: Split
    held_out: Split | None = None  # a part of the training images that is not in `train`

    # Mean and standard deviation of each channel of the images in `train`, in units of [0, 1].
    mean: list[float]
    std: list[float]

    flip: bool  # whether a mirrored image still belongs to its class
    img_size: tuple[int, int]  # (h, w) of the batches
    device: torch.device  # where batches end up
    streams: bool = False  # images stay on the CPU, and batches are fetched ahead of their use

    checksum: str = ""  # of all images and labels
    files: dict | None = None  # image folders only: number of images, hash of names and sizes
    notes: dict = field(default_factory=dict)  # anything unusual, for config.json

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def evaluated(self) -> Split:
        """What a training is evaluated on: the images held out, or without any, the test images."""
        return self.test if self.held_out is None else self.held_out

    def describe(self) -> dict:
        """What identifies the data, for config.json and checkpoints."""
        return {
            "name": self.name,
            "label": self.label,
            "num_train": len(self.train),
            "num_test": len(self.test),
            **({} if self.held_out is None else {"num_held_out": len(self.held_out)}),
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
    held_out: float = 0.0,
    **options,
) -> Dataset:
    """Read one of sources.DATASETS; its batches will have `img_size` = (h, w) and be on `device`.

    If the images exceed `limit_bytes` (default: half of the GPU's free memory), they stay on the
    CPU and their batches are streamed. `held_out` is the fraction of the training images to leave
    out of `train`, see `holdout.split`. `options` are passed on to the source. Raises UserError,
    with what to do about it, if the data cannot be read.
    """
    source = sources.DATASETS[name]
    loaded = source.load(Path(data_dir), img_size, **options)
    train_images, train_labels = loaded.train
    test_images, test_labels = loaded.test

    if limit_bytes is None:
        limit_bytes = _bytes_for_data(device)
    streams = train_images.nbytes + test_images.nbytes > limit_bytes
    storage = torch.device("cpu") if streams else device

    apart = None
    if held_out:
        kept, others = holdout.split(train_labels, loaded.class_names, held_out)
        apart = Split(train_images[others].to(storage), train_labels[others].to(storage))
        train_images, train_labels = train_images[kept], train_labels[kept]

    mean, std = channel_statistics(train_images)
    return Dataset(
        name=name,
        label=loaded.label,
        class_names=loaded.class_names,
        train=Split(train_images.to(storage), train_labels.to(storage)),
        test=Split(test_images.to(storage), test_labels.to(storage)),
        held_out=apart,
        mean=mean,
        std=std,
        flip=source.flip,
        img_size=img_size,
        device=device,
        streams=streams,
        checksum=checksum(loaded),
        files=loaded.files,
        notes=loaded.notes,
    )


def checksum(loaded: sources.Images) -> str:
    """CRC-32 of all images and labels, in hexadecimal."""
    value = 0
    for tensor in (*loaded.train, *loaded.test):
        value = zlib.crc32(tensor.contiguous().numpy(), value)
    return f"{value:08x}"


def _bytes_for_data(device: torch.device) -> float:
    """Half of a GPU's free memory; no limit on the CPU, where the images already are."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free / 2


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of uint8 images [n, C, H, W], in units of [0, 1].

    They come from histograms, so they are exact for any number of images.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = share @ values
        std = (share @ (values - mean).square()).sqrt()

        means.append(mean.item())
        stds.append(max(std.item(), 1 / 255))  # A constant channel would be divided by 0.
    return means, stds


# --------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images. The fields are the flags of main.py with the same names."""

    crop: bool = True
    flip: bool = True  # only if the dataset allows it
    policy: str = "none"  # one of augment.POLICIES
    random_erasing: float = 0.0  # probability per image
    mix: float = 0.0  # share of the batches that are mixed
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Batches per epoch; the last one may be smaller."""
    return -(-num_images // batch_size)


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augmentation: Augmentation | None = None,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 [b, C, h, w], labels): every training image once, shuffled, augmented.

    Labels are int64 [b], or float32 [b, classes] in a mixed batch. `batch_size` counts the images
    of all ranks, of which each rank gets its part (`rank_part`). A rank whose part is empty gets
    one image of another rank, so that it has something to compute.
    """
    augmentation = augmentation or Augmentation()
    draws = EpochDraws(dataset, augmentation, batch_size, seed, epoch)
    num_steps = steps_per_epoch(len(dataset.train), batch_size)
    steps = [draws.positions_of(step, rank, world_size) for step in range(num_steps)]

    # Resume at the start of a group, so that the groups are the same as without an interruption.
    at_once = batches_at_once(dataset.train.images, batch_size // world_size)
    first = start_step - start_step % at_once
    groups = [steps[start : start + at_once] for start in range(first, num_steps, at_once)]

    indices = (draws.order[torch.cat(group)] for group in groups)
    fetched = fetch(dataset.train, indices, dataset)
    step = first
    for group, (images, labels) in zip(groups, fetched, strict=True):
        images = draws.augment(images, torch.cat(group))

        sizes = [len(positions) for positions in group]
        batches = zip(group, images.split(sizes), labels.split(sizes), strict=True)
        for positions, batch_images, batch_labels in batches:
            if step >= start_step:
                yield draws.finish(batch_images, batch_labels, positions, step)
            step += 1


def batches_at_once(images: Tensor, batch_size: int) -> int:
    """How many batches to fetch and augment together.

    A batch of small images takes the GPU little longer than launching the work does.
    """
    batch_bytes = max(1, batch_size) * images[0].nbytes
    return max(1, BYTES_AT_ONCE // batch_bytes)


def eval_batches(
    dataset: Dataset, split: Split, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 [b, C, h, w], labels int64 [b]) in order, without augmentation.

    The ranks take turns: each gets every `world_size`-th batch.
    """
    starts = range(rank * batch_size, len(split), world_size * batch_size)
    indices = (torch.arange(start, min(start + batch_size, len(split))) for start in starts)
    for images, labels in fetch(split, indices, dataset):
        yield (
            pixels.resize(pixels.normalize(images, dataset.mean, dataset.std), dataset.img_size),
            labels,
        )


def rank_part(num_images: int, rank: int, world_size: int) -> tuple[int, int]:
    """The part [start, stop) of a batch that a rank takes: as even as possible, maybe empty."""
    return rank * num_images // world_size, (rank + 1) * num_images // world_size


def fetch(
    split: Split, indices: Iterable[Tensor], dataset: Dataset
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images uint8 [b, C, H, W], labels [b]) on the device, for each int64 [b] in `indices`.

    The indices are on the CPU. If the images are too, a thread gathers them ahead of their use.
    """
    if dataset.streams:
        yield from _fetch_ahead(split, indices, dataset.device)
        return

    for index in indices:
        index = hardware.to_device(index, dataset.device)
        # index_select, because images[index] copies uint8 one byte at a time.
        yield split.images.index_select(0, index), split.labels[index]


def _fetch_ahead(
    split: Split, indices: Iterable[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `fetch`, from images on the CPU: gathered in a thread, into pinned memory."""

    def gather(index: Tensor) -> tuple[Tensor, Tensor]:
        images = split.images.index_select(0, index)
        labels = split.labels[index]
        return hardware.pinned(images, device), hardware.pinned(labels, device)

    indices = iter(indices)
    with ThreadPoolExecutor(1) as thread:
        queue = deque(thread.submit(gather, index) for index in islice(indices, FETCHES_AHEAD))
        while queue:
            images, labels = queue.popleft().result()
            queue.extend(thread.submit(gather, index) for index in islice(indices, 1))
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class EpochDraws:
    """Everything random about the batches of an epoch, on the CPU.

    That is the order of the images, and what happens to the image at each position in this order.
    """

    def __init__(
        self, dataset: Dataset, augmentation: Augmentation, batch_size: int, seed: int, epoch: int
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_images = len(dataset.train)
        self.seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])

        # Crops and flips are drawn even if they are off, so that the other draws stay the same.
        generator = torch.Generator().manual_seed(self.seed)
        n = self.num_images
        image_size = tuple(dataset.train.images.shape[-2:])
        self.order = torch.randperm(n, generator=generator)

        self.padding = pixels.crop_padding(dataset.train.images)
        self.offsets = torch.randint(2 * self.padding + 1, (n, 2), generator=generator)
        if not augmentation.crop:
            self.offsets = torch.full_like(self.offsets, self.padding)

        self.mirrored = torch.rand(n, generator=generator) < 0.5
        if not (augmentation.flip and dataset.flip):
            self.mirrored = torch.zeros_like(self.mirrored)

        self.policy = augment.draw_policy(augmentation.policy, n, image_size, generator)

        self.erases = augmentation.random_erasing > 0
        self.boxes = augment.draw_erasing(augmentation.random_erasing, n, image_size, generator)

        self.alphas = {"mixup": augmentation.mixup_alpha, "cutmix": augmentation.cutmix_alpha}
        num_steps = steps_per_epoch(n, batch_size)
        self.kinds = mixing.draw_kinds(augmentation.mix, self.alphas, num_steps, generator)

    def positions_of(self, step: int, rank: int, world_size: int) -> Tensor:
        """int64 [b]: where in the epoch's order a rank's images of a batch are.

        In a mixed batch one more comes first: the image that the rank's first one is mixed with.
        """
        first = step * self.batch_size
        size = min(self.batch_size, self.num_images - first)
        start, stop = rank_part(size, rank, world_size)

        positions = torch.arange(start, max(stop, start + 1))
        if self.kinds[step] is not None:
            positions = torch.cat([positions[:1] - 1, positions])
        return first + positions % size

    def augment(self, images: Tensor, positions: Tensor) -> Tensor:
        """Crop, mirror and apply the policy to stored images uint8 [b, C, H, W] of any batches."""
        offsets = hardware.to_device(self.offsets[positions], images.device)
        mirrored = hardware.to_device(self.mirrored[positions], images.device)
        images = pixels.crop_and_flip(images, offsets, mirrored, self.padding)
        return augment.apply_policy(images, self.policy.at(positions))

    def finish(
        self, images: Tensor, labels: Tensor, positions: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Normalize, erase, mix and resize a batch: uint8 [b, C, H, W] -> float32 [b, C, h, w].

        `positions` come from `positions_of(step)`. The labels are returned, mixed in the same way.
        """
        images = pixels.normalize(images, self.dataset.mean, self.dataset.std)
        if self.erases:
            images = augment.erase(images, self.boxes[positions])

        kind = self.kinds[step]
        if kind is not None:
            alpha, seed = self.alphas[kind], self.seed + step
            num_classes = self.dataset.num_classes
            images, labels = mixing.mix(kind, alpha, images, labels, num_classes, seed)
        return pixels.resize(images, self.dataset.img_size), labels
