"""Datasets as one uint8 tensor on the device, and batches made from them there: crop, flip, resize, normalize.

Nothing is done image by image in Python, and there are no worker processes. All random draws of an epoch are a pure
function of (seed, epoch): an exact resume needs no stored state.

Shapes: n images of the split, b of the batch, C channels, H x W pixels as stored, h x w pixels as the model wants.
A dataset of your own: a function that returns `Images` for both splits, and an entry in DATASETS.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

import imagefolder
from utils import UserError


@dataclass
class Images:
    """What a loader returns for both splits: uint8 images [n, C, H, W] and int64 labels [n], on the CPU."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    class_names: list[str]
    label: str  # how the data is called where results are shown


@dataclass
class Split:
    """Images and labels on the compute device where they fit, else on the CPU."""

    images: Tensor  # uint8 [n, C, H, W]
    labels: Tensor  # int64 [n]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Dataset:
    name: str
    label: str
    class_names: list[str]
    train: Split
    test: Split
    mean: list[float]  # of each channel of the training images, in units of [0, 1]
    std: list[float]
    flip: bool  # whether a mirrored image is of the same class
    img_size: tuple[int, int]  # (h, w) of the batches
    device: torch.device  # of the batches

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def describe(self) -> dict:
        """What identifies the data, for config.json and checkpoints; the exact mean and std tell contents apart."""
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
        }


def load_dataset(name: str, data_dir: str, img_size: tuple[int, int], device: torch.device) -> Dataset:
    """Read a dataset of DATASETS; batches will be of `img_size` = (h, w) on `device`.

    Raises UserError, with the remedy, if the data cannot be read.
    """
    source = DATASETS[name]
    loaded = source.load(Path(data_dir), img_size)
    mean, std = channel_statistics(loaded.train[0])
    num_bytes = sum(images.nbytes for images, _ in (loaded.train, loaded.test))
    storage = device if num_bytes < _bytes_for_data(device) else torch.device("cpu")
    splits = [Split(images.to(storage), labels.to(storage)) for images, labels in (loaded.train, loaded.test)]
    return Dataset(name, loaded.label, loaded.class_names, *splits, mean, std, source.flip, img_size, device)


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


