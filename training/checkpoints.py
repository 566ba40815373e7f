"""Checkpoints: one file without pickled code, to resume a run and rebuild its model."""

from __future__ import annotations

import errno
import os
import warnings
import zipfile
from pathlib import Path

import torch

import models
import utils
from training.settings import Settings
from utils import UserError, atomic_path, first_line

FORMAT = 2
KEYS = {"model", "model_config", "settings", "data", "epoch", "history"}


class DamagedError(UserError):
    """A file that cannot be read as a checkpoint."""


# --------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write last.pt, whole or not at all, and keep the one before it as previous.pt.

    Raises UserError if there is no space for it.
    """
    last = folder / utils.CHECKPOINT
    with atomic_path(last) as temporary:
        try:
            torch.save({"format": FORMAT, **state}, temporary)
        except RuntimeError as error:  # torch's writer does not say why it failed
            if utils.says_no_memory(error):
                raise
            raise UserError(
                f"cannot write {last}: no space left on the disk, or a quota is reached "
                f"({first_line(error)}). What was saved before stays good; make room, then the "
                "same command goes on"
            ) from error
        keep_as(folder / utils.PREVIOUS_CHECKPOINT, last)


def keep_as(other: Path, path: Path) -> None:
    """Hard-link `path`, if it is there, to `other`, so that it survives being replaced."""
    if not path.exists():
        return
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        os.replace(path, other)


# --------------------------------------------------------------------------------------------------
# Reading


def load_latest(folder: Path) -> dict | None:
    """The state of last.pt, else of previous.pt, else None; a damaged file is set aside, named."""
    for path in (folder / utils.CHECKPOINT, folder / utils.PREVIOUS_CHECKPOINT):
        if not path.exists():
            continue
        try:
            return load_checkpoint(path)
        except DamagedError as error:
            aside = path.with_name(f"{path.name}.damaged")
            os.replace(path, aside)
            utils.warn(
                f"{error}; set aside as {aside.name}, going on from what was saved before it"
            )
    return None


def load_checkpoint(path: Path) -> dict:
    """The state that `save_checkpoint` wrote, on the CPU.

    Raises UserError for a checkpoint of another version, DamagedError for a file that is damaged or
    no checkpoint.
    """
    try:
        with warnings.catch_warnings():  # about foreign files; the error below says enough
            warnings.simplefilter("ignore")
            _verify_checksums(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; expected the last.pt of a run folder") from None
    except Exception as error:  # a damaged file can raise anything
        if is_no_fault_of_the_file(error):
            raise
        raise DamagedError(
            f"{path} is no readable checkpoint (damaged, or made by something else): "
            f"{first_line(error)}"
        ) from error

    is_ours = isinstance(state, dict) and "format" in state
    if not is_ours or (state["format"] == FORMAT and not state.keys() >= KEYS):
        raise DamagedError(
            f"{path} is no checkpoint of this project: expected the last.pt that main.py writes"
        )
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}; train "
            "it again"
        )
    return state


def _verify_checksums(path: Path) -> None:
    """Raise BadZipFile if one is wrong: torch.load ignores those that torch.save writes."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def is_no_fault_of_the_file(error: Exception) -> bool:
    """Whether memory ran out, or a disk or network failed, perhaps only this time."""
    # A damaged file may point outside of itself, which gives EINVAL or no number at all.
    is_of_the_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
    return is_of_the_system or utils.says_no_memory(error)


def rebuild_model(
    state: dict, backend: str = "auto", img_size: tuple[int, int] | None = None
) -> models.VisionTransformer:
    """The trained model that a checkpoint describes, on the CPU, in eval mode.

    With the averaged weights, if the run had any. For images of another `img_size` (height, width)
    than in training, the positions are resampled and the mask is built for the new grid. Raises
    ValueError if that size does not fit the patches, or if a mask from a file is for another grid.
    """
    config = state["model_config"]
    trained_grid = grid_of(config)
    config = config | {"img_size": tuple(img_size or config["img_size"])}
    mask = _masks_of(state, *grid_of(config), config["depth"])
    model = models.VisionTransformer(**config, attention_mask=mask, backend=backend)

    weights = state.get("average") or state["model"]
    if model.grid != trained_grid:
        num_prefix = len(model.pos_embed[0]) - model.num_patches
        positions = weights["pos_embed"]
        positions = models.resample_positions(positions, trained_grid, model.grid, num_prefix)
        weights = weights | {"pos_embed": positions}
    model.load_state_dict(weights)
    return model.eval()


def grid_of(config: dict) -> tuple[int, int]:
    """Rows and columns of patches, at least 1, so that the model reports what is too small."""
    height, width = (max(side // config["patch_size"], 1) for side in config["img_size"])
    return height, width


def _masks_of(state: dict, height: int, width: int, depth: int) -> list[torch.Tensor | None]:
    """The mask of each layer: what the checkpoint holds of a file, or else built anew."""
    spec = Settings.from_dict(state["settings"]).mask.spec
    if state.get("mask") is None:
        return spec.build_layers(height, width, depth)
    rows, columns = grid_of(state["model_config"])
    if (height, width) != (rows, columns):
        raise ValueError(
            f"the mask {spec.mask_file} is for the {rows}x{columns} grid of patches in training, "
            f"not for {height}x{width}; leave out --img_size"
        )
    return [None if layer in spec.global_layers else state["mask"] for layer in range(depth)]


# --------------------------------------------------------------------------------------------------
# Random numbers


def rng_state(device: torch.device) -> dict:
    """The states of the random number generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_rng_state(states: dict, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[device.type])
