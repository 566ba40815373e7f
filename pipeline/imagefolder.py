"""Read a folder of your own images, laid out as layout.py says.

Any formats and sizes will do. Every image becomes 8-bit RGB: it is rotated by its EXIF orientation,
transparency is laid over white, of an animation the first frame is taken, and gray of more than
8 bits is scaled by the bits in use (bit_depth.py). If all images have one size, no larger than
needed, they keep it; otherwise they are resized and center-cropped to the size that the model
wants. A file `label.txt` in the root sets the display name (default: the folder's name).
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from PIL import Image

import utils
from pipeline import bit_depth, identity
from pipeline.decoding import (
    Header,
    UnreadableError,
    largest_value,
    read_header,
    read_image,
    short_reason,
)
from pipeline.imagefiles import (
    ImageFiles,
    names_of_classes,
    read_label,
    some_of,
)
from pipeline.in_threads import attempt, quiet_libraries
from pipeline.layout import DEFAULT, Layout
from utils import UserError

if TYPE_CHECKING:
    from torch import Tensor

    Labeled = tuple[Tensor, Tensor]  # uint8 images [n, 3, H, W], int64 labels [n]

UNREADABLE_SHOWN = 20
EXAMPLES_SHOWN = 3


@dataclass
class Folder:
    """The contents of an image folder."""

    train: Labeled
    test: Labeled
    class_names: list[str]
    label: str  # display name in tables and plots
    files: dict  # from identity.fingerprint
    notes: dict = field(default_factory=dict)  # anything unusual, for config.json


def read(
    root: Path,
    img_size: tuple[int, int],
    skip_unreadable: bool = False,
    layout: Layout = DEFAULT,
) -> Folder:
    """All images of a folder, for a model that wants `img_size` = (height, width).

    Raises UserError, naming the file or folder, if something is missing, empty, damaged or too
    large. All unreadable files are named at once, or left out with a warning if `skip_unreadable`.
    """
    Image.MAX_IMAGE_PIXELS = None  # replaces Pillow's limit by ours, which names the file
    warnings.filterwarnings("ignore", module="PIL")  # odd metadata; these name no file

    files = layout.list_images(root)
    notes = {}
    _warn_about_layout(root, files, notes)

    unreadable: dict[Path, UnreadableError] = {}
    headers = read_headers([path for path, _ in files.train + files.test], unreadable)
    has_tiff = any(header.is_tiff for header in headers.values())

    with quiet_libraries(has_tiff) as stream:
        ranges, remarks = find_ranges(headers, unreadable, stream)
        size = _stored_size(headers, unreadable, img_size)
        splits = _read_splits(files, size, ranges, unreadable, stream)

        # Files that are left out, some of which only failed just now, must not affect the size.
        size_without_them = _stored_size(headers, unreadable, img_size)
        if skip_unreadable and size_without_them != size:
            splits = _read_splits(files, size_without_them, ranges, unreadable, stream)

    if remarks:
        warn(f"{root}: {'; '.join(remarks)}")
    if ranges:  # for images to predict later
        notes["gray_bits"] = {str(stored): used for stored, used in ranges.items()}
    _warn_about_unused_content(root, headers)

    if unreadable and not skip_unreadable:
        raise _error_for(unreadable)
    if unreadable:
        _check_classes_remain(root, files, unreadable)
        _report_skipped(root, unreadable, notes)

    return Folder(
        train=splits["train"],
        test=splits["test"],
        class_names=files.class_names,
        label=read_label(root),
        files=identity.fingerprint(root, files),
        notes=notes,
    )


def warn(message: str) -> None:
    """Warn only once if several processes read the same folder."""
    from runtime import distributed  # deferred: it imports torch

    if distributed.IS_FIRST:
        utils.warn(message)


def _warn_about_layout(root: Path, files: ImageFiles, notes: dict) -> None:
    train_only = set(files.class_names) - {files.class_names[label] for _, label in files.test}
    if train_only:
        classes = names_of_classes(train_only)
        warn(f"{root}: {classes} only in train/, so their accuracy cannot be measured")

    if files.test_folder != "test":
        notes["test_folder"] = files.test_folder
        warn(f"{root} has no test/; {files.test_folder}/ is used for the test images")

    if files.ignored:
        count, examples = len(files.ignored), some_of(files.ignored, EXAMPLES_SHOWN)
        warn(f"{root}: ignored what is not an image of a class ({count}): {examples}")


def _warn_about_unused_content(root: Path, headers: dict[Path, Header]) -> None:
    animated = [path for path, header in headers.items() if header.is_animated]
    if animated:
        examples = some_of(_relative(animated, root), EXAMPLES_SHOWN)
        warn(f"{root}: only the first frame is used of images with several: {examples}")

    extra = [path for path, header in headers.items() if header.has_unused_channels]
    if extra:
        examples = some_of(_relative(extra, root), EXAMPLES_SHOWN)
        warn(f"{root}: channels beyond color and opacity are ignored: {examples}")


def _relative(paths: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


def read_headers(paths: list[Path], unreadable: dict[Path, UnreadableError]) -> dict[Path, Header]:
    """The headers that can be read; the other files are added to `unreadable`."""
    headers = attempt(read_header, paths, "reading headers", unreadable, sys.stderr)

    pairs = zip(paths, headers, strict=True)
    return {path: header for path, header in pairs if header is not None}


def find_ranges(
    headers: dict[Path, Header], unreadable: dict[Path, UnreadableError], stream: TextIO
) -> tuple[dict[int, int], list[str]]:
    """The range of values of gray images with more than 8 bits, and remarks for the user."""
    depths = {path: header.depth for path, header in headers.items() if header.depth is not None}
    paths = list(depths)
    largest = attempt(largest_value, paths, "reading the range of values", unreadable, stream)
    return bit_depth.find_ranges(dict(zip(paths, largest, strict=True)), depths)


def _stored_size(
    headers: dict[Path, Header],
    unreadable: dict[Path, UnreadableError],
    img_size: tuple[int, int],
) -> tuple[int, int]:
    """The (height, width) to keep images at: their own if all share one, no larger than needed."""
    height, width = img_size
    sizes = {header.size for path, header in headers.items() if path not in unreadable}
    if len(sizes) != 1:
        return height, width

    common_width, common_height = next(iter(sizes))
    if common_width * common_height > width * height:
        return height, width
    return common_height, common_width


def _read_splits(
    files: ImageFiles,
    size: tuple[int, int],
    ranges: bit_depth.Ranges,
    unreadable: dict[Path, UnreadableError],
    stream: TextIO,
) -> dict[str, Labeled]:
    return {
        name: _read_split(split, *size, ranges, unreadable, stream)
        for name, split in files.splits.items()
    }


def _read_split(
    files: list[tuple[Path, int]],
    height: int,
    width: int,
    ranges: bit_depth.Ranges,
    unreadable: dict[Path, UnreadableError],
    stream: TextIO,
) -> Labeled:
    """The images that can be read, and their labels; the other files are added to `unreadable`."""
    import torch  # deferred: a sweep only looks at names and sizes, and starts without it

    paths = [path for path, _ in files]
    labels = torch.tensor([label for _, label in files])
    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    index_of = {path: index for index, path in enumerate(paths)}

    def fill(path: Path) -> None:
        if path in unreadable:
            return
        pixels = np.array(read_image(path, height, width, ranges))  # [H, W, 3]
        images[index_of[path]] = torch.from_numpy(pixels).permute(2, 0, 1)

    attempt(fill, paths, "reading images", unreadable, stream)

    is_readable = torch.tensor([path not in unreadable for path in paths])
    if is_readable.all():
        return images, labels  # without the copy that indexing would make
    return images[is_readable], labels[is_readable]


# --------------------------------------------------------------------------------------------------
# Unreadable files


def _error_for(unreadable: dict[Path, UnreadableError]) -> UserError:
    """One error that names all unreadable files."""
    if len(unreadable) == 1:
        error = next(iter(unreadable.values()))
        return UserError(f"{error}, or leave it out with --skip_unreadable")

    reasons = [f"{path} ({short_reason(unreadable[path])})" for path in sorted(unreadable)]
    return UserError(
        f"{len(unreadable)} images cannot be read: {some_of(reasons, UNREADABLE_SHOWN)}; remove or "
        "replace them, or leave them out with --skip_unreadable"
    )


def _check_classes_remain(
    root: Path, files: ImageFiles, unreadable: dict[Path, UnreadableError]
) -> None:
    """Raise UserError if a class has no readable image left in a split."""
    for split, images in files.splits.items():
        labels = {label for _, label in images}
        remaining = {label for path, label in images if path not in unreadable}
        lost = {files.class_names[label] for label in labels - remaining}
        if lost:
            raise UserError(
                f"{root}: none of the {split} images of {names_of_classes(lost)} can be read; "
                "replace them"
            )


def _report_skipped(root: Path, unreadable: dict[Path, UnreadableError], notes: dict) -> None:
    names = _relative(sorted(unreadable), root)
    notes["skipped"] = {"number": len(names), "names": names[:UNREADABLE_SHOWN]}

    noun = "image" if len(names) == 1 else "images"
    examples = some_of(names, UNREADABLE_SHOWN)
    warn(f"{root}: left out {len(names)} {noun} that cannot be read: {examples}")
