"""Follow a run in TensorBoard, Weights & Biases or Trackio: `main.py --track NAME`.

The run folder stays the truth. When a run begins or resumes, its tracker is given all epochs so far
and forgets what it had of them, so none is doubled or missing, wherever the run was cut off.
Whatever goes wrong in a tracker, the training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import utils
from utils import UserError

# What to install for each. No package is imported before it is asked for.
REQUIREMENTS = {
    "tensorboard": "tensorboard>=2.21",
    "wandb": "wandb>=0.31",
    "trackio": "trackio>=0.43",
}
TRACKERS = ("none", *REQUIREMENTS)

IDS = "tracking.json"  # in the run folder: the ids under which trackers know the run
SECONDS_TO_CONNECT = 30  # before the training
SECONDS_TO_UPLOAD = 60  # at the end of a run


def check_installed(name: str) -> None:
    """Raise UserError, with what to install, if a tracker's package is missing."""
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    # wandb leaves folders of its own name behind, which import as empty packages without origin.
    if spec is None or spec.origin is None:
        raise UserError(
            f"--track {name} needs the package {name}, which is not installed: "
            f"pip install '{REQUIREMENTS[name]}', or leave out --track"
        )


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run when it begins or resumes."""

    folder: Path  # <output_dir>/<dataset_name>/<run_name>/seed_<n>
    config: dict  # the content of config.json
    history: list[dict]  # the rows of metrics.jsonl so far

    @property
    def project(self) -> str:
        return self.folder.parents[1].name

    @property
    def group(self) -> str:
        return self.folder.parent.name

    @property
    def name(self) -> str:
        return f"{self.group} seed {self.config['settings']['seed']}"

    @property
    def picture(self) -> Path | None:
        """The picture of the mask; None if it could not be drawn."""
        path = self.folder / utils.MASK_PICTURE
        return path if path.exists() else None

    @property
    def facts(self) -> dict:
        """What runs are told apart by: the settings, and a few facts about model and machine."""
        facts = {"num_parameters": self.config["num_parameters"]}
        for key in ("num_neighbors_nominal", "num_neighbors_mean", "backend"):
            facts[key] = self.config["attention"][key]
        facts["device_name"] = self.config["provenance"].get("device")
        return {**self.config["settings"], **facts}


class Backend(Protocol):
    """A tracker's package. Starting it replaces what it has of the run by `run.history`."""

    where: str  # how to look at the run

    def __init__(self, run: TrackedRun): ...

    def log(self, row: dict) -> None:
        """One row of metrics.jsonl, at the step `row["epoch"]`."""

    def finish(self, numbers: dict[str, float], epoch: int) -> None:
        """The final numbers, by name."""

    def close(self) -> None: ...


class Tracker:
    """Passes a run on to a backend; at the backend's first failure, warns and goes on without."""

    def __init__(self, name: str):
        self.name = name
        self.backend: Backend | None = None

    def begin(self, folder: Path, config: dict, history: list[dict]) -> None:
        """Start the backend, if there is one; `config` and `history` are those of the folder."""
        if self.name == "none":
            return
        with self._contained():
            self.backend = BACKENDS[self.name](TrackedRun(folder, config, history))
        if self.backend is not None:
            print(f"tracked by {self.name}: {self.backend.where}", flush=True)

    def log_epoch(self, row: dict) -> None:
        if self.backend is not None:
            with self._contained():
                self.backend.log(row)

    def log_summary(self, summary: dict) -> None:
        """The final numbers; `summary` is the content of summary.json."""
        if self.backend is not None:
            numbers = {**summary["final"], **summary}
            named = {f"final/{key}": value for key, value in scalars(numbers).items()}
            with self._contained():
                self.backend.finish(named, summary["final"]["epoch"])

    def close(self) -> None:
        backend, self.backend = self.backend, None
        if backend is not None:
            with self._contained():
                backend.close()

    @contextlib.contextmanager
    def _contained(self) -> Iterator[None]:
        """Keep a backend's talk and its failures to itself."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:  # whatever these packages raise
            self.backend = None
            reason = utils.first_line(error)
            utils.warn(f"training goes on without --track {self.name}, which failed: {reason}")


def scalars(row: dict) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl or of summary.json, without those that only count."""
    counts = ("epoch", "epochs", "step", "format")
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, (int, float)) and key not in counts
    }


def curves(row: dict) -> dict[str, float]:
    """The numbers of a row as trackers group them: `train/loss`, `eval/loss`, `lr`, ..."""
    return {re.sub("^(train|eval)_", r"\1/", key): value for key, value in scalars(row).items()}


# --------------------------------------------------------------------------------------------------
# Backends


