"""What keeps runs from comparing cleanly: other data, other settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import utils
from report import logs
from report.logs import MAY_DIFFER, Run
from training.settings import FLAGS


def load_comparable(results_path: Path, with_speed: bool = True) -> list[Run]:
    """The runs in a folder, checked to be comparable; without speed, their times are left out.

    Raises UserError unless they share one dataset, no run is there twice, and at least one run has
    an epoch to show.
    """
    if not results_path.is_dir():
        raise utils.UsageError(f"--results_path {results_path} does not exist or is not a folder")

    runs = logs.load_runs(results_path)
    if not runs:
        raise utils.UserError(
            f"no runs in {results_path}: expected folders like full/seed_0, as main.py writes them"
        )

    groups = group_by_data(runs)
    if len(groups) > 1:
        found = "; ".join(map(_describe_group, groups))
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
    return runs if with_speed else [replace(run, is_timed=False) for run in runs]


def _describe_group(runs: list[Run]) -> str:
    """`pets in o/pets (full seed 0 and 3 more)`: the dataset of some runs, and their folders."""
    label = runs[0].config["data"]["label"]
    if holdout := runs[0].settings.data.holdout:
        label += f", {100 * holdout:g}% of the training images held out,"
    folders = ", ".join(map(str, sorted({run.folder.parents[1] for run in runs})))
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{label} in {folders} ({runs[0].name}{more})"


def group_by_data(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs grouped by dataset, in the order in which the datasets first appear."""
    groups = []
    for run in runs:
        for group in groups:
            if all(is_same_data(run, other) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def is_same_data(run: Run, other: Run) -> bool:
    """Whether two runs used the same data, and were evaluated on the same images of it.

    Compares the names and sizes of the files if both runs recorded them, else the labels and the
    checksums of the decoded pixels.
    """
    if run.settings.data.dataset != other.settings.data.dataset:
        return False
    if run.settings.data.holdout != other.settings.data.holdout:
        return False

    here = run.config["data"]
    there = other.config["data"]
    if here.get("files") is not None and there.get("files") is not None:
        return here["files"] == there["files"]
    if here["label"] != there["label"]:
        return False

    checksums = (here.get("checksum"), there.get("checksum"))
    comparable = None not in checksums and here.get("image_shape") == there.get("image_shape")
    return not comparable or checksums[0] == checksums[1]


def differing_settings(runs: list[Run]) -> list[str]:
    """One sentence for each difference that keeps the runs of a table from comparing cleanly."""
    compared = {}
    for key in FLAGS:
        if key not in MAY_DIFFER:
            compared[f"--{key}"] = lambda run, key=key: run.settings.to_dict()[key]
    compared["starting weights"] = lambda run: run.start
    for key in ("label", "num_train", "num_test", "num_classes"):
        compared[f"data {key}"] = lambda run, key=key: run.config["data"].get(key, "missing")

    speed_only = {}
    for name in runs[0].speed_conditions if runs else ():
        speed_only[name] = lambda run, name=name: run.speed_conditions[name]

    notes = []
    for name, values in _differing(runs, compared):
        notes.append(f"{name} differs between the runs: {values}")
    for name, values in _differing(runs, speed_only):
        consequence = "so images/s and peak memory are not comparable"
        notes.append(f"{name} differs between the runs, {consequence}: {values}")
    return notes


def _differing(
    runs: list[Run], compared: dict[str, Callable[[Run], object]]
) -> Iterator[tuple[str, str]]:
    """(name, values and the runs that have them) of whatever is not the same in all runs."""
    for name, value_of in compared.items():
        run_names_by_value = {}
        for run in runs:
            run_names_by_value.setdefault(str(value_of(run)), []).append(run.name)
        if len(run_names_by_value) < 2:
            continue

        described = []
        for value, run_names in run_names_by_value.items():
            few = len(run_names) <= 3
            which = ", ".join(run_names) if few else f"{len(run_names)} runs"
            described.append(f"{value} ({which})")
        yield name, "; ".join(described)
