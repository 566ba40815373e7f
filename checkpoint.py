"""Checkpoints: everything to go on from, or to rebuild the model from, in one file that holds no code."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

import masks
import models
from utils import UserError, atomic_path, first_line

FORMAT = 1
KEYS = {"model", "model_config", "settings", "data", "epoch", "history"}


def save_checkpoint(path: Path, state: dict) -> None:
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load_checkpoint(path: Path) -> dict:
    """The state in a file of `save_checkpoint`, on the CPU. Raises UserError if it is none, or is damaged."""
    try:
        with warnings.catch_warnings():  # of foreign files; the error says it all
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; expected the last.pt of a run folder") from None
    except Exception as error:  # of a damaged file anything may come
        raise UserError(
            f"{path} is no readable checkpoint (damaged, or made by something else): {first_line(error)}"
        ) from error
    if not isinstance(state, dict) or "format" not in state or (state["format"] == FORMAT and not state.keys() >= KEYS):
        raise UserError(f"{path} is no checkpoint of this project: expected the last.pt that main.py writes")
    if state["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}; train it again")
    return state


def rebuild_model(state: dict, backend: str = "auto") -> models.VisionTransformer:
    """The trained model as the checkpoint describes it, on the CPU, in eval mode."""
    settings, config = state["settings"], state["model_config"]
    height, width = (size // config["patch_size"] for size in config["img_size"])
    mask = masks.build_attention_mask(settings["mask_type"], settings["expansion_step"], height, width)
    model = models.VisionTransformer(**config, attention_mask=mask, backend=backend)
    model.load_state_dict(state["model"])
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
