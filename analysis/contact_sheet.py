"""A picture of the images on which two models differ most."""

from __future__ import annotations

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
    num_columns = min(NUM_COLUMNS, len(images))
    num_rows = -(-len(images) // num_columns)
    width = max(1.5 * num_columns + 0.2, 6.4)
    figure = figures.new_figure(width, 2.05 * num_rows + 1.1)

    names = [
        text.label(report[key]["name"], figures.WIDTHS["title"]) for key in ("first", "second")
    ]
    figure.suptitle(f"A: {names[0]}\nB: {names[1]}", fontsize=10)
    figure.supxlabel(describe_panels(report, len(images)), fontsize=8)

    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    class_names = text.labels(report["class_names"], NAME_WIDTH)
    for axes, pixels, about in zip(panels.flat, images, report["images"], strict=False):
        draw_image(axes, pixels)
        axes.set_title(class_names[about["label"]], fontsize=9)
        for line, (letter, key) in enumerate((("A", "first"), ("B", "second"))):
            guess = about[key]
            is_right = guess["prediction"] == about["label"]
            said = class_names[guess["prediction"]]
            axes.text(
                *(0.5, -0.05 - 0.13 * line, f"{letter} {guess['probability']:.0%}, says {said}"),
                transform=axes.transAxes,
                horizontalalignment="center",
                verticalalignment="top",
                fontsize=7.5,
                color=RIGHT if is_right else WRONG,
            )
    return figure


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
