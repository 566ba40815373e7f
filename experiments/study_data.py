"""Make the two image folders of the study that are parts of larger ones.

    python experiments/study_data.py   # data/cifar10-jpeg-5000 and data/tiny-imagenet-20

The first is made of data/cifar10-jpeg, the second of data/tiny-imagenet-200 as it is distributed;
whichever of the two is there. What exists already is left as it is.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

# The repository, wherever this is called from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils

CIFAR, PIXELS = "cifar10-jpeg", "cifar10-jpeg-5000"
TINY, TINY_20 = "tiny-imagenet-200", "tiny-imagenet-20"
IMAGES_PER_CLASS = {"train": 500, "test": 200}  # of CIFAR, the first by name
EVERY = 10  # of the 200 classes, in the order of their WordNet ids

Copies = Iterable[tuple[Path, str]]  # (image, where it goes)


def cifar_images(source: Path) -> Copies:
    """The first images of each class, which are in random order."""
    for split, number in IMAGES_PER_CLASS.items():
        for folder in folders_in(source / split):
            for image in sorted(folder.iterdir())[:number]:
                yield image, f"{split}/{folder.name}/{image.name}"


def tiny_images(source: Path) -> Copies:
    """All training images of every tenth class; its validation images, as the test images."""
    words = dict(line.split("\t") for line in read_lines(source / "words.txt"))
    chosen = [folder.name for folder in folders_in(source / "train")][::EVERY]
    names = {wnid: words[wnid].split(",")[0].replace(" ", "_") for wnid in chosen}
    assert len(set(names.values())) == len(names), "two classes would become one"

    for wnid, name in names.items():
        for image in sorted((source / "train" / wnid / "images").iterdir()):
            yield image, f"train/{name}/{image.name}"

    for line in read_lines(source / "val" / "val_annotations.txt"):
        image, wnid, *_ = line.split("\t")
        if wnid in names:
            yield source / "val" / "images" / image, f"test/{names[wnid]}/{image}"


def folders_in(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir())


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def make(source: Path, folder: Path, copies: Copies, label: str) -> None:
    """Copy images into a new image folder, whole or not at all."""
    if folder.exists():
        print(f"{folder} exists already")
        return
    if not source.is_dir():
        print(f"{folder} is not made, as there is no {source}")
        return

    aside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    number = 0
    for image, place in copies:
        (aside / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, aside / place)
        number += 1
    utils.write_text(aside / "label.txt", f"{label}\n")
    os.rename(aside, folder)
    print(f"{folder}: {number:,} images")


def main(data: Path = utils.REPOSITORY / "data") -> None:
    make(
        data / CIFAR,
        data / PIXELS,
        cifar_images(data / CIFAR),
        "CIFAR-10 (JPEG q75 copy), 5,000 images to train and 2,000 to test",
    )
    make(
        data / TINY,
        data / TINY_20,
        tiny_images(data / TINY),
        "Tiny ImageNet, 20 of its 200 classes",
    )


if __name__ == "__main__":
    main()
