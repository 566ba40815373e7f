"""Pictures of many images: those on which two models differ most, or what one model says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from report import figures, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_COLUMNS = 6
RIGHT, WRONG = "#0072B2", "#D55E00"
NAME_WIDTH = 16  # columns of text for the name of a class


@figures.drawing()
def draw(images: np.ndarray, report: dict) -> Figure:
    """Images uint8 [n, H, W, C] are those of `report["images"]`, see comparison.py."""
    figure, panels = panels_for(images)
    names = [
        text.label(report[key]["name"], figures.WIDTHS["title"]) for key in ("first", "second")
    ]
    figure.suptitle(f"A: {names[0]}\nB: {names[1]}", fontsize=10)
    figure.supxlabel(describe_panels(report, len(images)), fontsize=8)

    class_names = text.labels(report["class_names"], NAME_WIDTH)
    for axes, pixels, about in zip(panels, images, report["images"], strict=True):
        draw_image(axes, pixels)
        axes.set_title(class_names[about["label"]], fontsize=9)
        for line, (letter, key) in enumerate((("A", "first"), ("B", "second"))):
            guess = about[key]
            is_right = guess["prediction"] == about["label"]
            said = f"{letter} {guess['probability']:.0%}, says {class_names[guess['prediction']]}"
            write_below(axes, line, said, RIGHT if is_right else WRONG)
    return figure


@figures.drawing()
def draw_predictions(
    shown: list[tuple[Path, np.ndarray, list[tuple[int, float]]]],
    class_names: list[str],
    num_images: int,
) -> Figure:
    """Files, their images uint8 [H, W, C], and (label, probability) of their likeliest classes."""
    figure, panels = panels_for([pixels for _, pixels, _ in shown])
    names = text.labels(class_names, NAME_WIDTH)
    words = f"{len(shown)} of {num_images} images, and the most probable classes of each"
    figure.supxlabel(words, fontsize=8)

    for axes, (path, pixels, best) in zip(panels, shown, strict=True):
        draw_image(axes, pixels)
        axes.set_title(text.label(path.name, NAME_WIDTH), fontsize=8)
        for line, (label, probability) in enumerate(best[:2]):
            color = "0.5" if line else "black"
            write_below(axes, line, f"{names[label]} {probability:.0%}", color)
    return figure


def panels_for(images: Sequence[np.ndarray]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each of these images [H, W, C] of one size, without axes."""
    number, (height, width, _) = len(images), images[0].shape
    num_columns = min(NUM_COLUMNS, number)
    num_rows = -(-number // num_columns)
    panel_height = 1.5 * min(max(height / width, 0.2), 2)
    figure = figures.new_figure(
        max(1.5 * num_columns + 0.2, 6.4), (panel_height + 0.55) * num_rows + 1.1
    )

    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    return figure, panels[:number]


def write_below(axes: Axes, line: int, words: str, color: str) -> None:
    axes.annotate(
        words,
        (0.5, 0),
        xycoords="axes fraction",
        xytext=(0, -5 - 12 * line),
        textcoords="offset points",
        horizontalalignment="center",
        verticalalignment="top",
        fontsize=7.5,
        color=color,
    )


def draw_image(axes: Axes, pixels: np.ndarray) -> None:
    """uint8 [H, W, C]; gray images have one channel."""
    if pixels.shape[-1] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(pixels, interpolation="nearest")


def describe_panels(report: dict, num_images: int) -> str:
    return (
        f"The {num_images} of {report['num_images']} images on which A and B differ most.\n"
        "Above each: its class. Below: the probability that A and B give to this class,\n"
        "and the class that they choose (blue: right, orange: wrong)."
    )
