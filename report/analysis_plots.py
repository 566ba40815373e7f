"""Which plots there are of analyses, with their captions. Imports no matplotlib."""

from __future__ import annotations

import functools

from report import analysis_charts
from report.analyses import Analysis
from report.charts import MAX_NAMED
from report.plots import Plot, in_range
from report.results import Row

SECTION = "What the attention does"
MAX_CLASSES = 20  # that a plot can show apart

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


def choose(analyses: dict[Row, list[Analysis]]) -> dict[str, Plot]:
    """The plots for which there is data, by file name without suffix."""
    if not analyses:
        return {}
    chosen, num_patterns = {}, len(analyses)
    analyses = dict(list(analyses.items())[:MAX_NAMED])

    def add(name: str, title: str, caption: str, draw, shown: dict, *args) -> None:
        if len(shown) < num_patterns:
            caption += f" {len(shown)} of {num_patterns} patterns are shown."
        chosen[name] = Plot(SECTION, title, caption, functools.partial(draw, shown, *args))

    n = describe_n(analyses)
    layers = analysis_charts.draw_layers
    add("attention_distance", "Attention distance", DISTANCE.format(n=n), layers, analyses, True)
    add("attention_entropy", "Attention entropy", ENTROPY.format(n=n), layers, analyses, False)

    firsts = {row: members[0] for row, members in analyses.items()}
    n_of_first = describe_n({row: [found] for row, found in firsts.items()})
    caption = FIELD.format(n=f"{n_of_first}; the first seed is shown")
    draw = analysis_charts.draw_receptive_fields
    patch = next(iter(firsts.values())).numbers.get("patch")
    alike = {row: found for row, found in firsts.items() if found.numbers.get("patch") == patch}
    add("receptive_field", "Effective receptive field", caption, draw, alike)

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
    every = [found for members in analyses.values() for found in members]
    models = in_range([len(members) for members in analyses.values()])
    images = in_range([found.numbers["num_images"] for found in every])
    noun = "model" if models == "1" else "models"
    return f"n = {models} {noun} per pattern, {images} images each"


def with_the_same_images(firsts: dict[Row, Analysis]) -> dict[Row, Analysis]:
    """Those whose maps are of the same images, and of the same kind, as those of the first."""

    def kind(found: Analysis) -> tuple:
        images = [image["index"] for image in found.numbers.get("images", [])]
        kinds = [found.numbers.get(key) for key in ("maps_of", "grid")]
        patch = found.numbers.get("patch") if kinds[0] == "patch" else None
        return images, *kinds, patch

    first = next(iter(firsts.values()))
    if not kind(first)[0]:
        return {}
    return {row: found for row, found in firsts.items() if kind(found) == kind(first)}
