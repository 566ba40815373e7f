"""Find the images of a folder: `<root>/train/<class>/**` and `<root>/test/<class>/**`.

Other layouts are in layout.py. Opens no file and imports no torch, as a sweep only looks at names
and sizes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError

LABEL = "label.txt"  # in the root: the display name of the data
LAYOUT = (
    "expected train/<class>/* and test/<class>/* in --data_dir, or with --split_folder 0.2 no test/"
)
TEST_FOLDERS = ("test", "val", "validation")  # the first one that exists is used

# Formats that Pillow recognizes but cannot decode by itself, and FITS, where Pillow ignores the
# zero point BZERO, so that 16-bit values wrap around.
NOT_DECODED = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


@dataclass
class ImageFiles:
    """The images of a folder, in order of class and path."""

    class_names: list[str]
    train: list[tuple[Path, int]]  # (path, label)
    test: list[tuple[Path, int]]
    test_folder: str = TEST_FOLDERS[0]  # one of them
    ignored: list[str] = field(default_factory=list)  # not images of a class; relative to the root
    is_assigned: bool = False  # the paths do not say which class or split an image belongs to

    @property
    def splits(self) -> dict[str, list[tuple[Path, int]]]:
        return {"train": self.train, "test": self.test}


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """The formats that Pillow can decode, in the order in which it tries them."""
    from PIL import Image  # deferred: a sweep on other data does not need it

    Image.preinit()  # Registers JPEG, PNG and other common formats first.
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_DECODED)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The lower-case file extensions of these formats, such as `.png`."""
    from PIL import Image  # deferred: see above

    formats = {*readable_formats(), "MPO"}  # MPO comes from phones and is opened as JPEG.
    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, name in extensions.items() if name in formats)


def list_images(root: Path) -> ImageFiles:
    """Every image in the class folders and below, without opening any or printing anything.

    Raises UserError if a folder is missing or empty, or if a class has no training images.
    """
    ignored = []
    class_names = find_classes(root, "train", ignored)
    existing = [name for name in TEST_FOLDERS if (root / name).exists()]
    test_folder = existing[0] if existing else TEST_FOLDERS[0]
    test_classes = find_classes(root, test_folder, ignored)

    test_only = set(test_classes) - set(class_names)
    if test_only:
        raise UserError(
            f"{root}: {names_of_classes(test_only)} only in {test_folder}/, not in train/; add "
            "training images, or remove the test images"
        )

    train, test = [], []
    for label, name in enumerate(class_names):
        paths = images_of_class(root, root / "train" / name, ignored)
        train += [(path, label) for path in paths]
        if name in test_classes:
            paths = images_of_class(root, root / test_folder / name, ignored)
            test += [(path, label) for path in paths]

    unused = [name for name in existing if name != test_folder]
    ignored += [f"{name}/" for name in unused if (root / name).is_dir()]
    return ImageFiles(class_names, train, test, test_folder, ignored)


def find_classes(root: Path, split: str, ignored: list[str] | None = None) -> list[str]:
    """The sorted names of a split's class folders; whatever else is there is added to `ignored`.

    `split` is a folder in the root, or "." for the root itself.
    """
    entries = _entries(root / split)
    names = [entry.name for entry in entries if entry.is_dir()]
    if not names:
        raise UserError(f"no class folders in {root / split}; {LAYOUT}")

    if ignored is not None:
        others = [entry for entry in entries if not entry.is_dir() and entry != root / LABEL]
        ignored += [str(entry.relative_to(root)) for entry in others]
    return names


def images_of_class(root: Path, folder: Path, ignored: list[str]) -> list[Path]:
    found = walk(root, folder, ignored, parents=())
    if not found:
        raise UserError(f"no images in {folder} in a format that Pillow can read; {LAYOUT}")
    return found


def walk(root: Path, folder: Path, ignored: list[str], parents: tuple[Path, ...]) -> list[Path]:
    """The images in a folder, then those in its subfolders, each sorted by name.

    An image is a file with the right extension. A pipe, a socket or a dead link is not one,
    whatever its name. Links are followed, except to one of the `parents`, which would never end.
    """
    real = folder.resolve()
    if real in parents:
        ignored.append(f"{folder.relative_to(root)}/")
        return []

    entries = _entries(folder)
    if not entries:
        ignored.append(f"{folder.relative_to(root)}/")

    images, subfolders = [], []
    for entry in entries:
        if entry.suffix.lower() in image_suffixes() and entry.is_file():
            images.append(entry)
        elif entry.is_dir():
            subfolders.append(entry)
        else:
            ignored.append(str(entry.relative_to(root)))

    for subfolder in subfolders:
        images += walk(root, subfolder, ignored, (*parents, real))
    return images


def _entries(folder: Path) -> list[Path]:
    """The contents of a folder, sorted by name and without hidden files."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}; {LAYOUT}") from error


def read_label(root: Path) -> str:
    """The display name of the data: the text in label.txt on one line, or the folder's name."""
    path = root / LABEL
    expected = "expected one line of UTF-8 text"
    if path.exists() and not path.is_file():  # Opening a pipe would wait forever.
        raise UserError(f"{path} is not a file; {expected}")

    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        text = ""
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; {expected}") from error
    return " ".join(text.split()) or root.resolve().name


def names_of_classes(names: set[str]) -> str:
    noun = "class" if len(names) == 1 else "classes"
    return f"{noun} {', '.join(sorted(names))}"


def some_of(names: list[str], number: int) -> str:
    """The first `number` names, and how many more there are."""
    text = ", ".join(names[:number])
    more = len(names) - number
    return f"{text} and {more} more" if more > 0 else text
