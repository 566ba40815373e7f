"""Read a folder of your own images: `<root>/train/<class>/**` and `<root>/test/<class>/**`, any formats and sizes.

Every image becomes RGB of 8 bits: turned as its EXIF orientation says, transparency laid over white, the first frame of
an animation, gray of more than 8 bits scaled by the bits that are used (bit_depth.py). Where all images have one size
that is no larger than needed they are kept at it; otherwise they are resized and center-cropped to the size that the
model wants. A file `label.txt` in the root says how the data is to be called where results are shown (default: the
folder's name).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import utils
from pipeline import bit_depth, identity
from pipeline.imagefiles import ImageFiles, list_images, names_of_classes, read_label, readable_formats, some_of
from utils import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    Labeled = tuple[Tensor, Tensor]  # uint8 images [n, 3, H, W], int64 labels [n]

MAX_PIXELS = 64_000_000  # of one file; decoding takes 4 bytes a pixel, with transparency 8
CHUNK = 8  # files that a thread takes at once
NAMES_SHOWN = 20  # of unreadable files
NAMES_OF_NO_IMAGES_SHOWN = 3
EXTRA_SAMPLES, OPACITY = 338, (1, 2)  # a tag of TIFF 6.0: what the channels beside color are
STDERR_IS_AWAY = threading.Lock()  # a second reader would save, and put back, what the first had put in its place


class UnreadableError(UserError):
    """A file that should be an image and cannot be read."""


@dataclass
class Folder:
    """What was read."""

    train: Labeled
    test: Labeled
    class_names: list[str]
    label: str  # display name in tables and plots
    files: dict  # as identity.fingerprint has it
    notes: dict = field(default_factory=dict)  # for config.json: what was not as usual


@dataclass(frozen=True)
class Header:
    """What is known of an image without its pixels."""

    size: tuple[int, int]  # (width, height), as `read_image` will turn it
    depth: bit_depth.Depth | None  # of more than 8 bits
    is_tiff: bool
    is_animated: bool
    has_unused_channels: bool


def read(root: Path, img_size: tuple[int, int], skip_unreadable: bool = False) -> Folder:
    """All images of a folder, for a model that wants `img_size` = (height, width).

    Raises UserError, naming the file or folder, for whatever is missing, empty, damaged or too large; all files that
    cannot be read are named at once, or left out with a warning if they are to be skipped.
    """
    Image.MAX_IMAGE_PIXELS = None  # PIL's own limit; ours is checked on the header, with a message
    warnings.filterwarnings("ignore", module="PIL")  # remarks on odd metadata, which name no file
    files, notes = list_images(root), {}
    _say_what_is_odd(root, files, notes)

    unreadable: dict[Path, UnreadableError] = {}
    paths = [path for split in files.splits.values() for path, _ in split]
    headers = _attempt(read_header, paths, "reading headers", unreadable, sys.stderr)
    known = {path: header for path, header in zip(paths, headers, strict=True) if header is not None}
    deep = {path: header.depth for path, header in known.items() if header.depth is not None}

    with quiet_libraries(any(header.is_tiff for header in known.values())) as stream:
        largest = _attempt(_largest_value, list(deep), "reading the range of values", unreadable, stream)
        ranges, remarks = bit_depth.find_ranges(dict(zip(deep, largest, strict=True)), deep)

        def read_splits(size: tuple[int, int]) -> dict[str, Labeled]:
            return {name: _read_split(split, *size, ranges, unreadable, stream) for name, split in files.splits.items()}

        size = _stored_size(_sizes(known, unreadable), img_size)
        splits = read_splits(size)
        if skip_unreadable and size != (size := _stored_size(_sizes(known, unreadable), img_size)):
            splits = read_splits(size)  # that of the images that were left out counts no more

    if remarks:
        warn(f"{root}: {'; '.join(remarks)}")
    _say_what_is_not_used(root, known)
    _judge_unreadable(root, files, unreadable, skip_unreadable, notes)
    return Folder(
        splits["train"], splits["test"], files.class_names, read_label(root), identity.fingerprint(root, files), notes
    )


def warn(message: str) -> None:
    """Once, of many processes that read the same folder."""
    from runtime import distributed  # deferred, as torch is

    if distributed.IS_FIRST:
        utils.warn(message)


def _say_what_is_odd(root: Path, files: ImageFiles, notes: dict) -> None:
    train_only = set(files.class_names) - {files.class_names[label] for _, label in files.test}
    if train_only:
        warn(f"{root}: {names_of_classes(train_only)} only in train/: its accuracy cannot be measured")
    if files.test_folder != "test":
        notes["test_folder"] = files.test_folder
        warn(f"{root} has no test/: {files.test_folder}/ serves as the test images")
    if files.ignored:
        some = some_of(files.ignored, NAMES_OF_NO_IMAGES_SHOWN)
        warn(f"{root}: passed over {len(files.ignored)} that are no images of a class: {some}")


def _say_what_is_not_used(root: Path, headers: dict[Path, Header]) -> None:
    animated = [str(path.relative_to(root)) for path, header in headers.items() if header.is_animated]
    if animated:
        warn(f"{root}: of images with several frames the first is used: {some_of(animated, NAMES_OF_NO_IMAGES_SHOWN)}")
    extra = [str(path.relative_to(root)) for path, header in headers.items() if header.has_unused_channels]
    if extra:
        some = some_of(extra, NAMES_OF_NO_IMAGES_SHOWN)
        warn(f"{root}: images have more channels than color and opacity, which are not used: {some}")


def _sizes(headers: dict[Path, Header], unreadable: dict[Path, UnreadableError]) -> set[tuple[int, int]]:
    return {header.size for path, header in headers.items() if path not in unreadable}


def _stored_size(sizes: set[tuple[int, int]], img_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which images are kept: their own, if all have one that is no larger than wanted."""
    height, width = img_size
    if len(sizes) == 1:
        common_width, common_height = next(iter(sizes))
        if common_width * common_height <= width * height:
            return common_height, common_width
    return height, width