class TensorBoard:
    """Event files in the run folder, so that TensorBoard names the run by its path."""

    FILES = "events.out.tfevents.*"

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        for file in run.folder.glob(self.FILES):
            file.unlink()
        # A TensorBoard that is open right now forgets the old epochs, too.
        self.writer = SummaryWriter(str(run.folder), purge_step=0)
        self.where = f"tensorboard --logdir {shlex.quote(str(run.folder.parents[1]))}"

        self.writer.add_text("config", _as_code(run.facts), 0)
        if run.picture is not None:
            self._add_picture(run.picture)
        for row in run.history:
            self.log(row)

    def _add_picture(self, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))  # [H, W, 3]
        self.writer.add_image("attention_mask", pixels, 0, dataformats="HWC")

    def log(self, row: dict) -> None:
        for name, value in curves(row).items():
            self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()

    def finish(self, numbers: dict[str, float], epoch: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.add_text("final", _as_code(numbers), epoch)

    def close(self) -> None:
        self.writer.close()


def _as_code(values: dict) -> str:
    """Markdown that shows the values as they are."""
    lines = json.dumps(values, indent=2, ensure_ascii=False).splitlines()
    return "\n".join(f"    {line}" for line in lines)


class Wandb:
    """Weights & Biases; offline, in the folder `wandb` of the run, unless WANDB_MODE says online.

    So nothing waits for a network, asks for a key, or leaves this machine uncalled-for.
    """

    def __init__(self, run: TrackedRun):
        import wandb

        self.wandb = wandb
        run_id = _read_ids(run.folder).get("wandb") or uuid.uuid4().hex[:8]
        self.run = self._init(run, run_id)
        _save_id(run.folder, "wandb", run_id)
        self.where = self._describe()

        # Offline, we begin anew at step 0. Online, the server has kept the steps it knows.
        first = self.run.step
        if first == 0 and run.picture is not None:
            self.run.log({"attention_mask": self.wandb.Image(str(run.picture))}, step=0)
        for row in run.history:
            if row["epoch"] >= first:
                self.log(row)
        self._remove_earlier_parts(run.folder, run_id)

    def _init(self, run: TrackedRun, run_id: str):
        mode = os.environ.get("WANDB_MODE") or "offline"
        options = {
            "id": run_id,
            "resume": "allow",
            "dir": str(run.folder),
            # These characters are not allowed in the name of a project.
            "project": os.environ.get("WANDB_PROJECT") or re.sub(r"[/\\#?%:]", "-", run.project),
            "group": run.group,
            "name": run.name,
            "config": run.facts,
            "settings": self.wandb.Settings(
                silent=True,
                console="off",
                init_timeout=SECONDS_TO_CONNECT,
                finish_timeout=SECONDS_TO_UPLOAD,
            ),
        }
        try:
            return self.wandb.init(mode=mode, **options)
        except Exception as error:  # no network, no key, no permission
            if mode != "online":
                raise
            utils.warn(f"--track wandb goes on offline: {utils.first_line(error)}")
            self.wandb.teardown()  # its service still holds the id of the run
            return self.wandb.init(mode="offline", **options)

    def _describe(self) -> str:
        if not self.run.offline:
            return self.run.url or "nowhere, as WANDB_MODE is disabled"
        return f"wandb sync {shlex.quote(str(self._offline_dir()))} uploads it"

    def _offline_dir(self) -> Path:
        return Path(self.run.dir).parent

    def _remove_earlier_parts(self, folder: Path, run_id: str) -> None:
        """Remove what earlier processes of the run wrote offline, if all of it is in a new part."""
        if not self.run.offline:
            return
        # Of two that begin in the same second, wandb numbers the second one: `<id>-1`.
        for part in folder.glob(f"wandb/offline-run-*-{run_id}*"):
            was_uploaded = any(part.glob("*.synced"))
            if part.name != self._offline_dir().name and not was_uploaded:
                shutil.rmtree(part)

    def log(self, row: dict) -> None:
        self.run.log(curves(row), step=row["epoch"])

    def finish(self, numbers: dict[str, float], epoch: int) -> None:
        self.run.summary.update(numbers)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio: a database on this machine (TRACKIO_DIR), one project per dataset."""

    def __init__(self, run: TrackedRun):
        import trackio

        self.trackio = trackio
        self._delete(run.project, _read_ids(run.folder).get("trackio"))
        self.run = trackio.init(
            project=run.project, name=run.name, group=run.group, config=run.facts, embed=False
        )
        _save_id(run.folder, "trackio", self.run.id)
        self.where = f"trackio show --project {shlex.quote(run.project)}"

        if run.picture is not None:
            self.run.log({"attention_mask": trackio.Image(str(run.picture))}, step=0)
        for row in run.history:
            self.log(row)

    def _delete(self, project: str, run_id: str | None) -> None:
        """Forget the run with this id, which is given again, whole. Others may share its name."""
        if run_id is None:
            return
        with contextlib.suppress(ValueError):  # the whole project is gone
            for run in self.trackio.Api().runs(project):
                if run.id == run_id:
                    run.delete()

    def log(self, row: dict) -> None:
        self.run.log(curves(row), step=row["epoch"])

    def finish(self, numbers: dict[str, float], epoch: int) -> None:
        self.run.log(numbers, step=epoch)

    def close(self) -> None:
        self.trackio.finish()


def _read_ids(folder: Path) -> dict:
    return utils.read_json(folder / IDS) if (folder / IDS).exists() else {}


def _save_id(folder: Path, name: str, run_id: str) -> None:
    utils.write_json(folder / IDS, _read_ids(folder) | {name: run_id})


BACKENDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
