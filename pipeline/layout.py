"""How an image folder says which class an image is of, and which images are for testing.

    train/<class>/**, test/<class>/**    Layout()
    train/<class>/** or <class>/**       Layout(test_share=0.2)
    ** and a CSV of files and classes    Layout(test_share=0.2, labels="labels.csv")

Opens no image and imports no torch, as a sweep only looks at names and sizes.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline import imagefiles
from pipeline.imagefiles import TEST_FOLDERS, ImageFiles, some_of
from utils import UsageError, UserError

COLUMNS = ("file", "class")  # of a CSV with labels; others are ignored
NAMES_SHOWN = 5

Labeled = list[tuple[Path, int]]  # (path, label)


@dataclass(frozen=True)
class Layout:
    test_share: float = 0.0  # --split_folder: of each class's images; 0 = the folder has a test/
    labels: str | None = None  # --labels: a path; None = classes are folders

    def __post_init__(self):
        if self.labels is not None and not self.test_share:
            raise UsageError(
                "--labels says nothing about test images; add --split_folder 0.2 to test on a "
                "fifth of each class"
            )

    def class_names(self, root: Path) -> list[str]:
        """The sorted names of the classes, as in `list_images`, but without looking for images."""
        if self.labels is not None:
            return sorted({name for _, name in read_labels(self.find_labels(root))})
        return imagefiles.find_classes(root, self._train_folder(root))

    def list_images(self, root: Path) -> ImageFiles:
        """Every image of the folder. Raises UserError for a layout other than the one described."""
        if self.labels is None and not self.test_share:
            return imagefiles.list_images(root)

        ignored: list[str] = []
        if self.labels is None:
            self._refuse_test_folder(root)
            folder = self._train_folder(root)
            class_names = imagefiles.find_classes(root, folder, ignored)
            images = []
            for label, name in enumerate(class_names):
                paths = imagefiles.images_of_class(root, root / folder / name, ignored)
                images += [(path, label) for path in paths]
        else:
            class_names, images = labeled_images(root, self.find_labels(root), ignored)

        train, test = split(root, images, class_names, self.test_share)
        return ImageFiles(class_names, train, test, ignored=ignored, is_assigned=True)

    def find_labels(self, root: Path) -> Path:
        """The CSV, in the folder itself or where the path leads from here."""
        places = [root / self.labels, Path(self.labels)]
        for place in places:
            if place.is_file():  # Opening a pipe would wait forever.
                return place
        tried = " or ".join(dict.fromkeys(map(str, places)))
        raise UserError(f"--labels: there is no file {tried}; expected a CSV with {_columns()}")

    def _train_folder(self, root: Path) -> str:
        """`train`; or the root, where `--split_folder` makes both splits out of one."""
        return "." if self.test_share and not (root / "train").is_dir() else "train"

    def _refuse_test_folder(self, root: Path) -> None:
        existing = [name for name in TEST_FOLDERS if (root / name).is_dir()]
        if existing:
            raise UsageError(
                f"--split_folder is for folders without test images, but {root} has "
                f"{existing[0]}/; leave out --split_folder, or move that folder away"
            )


DEFAULT = Layout()


# --------------------------------------------------------------------------------------------------
# Test images


def split(
    root: Path, images: Labeled, class_names: list[str], share: float
) -> tuple[Labeled, Labeled]:
    """(train, test): of each class the same share, rounded and at least one, is for testing.

    Which ones depends only on a hash of their names relative to the root. So it is the same for
    every seed and machine, and hardly changes when images are added. Raises UsageError if a class
    would have no image left to train on.
    """
    chosen = set()
    for label, name in enumerate(class_names):
        members = [path for path, other in images if other == label]
        number = max(1, round(share * len(members)))
        if number >= len(members):
            raise UsageError(
                f"--split_folder {share:g} would leave class {name!r} of {root} no image to train "
                f"on, as it has {len(members)}; use a lower fraction, or add images to that class"
            )
        members.sort(key=lambda path: hashlib.sha256(os.fsencode(name_in(root, path))).digest())
        chosen.update(members[:number])

    train = [image for image in images if image[0] not in chosen]
    return train, [image for image in images if image[0] in chosen]


def name_in(root: Path, path: Path) -> str:
    """The path relative to the root, with slashes on every system."""
    return path.relative_to(root).as_posix()


# --------------------------------------------------------------------------------------------------
# Labels in a CSV


def read_labels(path: Path) -> list[tuple[str, str]]:
    """(file, class) of each row; raises UserError unless it is such a CSV, in UTF-8."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            rows = [tuple((row.get(key) or "").strip() for key in COLUMNS) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}; expected a CSV with {_columns()}") from error

    if not set(COLUMNS) <= set(header):
        found = some_of([repr(name) for name in header], NAMES_SHOWN) or "nothing"
        raise UserError(f"{path} has {found} in its first line; expected {_columns()}")
    if not rows:
        raise UserError(f"{path} has no rows below its first line; expected one per image")

    incomplete = [f"line {line}" for line, row in enumerate(rows, start=2) if "" in row]
    if incomplete:
        examples = some_of(incomplete, NAMES_SHOWN)
        raise UserError(
            f"{path}: {len(incomplete)} of {len(rows)} rows lack a file or a class ({examples}); "
            "complete or remove them"
        )
    return [(PurePosixPath(name).as_posix(), label) for name, label in rows]


def labeled_images(root: Path, labels: Path, ignored: list[str]) -> tuple[list[str], Labeled]:
    """(class names, images in order of class and path) of a folder with labels in a CSV.

    Raises UserError, with all counts at once, unless each row is of one image in the folder, and
    each image has one row. What else is in the folder is added to `ignored`.
    """
    rows = read_labels(labels)
    found = {name_in(root, path): path for path in imagefiles.walk(root, root, ignored, ())}
    about_data = {labels.resolve(), (root / imagefiles.LABEL).resolve()}
    ignored[:] = [name for name in ignored if (root / name).resolve() not in about_data]

    counts = Counter(name for name, _ in rows)
    unknown = [name for name in counts if name not in found]
    no_image = [name for name in unknown if (root / name).exists()]
    problems = {
        "of its files do not exist": [name for name in unknown if name not in set(no_image)],
        "of its files are no images that Pillow can read": no_image,
        "files have several rows": [name for name, count in counts.items() if count > 1],
        "images have no row": [name for name in found if name not in counts],
    }
    said = [
        f"{len(names)} {what} ({some_of(names, NAMES_SHOWN)})"
        for what, names in problems.items()
        if names
    ]
    if said:
        raise UserError(
            f"{labels} does not fit the images of {root}: {'; '.join(said)}; give each image one "
            "row, with its path in the folder"
        )

    class_names = sorted({name for _, name in rows})
    label_of = {name: label for label, name in enumerate(class_names)}
    labeled = {name: label_of[class_name] for name, class_name in rows}
    images = [(path, labeled[name]) for name, path in found.items()]
    return class_names, sorted(images, key=lambda image: image[1])  # stable: keeps the paths' order


def _columns() -> str:
    return f"the columns {','.join(COLUMNS)}"
