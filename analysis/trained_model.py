"""A checkpoint, ready to run: its model and the images of one split, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import data
import utils
from models import VisionTransformer
from pipeline import identity, sizes
from runtime import hardware
from training.checkpoints import grid_of, load_checkpoint, rebuild_model
from training.settings import EVAL_SPLITS, Settings
from utils import UsageError, UserError

SPLITS = {**EVAL_SPLITS, "train": "training images"}


@dataclass
class TrainedModel:
    checkpoint: Path
    epoch: int  # finished epochs
    settings: Settings
    model: VisionTransformer  # on the device, in eval mode
    dataset: data.Dataset
    request: dict  # what it was read with
    is_as_trained: bool | None  # whether these are the images of the training; None if unknown
    split_name: str  # one of SPLITS
    device: torch.device
    precision: str
    trained_size: tuple[int, int]  # (height, width) of the images in training

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        split_name: str,
        device: torch.device,
        precision: str | None = None,
        backend: str = "dense",
        img_size: tuple[int, int] | None = None,
        elsewhere: dict | None = None,
        earlier: TrainedModel | None = None,
    ) -> TrainedModel:
        """Read a checkpoint and its data; the images of an `earlier` one are used again.

        Precision and size are those of the training if they are None, and so are the settings of
        the data that `elsewhere` does not name. Raises UserError or UsageError if the checkpoint
        cannot be read, has weights that are not finite, or does not go with the split, the size,
        the device or the data.
        """
        state, model = load_model(checkpoint, device, backend, img_size)
        settings = Settings.from_dict(state["settings"])
        if split_name == "holdout" and not settings.data.holdout:
            raise UsageError(
                f"--split holdout, but {checkpoint} was trained without --holdout; choose "
                "--split test or train"
            )

        precision = hardware.resolve_precision(precision or settings.machine.precision, device)
        hardware.set_precision(precision)

        misplaced = [name for name in ("labels", "split_folder") if (elsewhere or {}).get(name)]
        if misplaced and settings.data.dataset != identity.IMAGE_FOLDER:
            raise UsageError(
                f"--{misplaced[0]} is for image folders, but {checkpoint} was trained on "
                f"{settings.data.dataset}"
            )
        trained_size, img_size = tuple(state["model_config"]["img_size"]), model.config["img_size"]
        request = image_request(settings.changed(**elsewhere or {}), img_size, split_name)
        if earlier is not None and earlier.request == request:
            dataset = dataclasses.replace(earlier.dataset)
        else:
            dataset = data.load_dataset(device=device, **request)
        is_as_trained = check_data(dataset, state["data"], split_name, img_size == trained_size)
        # Normalize as in training, whatever the folder contains now.
        dataset.mean, dataset.std = state["data"]["mean"], state["data"]["std"]

        return cls(
            checkpoint=checkpoint,
            epoch=len(state["history"]),
            settings=settings,
            model=model,
            dataset=dataset,
            request=request,
            is_as_trained=is_as_trained,
            split_name=split_name,
            device=device,
            precision=precision,
            trained_size=trained_size,
        )

    @property
    def file_suffix(self) -> str:
        """What tells this split at this size apart in names of files: `test`, `test_192x320`."""
        return self.split_name + sizes.suffix(self.model.config["img_size"], self.trained_size)

    @property
    def split(self) -> data.Split:
        dataset = self.dataset
        splits = {"test": dataset.test, "holdout": dataset.held_out, "train": dataset.train}
        return splits[self.split_name]

    def batches(
        self, batch_size: int, indices: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 [b, C, h, w] and labels of the split, or of some of it: int64 [n]."""
        split = self.split
        if indices is not None:
            indices = indices.to(split.labels.device)
            split = data.Split(split.images[indices], split.labels[indices])
        return data.eval_batches(self.dataset, split, batch_size)

    def describe(self) -> dict:
        """What was evaluated on what, for JSON."""
        return {
            "checkpoint": str(self.checkpoint),
            "epoch": self.epoch,
            "data": self.dataset.label,
            "data_as_trained": self.is_as_trained,
            "split": self.split_name,
            "holdout": self.settings.data.holdout,  # the fraction that was kept from training
            "precision": self.precision,
            "img_size": list(self.model.config["img_size"]),
            "img_size_in_training": list(self.trained_size),
            "class_names": self.dataset.class_names,
        }

    def describe_run(self) -> dict:
        """What was trained, for JSON."""
        return {
            **self.settings.mask.spec.to_settings(),
            "num_registers": self.model.config["num_registers"],
            "mask_label": self.settings.mask.spec.label,
            "pool": self.model.config["pool"],
            "run_name": self.settings.run.run_name,
            "seed": self.settings.optimization.seed,
        }