def _read_split(
    files: list[tuple[Path, int]],
    height: int,
    width: int,
    ranges: bit_depth.Ranges,
    unreadable: dict[Path, UnreadableError],
    stream: TextIO,
) -> Labeled:
    """The images that can be read, and their labels; the others are added to `unreadable`."""
    import torch  # deferred: a sweep only looks at names and sizes, and starts without it

    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)

    def fill(index: int) -> None:
        path = files[index][0]
        if path not in unreadable:
            pixels = np.array(read_image(path, height, width, ranges))  # [H, W, 3]
            images[index] = torch.from_numpy(pixels).permute(2, 0, 1)

    def path_of(index: int) -> Path:
        return files[index][0]

    _attempt(fill, range(len(files)), "reading images", unreadable, stream, path_of)
    labels = torch.tensor([label for _, label in files])
    if any(path in unreadable for path, _ in files):
        good = torch.tensor([path not in unreadable for path, _ in files])
        return images[good], labels[good]
    return images, labels


def _judge_unreadable(
    root: Path, files: ImageFiles, unreadable: dict[Path, UnreadableError], skip: bool, notes: dict
) -> None:
    """Raise UserError for files that cannot be read; or, if they are to be skipped, say and note how many."""
    if not unreadable:
        return
    names = [str(path.relative_to(root)) for path in sorted(unreadable)]
    if not skip:
        if len(unreadable) == 1:
            raise UserError(f"{next(iter(unreadable.values()))}, or leave it out with --skip_unreadable")
        reasons = [f"{path} ({_short_reason(unreadable[path])})" for path in sorted(unreadable)]
        raise UserError(
            f"{len(unreadable)} images cannot be read: {some_of(reasons, NAMES_SHOWN)}; remove or replace them, or "
            "leave them out with --skip_unreadable"
        )
    for split, images in files.splits.items():
        left = {label for path, label in images if path not in unreadable}
        emptied = {files.class_names[label] for _, label in images} - {files.class_names[label] for label in left}
        if emptied:
            raise UserError(f"{root}: no image of {names_of_classes(emptied)} in the {split} images can be read")
    notes["skipped"] = {"number": len(names), "names": names[:NAMES_SHOWN]}
    warn(f"{root}: left out {len(names)} images that cannot be read: {some_of(names, NAMES_SHOWN)}")


def _short_reason(error: UnreadableError) -> str:
    return _reason(error.__cause__) if error.__cause__ else f"more than {MAX_PIXELS // 1_000_000} million pixels"


def _reason(error: Exception) -> str:
    """On one line, without the name of the file."""
    return "of no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else first_line(error)


# ---------------------------------------------------------------------------------------------------------------------
# One file


