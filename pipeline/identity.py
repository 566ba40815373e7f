"""Which data a run is of, told from the files' names and sizes alone, and where its folder lies. Imports no torch.

Only image folders need that: torchvision checks what it has downloaded, and the digits come with scikit-learn.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import utils
from pipeline import imagefiles
from utils import UsageError, UserError

IMAGE_FOLDER = "imagefolder"  # the --dataset; all runs of image folders once shared a folder of this name
DATA_DIR = "data"  # the default of --data_dir
NAMES_SHOWN = 5


def describe(dataset: str, data_dir: str) -> dict | None:
    """`label`, `class_names` and `files` of an image folder, no image read; None for a dataset known by its name.

    `files` holds the number of images of each split, and a hash of their names and sizes that is the same wherever
    the folder lies. Raises UserError if the folder cannot be read.
    """
    if dataset != IMAGE_FOLDER:
        return None
    root = Path(data_dir)
    found = imagefiles.list_images(root)
    return {
        "label": imagefiles.read_label(root),
        "class_names": found.class_names,
        "files": fingerprint(root, found),
    }


def fingerprint(root: Path, found: imagefiles.ImageFiles) -> dict:
    """The number of images of each split, and the hash of their names and sizes."""
    numbers = {split: len(images) for split, images in found.splits.items()}
    paths = [path for images in found.splits.values() for path, _ in images]
    return numbers | {"hash": _hash_names_and_sizes(root, paths)}


def _hash_names_and_sizes(root: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for name, size in sorted((path.relative_to(root).as_posix(), _size(path)) for path in paths):
        digest.update(os.fsencode(name) + b"\0%d\0" % size)
    return digest.hexdigest()[:16]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone since it was listed: whoever reads the images says so
        return 0


def is_known(found: dict) -> bool:
    """Whether a run's `data`, of its config.json, holds the hash: before there was one, only reading all told."""
    return isinstance(found.get("files"), dict)


def differences(found: dict, data: dict) -> list[str]:
    """What tells a run's `data`, of its config.json, from that of `describe`; [] where it is the same, as far as known.

    The label does not count: it is only what the data is called.
    """
    differing = []
    classes_there = found.get("class_names")
    classes_there = list(map(str, classes_there)) if isinstance(classes_there, list) else []
    if classes_there != data["class_names"]:
        only_there = sorted(set(classes_there) - set(data["class_names"]))
        only_here = sorted(set(data["class_names"]) - set(classes_there))
        there, here = (imagefiles.some_of(names, NAMES_SHOWN) or "none" for names in (only_there, only_here))
        differing.append(f"classes {there} only there, {here} only here")
    files = found["files"] if is_known(found) else {"train": found.get("num_train"), "test": found.get("num_test")}
    for split in ("train", "test"):
        if files.get(split) != data["files"][split]:
            differing.append(f"{files.get(split)} {split} images there, {data['files'][split]} here")
    if not differing and is_known(found) and files.get("hash") != data["files"]["hash"]:
        differing.append("as many images, but with other names or sizes")
    return differing


def refuse_other_data(folder: Path, differing: list[str]) -> None:
    """Raise UsageError if there are differences."""
    if differing:
        raise UsageError(
            f"{folder} holds a run of other data: {'; '.join(differing)}. Choose another --dataset_name or "
            "--output_dir, or remove the folder"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Where a run lies


def default_dataset_name(dataset: str, data_dir: str) -> str:
    """The folder of a dataset's runs: an image folder has its own name, not that of all image folders."""
    return (Path(data_dir).resolve().name if dataset == IMAGE_FOLDER else "") or dataset


def find_run_folder(
    output_dir: str, dataset: str, data_dir: str, dataset_name: str | None, run_name: str, seed: int, data: dict | None
) -> Path:
    """Where a run lies or is to lie; `data` as `describe` has it.

    Without a --dataset_name, a run that was begun when all image folders shared one place stays there.
    """
    if dataset_name is None and data is not None:
        shared = utils.run_folder(output_dir, IMAGE_FOLDER, run_name, seed)
        if _holds_run_of(shared, data):
            return shared
    return utils.run_folder(output_dir, dataset_name or default_dataset_name(dataset, data_dir), run_name, seed)


def _holds_run_of(folder: Path, data: dict) -> bool:
    if not (folder / utils.CONFIG).exists():
        return False
    try:
        found = utils.read_json(folder / utils.CONFIG).get("data")
    except UserError:  # which is said when the run goes on
        return True
    if not isinstance(found, dict) or differences(found, data):
        return False
    return is_known(found) or found.get("label") == data["label"]