def load_model(
    checkpoint: Path,
    device: torch.device,
    backend: str = "dense",
    img_size: tuple[int, int] | None = None,
) -> tuple[dict, VisionTransformer]:
    """A checkpoint's state, and its model on the device; says so if it runs at another size."""
    state = load_checkpoint(checkpoint)
    with utils.usage_errors():
        model = rebuild_model(state, backend, img_size).to(device)
        model.layer_masks.check_device(device)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(
            f"{checkpoint} holds weights that are not finite, so it cannot be evaluated; train it "
            "again, perhaps with a lower --lr"
        )

    if model.config["img_size"] != tuple(state["model_config"]["img_size"]):
        print(f"{checkpoint}: {describe_resizing(state, model)}", flush=True)
    return state, model


def describe_resizing(state: dict, model: VisionTransformer) -> str:
    """What was done to run a model on images of another size than in training."""

    def by(sides: Sequence[int]) -> str:
        return "x".join(map(str, sides))

    trained = state["model_config"]
    change = f"{by(model.config['img_size'])} pixels instead of {by(trained['img_size'])}"
    if model.grid == grid_of(trained):
        return f"{change}, the same {by(model.grid)} grid"

    done = f"positions interpolated from the {by(grid_of(trained))} grid to {by(model.grid)}"
    spec = Settings.from_dict(state["settings"]).mask.spec
    if any(compiled.mask is not None for compiled in model.layer_masks.different):
        done += f", the mask {spec.label} rebuilt for it"
    return f"{change}: {done}"


def image_request(settings: Settings, img_size: tuple[int, int], split_name: str) -> dict:
    """Arguments of `data.load_dataset` for the images of a split.

    Training images are divided as in training, unless only the test images are needed.
    """
    return {
        "name": settings.data.dataset,
        "data_dir": settings.data.data_dir,
        "img_size": tuple(img_size),
        "held_out": 0.0 if split_name == "test" else settings.data.holdout,
        **settings.data.reading_options,
    }


def check_data(
    dataset: data.Dataset, trained_on: dict, split_name: str, is_same_size: bool
) -> bool | None:
    """Whether the data is what the checkpoint was trained with, None if unknown.

    Images of a folder may have been stored at another size; then their files tell.

    Raises UserError if its classes differ from those of the checkpoint, or if it is other data and
    the images held out in training are asked for.
    """
    if dataset.class_names != trained_on["class_names"]:
        raise UserError(
            f"the data has classes {dataset.class_names}, the checkpoint was trained on "
            f"{trained_on['class_names']}; point --data_dir at the data that it was trained on"
        )
    if trained_on.get("checksum") is None:  # older checkpoints have none
        return None

    key = "checksum" if is_same_size or trained_on.get("files") is None else "files"
    is_as_trained = getattr(dataset, key) == trained_on[key]
    if not is_as_trained and split_name == "holdout":
        raise UserError(
            f"{dataset.label} holds other images than the checkpoint was trained with, so none of "
            "them is known to be held out; choose --split test or train"
        )
    if not is_as_trained:
        utils.warn(
            f"{dataset.label} holds other images than the checkpoint was trained and tested with; "
            'they are normalized as in training, and the JSON notes it ("data_as_trained")'
        )
    return is_as_trained
