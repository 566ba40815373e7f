"""Write up the results of a sweep: results.md with the table, and plots as PNG and SVG.

    python plot_result.py --results_path experiments/cifar10

Everything is read from the run folders, so the report can be rebuilt at any time, even while runs
are in progress.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import utils
from report import charts, figures, results, text
from report.results import Row, Run
from training.settings import EVAL_SPLITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES_CAPTION = (
    "Line: mean over the seeds that have reached the epoch; band: from the lowest seed to the "
    "highest. Training values are averages over the epoch while the weights change, with "
    "augmentation, dropout and label smoothing if they are on; {split} values are measured without "
    "them after the epoch."
)
POINTS_CAPTION = (
    "The number in a marker is the expansion step; the dashed line is full attention. Bars: ± one "
    "sample standard deviation over seeds."
)


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    draw: Callable[[], Figure]


def parse_args(argv=None):
    def folder(path: str) -> Path:
        return Path(utils.home_path(path))

    parser = utils.ArgumentParser(
        description="Write up the results of a sweep: results.md, and plots as PNG and SVG."
    )
    parser.add_argument(
        "--results_path",
        type=folder,
        required=True,
        metavar="DIR",
        help="folder with the runs of one dataset",
    )
    parser.add_argument(
        "--output_dir",
        type=folder,
        metavar="DIR",
        help="where results.md and figures/ go (default: --results_path)",
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    output_dir = args.output_dir or args.results_path
    figures_dir = output_dir / "figures"
    report_path = output_dir / "results.md"

    runs = load_comparison(args.results_path)
    rows = results.group_by_pattern(runs)
    differences = results.differing_settings(runs)

    plots = choose_plots(rows)
    failed = figures.save_drawings(figures_dir, {name: plot.draw for name, plot in plots.items()})
    plots = {name: plot for name, plot in plots.items() if name not in failed}

    command = shlex.join(["python", Path(__file__).name, *argv])
    report = format_report(rows, plots, differences, command)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        utils.write_text(report_path, report)
    except OSError as error:
        raise utils.UserError(f"cannot write {report_path}: {error}") from error

    for difference in differences:
        utils.warn(difference)
    print(results.format_table(rows))
    print(f"\nwrote {report_path} and {len(plots)} plots in {figures_dir}")
    figures.raise_failed(failed)
    return 0


# -------------------------------------------------------------------------------------------------
# What to show


def load_comparison(results_path: Path) -> list[Run]:
    """The runs in a folder, checked to be comparable.

    Raises UserError unless they share one dataset, no run is there twice, and at least one run has
    an epoch to show.
    """
    if not results_path.is_dir():
        raise utils.UsageError(f"--results_path {results_path} does not exist or is not a folder")

    runs = results.load_runs(results_path)
    if not runs:
        raise utils.UserError(
            f"no runs in {results_path}: expected folders like full/seed_0, as main.py writes them"
        )

    groups = results.group_by_data(runs)
    if len(groups) > 1:
        found = "; ".join(map(describe_group, groups))
        differ_in_holdout = len({group[0].settings.data.holdout for group in groups}) == len(groups)
        several = "runs evaluated on different images" if differ_in_holdout else "several datasets"
        raise utils.UserError(
            f"{results_path} holds {several} ({found}): point --results_path at one of them"
        )

    folders = {}
    for run in runs:
        key = (run.settings.run.run_name, run.settings.optimization.seed)
        first = folders.setdefault(key, run.folder)
        if first != run.folder:
            raise utils.UserError(
                f"{run.name} exists twice, in {first} and {run.folder}: move one of them away"
            )

    if not any(run.metrics or run.summary for run in runs):
        raise utils.UserError(
            f"none of the {len(runs)} runs in {results_path} has finished an epoch: try again later"
        )
    return runs


def describe_group(runs: list[Run]) -> str:
    """`pets in o/pets (full seed 0 and 3 more)`: the dataset of some runs, and their folders."""
    label = runs[0].config["data"]["label"]
    if holdout := runs[0].settings.data.holdout:
        label += f", {100 * holdout:g}% of the training images held out,"
    folders = ", ".join(map(str, sorted({run.folder.parents[1] for run in runs})))
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{label} in {folders} ({runs[0].name}{more})"


def choose_plots(rows: list[Row]) -> dict[str, Plot]:
    """The plots for which there is data, by file name without suffix."""
    plots = {}
    for kind in charts.UNITS:
        if any(row.curve(f"{split}_{kind}") for row in rows for split in charts.SPLITS):
            draw = functools.partial(charts.draw_curves, rows, kind)
            title = f"{kind.capitalize()} during training"
            caption = CURVES_CAPTION.format(split=charts.name_of_split("eval", rows))
            plots[f"{kind}_curves"] = Plot(title, caption, draw)

    measured = [row for row in rows if row.accuracy is not None]
    if measured:
        draw = functools.partial(charts.draw_accuracy_vs_neighbors, measured)
        plots["accuracy_vs_neighbors"] = Plot("Accuracy against neighbors", POINTS_CAPTION, draw)

    timed = [row for row in measured if row.throughput is not None]
    if timed:
        draw = functools.partial(charts.draw_accuracy_vs_throughput, timed)
        plots["accuracy_vs_throughput"] = Plot("Accuracy against throughput", POINTS_CAPTION, draw)
    return plots


# -------------------------------------------------------------------------------------------------
# The report


def format_report(
    rows: list[Row], plots: dict[str, Plot], differences: list[str], command: str
) -> str:
    """The text of results.md. The same run folders give the same text, so a diff shows changes."""
    label = rows[0].runs[0].config["data"]["label"]
    parts = [
        f"# Local attention on {text.markdown(label)}",
        describe_setup(rows),
        results.format_table(rows),
    ]
    for name, plot in plots.items():
        image = f"![{plot.title}](figures/{name}.png)"
        parts.append(f"## {plot.title}\n\n{image}\n\n{plot.caption} ([SVG](figures/{name}.svg))")

    notes = [*map(text.markdown, differences), *reading_notes(rows)]
    parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes))

    provenance = text.markdown(describe_provenance(rows))
    parts.append(f"## Provenance\n\n{provenance}\n\nRebuild with {text.code(command)}.")
    return "\n\n".join(parts) + "\n"


def describe_setup(rows: list[Row]) -> str:
    """One line about model, images, epochs and seeds.

    Read from the first run; the notes list what differs in others.
    """
    first = rows[0].runs[0]
    model = first.settings.model

    facts = [text.markdown(model.model)]
    if rows[0].num_parameters is not None:
        facts.append(f"{rows[0].num_parameters:,} parameters")

    grid = first.config["attention"].get("grid")
    if grid:
        size, patch = model.img_size, model.patch_size
        grid = "×".join(map(str, grid))
        facts.append(f"{size}×{size} images in {patch}×{patch} patches (grid {grid})")

    facts.append(text.code(f"--pool {model.pool}"))
    facts.append(_plural(first.settings.optimization.epochs, "epoch"))
    seeds = {run.settings.optimization.seed for row in rows for run in row.runs}
    facts.append(_plural(len(seeds), "seed"))
    return ", ".join(facts) + "."


def reading_notes(rows: list[Row]) -> list[str]:
    """What a reader must know to interpret the table and the plots."""
    runs = [run for row in rows for run in row.runs]
    on_cpu = ""
    if any(run.settings.machine.device == "cpu" for run in runs):
        on_cpu = ", and on a CPU that of the whole process"

    accuracy, holdout = "the test accuracy", runs[0].settings.data.holdout
    if holdout:
        accuracy = (
            f"the accuracy on {EVAL_SPLITS['holdout']} (`--holdout {holdout:g}`), not on test "
            "images,"
        )

    notes = [
        f"Final accuracy is {accuracy} after the last epoch, not the best epoch; mean ± "
        "sample standard deviation over n seeds. Only finished runs count in the table.",
        "Neighbors include the patch itself. Nominal: for a patch far from every border; the "
        "shapes are matched by this number. Mean: over all patches of the grid, truncated at the "
        "border, where a 2D shape loses more than a 1D window with the same nominal number.",
        "Images/s is training throughput without the first epoch, which includes the warm-up; "
        f"peak memory is the highest over seeds{on_cpu}.",
    ]
    if any(run.settings.model.pool == "cls" for run in runs):
        notes.append(
            "The class token is a global token: it attends to every patch and every patch attends "
            "to it. That links all patches within two layers and blurs the comparison. "
            "`--pool mean` has no class token and is the strict version."
        )

    attention = rows[0].runs[0].config["attention"]
    share = attention.get("attention_share_of_flops")
    if rows[0].mask.mask_type == "full" and share is not None and 0 <= share < 1:
        notes.append(
            f"Attention is {100 * share:.1f}% of the arithmetic of the model with full attention, "
            f"so no local pattern can make it more than {1 / (1 - share):.2f} times as fast by "
            "saving arithmetic."
        )

    unfinished = []
    for run in runs:
        if run.state != "done":
            epoch = max(run.curve("eval_accuracy"), default=0)
            unfinished.append(f"{run.name} (epoch {epoch} of {run.settings.optimization.epochs})")
    if unfinished:
        names = text.markdown(", ".join(unfinished))
        notes.append(f"Unfinished runs, plotted up to their latest epoch: {names}.")
    return notes


def describe_provenance(rows: list[Row]) -> str:
    """One line: the number of runs, the devices, and the versions of software and code."""
    origins = [run.config["provenance"] for row in rows for run in row.runs]
    versions = [origin.get("versions") or {} for origin in origins]
    facts = {
        "device": [origin.get("device") for origin in origins],
        "torch": [version.get("torch") for version in versions],
        "python": [version.get("python") for version in versions],
        "git commit": [_describe_commit(origin) for origin in origins],
    }

    described = []
    for name, values in facts.items():
        distinct = dict.fromkeys(str(value) for value in values if value)
        described.append(f"{name} {' / '.join(distinct) or 'unknown'}")
    return f"{_plural(len(origins), 'run')}; {'; '.join(described)}."


def _describe_commit(origin: dict) -> str | None:
    commit = origin.get("git_commit")
    if not commit:
        return None
    return commit[:10] + (" (modified)" if origin.get("git_dirty") else "")


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    utils.run_cli(main)
