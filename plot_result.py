"""Write up the results of a sweep: results.html to read, results.md, and plots as PNG and SVG.

    python plot_result.py --results_path experiments/cifar10

Everything is read from the run folders, so the report can be rebuilt at any time, even while runs
are in progress. results.html is one file that needs no network.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import utils
from benchmarks import reports
from report import (
    analyses,
    analysis_plots,
    answer,
    comparison,
    differences,
    document,
    figures,
    page,
    plots,
    results,
    table,
)
from report.comparison import Study
from report.page import Picture, Section
from report.plots import Plot


def parse_args(argv=None):
    def folder(path: str) -> Path:
        return Path(utils.home_path(path))

    parser = utils.ArgumentParser(
        description="Write up the results of a sweep: results.html, results.md and plots."
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
        help="where results.html, results.md and figures/ go (default: --results_path)",
    )
    parser.add_argument(
        "--benchmark",
        type=folder,
        nargs="+",
        default=[],
        metavar="FILE",
        help="reports of benchmark.py to show in the page (JSON)",
    )
    parser.add_argument(
        "--targets",
        type=utils.number_type(float, above=0, maximum=100),
        nargs="+",
        metavar="PERCENT",
        help="accuracies: the page shows how long each pattern takes to reach them (default: round "
        "numbers below the best)",
    )
    parser.add_argument(
        "--no_speed",
        action="store_true",
        help="leave out speed and time, for runs that something else disturbed",
    )
    parser.add_argument(
        "--format",
        choices=("pdf",),
        action="append",
        default=[],
        dest="more_formats",
        help="write the plots in this format, too, beside PNG and SVG",
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    output_dir = args.output_dir or args.results_path
    figures_dir = output_dir / "figures"

    runs = differences.load_comparable(args.results_path, with_speed=not args.no_speed)
    study = comparison.study(results.group_by_pattern(runs))
    notes = differences.differing_settings(runs)
    command = shlex.join(["python", Path(__file__).name, *argv])

    chosen = {
        **plots.choose(study),
        **analysis_plots.choose(analyses.load(study)),
        **reports.plots(args.benchmark),
    }
    drawings = {name: plot.draw for name, plot in chosen.items()}
    failed = figures.save_drawings(figures_dir, drawings, (*figures.FORMATS, *args.more_formats))
    drawn = {name: plot for name, plot in chosen.items() if name not in failed}

    markdown = document.format_report(study, drawn, notes, command)
    write(output_dir / "results.md", markdown)
    sections = into_sections(drawn, figures_dir)
    add_tables(sections, study, args.targets)
    html = page.format_page(study, sections, notes, command)
    write(output_dir / "results.html", html)

    for note in notes:
        utils.warn(note)
    print(table.format_table(study))
    for sentence in answer.sentences(study):
        print(f"\n{sentence}")
    print(f"\nwrote {output_dir / 'results.md'} and {len(drawn)} plots in {figures_dir}")
    print(f"the page to read: {output_dir / 'results.html'}")
    figures.raise_failed(failed)
    return 0


# -------------------------------------------------------------------------------------------------
# What is written


def into_sections(drawn: dict[str, Plot], folder: Path) -> list[Section]:
    """The plots for the page, with their SVG files, in the order of their sections."""
    sections = {}
    for name, plot in drawn.items():
        svg = page.inline((folder / f"{name}.svg").read_text(encoding="utf-8"))
        section = sections.setdefault(plot.section, Section(plot.section))
        section.pictures.append(Picture(name, plot.title, plot.caption, svg))
    return list(sections.values())


def add_tables(sections: list[Section], study: Study, targets: list[float] | None) -> None:
    """The tables that belong to the plots: the time to reach accuracies, and disagreements."""
    targets = sorted(set(targets or page.choose_targets(study.distinct)))
    by_title = {section.title: section for section in sections}
    if plots.TRADE_OFF in by_title:
        by_title[plots.TRADE_OFF].seconds_to = page.time_to_reach(study.distinct, targets)

    compared = analyses.load_comparisons(study)
    if compared:
        if analysis_plots.SECTION not in by_title:
            sections.append(Section(analysis_plots.SECTION))
            by_title[analysis_plots.SECTION] = sections[-1]
        by_title[analysis_plots.SECTION].disagreements = page.disagreements(compared)


def write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        utils.write_text(path, content)
    except OSError as error:
        raise utils.UserError(f"cannot write {path}: {error}") from error


if __name__ == "__main__":
    utils.run_cli(main)
