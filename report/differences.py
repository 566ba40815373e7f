"""What keeps runs from comparing cleanly: other data, other settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from report.logs import MAY_DIFFER, Run
from training.settings import FLAGS


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
