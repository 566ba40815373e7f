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
from report import analysis_charts, text
from report.comparison import Study
from report.plots import Plot
from report.results import Row, Run

FORMAT = 1
SECTION = "What the attention does"
MAX_CLASSES = 20  # that a plot can show apart
NUMBERS = ("distance", "distance_uniform", "distance_ceiling", "entropy", "per_class_accuracy")

DISTANCE = (
    "Between the centers of patches, weighted by attention, mean over heads; the class token is "
    "left out. Band: from the lowest head to the highest. The dotted line is what the mask allows "
    "at most, mean over the patches. {n}."
)
ENTROPY = (
    "Of a patch's attention, divided by the logarithm of the number of tokens that it may attend "
    "to: 1 is uniform, 0 is one token only. Mean over heads; band: from the lowest head to the "
    "highest. {n}."
)
FIELD = (
    "Mean absolute gradient of a patch's final token with respect to the pixels, each panel "
    "divided by its largest value, on a logarithmic scale. White can have no influence. {n}."
)
MAPS = (
    "Attention of the last layer, mean over heads, of the {maps_of}; each panel divided by its "
    "largest value. Below the image its class, below a map what that model says. n = 1 model per "
    "pattern."
)
CLASSES = "Accuracy on the {images} of the analysis, for each class. {n}."


@dataclass(frozen=True)
class Analysis:
    run: Run
    numbers: dict  # analysis_<split>.json

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """analysis_<split>.npz. Raises UserError if it is missing or damaged."""
        path = self.run.folder / str(self.numbers.get("arrays"))
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
                found.setdefault(row, []).append(Analysis(run, numbers))
    return found


def _read(path: Path, run: Run) -> dict | None:
    try:
        numbers = utils.read_json(path)
    except utils.UserError as error:
        utils.warn(f"left out an analysis: {error}")
        return None

    trouble = ""
    if numbers.get("format") != FORMAT or any(numbers.get(key) is None for key in NUMBERS):
        trouble = "is no analysis that this version can read"
    elif numbers.get("epoch") != len(run.metrics):
        trouble = f"is of epoch {numbers.get('epoch')}, the run has {len(run.metrics)}"
    if trouble:
        utils.warn(f"left out an analysis: {path} {trouble}; run eval.py --analyze again")
        return None
    return numbers


def plots(analyses: dict[Row, list[Analysis]]) -> dict[str, Plot]:
    """The plots for which there is data, by file name without suffix."""
    if not analyses:
        return {}
    chosen = {}

    def add(name: str, title: str, caption: str, draw, *args) -> None:
        chosen[name] = Plot(SECTION, title, caption, functools.partial(draw, *args))

    n = describe_n(analyses)
    layers = analysis_charts.draw_layers
    add("attention_distance", "Attention distance", DISTANCE.format(n=n), layers, analyses, True)
    add("attention_entropy", "Attention entropy", ENTROPY.format(n=n), layers, analyses, False)

    firsts = {row: members[0] for row, members in analyses.items()}
    caption = FIELD.format(n=f"{n}; the first seed is shown")
    draw = analysis_charts.draw_receptive_fields
    add("receptive_field", "Effective receptive field", caption, draw, firsts)

    shared = with_the_same_images(firsts)
    if shared:
        caption = MAPS.format(maps_of=next(iter(shared.values())).numbers["maps_of"])
        add("attention_maps", "Attention maps", caption, analysis_charts.draw_maps, shared)

    classes = {len(found.numbers["class_names"]) for found in firsts.values()}
    if len(classes) == 1 and max(classes) <= MAX_CLASSES:
        images = f"{min(found.numbers['num_images'] for found in firsts.values()):,} images"
        caption = CLASSES.format(images=images, n=n)
        draw = analysis_charts.draw_classes
        add("class_accuracy", "Accuracy per class", caption, draw, analyses)
    return chosen


def describe_n(analyses: dict[Row, list[Analysis]]) -> str:
    """How many models and images the numbers are means of."""
    models = sorted({len(members) for members in analyses.values()})
    every = [found for members in analyses.values() for found in members]
    images = sorted({found.numbers["num_images"] for found in every})
    few, many = models[0], models[-1]
    models = f"{many}" if few == many else f"{few} to {many}"
    few, many = images[0], images[-1]
    images = f"{many:,}" if few == many else f"{few:,} to {many:,}"
    return f"n = {models} models per pattern, {images} images each"


def with_the_same_images(firsts: dict[Row, Analysis]) -> dict[Row, Analysis]:
    """Those whose maps are of the same images, and of the same kind, as those of the first."""

    def kind(found: Analysis) -> tuple:
        images = [image["index"] for image in found.numbers.get("images", [])]
        return images, found.numbers.get("maps_of"), found.numbers.get("grid")

    first = next(iter(firsts.values()))
    if not kind(first)[0]:
        return {}
    return {row: found for row, found in firsts.items() if kind(found) == kind(first)}


# -------------------------------------------------------------------------------------------------
# Disagreements


def load_comparisons(results: Study) -> list[dict]:
    """What `eval.py --compare` wrote beside the runs, with the path of each contact sheet."""
    found = []
    for run in (run for row in results.rows for run in row.done):
        for path in sorted(run.folder.glob("compare_*.json")):
            try:
                report = utils.read_json(path)
                picture = report.get("picture")
                cells = _cells(report)
            except (utils.UserError, KeyError, TypeError, ValueError) as error:
                utils.warn(f"left out a comparison: {path}: {utils.first_line(error)}")
                continue
            sheet = path.with_name(Path(picture).name) if isinstance(picture, str) else None
            found.append({"cells": cells, "sheet": sheet})
    return found


def _cells(report: dict) -> list[str]:
    interval = report["interval"]
    first, second = report["first"], report["second"]
    cells = [
        text.one_line(first["name"]),
        text.one_line(second["name"]),
        f"{first['top1_accuracy']:.2f}",
        f"{second['top1_accuracy']:.2f}",
        f"{report['difference']:+.2f} ({interval['low']:+.2f} to {interval['high']:+.2f})",
        f"{report['p']:.3g}",
        f"{report['only_first']:,}",
        f"{report['only_second']:,}",
        f"{report['agreement']:.1f}",
        f"{report['num_images']:,}",
    ]
    return cells
