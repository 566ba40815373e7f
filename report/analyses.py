"""What `eval.py --analyze` and `--compare` left in the run folders, for the page.

docs/analysis.md has the keys. Imports neither torch nor matplotlib.
"""

from __future__ import annotations

import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils
from report import text
from report.comparison import Study, format_interval
from report.logs import Run
from report.results import Row
from report.statistics import Interval

FORMAT = 1
# What the plots read. docs/analysis.md has the others.
NUMBERS = {
    "class_names": list,
    "num_images": int,
    "distance": list,
    "distance_ceiling": float,
    "entropy": list,
    "per_class_accuracy": list,
    "images": list,
    "grid": list,
    "maps_of": str,
    "arrays": str,
}


@dataclass(frozen=True)
class Analysis:
    run: Run
    numbers: dict  # analysis_<split>.json

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """analysis_<split>.npz. Raises UserError if it is missing or damaged."""
        path = self.run.folder / self.numbers["arrays"]
        try:
            with np.load(path, allow_pickle=False) as found:
                return dict(found)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise utils.UserError(f"cannot read {path}: {utils.first_line(error)}") from error


def load(results: Study) -> dict[Row, list[Analysis]]:
    """The analyses of finished runs, of the images that their accuracy is of.

    Those that cannot be read, or are of another epoch, are left out with a warning.
    """
    found = {}
    for row in results.distinct:
        for run in row.done:
            path = run.folder / f"analysis_{row.eval_split}.json"
            if path.exists() and (numbers := _read(path, run)) is not None:
                members = found.setdefault(row, [])
                if members and _shape(numbers) != _shape(members[0].numbers):
                    utils.warn(f"left out an analysis: {path} has other layers than {row.label}")
                else:
                    members.append(Analysis(run, numbers))
    return found


def _shape(numbers: dict) -> tuple[int, ...]:
    """Layers and heads."""
    return np.shape(numbers["distance"])


def _read(path: Path, run: Run) -> dict | None:
    try:
        numbers = utils.read_json(path)
    except utils.UserError as error:
        utils.warn(f"left out an analysis: {error}")
        return None

    trouble = _misfit(numbers, run)
    if _is_resized(numbers):
        trouble = "is of images of another size than in training"
    if numbers.get("format") != FORMAT or not _has_all(numbers):
        trouble = "is no analysis that this version can read"
    if trouble:
        utils.warn(f"left out an analysis: {path} {trouble}; run eval.py --analyze again")
        return None
    return numbers


def _misfit(about: dict, run: Run) -> str:
    """Why what was found out about a model does not go with the run; "" if it does."""
    if about.get("epoch") != len(run.metrics):
        return f"is of epoch {about.get('epoch')}, the run has {len(run.metrics)}"
    if about.get("data_as_trained") is False:
        return "is of other images than those of the training"
    return ""


def _is_resized(about: dict) -> bool:
    """Whether a model ran at another size than in training; older files do not say, and did not."""
    return about.get("img_size_in_training", about.get("img_size")) != about.get("img_size")


def _has_all(numbers: dict) -> bool:
    """Whether all that the plots read is there, in the shape that they expect."""
    if any(not isinstance(numbers.get(key), kind) for key, kind in NUMBERS.items()):
        return False
    names, images = numbers["class_names"], numbers["images"]
    labels = range(len(names))
    return (
        all(isinstance(name, str) for name in names)
        and len(numbers["per_class_accuracy"]) == len(names)
        and all(isinstance(image, dict) and "index" in image for image in images)
        and all(image.get(key) in labels for image in images for key in ("label", "prediction"))
    )


# -------------------------------------------------------------------------------------------------
# Disagreements


def load_comparisons(results: Study) -> list[dict]:
    """What `eval.py --compare` wrote beside the runs, with the path of each contact sheet.

    Only those on the images that the accuracy of the run is of, at the size of the training. Those
    that cannot be read, or are of another epoch or other images, are left out with a warning.
    """
    found = []
    for run in (run for row in results.rows for run in row.done):
        for path in sorted(run.folder.glob("compare_*.json")):
            try:
                report = utils.read_json(path)
                if report["format"] != FORMAT:
                    raise ValueError("has a format that this version cannot read")
                if report["split"] != run.settings.data.eval_split:
                    continue
                if misfit := _misfit(report["first"], run):
                    raise ValueError(f"{misfit}; run eval.py --compare again")
                cells = _cells(report)
                if _is_resized(report["first"]) or _is_resized(report["second"]):
                    continue
            except KeyError as key:
                utils.warn(f"left out a comparison: {path} lacks {key}")
                continue
            except (utils.UserError, TypeError, ValueError) as error:
                utils.warn(f"left out a comparison: {path} {utils.first_line(error)}")
                continue
            found.append({"cells": cells, "sheet": _sheet(path, report.get("picture"))})
    return found


def _sheet(path: Path, picture: object) -> Path | None:
    """The contact sheet of a comparison, which lies beside it; None without one."""
    if not isinstance(picture, str) or not picture.endswith(".png") or "\0" in picture:
        return None
    return path.with_name(Path(picture).name)


def _cells(report: dict) -> list[str]:
    interval = format_interval(Interval(report["interval"]["low"], report["interval"]["high"]))
    first, second = report["first"], report["second"]
    return [
        text.one_line(first["name"]),
        text.one_line(second["name"]),
        f"{first['top1_accuracy']:.2f}",
        f"{second['top1_accuracy']:.2f}",
        f"{report['difference']:+.2f} ({interval})",
        f"{report['p']:.3g}",
        f"{report['only_first']:,}",
        f"{report['only_second']:,}",
        f"{report['agreement']:.1f}",
        f"{report['num_images']:,}",
    ]