def read_image(path: Path, height: int, width: int, ranges: bit_depth.Ranges | None = None) -> Image.Image:
    """The file as RGB, resized and center-cropped to height x width unless it has that size.

    In place and resized before the transparency is resolved: a copy of a large image is hundreds of megabytes.
    """
    with _opened(path) as image:
        image.draft(None, (2 * max(height, width),) * 2)  # a JPEG is decoded at 1/2, 1/4, 1/8 if that is enough
        image.load()  # of an animation, the first frame
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of no known range")
        if image.mode.startswith("I"):  # gray of 16 or 32 bits; convert() would cut it off at 255
            values, transparent = np.asarray(image), image.info.get("transparency")
            pixels = bit_depth.to_8_bits(values, bit_depth.depth_of(image), ranges or {})
            if isinstance(transparent, int):  # the one value that a PNG shows nothing for
                pixels[values == transparent] = 255
            image = Image.fromarray(pixels)
        mode = "RGBA" if image.has_transparency_data else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.BILINEAR)
        if mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image


def read_header(path: Path) -> Header:
    with _opened(path) as image:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's own getexif() decodes it all
        on_its_side = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # PIL gives a TIFF's size turned already
        size = image.size[::-1] if on_its_side else image.size
        # A phone's JPEG may carry a preview as its second picture.
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
        channels = getattr(image, "tag_v2", {}).get(EXTRA_SAMPLES, ())
        has_unused_channels = any(meaning not in OPACITY for meaning in channels)
        return Header(size, bit_depth.depth_of(image), image.format == "TIFF", is_animated, has_unused_channels)


def _largest_value(path: Path) -> int:
    with _opened(path) as image:
        return bit_depth.largest_value(image)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image of a file, not decoded yet; whatever fails meanwhile is an UnreadableError that names the file."""
    try:
        with Image.open(path, formats=readable_formats()) as image:  # an EPS would be run as a program, by Ghostscript
            if image.width * image.height > MAX_PIXELS:
                size, limit = f"{image.width}x{image.height}", MAX_PIXELS // 1_000_000
                raise UnreadableError(f"{path} has {size} pixels, more than {limit} million; make it smaller")
            yield image
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # PIL raises anything
        reason = _reason(error)
        raise UnreadableError(f"cannot read {path} as an image: {reason}; remove or replace it") from error


# ---------------------------------------------------------------------------------------------------------------------
# Many files


def _attempt(
    function: Callable,
    items,
    title: str,
    unreadable: dict[Path, UnreadableError],
    stream: TextIO,
    path_of: Callable = lambda item: item,
) -> list:
    """`function` of every item; None for one that fails, whose file is added to `unreadable`."""

    def attempt(item):
        try:
            return function(item)
        except UnreadableError as error:
            unreadable[path_of(item)] = error
            return None

    return map_with_bar(attempt, items, title, stream)


def map_with_bar(function: Callable, items, title: str, stream: TextIO) -> list:
    """`function` of every item, in threads: decoding lets go of Python's lock.

    In chunks: threads that hand over single small images spend more time on the lock than on the images.
    """
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    stopping, results = threading.Event(), []

    def work(chunk) -> list:
        return [function(item) for item in chunk if not stopping.is_set()]

    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
        tqdm(desc=title, total=len(items), leave=False, disable=not stream.isatty(), file=stream) as bar,
    ):
        try:
            for done in pool.map(work, chunks):
                results += done
                bar.update(len(done))
        except BaseException:  # a request to stop too: without this, the pool would first read all the other files
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise
    return results


@contextlib.contextmanager
def quiet_libraries(has_tiff: bool) -> Iterator[TextIO]:
    """Within, nothing that C writes to stderr is seen, if there are TIFFs; yields a stream that still reaches it.

    libtiff has remarks of its own on the pixels of odd files, beside the error that names the file.
    """
    with STDERR_IS_AWAY if has_tiff else contextlib.nullcontext():
        try:
            descriptor = os.dup(2) if has_tiff else None
        except OSError:  # stderr is closed
            descriptor = None
        if descriptor is None:
            yield sys.stderr
            return
        with open(descriptor, "w", errors="backslashreplace") as stream, open(os.devnull, "w") as nowhere:
            sys.stderr.flush()
            try:
                os.dup2(nowhere.fileno(), 2)
                yield stream
            finally:
                stream.flush()
                os.dup2(descriptor, 2)
