"""Which data a run used, and where its folder is. Imports no torch.

The images of a folder are identified by their files' names and sizes alone, without reading them.
Other datasets don't need this: torchvision checks what it downloads, and the digits come with
scikit-learn.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import utils
from pipeline import imagefiles
from pipeline.layout import DEFAULT, Layout, name_in
from utils import UsageError, UserError

# A value of --dataset. Runs on any image folder used to share one output folder of this name.
IMAGE_FOLDER = "imagefolder"
DATA_DIR = "data"  # the default of --data_dir
NAMES_SHOWN = 5


def describe(dataset: str, data_dir: str, layout: Layout = DEFAULT) -> dict | None:
    """`label`, `class_names` and `files` of an image folder; None for a dataset known by its name.

    No image is read. `files` is the `fingerprint` of the folder, which does not change when the
    folder is moved. Raises UserError if the folder cannot be read.
    """
    if dataset != IMAGE_FOLDER:
        return None

    root = Path(data_dir)
    found = layout.list_images(root)
    return {
        "label": imagefiles.read_label(root),
        "class_names": found.class_names,
        "files": fingerprint(root, found),
    }


def fingerprint(root: Path, found: imagefiles.ImageFiles) -> dict:
    """The number of images in each split, and a hash of their names and sizes.

    Where the names do not say which split and class an image belongs to, the hash is of these too.
    """
    counts = {split: len(images) for split, images in found.splits.items()}
    files = []
    for split, images in found.splits.items():
        for path, label in images:
            place = f"{split}/{found.class_names[label]}" if found.is_assigned else None
            files.append((name_in(root, path), _size(path), place))

    digest = hashlib.sha256()
    for name, size, place in sorted(files):
        digest.update(os.fsencode(name) + b"\0%d\0" % size)
        if place is not None:
            digest.update(os.fsencode(place) + b"\0")
    return {**counts, "hash": digest.hexdigest()[:16]}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # The file is gone since it was listed; reading the images will report it.
        return 0


def is_known(found: dict) -> bool:
    """Whether the `data` of a run's config.json has the hash.

    Runs of earlier versions do not: only reading all images tells whether they used the same data.
    """
    return isinstance(found.get("files"), dict)


def differences(found: dict, data: dict) -> list[str]:
    """How the `data` of a run's config.json differs from `data` as `describe` returns it.

    The list is empty if they are the same, as far as can be told. The label does not count: it is
    only a display name.
    """
    differing = []

    classes_there = found.get("class_names")
    if not isinstance(classes_there, list):
        classes_there = []
    classes_there = [str(name) for name in classes_there]
    if classes_there != data["class_names"]:
        only_there = sorted(set(classes_there) - set(data["class_names"]))
        only_here = sorted(set(data["class_names"]) - set(classes_there))
        there = imagefiles.some_of(only_there, NAMES_SHOWN) or "none"
        here = imagefiles.some_of(only_here, NAMES_SHOWN) or "none"
        differing.append(f"classes {there} only there, {here} only here")

    files = {"train": found.get("num_train"), "test": found.get("num_test")}
    if is_known(found):
        files = found["files"]
    for split in ("train", "test"):
        if files.get(split) != data["files"][split]:
            differing.append(
                f"{files.get(split)} {split} images there, {data['files'][split]} here"
            )

    if not differing and is_known(found) and files.get("hash") != data["files"]["hash"]:
        differing.append("the same number of images, but other names or sizes, or other labels")
    return differing


def refuse_other(folder: Path, what: str, differing: list[str], hint: str = "") -> None:
    """Raise UsageError if the folder's run has other `what` (settings, data) than asked for."""
    if differing:
        raise UsageError(
            f"{folder} holds a run with other {what}: {'; '.join(differing)}. Choose another "
            f"--dataset_name, --run_name or --output_dir, or remove the folder{hint}"
        )


# --------------------------------------------------------------------------------------------------
# Where the folder of a run is


def default_dataset_name(dataset: str, data_dir: str) -> str:
    """The folder for a dataset's runs: the dataset's name or, for an image folder, the folder's."""
    if dataset != IMAGE_FOLDER:
        return dataset
    return Path(data_dir).resolve().name or dataset


def find_run_folder(
    output_dir: str,
    dataset: str,
    data_dir: str,
    dataset_name: str | None,
    run_name: str,
    seed: int,
    data: dict | None,
) -> Path:
    """The folder of a run, whether it exists or not; `data` as `describe` returns it.

    Without a --dataset_name, a run stays where earlier versions put it, in the folder that the runs
    on all image folders shared.
    """
    if dataset_name is None and data is not None:
        shared = utils.run_folder(output_dir, IMAGE_FOLDER, run_name, seed)
        if _holds_run_of(shared, data):
            return shared

    dataset_name = dataset_name or default_dataset_name(dataset, data_dir)
    return utils.run_folder(output_dir, dataset_name, run_name, seed)


def _holds_run_of(folder: Path, data: dict) -> bool:
    if not (folder / utils.CONFIG).exists():
        return False
    try:
        found = utils.read_json(folder / utils.CONFIG).get("data")
    except UserError:  # Resuming the run will report it.
        return True

    if not isinstance(found, dict) or differences(found, data):
        return False
    return is_known(found) or found.get("label") == data["label"]
