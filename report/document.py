"""results.md: the answer, the table, the plots, and what a reader must know about them.

Imports neither torch nor matplotlib.
"""

from __future__ import annotations

from urllib.parse import quote

from pipeline import sizes
from report import answer, shapes, table, text
from report.comparison import Study, name_of
from report.plots import Plot
from report.results import Row
from training.settings import EVAL_SPLITS

MAX_LISTED = 16  # rows in one note


def format_report(
    results: Study, plots: dict[str, Plot], differences: list[str], command: str
) -> str:
    """The text of results.md. The same run folders give the same text, so a diff shows changes."""
    rows = results.rows
    parts = [
        f"# {text.markdown(title(rows))}",
        text.markdown(" ".join(answer.sentences(results))),
        f"{text.markdown(describe_setup(rows))}.",
        table.format_table(results),
    ]
    compared = shapes.against_windows(results)
    if compared:
        lines = [map(text.markdown, shapes.cells(found)) for found in compared]
        compared_shapes = text.markdown_table(shapes.TITLES, lines).rstrip()
        parts += [f"## {shapes.TITLE}", compared_shapes, shapes.NOTE]

    for name, plot in plots.items():
        heading, caption = text.markdown(plot.title), text.markdown(plot.caption)
        file = f"figures/{quote(name)}"
        parts.append(f"## {heading}\n\n![{heading}]({file}.png)\n\n{caption} ([SVG]({file}.svg))")

    found = map(text.markdown, [*differences, *findings(results)])
    parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in [*found, *reading_notes(rows)]))

    provenance = text.markdown(describe_provenance(rows))
    parts.append(f"## Provenance\n\n{provenance}\n\nRebuild with {text.code(command)}.")
    return "\n\n".join(parts) + "\n"


def title(rows: list[Row]) -> str:
    return f"Local attention on {text.one_line(rows[0].runs[0].config['data']['label'])}"


def describe_setup(rows: list[Row]) -> str:
    """A line of plain text about model, images, epochs and seeds.

    Read from the first run; the notes list what differs in others.
    """
    first = rows[0].runs[0]
    model = first.settings.model

    facts = [model.model]
    if rows[0].num_parameters is not None:
        facts.append(f"{rows[0].num_parameters:,} parameters")

    grid = first.config["attention"].get("grid")
    if grid:
        size, patch = sizes.in_words(model.img_size), model.patch_size
        grid = "×".join(map(str, grid))
        facts.append(f"{size} images in {patch}×{patch} patches (grid {grid})")

    facts.append(f"--pool {model.pool}")
    facts.append(str(first.settings.optimization.budget))
    if first.settings.data.holdout:
        facts.append(f"accuracies on {EVAL_SPLITS['holdout']}")
    seeds = {run.seed for row in rows for run in row.runs}
    facts.append(_plural(len(seeds), "seed"))
    return ", ".join(facts)


def findings(results: Study) -> list[str]:
    """Plain text about these runs: rows that are one and the same, runs that are not finished."""
    notes = []
    for row, same in results.same_as.items():
        names = name_of(row), name_of(same)
        notes.append(
            f"{names[0]} and {names[1]} are one and the same mask on this grid; they count once in "
            f"comparisons and plots, with the runs of {names[1]}."
        )

    notes += _chance_of_images(results)

    unfinished = []
    for run in (run for row in results.rows for run in row.runs):
        if run.state != "done":
            epoch = max(run.curve("eval_accuracy"), default=0)
            budget = run.settings.optimization.budget
            unfinished.append(f"{run.name} (epoch {epoch} of {budget.epochs or budget})")
    if unfinished:
        names = ", ".join(unfinished)
        notes.append(f"Unfinished runs, plotted up to their latest epoch: {names}.")
    return notes


def _chance_of_images(results: Study) -> list[str]:
    """The binomial intervals of rows with one seed, which have none over seeds."""
    single = [row for row in results.distinct if len(row.done) == 1]
    intervals = []
    for row in single[:MAX_LISTED]:
        interval = answer.interval_of_images(row.done[0], row.num_images_evaluated)
        if interval is not None:
            intervals.append(f"{name_of(row)} {interval.low:.1f} to {interval.high:.1f} %")
    if not intervals:
        return []

    more = f", and {len(single) - MAX_LISTED} more" if len(single) > MAX_LISTED else ""
    return [
        "Rows with one seed have no interval over seeds. Their images alone leave open (95 %, "
        f"binomial; another seed would be another model): {'; '.join(intervals)}{more}."
    ]


def reading_notes(rows: list[Row]) -> list[str]:
    """What a reader must know to interpret the table and the plots, in Markdown."""
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

    speed = "Images/s is training throughput without the first epoch, which includes the warm-up."
    if not any(run.is_timed for run in runs):
        speed = "Speed is left out: the runs shared the machine with other work."

    notes = [
        f"Final accuracy is {accuracy} after the last epoch, not the best epoch; mean ± half of "
        "the 95 % interval (Student's t) over n seeds. Only finished runs count in the table.",
        "Difference: to the run of full attention with the same seed and the same settings, mean "
        "and 95 % interval of the paired differences. p: of the paired t test, corrected for the "
        "number of patterns by Holm's method. Both take the differences as normally distributed. "
        "Intervals are those of each pattern by itself, and the best of several patterns looks a "
        "little better than it is.",
        "Neighbors include the patch itself. Nominal: for a patch far from every border; the "
        "shapes are matched by this number. Mean: over all patches of the grid, truncated at the "
        "border, where a 2D shape loses more than a 1D window with the same nominal number.",
        f"{speed} Peak memory is the highest over seeds{on_cpu}.",
    ]
    if any(run.settings.model.pool == "cls" for run in runs):
        notes.append(
            "The class token is a global token: it attends to every patch and every patch attends "
            "to it. That links all patches within two layers and blurs the comparison. "
            "`--pool mean` has no class token and is the strict version."
        )
    if any(row.num_registers for row in rows):
        notes.append(
            "Registers are global tokens too. Runs are compared with full attention with as many."
        )

    attention = rows[0].runs[0].config["attention"]
    share = attention.get("attention_share_of_flops")
    if rows[0].mask.mask_type == "full" and share is not None and 0 <= share < 1:
        notes.append(
            f"Attention is {100 * share:.1f}% of the arithmetic of the model with full attention, "
            f"so no local pattern can make it more than {1 / (1 - share):.2f} times as fast by "
            "saving arithmetic."
        )
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
