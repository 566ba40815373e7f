"""Draw the results of a sweep and write them up: results.md with the table, and the pictures as PNG and SVG.

    python plot_result.py --results_path experiments/cifar10

Everything is read from the run folders, so that it can be rebuilt at any time, also while runs are in progress.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import figures
import results
import utils
from results import Row, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CROWDED = 6  # more curves than this in one panel cannot be told apart: each mask type gets a panel of its own
PANELS_ABREAST = 4
MARKERS_A_CURVE = 8
REFERENCE = "#999999"  # full attention behind the curves of another mask type

ACCURACY, THROUGHPUT = "test accuracy after the final epoch (%)", "training throughput (images/s)"
NEIGHBORS = "neighbors a patch, itself included (mean over the grid)"
CURVES = {  # of a picture: the metrics of its panels, their titles, and the label of the y axis
    "accuracy": {"eval_accuracy": "test", "train_accuracy": "training", "label": "accuracy (%)"},
    "loss": {"eval_loss": "test", "train_loss": "training", "label": "loss (nats)"},
}
CURVES_CAPTION = (
    "Line: mean over the seeds that have got to the epoch; band: from the lowest seed to the highest. Training values "
    "are running means over the epoch, with dropout, augmentation and label smoothing on; test values have them off."
)
POINTS_CAPTION = "The number in a marker is the expansion step; bars: ± one sample standard deviation over seeds."


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Draw the results of a sweep: results.md, and figures as PNG and SVG.")
    parser.add_argument(
        "--results_path", type=Path, required=True, metavar="DIR", help="folder of one dataset's runs"
    )
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="where to write; None = --results_path")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    output_dir = args.output_dir or args.results_path
    runs = load_comparison(args.results_path)
    rows = results.group_by_pattern(runs)
    pictures = draw_pictures(rows)
    notes = results.differing_settings(runs)
    for name, (_, _, figure) in pictures.items():
        figures.save_png_and_svg(figure, output_dir / "figures" / name)
    try:
        utils.write_text(output_dir / "results.md", format_report(rows, pictures, notes, argv))
    except OSError as error:
        raise utils.UserError(f"cannot write {output_dir / 'results.md'}: {error}") from error
    for note in notes:
        utils.warn(note)
    print(f"{results.format_table(rows)}\n\nwrote {output_dir / 'results.md'} and {len(pictures)} pictures beside it")
    return 0


def load_comparison(results_path: Path) -> list[Run]:
    """The runs in a folder, at least one of them with an epoch to show, all of one dataset, no run there twice."""
    if not results_path.is_dir():
        raise utils.UsageError(f"--results_path {results_path}: there is no such folder")
    runs = results.load_runs(results_path)
    if not runs:
        raise utils.UserError(
            f"no runs in {results_path}: expected folders like full/seed_0 with a {utils.CONFIG}, as main.py writes them"
        )
    folders = {}
    for run in runs:
        folders.setdefault((run.settings["dataset"], run.config["data"]["label"]), set()).add(run.folder.parent.parent)
    if len(folders) > 1:
        found = ", ".join(f"{label} in {' and '.join(map(str, sorted(at)))}" for (_, label), at in folders.items())
        raise utils.UserError(f"{results_path} holds several datasets ({found}); give the --results_path of one")
    seen = {}
    for run in runs:
        if run.name in seen:
            raise utils.UserError(f"{run.name} is there twice, in {seen[run.name]} and {run.folder}; move one away")
        seen[run.name] = run.folder
    if not any(run.metrics or run.summary for run in runs):
        raise utils.UserError(f"{len(runs)} runs in {results_path}, but none has finished an epoch; try again later")
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_pictures(rows: list[Row]) -> dict[str, tuple[str, str, Figure]]:
    """File name -> (title, caption, figure), of the pictures for which there are numbers."""
    pictures = {
        f"{kind}_curves": (f"{kind.capitalize()} during training", CURVES_CAPTION, draw_curves(rows, kind))
        for kind in CURVES
        if any(row.curve(f"{split}_{kind}") for row in rows for split in ("train", "eval"))
    }
    rows = [row for row in rows if row.accuracy is not None]
    if rows:
        caption = f"{POINTS_CAPTION} Dashed: full attention."
        pictures["accuracy_vs_neighbors"] = (
            "Accuracy against number of neighbors",
            caption,
            draw_points(rows, lambda row: results.Spread(row.num_neighbors_mean, None, 1), NEIGHBORS, logarithmic=True),
        )
    rows = [row for row in rows if row.throughput is not None]
    if rows:
        pictures["accuracy_vs_throughput"] = (
            "Accuracy against throughput",
            caption,
            draw_points(rows, lambda row: row.throughput, THROUGHPUT),
        )
    return pictures


def draw_curves(rows: list[Row], kind: str) -> Figure:
    """`accuracy` or `loss` against epochs, for test and training; a panel each for every mask type if crowded."""
    (*metrics, ylabel) = CURVES[kind]
    groups = group_by_mask_type(rows) if len(rows) > CROWDED else {"": rows}
    columns = min(len(groups), PANELS_ABREAST)
    figure = figures.new_figure(2, 2)
    return figure


if __name__ == "__main__":
    utils.run_cli(main)
