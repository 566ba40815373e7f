"""Where the images come from: scikit-learn's digits, torchvision's downloads, a folder of your own.

A dataset of your own: a function (data_dir, img_size) -> `Images`, and an entry in DATASETS.

Shapes: n images of a split, C channels, H x W pixels as stored; img_size = (h, w) as the model wants them.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import imagefiles, imagefolder
from runtime import locks
from utils import UserError


@dataclass
class Images:
    """What a loader returns for both splits: uint8 images [n, C, H, W] and int64 labels [n], on the CPU."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    class_names: list[str]
    label: str  # display name in tables and plots
    files: dict | None = None  # of an image folder, as identity.describe has it
    notes: dict = field(default_factory=dict)  # for config.json: what was not as usual


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
            lock = data_dir / f".{class_name}.lock"
            risk = "runs that start together may each download the data"
            with locks.acquire_if_possible(lock, risk) if writable else contextlib.nullcontext(), quiet:
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


def load_imagefolder(data_dir: Path, img_size: tuple[int, int], skip_unreadable: bool = False) -> Images:
    return Images(**vars(imagefolder.read(data_dir, img_size, skip_unreadable)))


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
    return source.in_channels, source.num_classes or len(imagefiles.find_classes(Path(data_dir), "train"))
