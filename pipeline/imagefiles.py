"""Which files of an image folder are its images: `<root>/train/<class>/**` and `<root>/test/<class>/**`. Opens none.

Imports no torch: a sweep looks at names and sizes alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError

LAYOUT = "expected train/<class>/* and test/<class>/* in --data_dir"
TEST_FOLDERS = ("test", "val", "validation")  # the first that is there serves
# Formats that Pillow recognizes and cannot decode by itself; of FITS it passes over BZERO, without which 16 bits wrap.
NOT_DECODED = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


@dataclass
class ImageFiles:
    """The images of a folder, in order of class and path."""

    class_names: list[str]
    train: list[tuple[Path, int]]  # (path, label)
    test: list[tuple[Path, int]]
    test_folder: str  # of TEST_FOLDERS
    passed_over: list[str] = field(default_factory=list)  # what is no image of a class, relative to the root

    @property
    def splits(self) -> dict[str, list[tuple[Path, int]]]:
        return {"train": self.train, "test": self.test}


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """The formats that Pillow can decode, in the order in which it tries them."""
    from PIL import Image  # deferred: a sweep of other data does not need it

    Image.preinit()  # JPEG, PNG and the like come first
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_DECODED)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Lower-case endings of the names of files in these formats, such as `.png`."""
    from PIL import Image  # deferred: see above

    formats = {*readable_formats(), "MPO"}  # of a phone, which the reader of JPEG opens
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def list_images(root: Path) -> ImageFiles:
    """Every image below the class folders; no image is opened, and nothing said.

    Raises UserError for a folder that is missing, empty, or of a class that could not be learned.
    """
    passed_over = []
    class_names = find_classes(root, "train", passed_over)
    test_folder = next((name for name in TEST_FOLDERS if (root / name).exists()), TEST_FOLDERS[0])
    in_test = set(find_classes(root, test_folder, passed_over))
    test_only = in_test - set(class_names)
    if test_only:
        raise UserError(
            f"{root}: {names_of_classes(test_only)} only in {test_folder}/, not in train/: nothing could learn it; "
            "remove or add images"
        )

    train, test = [], []
    for label, name in enumerate(class_names):
        train += [(path, label) for path in _images_of_class(root, root / "train" / name, passed_over)]
        if name in in_test:
            test += [(path, label) for path in _images_of_class(root, root / test_folder / name, passed_over)]
    unused = [name for name in TEST_FOLDERS if name != test_folder and (root / name).is_dir()]
    return ImageFiles(class_names, train, test, test_folder, [*passed_over, *(f"{name}/" for name in unused)])


def find_classes(root: Path, split: str, passed_over: list[str] | None = None) -> list[str]:
    """The names of the class folders of a split, sorted; what else lies there is added to `passed_over`."""
    entries = _entries(root / split)
    names = [entry.name for entry in entries if entry.is_dir()]
    if not names:
        raise UserError(f"no class folders in {root / split}; {LAYOUT}")
    if passed_over is not None:
        passed_over += [f"{split}/{entry.name}" for entry in entries if not entry.is_dir()]
    return names


def _images_of_class(root: Path, folder: Path, passed_over: list[str]) -> list[Path]:
    found = _walk(root, folder, passed_over, above=())
    if not found:
        raise UserError(f"no images in {folder}, in none of the formats that Pillow reads; {LAYOUT}")
    return found


def _walk(root: Path, folder: Path, passed_over: list[str], above: tuple[Path, ...]) -> list[Path]:
    """The images in a folder, then those of its subfolders, each in order of name; links are followed, not in a ring.

    A file is an image by its name's ending; a pipe, a socket or a dead link is none, whatever its name.
    """
    real = folder.resolve()
    if real in above:
        passed_over.append(f"{folder.relative_to(root)}/")
        return []
    images, folders, entries = [], [], _entries(folder)
    if not entries:
        passed_over.append(f"{folder.relative_to(root)}/")
    for entry in entries:
        if entry.suffix.lower() in image_suffixes() and entry.is_file():
            images.append(entry)
        elif entry.is_dir():
            folders.append(entry)
        else:
            passed_over.append(str(entry.relative_to(root)))
    for subfolder in folders:
        images += _walk(root, subfolder, passed_over, (*above, real))
    return images


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, in order of name; hidden files are passed over."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}; {LAYOUT}") from error


def read_label(root: Path) -> str:
    """How the data is to be called: the text of label.txt on one line, or the folder's name."""
    path, expected = root / "label.txt", "expected a line of UTF-8 text"
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is no file; {expected}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        text = ""
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; {expected}") from error
    return " ".join(text.split()) or root.resolve().name


def names_of_classes(names: set[str]) -> str:
    return f"class{'es' if len(names) > 1 else ''} {', '.join(sorted(names))}"


def some_of(names: list[str], number: int) -> str:
    """The first names, and how many more there are."""
    more = len(names) - number
    return ", ".join(names[:number]) + (f" and {more} more" if more > 0 else "")
