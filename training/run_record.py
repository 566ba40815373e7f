"""What a run folder holds, read back: the one reader for resuming, sweeps and reports. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import utils
from masks import MaskSpec
from utils import UserError

FORMAT = 2  # of config.json and summary.json, as they are written
FORMATS = (1, 2)  # that are read: what is read here is the same in both
LARGEST = 1e100  # beyond, a number is taken for damage: sums and axes would overflow

# What is read from a config.json without asking twice.
REQUIRED = {
    "settings": {
        "mask_type": str,
        "expansion_step": (int, type(None)),
        "run_name": str,
        "seed": int,
        "dataset": str,
        "epochs": int,
    },
    "attention": {"num_neighbors_nominal": int, "num_neighbors_mean": (int, float)},
    "data": {"label": str},
    "provenance": {},
}
OPTIONAL = {
    "attention": {"grid": list, "attention_share_of_flops": float, "backend": str, "backend_reason": str},
    "provenance": {"device": str, "git_commit": str, "versions": dict},
}


@dataclass(frozen=True)
class RunRecord:
    """One run: its config.json, and, read when they are asked for, metrics.jsonl and summary.json."""

    folder: Path
    config: dict

    @classmethod
    def read(cls, folder: Path, formats: tuple[int, ...] = FORMATS) -> RunRecord | None:
        """None where there is no run yet. Raises UserError for a config.json that is damaged or of another format."""
        path = folder / utils.CONFIG
        if not path.exists():
            return None
        config = utils.read_json(path)
        if config.get("format") not in formats:
            expected = " or ".join(map(str, formats))
            raise UserError(f"{path} has format {config.get('format')!r}, expected {expected}; move it away")
        utils.check_sections(path, config, REQUIRED, OPTIONAL)
        return cls(folder, config)

    @cached_property
    def metrics(self) -> list[dict]:
        """One row per epoch. Raises UserError if they cannot be read."""
        path = self.folder / utils.METRICS
        return utils.read_json_lines(path) if path.exists() else []

    @cached_property
    def summary(self) -> dict | None:
        """None for a run that is not finished. Raises UserError for one that cannot be read."""
        path = self.folder / utils.SUMMARY
        if not path.exists():
            return None
        summary = utils.read_json(path)
        utils.check_sections(path, summary, {"final": {}})
        return summary

    @property
    def settings(self) -> dict:
        return self.config["settings"]

    @property
    def mask(self) -> MaskSpec:
        return MaskSpec.from_settings(self.settings)

    @property
    def state(self) -> str:
        """`incomplete` or `done`; where the run is absent there is no record."""
        return "incomplete" if self.summary is None else "done"

    def curve(self, metric: str) -> dict[int, float]:
        """Epoch -> value, for the epochs that have one."""
        values = [(row.get("epoch"), number(row, metric)) for row in self.metrics]
        return {epoch: value for epoch, value in values if isinstance(epoch, int) and value is not None}


def peek(folder: Path, section: str) -> dict:
    """A section of config.json as it stands; {} where there is none that can be read. For deciding what to start."""
    try:
        value = utils.read_json(folder / utils.CONFIG).get(section)
    except UserError:
        value = None
    return value if isinstance(value, dict) else {}


def number(values: dict, key: str) -> float | None:
    """A number that a run wrote; None where it is missing or beyond reason."""
    value = values.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= LARGEST else None
