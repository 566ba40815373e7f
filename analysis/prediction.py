"""What a model says about any image files: `eval.py --predict`, as a CSV and a contact sheet.

Files are read as those of an image folder are, at the size of the training images. So a file that
the model was evaluated on gets the very probabilities that it had there.

Legend for shapes:
    n files, b files of a batch, C channels, H x W pixels as read, h x w as the model expects them
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import utils
from analysis import contact_sheet
from analysis.trained_model import load_model
from models import VisionTransformer
from pipeline import bit_depth, decoding, imagefiles, imagefolder, in_threads, pixels, sizes
from pipeline.decoding import UnreadableError
from pipeline.imagefiles import some_of
from report import figures
from runtime import hardware
from training.settings import Settings
from utils import UserError

COLUMNS = ("file", "class", "probability")  # of the CSV; then class_2, probability_2 and so on
TOP = 5  # classes per file
NUM_SHOWN = 48  # images on the contact sheet
NAMES_SHOWN = 20
CLASSES_SHOWN = 10


# (label, probability) of the TOP classes of a file, or all of fewer, most probable first
Guess = list[tuple[int, float]]


@dataclass
class Predictions:
    files: list[Path]  # [n]
    guesses: dict[Path, Guess] = field(default_factory=dict)  # of those that can be read
    unreadable: dict[Path, UnreadableError] = field(default_factory=dict)
    shown: dict[Path, np.ndarray] = field(default_factory=dict)  # some of them, uint8 [H, W, C]


def find_files(paths: list[Path]) -> list[Path]:
    """The files, and the images in and below the folders, each path once.

    Raises UserError if a folder has none, and warns about files in folders that are no images.
    """
    found: list[Path] = []
    ignored: list[str] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue

        others: list[str] = []
        images = imagefiles.walk(path, path, others, parents=())
        if not images:
            raise UserError(f"no images in {path} in a format that Pillow can read")
        found += images
        ignored += [str(path / name) for name in others]

    if ignored:
        examples = some_of(ignored, imagefolder.EXAMPLES_SHOWN)
        utils.warn(f"ignored what is not an image ({len(ignored)}): {examples}")
    return list(dict.fromkeys(found))


# --------------------------------------------------------------------------------------------------
# From files to probabilities


@dataclass
class Predictor:
    """A trained model, and how image files become its input."""

    model: VisionTransformer
    class_names: list[str]
    mean: list[float]
    std: list[float]
    trained_size: tuple[int, int]  # (H, W) of the images in training
    read_size: tuple[int, int]  # (H, W) to read files at
    gray_bits: dict[int, int] | None  # of the training images, see `bit_depth.find_ranges`
    device: torch.device
    precision: str

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        device: torch.device,
        precision: str | None = None,
        backend: str = "dense",
        img_size: tuple[int, int] | None = None,
    ) -> Predictor:
        """From the checkpoint alone, without the data that it was trained on."""
        state, model = load_model(checkpoint, device, backend, img_size)
        about = state["data"]

        # Training images that were resized to what the model wants are so now; others had a size.
        read_size = tuple(about["image_shape"][1:])
        trained_size = tuple(state["model_config"]["img_size"])
        if read_size == trained_size:
            read_size = model.config["img_size"]

        bits = about.get("gray_bits")
        precision = precision or Settings.from_dict(state["settings"]).machine.precision
        precision = hardware.resolve_precision(precision, device)
        hardware.set_precision(precision)
        return cls(
            model=model,
            class_names=about["class_names"],
            mean=about["mean"],
            std=about["std"],
            trained_size=trained_size,
            read_size=read_size,
            gray_bits=bits and {int(stored): used for stored, used in bits.items()},
            device=device,
            precision=precision,
        )

    @property
    def file_name(self) -> str:
        """Of the CSV: `predictions.csv`, at another size `predictions_192x320.csv`."""
        return f"predictions{sizes.suffix(self.model.config['img_size'], self.trained_size)}.csv"

    def predict(self, files: list[Path], batch_size: int) -> Predictions:
        """Raises UserError if no file can be read."""
        found = Predictions(files)
        headers = imagefolder.read_headers(files, found.unreadable)
        has_tiff = any(header.is_tiff for header in headers.values())
        to_show = set(spread(list(headers), NUM_SHOWN))

        with in_threads.quiet_libraries(has_tiff) as stream:
            ranges, remarks = self.ranges_of(headers, found.unreadable, stream)
            batches = self.read_batches(list(headers), batch_size, ranges, found.unreadable, stream)
            for paths, images in batches:
                guesses = self.guess(images)
                found.guesses.update(zip(paths, guesses, strict=True))
                for path, image in zip(paths, images, strict=True):
                    if path in to_show:
                        found.shown[path] = image.permute(1, 2, 0).numpy()

        if remarks:
            utils.warn("; ".join(remarks))
        if not found.guesses:
            raise UserError(f"none of the files can be read: {reasons_of(found.unreadable)}")
        return found

    def ranges_of(self, headers, unreadable, stream) -> tuple[bit_depth.Ranges, list[str]]:
        """The range of gray images of more than 8 bits: as in training, if it had such images."""
        if self.gray_bits is not None:
            return self.gray_bits, []
        return imagefolder.find_ranges(headers, unreadable, stream)

    def read_batches(
        self, files, batch_size, ranges, unreadable, stream
    ) -> Iterator[tuple[list[Path], Tensor]]:
        """Yield readable files and their images, uint8 [b, C, H, W]; the others are noted."""
        num_channels = self.model.config["in_channels"]

        def read(path: Path) -> Tensor | None:
            try:
                image = decoding.read_image(path, *self.read_size, ranges)
            except UnreadableError as error:
                unreadable[path] = error
                return None
            image = np.array(image if num_channels == 3 else image.convert("L"))
            return torch.from_numpy(image).view(*self.read_size, num_channels).permute(2, 0, 1)

        is_hidden = not stream.isatty()
        with (
            ThreadPoolExecutor(in_threads.num_threads()) as pool,
            tqdm(desc="predicting", total=len(files), disable=is_hidden, file=stream) as bar,
        ):
            for start in range(0, len(files), batch_size):
                paths = files[start : start + batch_size]
                images = list(pool.map(read, paths))
                bar.update(len(paths))
                readable = [path for path in paths if path not in unreadable]
                if readable:
                    yield readable, torch.stack([image for image in images if image is not None])

    @torch.no_grad()
    def guess(self, images: Tensor) -> list[Guess]:
        """Of images uint8 [b, C, H, W]."""
        images = pixels.normalize(images.to(self.device), self.mean, self.std)
        images = pixels.resize(images, self.model.config["img_size"])  # [b, C, h, w]
        with hardware.autocast(self.device, self.precision):
            logits = self.model(images)

        best = logits.float().softmax(-1).topk(min(TOP, len(self.class_names)))  # [b, TOP]
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [list(zip(labels, values, strict=True)) for labels, values in pairs]


def spread(items: list, number: int) -> list:
    """At most this many items, evenly spread, since folders are often sorted by class."""
    number = min(number, len(items))
    return [items[position * len(items) // number] for position in range(number)]


# --------------------------------------------------------------------------------------------------
# Files


def write(output: Path, found: Predictions, class_names: list[str]) -> Path:
    """Write the CSV and, beside it, the contact sheet, whose path is returned."""
    output.parent.mkdir(parents=True, exist_ok=True)
    shown = [(path, found.shown[path], found.guesses[path]) for path in found.shown]
    picture = output.with_suffix(".png")
    sheet = contact_sheet.draw_predictions(shown, class_names, len(found.guesses))
    figures.save(sheet, picture)
    utils.write_text(output, as_csv(found, class_names))
    return picture


def as_csv(found: Predictions, class_names: list[str]) -> str:
    """One row per file; that of a file that cannot be read has no classes."""
    num_classes = min(TOP, len(class_names))
    others = [f"{name}_{rank}" for rank in range(2, num_classes + 1) for name in COLUMNS[1:]]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*COLUMNS, *others])
    for path in found.files:
        cells = [""] * (2 * num_classes)
        if guess := found.guesses.get(path):
            cells[::2] = [class_names[label] for label, _ in guess]
            cells[1::2] = [f"{probability:.6f}" for _, probability in guess]
        writer.writerow([path, *cells])
    return lines.getvalue()


def describe(found: Predictions, class_names: list[str]) -> str:
    """How many files were taken for what, most frequent first."""
    counts = Counter(class_names[guess[0][0]] for guess in found.guesses.values())
    named = [f"{name} {count}" for name, count in counts.most_common()]
    return f"{len(found.guesses)} images: {some_of(named, CLASSES_SHOWN)}"


def reasons_of(unreadable: dict[Path, UnreadableError]) -> str:
    reasons = [
        f"{path} ({decoding.short_reason(error)})" for path, error in sorted(unreadable.items())
    ]
    return some_of(reasons, NAMES_SHOWN)
