"""Read a folder of one's own images: `<root>/train/<class>/*` and `<root>/test/<class>/*`, any formats and sizes.

Every image becomes RGB: turned as its EXIF orientation says, transparency laid over white, the first frame of an
animation. Where all images have one size that is no larger than needed they are kept at it; otherwise they are
resized and center-cropped to the size that the model wants. A file `label.txt` in the root says how the data is to be
called where results are shown (default: the folder's name).
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from utils import UserError, warn

if TYPE_CHECKING:
    from torch import Tensor

    Labeled = tuple[Tensor, Tensor]  # uint8 images [n, 3, H, W], int64 labels [n]

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
MAX_PIXELS = 64_000_000  # of one file; decoding takes 4 bytes a pixel, with transparency 8
CHUNK = 8  # files that a thread takes at once
LAYOUT = "expected train/<class>/* and test/<class>/* in --data_dir"


def read(root: Path, img_size: tuple[int, int]) -> tuple[Labeled, Labeled, list[str], str]:
    """The training images, the test images, the class names, and how the data is called.

    Raises UserError, naming the file or folder, for whatever is missing, empty, damaged or too large.
    """
    Image.MAX_IMAGE_PIXELS = None  # PIL's own limit; ours is checked on the header, with a message
    warnings.filterwarnings("ignore", module="PIL")  # remarks on odd metadata, which name no file
    class_names, files = find_images(root)
    label = read_label(root)
    train_only = set(class_names) - {class_names[index] for _, index in files["test"]}
    if train_only:
        warn(f"{root}: {_names(train_only)} only in train/: its accuracy cannot be measured")
    sizes = set(_map_with_bar(_read_size, [path for split in files.values() for path, _ in split], "reading headers"))
    height, width = img_size
    if len(sizes) == 1:
        common_width, common_height = next(iter(sizes))
        if common_width * common_height <= width * height:
            height, width = common_height, common_width
    splits = [_read_split(split, height, width) for split in files.values()]
    return *splits, class_names, label


def find_images(root: Path) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """The class names, and (path, label) of every image of each split; no image is opened, and nothing said.

    Raises UserError for a folder that is missing, empty, or of a class that could not be learned.
    """
    class_names = find_classes(root, "train")
    in_test = set(find_classes(root, "test"))
    test_only = in_test - set(class_names)
    if test_only:
        raise UserError(
            f"{root}: {_names(test_only)} only in test/, not in train/: nothing could learn it; remove or add images"
        )
    train_only = set(class_names) - in_test
    return class_names, {
        split: _find_files(root / split, class_names, train_only if split == "test" else ())
        for split in ("train", "test")
    }


def find_classes(root: Path, split: str) -> list[str]:
    """The names of the class folders of a split, sorted."""
    names = [entry.name for entry in _entries(root / split) if entry.is_dir()]
    if not names:
        raise UserError(f"no class folders in {root / split}; {LAYOUT}")
    return names


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, in order of name; hidden files are passed over."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}; {LAYOUT}") from error


def read_label(root: Path) -> str:
    """How the data is to be called: the text of label.txt on one line, or the folder's name."""
    try:
        text = (root / "label.txt").read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        text = ""
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {root / 'label.txt'}: {error}; expected a line of UTF-8 text") from error
    return " ".join(text.split()) or root.resolve().name


def _find_files(folder: Path, class_names: list[str], missing: set[str] | tuple) -> list[tuple[Path, int]]:
    """(path, label) of every image, in order of class and name; other extensions are passed over."""
    found = []
    for label, name in enumerate(class_names):
        if name in missing:
            continue
        paths = [path for path in _entries(folder / name) if path.suffix.lower() in IMG_EXTENSIONS]
        if not paths:
            raise UserError(f"no images in {folder / name} (looked for {' '.join(IMG_EXTENSIONS)}); {LAYOUT}")
        found += [(path, label) for path in paths]
    return found


def _read_split(files: list[tuple[Path, int]], height: int, width: int) -> Labeled:
    import torch  # deferred: a sweep only looks at names and sizes, and starts without it

    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)

    def fill(index: int) -> None:
        pixels = np.array(read_image(files[index][0], height, width))  # [H, W, 3]
        images[index] = torch.from_numpy(pixels).permute(2, 0, 1)

    _map_with_bar(fill, range(len(files)), "reading images")
    return images, torch.tensor([label for _, label in files])


def read_image(path: Path, height: int, width: int) -> Image.Image:
    """The file as RGB, resized and center-cropped to height x width unless it has that size.

    In place and resized before the transparency is resolved: a copy of a large image is hundreds of megabytes.
    """
    with _opened(path) as image:
        image.draft(None, (2 * max(height, width),) * 2)  # a JPEG is decoded at 1/2, 1/4, 1/8 if that is enough
        image.load()  # of an animation, the first frame
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of no known range")
        if image.mode.startswith("I"):  # 16 bits of gray; convert() would cut them off at 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        mode = "RGBA" if image.has_transparency_data else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.BILINEAR)
        if mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image


def _read_size(path: Path) -> tuple[int, int]:
    """(width, height) as `read_image` will turn the image, from the header."""
    with _opened(path) as image:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's own getexif() decodes it all
        on_its_side = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # PIL gives a TIFF's size turned already
        return image.size[::-1] if on_its_side else image.size


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image of a file, not decoded yet; whatever fails while it is open is a UserError that names the file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                size, limit = f"{image.width}x{image.height}", MAX_PIXELS // 1_000_000
                raise UserError(f"{path} has {size} pixels, more than {limit} million; make it smaller")
            yield image
    except UserError:
        raise
    except Exception as error:  # PIL raises anything
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot read {path} as an image: {reason}; remove or replace it") from error


def _map_with_bar(function, items, title: str) -> list:
    """`function` of every item, in threads: decoding lets go of Python's lock.

    In chunks: threads that hand over single small images spend more time on the lock than on the images.
    """
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    results = []
    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
        tqdm(desc=title, total=len(items), leave=False, disable=not sys.stderr.isatty()) as bar,
    ):
        try:
            for chunk in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
                results += chunk
                bar.update(len(chunk))
        except BaseException:  # an interrupt too: without this, the pool would first read all the other files
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _names(names: set[str]) -> str:
    return f"class{'es' if len(names) > 1 else ''} {', '.join(sorted(names))}"
