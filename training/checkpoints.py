"""Checkpoints: everything to go on from, or to rebuild the model from, in one file that holds no code."""

from __future__ import annotations

import errno
import os
import warnings
import zipfile
from pathlib import Path

import torch

import models
import utils
from masks import MaskSpec
from utils import UserError, atomic_path, first_line

FORMAT = 2
KEYS = {"model", "model_config", "settings", "data", "epoch", "history"}


class DamagedError(UserError):
    """A file that should be a checkpoint and cannot be read."""


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write last.pt, whole or not at all; the one before stays as previous.pt. Raises UserError without space."""
    last = folder / utils.CHECKPOINT
    with atomic_path(last) as temporary:
        try:
            torch.save({"format": FORMAT, **state}, temporary)
        except RuntimeError as error:  # torch's writer does not say why it failed
            if utils.says_no_memory(error):
                raise
            raise UserError(
                f"cannot write {last}: no space left on the disk, or a quota reached ({first_line(error)}). What was "
                "saved before stays good; make room, then the same command goes on"
            ) from error
        keep_as(folder / utils.PREVIOUS_CHECKPOINT, last)


def keep_as(other: Path, path: Path) -> None:
    """Hard-link `path`, if it is there, to `other`, so that it survives being replaced."""
    if path.exists():
        other.unlink(missing_ok=True)
        try:
            os.link(path, other)
        except OSError:  # a file system without links
            os.replace(path, other)


def load_latest(folder: Path) -> dict | None:
    """The state of last.pt, else of previous.pt, or None if there is none; a damaged file is set aside and named."""
    for path in (folder / utils.CHECKPOINT, folder / utils.PREVIOUS_CHECKPOINT):
        if path.exists():
            try:
                return load_checkpoint(path)
            except DamagedError as error:
                aside = path.with_name(f"{path.name}.damaged")
                os.replace(path, aside)
                utils.warn(f"{error}; set aside as {aside.name}, going on from what was saved before it")
    return None


def load_checkpoint(path: Path) -> dict:
    """The state in a file of `save_checkpoint`, on the CPU.

    Raises UserError if it is of another version, DamagedError if it is no checkpoint, or is damaged.
    """
    try:
        with warnings.catch_warnings():  # of foreign files; the error says it all
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save wrote
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; expected the last.pt of a run folder") from None
    except Exception as error:  # of a damaged file anything may come
        if is_no_fault_of_the_file(error):
            raise
        raise DamagedError(
            f"{path} is no readable checkpoint (damaged, or made by something else): {first_line(error)}"
        ) from error
    if not isinstance(state, dict) or "format" not in state or (state["format"] == FORMAT and not state.keys() >= KEYS):
        raise DamagedError(f"{path} is no checkpoint of this project: expected the last.pt that main.py writes")
    if state["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}; train it again")
    return state


def is_no_fault_of_the_file(error: Exception) -> bool:
    """Whether reading failed for lack of memory, or by a disk or network that may answer the next time."""
    of_the_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)  # a place outside the file
    return of_the_system or utils.says_no_memory(error)


def rebuild_model(state: dict, backend: str = "auto") -> models.VisionTransformer:
    """The trained model as the checkpoint describes it, on the CPU, in eval mode; averaged weights, if it has any."""
    settings, config = state["settings"], state["model_config"]
    height, width = (size // config["patch_size"] for size in config["img_size"])
    mask = MaskSpec.from_settings(settings).build(height, width)
    model = models.VisionTransformer(**config, attention_mask=mask, backend=backend)
    model.load_state_dict(state.get("average") or state["model"])
    return model.eval()


def rng_state(device: torch.device) -> dict:
    """The random number generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_rng_state(states: dict, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[device.type])
