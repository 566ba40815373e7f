"""A checkpoint, ready to run: its model and the images of one split, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import data
import utils
from models import VisionTransformer
from runtime import hardware
from training.checkpoints import load_checkpoint, rebuild_model
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

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        split_name: str,
        device: torch.device,
        precision: str | None = None,
        backend: str = "dense",
        data_dir: str | None = None,
        earlier: TrainedModel | None = None,
    ) -> TrainedModel:
        """Read a checkpoint and its data; the images of an `earlier` one are used again.

        Precision and folder are those of the training if they are None. Raises UserError or
        UsageError if the checkpoint cannot be read, has weights that are not finite, or does not go
        with the split, the device or the data.
        """
        state = load_checkpoint(checkpoint)
        settings = Settings.from_dict(state["settings"])
        if split_name == "holdout" and not settings.data.holdout:
            raise UsageError(
                f"--split holdout, but {checkpoint} was trained without --holdout; choose "
                "--split test or train"
            )
        model = rebuild_model(state, backend).to(device)
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise UserError(
                f"{checkpoint} holds weights that are not finite, so it cannot be evaluated; train "
                "it again, perhaps with a lower --lr"
            )
        with utils.usage_errors():
            model.compiled_mask.check_device(device)

        precision = hardware.resolve_precision(precision or settings.machine.precision, device)
        hardware.set_precision(precision)

        request = image_request(settings, state["model_config"]["img_size"], split_name, data_dir)
        if earlier is not None and earlier.request == request:
            dataset = dataclasses.replace(earlier.dataset)
        else:
            dataset = data.load_dataset(device=device, **request)
        is_as_trained = check_data(dataset, state["data"], split_name)
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
        )

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
            "class_names": self.dataset.class_names,
        }

    def describe_run(self) -> dict:
        """What was trained, for JSON."""
        return {
            "mask_type": self.settings.mask.mask_type,
            "expansion_step": self.settings.mask.expansion_step,
            "mask_label": self.settings.mask.spec.label,
            "pool": self.model.config["pool"],
            "run_name": self.settings.run.run_name,
            "seed": self.settings.optimization.seed,
        }


def image_request(
    settings: Settings, img_size: tuple[int, int], split_name: str, data_dir: str | None
) -> dict:
    """Arguments of `data.load_dataset` for the images of a split.

    Training images are divided as in training, unless only the test images are needed.
    """
    return {
        "name": settings.data.dataset,
        "data_dir": data_dir or settings.data.data_dir,
        "img_size": tuple(img_size),
        "held_out": 0.0 if split_name == "test" else settings.data.holdout,
        **({"skip_unreadable": True} if settings.data.skip_unreadable else {}),
    }


def check_data(dataset: data.Dataset, trained_on: dict, split_name: str) -> bool | None:
    """Whether the data is what the checkpoint was trained with, None if unknown.

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

    is_as_trained = dataset.checksum == trained_on["checksum"]
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
