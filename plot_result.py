"""Draw the results of a sweep and write them up: results.md with the table, and the pictures as PNG and SVG.

    python plot_result.py --results_path experiments/cifar10

Everything is read from the run folders, so that it can be rebuilt at any time, also while runs are in progress.
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES_CAPTION = (
    "Line: mean over the seeds that have got to the epoch; band: from the lowest seed to the highest. Training values "
    "are means over the epoch while the weights change, with augmentation, dropout and label smoothing where they are "
    "on; test values are without them, after the epoch."
)
POINTS_CAPTION = (
    "The number in a marker is the expansion step, the dashed line is full attention. Bars: ± one sample standard "
    "deviation over seeds."
)


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    draw: Callable[[], Figure]


def parse_args(argv=None):
    def home(text: str) -> Path:
        return Path(utils.home_path(text))

    parser = utils.ArgumentParser(description="Draw the results of a sweep: results.md, and figures as PNG and SVG.")
    parser.add_argument("--results_path", type=home, required=True, metavar="DIR", help="folder of one dataset's runs")
    parser.add_argument(
        "--output_dir", type=home, metavar="DIR", help="where results.md and figures/ go (default: --results_path)"
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    output_dir = args.output_dir or args.results_path
    runs = load_comparison(args.results_path)
    rows, differences = results.group_by_pattern(runs), results.differing_settings(runs)
    pictures = choose_pictures(rows)
    failed = figures.save_drawings(output_dir / "figures", {name: picture.draw for name, picture in pictures.items()})
    pictures = {name: picture for name, picture in pictures.items() if name not in failed}
    report = format_report(rows, pictures, differences, command=shlex.join(["python", Path(__file__).name, *argv]))
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        utils.write_text(output_dir / "results.md", report)
    except OSError as error:
        raise utils.UserError(f"cannot write {output_dir / 'results.md'}: {error}") from error
    for difference in differences:
        utils.warn(difference)
    print(f"{results.format_table(rows)}\n\nwrote {output_dir / 'results.md'} and {len(pictures)} pictures beside it")
    figures.raise_failed(failed)
    return 0


def load_comparison(results_path: Path) -> list[Run]:
    """The runs in a folder: all of one dataset, none there twice, at least one with an epoch to show."""
    if not results_path.is_dir():
        raise utils.UsageError(f"--results_path {results_path}: there is no such folder")
    runs = results.load_runs(results_path)
    if not runs:
        raise utils.UserError(f"no runs in {results_path}: expected folders like full/seed_0 as main.py writes them")
    groups = results.group_by_data(runs)
    if len(groups) > 1:
        found = "; ".join(map(describe_group, groups))
        raise utils.UserError(f"{results_path} holds several datasets ({found}): give --results_path the folder of one")
    seen = {}
    for run in runs:
        place = seen.setdefault((run.settings["run_name"], run.settings["seed"]), run.folder)
        if place != run.folder:
            raise utils.UserError(f"{run.name} is there twice, in {place} and {run.folder}: move one away")
    if not any(run.metrics or run.summary for run in runs):
        raise utils.UserError(f"none of the {len(runs)} runs in {results_path} has finished an epoch: try again later")
    return runs


def describe_group(runs: list[Run]) -> str:
    """`pets in o/pets (full seed 0 and 3 more)`: the data of some runs, and where they lie."""
    folders = ", ".join(map(str, sorted({run.folder.parents[1] for run in runs})))
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{runs[0].config['data']['label']} in {folders} ({runs[0].name}{more})"


def choose_pictures(rows: list[Row]) -> dict[str, Picture]:
    """File name -> picture, of those pictures for which there are numbers."""
    pictures = {}
    for kind in charts.UNITS:
        if any(row.curve(f"{split}_{kind}") for row in rows for split in charts.SPLITS):
            draw = functools.partial(charts.draw_curves, rows, kind)
            pictures[f"{kind}_curves"] = Picture(f"{kind.capitalize()} during training", CURVES_CAPTION, draw)
    measured = [row for row in rows if row.accuracy is not None]
    if measured:
        draw = functools.partial(charts.draw_accuracy_vs_neighbors, measured)
        pictures["accuracy_vs_neighbors"] = Picture("Accuracy against neighbors", POINTS_CAPTION, draw)
    timed = [row for row in measured if row.throughput is not None]
    if timed:
        draw = functools.partial(charts.draw_accuracy_vs_throughput, timed)
        pictures["accuracy_vs_throughput"] = Picture("Accuracy against throughput", POINTS_CAPTION, draw)
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# The report


def format_report(rows: list[Row], pictures: dict[str, Picture], differences: list[str], command: str) -> str:
    """The text of results.md: the same run folders give the same text, so that a diff of it shows what changed."""
    label = rows[0].runs[0].config["data"]["label"]
    parts = [f"# Local attention on {text.markdown(label)}", describe_setup(rows), results.format_table(rows)]
    for name, picture in pictures.items():
        image = f"![{picture.title}](figures/{name}.png)"
        parts.append(f"## {picture.title}\n\n{image}\n\n{picture.caption} ([SVG](figures/{name}.svg))")
    notes = [*map(text.markdown, differences), *reading_notes(rows)]
    parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes))
    parts.append(f"## Provenance\n\n{text.markdown(describe_provenance(rows))}\n\nRebuild with {text.code(command)}.")
    return "\n\n".join(parts) + "\n"


def describe_setup(rows: list[Row]) -> str:
    """One line on what was trained, on what, for how long, read from the first run; differences are in the notes."""
    config, settings = rows[0].runs[0].config, rows[0].runs[0].settings
    facts = [text.markdown(str(settings["model"]))] if "model" in settings else []
    if rows[0].num_parameters is not None:
        facts.append(f"{rows[0].num_parameters:,} parameters")
    grid = config["attention"].get("grid")
    if {"img_size", "patch_size"} <= settings.keys() and grid:
        size, patch = settings["img_size"], settings["patch_size"]
        facts.append(f"{size}×{size} images in {patch}×{patch} patches (grid {'×'.join(map(str, grid))})")
    if "pool" in settings:
        facts.append(text.code(f"--pool {settings['pool']}"))
    facts.append(_plural(settings["epochs"], "epoch"))
    facts.append(_plural(len({run.settings["seed"] for row in rows for run in row.runs}), "seed"))
    return ", ".join(facts) + "."


def reading_notes(rows: list[Row]) -> list[str]:
    """What one has to know to read the table and the pictures rightly."""
    runs = [run for row in rows for run in row.runs]
    notes = [
        "Final accuracy is the test accuracy after the last epoch, not the best epoch; mean ± sample standard "
        "deviation over n seeds. Only finished runs count in the table.",
        "Neighbors include the patch itself. Nominal: of a patch far from every border, the number that the shapes are "
        "matched by. Mean: over the patches of the grid, truncated at the border, where a 2D shape loses more than a "
        "1D window of the same nominal number.",
        "Images/s is training throughput without the first epoch, which carries the warm-up; peak memory is the "
        f"highest over seeds{', on a CPU of the whole process' * _any_setting(runs, 'device', 'cpu')}.",
    ]
    if _any_setting(runs, "pool", "cls"):
        notes.append(
            "The class token is a global token: it attends to every patch and every patch to it, which links all "
            "patches within two layers and so blurs the comparison. `--pool mean` has no class token and is the "
            "strict version."
        )
    share = next((row.runs[0].config["attention"].get("attention_share_of_flops") for row in rows), None)
    if rows[0].mask.mask_type == "full" and share is not None and 0 <= share < 1:
        notes.append(
            f"Attention is {100 * share:.1f}% of the arithmetic of the model with full attention: no local pattern can "
            f"make it more than {1 / (1 - share):.2f} times as fast by saving arithmetic."
        )
    unfinished = [
        f"{run.name} (epoch {max(run.curve('eval_accuracy'), default=0)} of {run.settings['epochs']})"
        for run in runs
        if run.state != "done"
    ]
    if unfinished:
        notes.append(f"Unfinished, and drawn as far as they have got: {text.markdown(', '.join(unfinished))}.")
    return notes


def describe_provenance(rows: list[Row]) -> str:
    """One line: how many runs, on what, with which versions of what."""
    origins = [run.config["provenance"] for row in rows for run in row.runs]
    versions = [origin.get("versions") or {} for origin in origins]
    commits = [
        None
        if not origin.get("git_commit")
        else origin["git_commit"][:10] + " (modified)" * bool(origin.get("git_dirty"))
        for origin in origins
    ]
    facts = {
        "device": [origin.get("device") for origin in origins],
        "torch": [version.get("torch") for version in versions],
        "python": [version.get("python") for version in versions],
        "git commit": commits,
    }
    described = [
        f"{name} {' / '.join(dict.fromkeys(map(str, filter(None, values)))) or 'unknown'}"
        for name, values in facts.items()
    ]
    return f"{_plural(len(origins), 'run')}; {'; '.join(described)}."


def _any_setting(runs: list[Run], key: str, value: str) -> bool:
    return any(run.settings.get(key) == value for run in runs)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    utils.run_cli(main)
