"""Reads files of weights, and only in ways that cannot run code: tensors by name, and notes."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import utils
from utils import UsageError, UserError, first_line

SAFETENSORS = ".safetensors"
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # read with weights_only=True

# Where training scripts keep a state dict among other things. Averaged weights come first, as those
# are what such scripts evaluate.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module")
# What DistributedDataParallel and torch.compile put before each name.
PREFIXES = ("module.", "_orig_mod.")
NAMES_SHOWN = 3

# In the metadata of a .safetensors file of `eval.py --export`, as JSON.
TIMM_ARGUMENTS = "timm"  # the arguments of timm.create_model
NOTES = "notes"  # what else one has to know


@dataclass(frozen=True)
class WeightFile:
    path: Path
    sha256: str
    tensors: dict[str, Tensor]  # on the CPU, by name
    # What stands in the file or beside it: JSON, {} where there is nothing.
    timm_arguments: dict  # of our own exports
    notes: dict  # likewise
    config: dict  # config.json, as Hugging Face and timm write it

    @property
    def name(self) -> str:
        return str(self.path)


def read(path: Path) -> WeightFile:
    """Raises UserError for a file that cannot be read, UsageError for a format that is not."""
    if path.suffix not in (SAFETENSORS, *PICKLED):
        raise UsageError(
            f"{path}: weights are read from {SAFETENSORS} or, as torch.save writes them, from "
            f"{', '.join(PICKLED)}"
        )
    if not path.is_file():
        raise UserError(f"there is no file of weights at {path}")

    metadata = {}
    if path.suffix == SAFETENSORS:
        tensors, metadata = _read_safetensors(path)
    else:
        tensors = _unwrap(path, _load_pickled(path))
    if not tensors:
        raise UserError(f"{path} holds no weights")

    return WeightFile(
        path=path,
        sha256=hash_of(path),
        tensors={_without_prefixes(name): value for name, value in tensors.items()},
        timm_arguments=_parse_object(metadata.get(TIMM_ARGUMENTS, "{}")),
        notes=_parse_object(metadata.get(NOTES, "{}")),
        config=_config_beside(path),
    )


def hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return safetensors.torch.load_file(path), metadata
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no readable safetensors file: {first_line(error)}") from error


def _load_pickled(path: Path) -> object:
    """What torch.save wrote, as long as that is tensors and plain values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign files; the errors below say enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_why_not_unpickled(path)) from error
    except Exception as error:  # a damaged file can raise anything
        if (isinstance(error, OSError) and error.errno is not None) or utils.says_no_memory(error):
            raise
        raise UserError(f"{path} is no readable file of weights: {first_line(error)}") from error


def _why_not_unpickled(path: Path) -> str:
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not even a zip file with a pickle
        unsafe = []
    if not unsafe:
        return f"{path} is no readable file of weights: damaged, or written by something else"

    shown = ", ".join(sorted(unsafe)[:NAMES_SHOWN])
    return (
        f"{path} holds pickled objects ({shown}), which could run any code when they are read, so "
        "it is not; where you trust it, save its weights alone: torch.save(model.state_dict(), ...)"
    )


def _unwrap(path: Path, content: object) -> dict[str, Tensor]:
    """The state dict in what was saved. Raises UserError if there is none."""
    if isinstance(content, dict) and {"model_config", "settings"} <= content.keys():
        raise UsageError(
            f"{path} is a checkpoint of main.py; start from it with --init_from instead of "
            "--pretrained"
        )
    for candidate in _candidates(content):
        tensors = {name: value for name, value in candidate.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors

    raise UserError(
        f"{path} holds no state dict: expected tensors by name, found {_describe(content)}"
    )


def _candidates(content: object) -> Iterator[dict]:
    if isinstance(content, dict):
        wrapped = (content.get(key) for key in WRAPPERS)
        yield from (value for value in wrapped if isinstance(value, dict))
        yield content


def _describe(content: object) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    return f"a dict of {', '.join(map(repr, [*content][:NAMES_SHOWN])) or 'nothing'}"


def _without_prefixes(name: str) -> str:
    while name.startswith(PREFIXES):
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
    return name


def _config_beside(path: Path) -> dict:
    """config.json in the same folder, if it is about a model of Hugging Face or timm."""
    config = path.with_name("config.json")
    try:
        found = _parse_object(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.keys() & {"model_type", "architecture"} else {}


def _parse_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
