"""What a run folder holds: the one reader for resuming, sweeps and reports. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import utils
from masks import MaskSpec
from training.settings import Settings
from utils import UserError

FORMAT = 2  # of config.json and summary.json, as they are written
FORMATS = (1, 2)  # formats that can be read; what this file uses is the same in both
LARGEST = 1e100  # larger numbers are treated as damage: sums and axes would overflow

# Checked once, when a config.json is read, so that its readers need not check.
REQUIRED = {
    "settings": {
        "mask_type": str,
        "expansion_step": (int, type(None)),
        "run_name": str,
        "seed": int,
        "dataset": str,
        "epochs": (int, type(None)),
    },
    "attention": {"num_neighbors_nominal": int, "num_neighbors_mean": (int, float)},
    "data": {"label": str},
    "provenance": {},
}
OPTIONAL = {
    "settings": {
        "dilation": int,
        "edge": str,
        "mask_seed": int,
        "mask_file": str,
        "mask_hash": str,
        "global_layers": str,
        "num_registers": int,
        "model": str,
        "img_size": (int, str),
        "patch_size": int,
        "pool": str,
        "grad_accumulation": int,
        "holdout": (int, float),
        "minutes": (int, float),
    },
    "attention": {
        "grid": list,
        "attention_share_of_flops": float,
        "backend": str,
        "backend_reason": str,
        "masks": list,
    },
    "provenance": {"device": str, "git_commit": str, "versions": dict},
}
# Of runs that did not start from drawn weights.
WEIGHTS = {"weights": {"file": str, "sha256": str, "source": str}}


@dataclass(frozen=True)
class RunRecord:
    """One run: its config.json; metrics.jsonl and summary.json are read when needed."""

    folder: Path
    config: dict

    @classmethod
    def read(cls, folder: Path, formats: tuple[int, ...] = FORMATS) -> RunRecord | None:
        """None where there is no run yet.

        Raises UserError for a config.json that is damaged or has another format.
        """
        path = folder / utils.CONFIG
        if not path.exists():
            return None
        config = utils.read_json(path)
        if config.get("format") not in formats:
            expected = " or ".join(map(str, formats))
            raise UserError(
                f"{path} has format {config.get('format')!r}, expected {expected}; move it away"
            )
        utils.check_sections(path, config, REQUIRED, OPTIONAL)
        if config.get("weights") is not None:
            utils.check_sections(path, config, WEIGHTS)
        if not (config["settings"]["epochs"] or config["settings"].get("minutes")):
            raise UserError(
                f"{path} says neither epochs nor minutes, so it is damaged; move it away"
            )
        return cls(folder, config)

    @cached_property
    def metrics(self) -> list[dict]:
        """One row per epoch. Raises UserError for a file that cannot be read."""
        path = self.folder / utils.METRICS
        return utils.read_json_lines(path) if path.exists() else []

    @cached_property
    def summary(self) -> dict | None:
        """None for a run that is not finished. Raises UserError for an unreadable file."""
        path = self.folder / utils.SUMMARY
        if not path.exists():
            return None
        summary = utils.read_json(path)
        utils.check_sections(path, summary, {"final": {}})
        return summary

    @cached_property
    def settings(self) -> Settings:
        return Settings.from_dict(self.config["settings"])

    @property
    def mask(self) -> MaskSpec:
        return self.settings.mask.spec

    @property
    def state(self) -> str:
        """`incomplete` or `done`. An absent run has no record."""
        return "incomplete" if self.summary is None else "done"

    def curve(self, metric: str) -> dict[int, float]:
        """Epoch -> value, for the epochs that have one."""
        curve = {}
        for row in self.metrics:
            epoch, value = row.get("epoch"), number(row, metric)
            if isinstance(epoch, int) and value is not None:
                curve[epoch] = value
        return curve


def peek(folder: Path, section: str) -> dict:
    """A section of config.json, or {} if unreadable; used to decide what to start."""
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