def num_steps(num_images: int, batch_size: int) -> int:
    """Batches an epoch; the last one may be smaller."""
    return -(-num_images // batch_size)


def train_batches(dataset: Dataset, batch_size: int, seed: int, epoch: int, start_step: int = 0) -> Iterator:
    """Batches of (images float32 [b, C, h, w], labels int64 [b]): each training image once, augmented, shuffled."""
    split, num_images = dataset.train, len(dataset.train)
    padding = crop_padding(split.images)
    # Drawn on the CPU, the same for every device, and whole, so that any step can be the first.
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    order = torch.randperm(num_images, generator=generator).to(split.images.device)
    offsets = torch.randint(2 * padding + 1, (num_images, 2), generator=generator).to(split.images.device)
    mirrored = (torch.rand(num_images, generator=generator) < 0.5).to(split.images.device)
    for start in range(start_step * batch_size, num_images, batch_size):
        here = slice(start, start + batch_size)
        images = crop_with_padding(split.images[order[here]], offsets[here], padding)
        if dataset.flip:
            images = flip_horizontally(images, mirrored[here])
        yield _finish(dataset, images, split.labels[order[here]])


def eval_batches(dataset: Dataset, split: Split, batch_size: int) -> Iterator:
    """Batches of (images float32 [b, C, h, w], labels int64 [b]) in order, as they are."""
    for start in range(0, len(split), batch_size):
        here = slice(start, start + batch_size)
        yield _finish(dataset, split.images[here], split.labels[here])


def _finish(dataset: Dataset, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if images.device.type == "cpu" and dataset.device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    images = images.to(dataset.device, non_blocking=True)
    images = normalize_and_resize(images, dataset.mean, dataset.std, dataset.img_size)
    return images, labels.to(dataset.device, non_blocking=True)


def crop_padding(images: Tensor) -> int:
    """Pixels of padding around an image before it is cropped: an eighth of its shorter side, 4 of 32."""
    return round(min(images.shape[-2:]) / 8)


def crop_with_padding(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Pad images [b, C, H, W] with black, and cut each [C, H, W] out at its own offset [b, 2] in [0, 2 * padding]."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view, [b, C, 2p + 1, 2p + 1, H, W]
    return windows[torch.arange(len(images), device=images.device), :, offsets[:, 0], offsets[:, 1]]


def flip_horizontally(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror those of the images [b, C, H, W] that `mirrored`, bool [b], names."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def normalize_and_resize(images: Tensor, mean: list[float], std: list[float], img_size: tuple[int, int]) -> Tensor:
    """uint8 [b, C, H, W] -> float32 [b, C, h, w], of zero mean and unit variance; bilinear, antialiased to shrink."""
    mean = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(std, device=images.device).view(-1, 1, 1)
    images = (images - 255 * mean) / (255 * std)  # before the resize, which is linear: most images grow
    if images.shape[-2:] == img_size:
        return images
    shrinks = images.shape[-2] > img_size[0] or images.shape[-1] > img_size[1]
    return F.interpolate(images, img_size, mode="bilinear", antialias=shrinks)


# ---------------------------------------------------------------------------------------------------------------------
# Loaders: (data_dir, img_size) -> Images


def load_sklearn_digits(data_dir: Path, img_size: tuple[int, int]) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, in a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits  # deferred: takes seconds to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]  # [n, 1, 8, 8], from 0..16
    parts = train_test_split(pixels, digits.target, test_size=360, stratify=digits.target, random_state=0)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    names = [str(name) for name in digits.target_names]
    return Images((train_images, train_labels), (test_images, test_labels), names, "digits (scikit-learn)")


def load_torchvision(class_name: str, label: str) -> Callable[[Path, tuple[int, int]], Images]:
    """A loader of one of torchvision's datasets, downloaded and checksummed on first use."""

    def load(data_dir: Path, img_size: tuple[int, int]) -> Images:
        import torchvision  # deferred: takes seconds to import

        kind = getattr(torchvision.datasets, class_name)
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            # The runs of a sweep start together: one downloads, the others wait. A read-only folder is only read.
            writable = os.access(data_dir, os.W_OK)
            with FileLock(data_dir / f".{class_name}.lock") if writable else contextlib.nullcontext(), quiet:
                splits = [kind(str(data_dir), train=train, download=True) for train in (True, False)]
        except Exception as error:  # no network, a bad checksum, a damaged archive: torchvision raises anything
            reason = str(error) or type(error).__name__
            where = getattr(kind, "url", None) or getattr(kind, "mirrors", ["its authors"])[0]
            raise UserError(
                f"cannot load {label} from {data_dir.resolve()}: {reason}. With a network it is "
                f"downloaded there on first use; without, get it from {where} and put it there; if a file there is "
                "damaged, remove it. --dataset digits needs no download"
            ) from error
        train, test = ((_as_channels_first(split.data), torch.as_tensor(split.targets)) for split in splits)
        return Images(train, test, list(splits[0].classes), label)

    return load


def _as_channels_first(pixels: np.ndarray | Tensor) -> Tensor:
    """[n, H, W] or [n, H, W, C] -> [n, C, H, W]."""
    pixels = torch.as_tensor(pixels)
    return pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def load_imagefolder(data_dir: Path, img_size: tuple[int, int]) -> Images:
    return Images(*imagefolder.read(data_dir, img_size))


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from, and what is known of it before it is read."""

    load: Callable[[Path, tuple[int, int]], Images]
    in_channels: int
    num_classes: int | None  # None: as many as there are folders
    flip: bool


DATASETS = {
    "cifar10": Source(load_torchvision("CIFAR10", "CIFAR-10"), 3, 10, flip=True),
    "cifar100": Source(load_torchvision("CIFAR100", "CIFAR-100"), 3, 100, flip=True),
    "fashion_mnist": Source(load_torchvision("FashionMNIST", "Fashion-MNIST"), 1, 10, flip=True),
    "imagefolder": Source(load_imagefolder, 3, None, flip=True),
    "digits": Source(load_sklearn_digits, 1, 10, flip=False),
}


def channels_and_classes(name: str, data_dir: str) -> tuple[int, int]:
    """(in_channels, num_classes) of a dataset, without reading or downloading its images."""
    source = DATASETS[name]
    return source.in_channels, source.num_classes or len(imagefolder.find_classes(Path(data_dir), "train"))
