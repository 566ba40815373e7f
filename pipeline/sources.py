"""Where the images come from: scikit-learn's digits, torchvision's downloads, your own folder.

To add a dataset, write a function (data_dir, img_size) -> `Images` and add it to DATASETS.

Shapes: n images in a split, C channels, H x W pixels as stored; img_size = (h, w) as the model
expects them.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import imagefolder
from pipeline.layout import DEFAULT, Layout
from runtime import locks
from utils import UserError


@dataclass
class Images:
    """What a loader returns, on the CPU."""

    train: tuple[Tensor, Tensor]  # uint8 images [n, C, H, W], int64 labels [n]
    test: tuple[Tensor, Tensor]
    class_names: list[str]
    label: str  # display name in tables and plots
    files: dict | None = None  # image folders only, from identity.fingerprint
    notes: dict = field(default_factory=dict)  # anything unusual, for config.json


def load_sklearn_digits(data_dir: Path, img_size: tuple[int, int]) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels.

    The split into 1,437 for training and 360 for testing is stratified and always the same.
    """
    from sklearn.datasets import load_digits  # deferred: takes seconds to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # stored as 0..16
    parts = train_test_split(
        pixels[:, None],  # [n, 1, 8, 8]
        digits.target,
        test_size=360,
        stratify=digits.target,
        random_state=0,
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return Images(
        train=(train_images, train_labels),
        test=(test_images, test_labels),
        class_names=[str(name) for name in digits.target_names],
        label="digits (scikit-learn)",
    )


def load_torchvision(class_name: str, label: str) -> Callable[[Path, tuple[int, int]], Images]:
    """A loader for one of torchvision's datasets, downloaded and checksummed on first use."""

    def load(data_dir: Path, img_size: tuple[int, int]) -> Images:
        import torchvision  # deferred: takes seconds to import

        kind = getattr(torchvision.datasets, class_name)
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with _download_lock(data_dir, class_name), _no_progress_bars_in_logs():
                train = kind(str(data_dir), train=True, download=True)
                test = kind(str(data_dir), train=False, download=True)
        except Exception as error:  # torchvision may raise anything: no network, a damaged archive
            url = getattr(kind, "url", None) or getattr(kind, "mirrors", ["its authors"])[0]
            reason = str(error) or type(error).__name__
            raise UserError(
                f"cannot load {label} from {data_dir.resolve()}: {reason}. It is downloaded there "
                f"on first use; without a network, get it from {url} and put it there. If a file "
                "there is damaged, remove it. --dataset digits needs no download"
            ) from error

        return Images(
            train=(_as_channels_first(train.data), torch.as_tensor(train.targets)),
            test=(_as_channels_first(test.data), torch.as_tensor(test.targets)),
            class_names=list(train.classes),
            label=label,
        )

    return load


def _download_lock(data_dir: Path, class_name: str) -> AbstractContextManager:
    """Let one of several runs that start together download the data while the others wait."""
    if not os.access(data_dir, os.W_OK):
        return contextlib.nullcontext()  # A read-only folder can only be read.
    risk = "runs that start together may each download the data"
    return locks.acquire_if_possible(data_dir / f".{class_name}.lock", risk)


def _no_progress_bars_in_logs() -> AbstractContextManager:
    if sys.stderr.isatty():
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())


def _as_channels_first(pixels: np.ndarray | Tensor) -> Tensor:
    """[n, H, W] or [n, H, W, C] -> [n, C, H, W]."""
    pixels = torch.as_tensor(pixels)
    if pixels.ndim == 3:
        return pixels.unsqueeze(1)
    return pixels.permute(0, 3, 1, 2).contiguous()


def load_imagefolder(data_dir: Path, img_size: tuple[int, int], **options) -> Images:
    return Images(**vars(imagefolder.read(data_dir, img_size, **options)))


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from, and what is known about it before it is read."""

    load: Callable[[Path, tuple[int, int]], Images]
    in_channels: int
    num_classes: int | None  # None: one per class folder
    flip: bool  # whether a mirrored image still belongs to its class


DATASETS = {
    "cifar10": Source(load_torchvision("CIFAR10", "CIFAR-10"), 3, 10, flip=True),
    "cifar100": Source(load_torchvision("CIFAR100", "CIFAR-100"), 3, 100, flip=True),
    "fashion_mnist": Source(load_torchvision("FashionMNIST", "Fashion-MNIST"), 1, 10, flip=True),
    "imagefolder": Source(load_imagefolder, 3, None, flip=True),
    "digits": Source(load_sklearn_digits, 1, 10, flip=False),
}


def channels_and_classes(name: str, data_dir: str, layout: Layout = DEFAULT) -> tuple[int, int]:
    """(in_channels, num_classes) of a dataset, without reading or downloading its images."""
    source = DATASETS[name]
    num_classes = source.num_classes or len(layout.class_names(Path(data_dir)))
    return source.in_channels, num_classes
