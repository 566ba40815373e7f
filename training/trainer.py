"""The training loop: forward, backward, step, log, evaluate, save; on one process or on many.

Nothing in a step waits for the device: losses and hits add up there, and are read once per epoch
(or every `--log_every` steps, and for the progress bar of a terminal, once a second).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import models
import utils
from runtime import distributed, hardware
from runtime.stopping import StopRequest
from training import optimizers
from training.budget import Budget, trained_seconds
from training.checkpoints import rng_state, save_checkpoint, set_rng_state
from training.evaluation import evaluate, padded_forward
from training.progress import Progress, ProgressBar, Stopwatch, format_epoch
from training.settings import AugmentationSettings, Settings
from utils import UserError

SECONDS_BETWEEN_SAVES = 60.0  # at most this much work is lost, or one epoch
REMEDIES = (
    "what was saved before stays good. A lower --lr, a longer --warmup_fraction or --precision "
    "fp32 may help"
)


class Stopped(Exception):
    """The run was asked to stop, and everything it has done is saved."""


def micro_batch_size(settings: Settings) -> int:
    """The most images that one process takes through the model at once."""
    of_process = -(-settings.optimization.batch_size // distributed.WORLD_SIZE)
    return -(-of_process // settings.machine.grad_accumulation)


def seed_of_process(seed: int) -> int:
    """Of dropout and stochastic depth: another for each process, and not that of another run."""
    if distributed.IS_FIRST:
        return seed
    drawn = np.random.SeedSequence([seed, distributed.RANK]).generate_state(1, np.uint64)
    return int(drawn[0]) % 2**63


def augmentation_of_epoch(
    settings: AugmentationSettings, budget: Budget, epoch: int, seconds_before: float
) -> data.Augmentation:
    """What is done to the training images; in the last epochs they are not mixed.

    `seconds_before`: of training, in the epochs before.
    """
    names = [field.name for field in fields(data.Augmentation)]
    augmentation = data.Augmentation(**{name: getattr(settings, name) for name in names})

    is_mixed = budget.is_mixed(epoch, seconds_before, settings.mix_off)
    return augmentation if is_mixed else replace(augmentation, mix=0.0)


class Trainer:
    """One run: optionally `load` a saved state, then `train` to the end.

    `config` is what config.json holds: its section on the data goes into checkpoints.
    """

    def __init__(
        self,
        model: models.VisionTransformer,
        dataset: data.Dataset,
        settings: Settings,
        config: dict,
        folder: Path,
        device: torch.device,
        stop: StopRequest,
    ):
        self.model, self.dataset, self.settings, self.config = model, dataset, settings, config
        self.folder, self.device, self.stop = folder, device, stop
        optimization, machine = settings.optimization, settings.machine

        self.num_images = len(dataset.train)
        self.steps_per_epoch = data.steps_per_epoch(self.num_images, optimization.batch_size)
        self.budget = optimization.budget
        self.seconds = 0.0  # of training so far, see `read_clock`

        self.optimizers = optimizers.build_optimizers(model, optimization)
        self.schedulers = optimizers.build_schedulers(self.optimizers, self.lr_factor)
        self.average = None
        if optimization.ema:
            self.average = optimizers.WeightAverage(model, optimization.ema)

        hardware.set_precision(machine.precision)
        model.checkpoint_activations = machine.checkpoint_activations
        if machine.compile != "off":
            model.compile_blocks(machine.compile)
            if self.average:
                self.average.model.run_block = model.run_block
                self.average.model.replays_graphs = model.replays_graphs
        self.parallel_model = distributed.wrap(model, device)

        # Where kernels are compiled for one shape, smaller batches are padded to it.
        is_padded = machine.compile != "off" or device.type == "cuda"
        self.padded_size = micro_batch_size(settings) if is_padded else 0

        self.stopwatch = Stopwatch(device)
        self.start_epoch(Progress())
        self.vote = distributed.Vote()
        self.saved_at, self.saved = time.monotonic(), None  # when, and at which step of which epoch
        torch.manual_seed(seed_of_process(optimization.seed))

    def start_epoch(self, progress: Progress) -> None:
        self.progress = progress
        # This process's part of each step's loss, and its hits; read at the end of the epoch.
        self.losses = torch.zeros(self.steps_per_epoch, device=self.device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def step(self) -> int:
        """Steps of the run that are done."""
        return (self.progress.epoch - 1) * self.steps_per_epoch + self.progress.epoch_step

    @property
    def place(self) -> tuple[int, int]:
        """The epoch in progress, and how many of its steps are done."""
        return self.progress.epoch, self.progress.epoch_step

    @property
    def is_done(self) -> bool:
        """Whether all epochs are finished, or the time is up; the same on all processes."""
        return self.budget.share_done(len(self.progress.history), self.seconds) >= 1

    def lr_factor(self, step: int) -> float:
        """The learning rate after so many steps, as a share of its peak."""
        warmup_fraction = self.settings.optimization.warmup_fraction
        if self.budget.minutes is not None:
            share_done = self.budget.share_done(0, self.seconds)
            return optimizers.lr_factor_by_clock(share_done, warmup_fraction, step)

        total_steps = self.budget.epochs * self.steps_per_epoch
        return optimizers.lr_factor(step, total_steps, round(warmup_fraction * total_steps))

    def read_clock(self, seconds_of_epoch: float) -> None:
        """Note how long the run has trained, if that decides how it goes on.

        All processes go by the clock of the first, so that they agree.
        """
        if self.budget.minutes is not None:
            seconds = trained_seconds(self.progress.history) + seconds_of_epoch
            self.seconds = distributed.from_first(seconds)

    # ----------------------------------------------------------------------------------------------
    # State

    def save(self) -> None:
        """Write last.pt. Raises UserError, and keeps the one before, if weights are not finite."""
        are_finite = [parameter.isfinite().all() for parameter in self.model.parameters()]
        if not torch.stack(are_finite).all():
            raise UserError(
                f"the weights are not finite after step {self.step} (epoch {self.progress.epoch}); "
                f"{REMEDIES}"
            )

        of_ranks = distributed.from_all(
            {
                "rng": rng_state(self.device),
                "losses": self.losses.cpu(),
                "num_correct": self.num_correct.cpu(),
            }
        )
        if distributed.IS_FIRST:
            state = {
                "model": self.model.state_dict(),
                "average": self.average and self.average.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
                "ranks": of_ranks,
                "settings": self.settings.to_dict(),
                "model_config": self.model.config,
                "mask": self.mask_from_file(),
                "data": self.config["data"],
                "weights": self.config.get("weights"),
                **vars(self.progress),
            }
            save_checkpoint(self.folder, state)
        self.saved_at, self.saved = time.monotonic(), self.place
        self.vote = distributed.Vote()  # what was voted on before is done

    def mask_from_file(self) -> torch.Tensor | None:
        """The mask of --mask_file, bool [N, N], so that the model can be rebuilt without it."""
        if self.settings.mask.mask_type != "file":
            return None
        masks = [compiled.mask for compiled in self.model.layer_masks]
        return next((mask for mask in masks if mask is not None), None)

    def load(self, state: dict) -> None:
        """Continue from a saved state, on the same number of processes or another."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
        for name in ("optimizers", "schedulers"):
            for mine, saved in zip(getattr(self, name), state[name], strict=True):
                mine.load_state_dict(saved)
        self.progress = Progress(**{field.name: state[field.name] for field in fields(Progress)})
        self.read_clock(self.progress.train_seconds)

        ranks = state["ranks"]
        if len(ranks) == distributed.WORLD_SIZE:
            mine = ranks[distributed.RANK]
            set_rng_state(mine["rng"], self.device)
            losses, num_correct = mine["losses"], mine["num_correct"]
        else:  # another number of processes: the first takes over all sums
            share = 1 if distributed.IS_FIRST else 0
            losses = share * sum(rank["losses"] for rank in ranks)
            num_correct = share * sum(rank["num_correct"] for rank in ranks)
        self.losses, self.num_correct = losses.to(self.device), num_correct.to(self.device)

    # ----------------------------------------------------------------------------------------------
    # Training

    def train(self, on_epoch: Callable[[dict], None] = lambda row: None) -> list[dict]:
        """Train to the last epoch, or until the time is up -> the rows of metrics.jsonl.

        `on_epoch` is called with each new row on the first process. Raises Stopped if asked to
        stop; everything is saved then. Killed, the run has lost SECONDS_BETWEEN_SAVES at most, or
        one epoch: it repeats those that were not saved, and their rows are written anew.
        """
        self.write_metrics()  # the checkpoint is the truth, the log follows it
        hardware.reset_peak_memory(self.device)  # forget the peak of choosing a backend

        while not self.is_done or self.progress.epoch_step:
            self.train_epoch()
            # All processes go by one history: its times decide when images are no longer mixed.
            row = distributed.from_first(self.finish_epoch())
            self.start_epoch(self.progress.next_epoch(row))
            self.read_clock(0.0)  # the device was still working when it was read last
            if distributed.any_rank(self.is_done or self.is_save_due()):
                self.save()
            self.write_metrics()

            if distributed.IS_FIRST:
                print(format_epoch(row, self.budget), flush=True)
                on_epoch(row)
            if not self.is_done:
                self.stop_if_asked()
        return self.progress.history

    def stop_if_asked(self) -> None:
        """Save and raise Stopped, on all processes, if one was asked to stop."""
        if distributed.any_rank(self.stop.reason is not None):
            if self.saved != self.place:
                self.save()
            raise Stopped

    def write_metrics(self) -> None:
        if distributed.IS_FIRST:
            utils.write_json_lines(self.folder / utils.METRICS, self.progress.history)

    def train_epoch(self) -> None:
        """Train the rest of the epoch, or until the time is up.

        Saves now and then, and when asked to stop.
        """
        if self.is_done:  # asked to stop in the evaluation of the last epoch
            return
        progress, optimization = self.progress, self.settings.optimization
        batches = data.train_batches(
            dataset=self.dataset,
            batch_size=optimization.batch_size,
            seed=optimization.seed,
            epoch=progress.epoch,
            augmentation=augmentation_of_epoch(
                self.settings.augmentation,
                self.budget,
                progress.epoch,
                trained_seconds(progress.history),
            ),
            start_step=progress.epoch_step,
            rank=distributed.RANK,
            world_size=distributed.WORLD_SIZE,
        )
        self.model.train()
        self.stopwatch.start(progress)

        with self.progress_bar() as bar:
            for images, labels in batches:
                size = self.size_of_batch(progress.epoch_step)
                with self.stopwatch.step(size, shape=self.padded_size or size):
                    self.train_step(images, labels)
                    progress.epoch_step += 1
                bar.update(progress.epoch_step, size, self.losses, self.num_correct)

                if progress.epoch_step == self.steps_per_epoch or self.is_done:
                    break
                if self.vote.cast(self.is_save_due() or self.stop.reason is not None):
                    self.stopwatch.pause()
                    self.save()
                    self.stop_if_asked()
                    self.stopwatch.start(progress)
        self.stopwatch.pause()

    def is_save_due(self) -> bool:
        """Whether the last save is long enough ago; the first epoch is saved in any case.

        At the end of an epoch, and after one that was not saved, a minute is enough.
        """
        seconds = 60 * self.settings.run.checkpoint_every_minutes or math.inf
        is_at_end = self.progress.epoch_step == 0
        if is_at_end and self.saved is None:
            return True

        has_ended = self.saved is not None and self.progress.epoch > self.saved[0]
        if is_at_end or (has_ended and seconds < math.inf):
            seconds = min(seconds, SECONDS_BETWEEN_SAVES)
        return time.monotonic() - self.saved_at > seconds

    def progress_bar(self) -> ProgressBar:
        progress, batch_size = self.progress, self.settings.optimization.batch_size
        return ProgressBar(
            title=f"epoch {self.budget.name_of(progress.epoch).strip()}",
            num_images=self.num_images,
            num_done=min(self.num_images, progress.epoch_step * batch_size),
            num_steps=self.steps_per_epoch,
            log_every=self.settings.run.log_every,
        )

    def size_of_batch(self, epoch_step: int) -> int:
        """Images of a step, over all processes."""
        batch_size = self.settings.optimization.batch_size
        return min(batch_size, self.num_images - epoch_step * batch_size)

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step on this process's images [b, C, h, w] of a batch.

        Labels are int64 [b], or float [b, classes] where images are mixed.
        """
        epoch_step = self.progress.epoch_step
        size = self.size_of_batch(epoch_step)
        first, stop = data.rank_part(size, distributed.RANK, distributed.WORLD_SIZE)
        # A process without an image computes one of another's at weight 0, as DDP waits for it.
        weight = 1 / size if stop > first else 0.0

        num_parts = min(self.settings.machine.grad_accumulation, len(images))
        parts = list(
            zip(images.tensor_split(num_parts), labels.tensor_split(num_parts), strict=True)
        )
        for number, (x, y) in enumerate(parts, start=1):
            is_last = number == num_parts
            no_sync = distributed.without_sync(self.parallel_model)
            with contextlib.nullcontext() if is_last else no_sync:
                loss, hits = self.loss_of(x, y)
                loss = weight * loss
                (distributed.WORLD_SIZE * loss).backward()  # DDP averages over the processes
            self.losses[epoch_step] += loss.detach()
            self.num_correct += hits if weight else 0

        if self.settings.optimization.grad_clip:
            torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), self.settings.optimization.grad_clip
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.read_clock(self.stopwatch.now())
        for scheduler in self.schedulers:
            scheduler.step()
        if self.average:
            self.average.update(self.step + 1)

    def loss_of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the images, in nats, and how many are classified correctly."""
        with hardware.autocast(self.device, self.settings.machine.precision):
            logits = padded_forward(self.parallel_model, images, self.padded_size)  # [b, classes]
            smoothing = self.settings.optimization.label_smoothing
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")

        # A mixed image counts as the class with the larger share.
        true = labels if labels.ndim == 1 else labels.argmax(1)
        return loss, (logits.argmax(1) == true).sum()

    # ----------------------------------------------------------------------------------------------
    # The end of an epoch

    def finish_epoch(self) -> dict:
        """Evaluate -> the epoch's row of metrics.jsonl."""
        progress = self.progress
        losses, num_correct = self.losses.clone(), self.num_correct.clone()
        distributed.sum_over_ranks(losses, num_correct)
        losses = losses.cpu().double()
        self.check_losses(losses)
        sizes = [self.size_of_batch(step) for step in range(progress.epoch_step)]
        num_images = sum(sizes)  # all, unless the time was up before
        losses = losses[: progress.epoch_step]

        result = self.evaluate()
        rate = progress.images_per_second(num_images)
        return {
            "epoch": progress.epoch,
            "step": self.step,
            "train_images": num_images,
            "train_loss": (losses @ losses.new_tensor(sizes)).item() / num_images,
            "train_accuracy": 100 * num_correct.item() / num_images,
            "lr": self.schedulers[0].get_last_lr()[0],
            "train_images_per_second": rate,
            "epoch_seconds": progress.train_seconds + result["seconds"],
            "train_seconds": progress.train_seconds,
            "compile_seconds": progress.compile_seconds,
            "flops_utilization": self.flops_utilization(rate),
            "eval_split": self.settings.data.eval_split,
            "eval_loss": result["loss"],
            "eval_accuracy": result["top1_accuracy"],
            "eval_images_per_second": result["images_per_second"],
            "peak_memory_bytes": hardware.peak_memory_bytes(self.device),
        }

    def check_losses(self, losses: Tensor) -> None:
        """Raise UserError if a step of the epoch had a loss that is not finite."""
        if losses.isfinite().all():
            return
        first_bad = int((~losses.isfinite()).nonzero()[0])
        step = self.step - self.progress.epoch_step + first_bad + 1
        raise UserError(
            f"the loss became {losses[first_bad].item()} at step {step} "
            f"(epoch {self.progress.epoch}); {REMEDIES}"
        )

    def evaluate(self) -> dict:
        """Evaluate on the test or held-out images, with the averaged weights if there are any."""
        result = evaluate(
            self.average.model if self.average else self.model,
            self.eval_batches(micro_batch_size(self.settings)),
            self.dataset.num_classes,
            self.device,
            self.settings.machine.precision,
            self.padded_size,
        )
        if not math.isfinite(result["loss"]):
            raise UserError(
                f"the evaluation loss became {result['loss']} after epoch {self.progress.epoch}; "
                f"{REMEDIES}"
            )
        return result

    def eval_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the test or held-out images.

        If asked to stop before a batch, saves and raises Stopped: the resumed run repeats the
        whole evaluation.
        """
        split, rank, world_size = self.dataset.evaluated, distributed.RANK, distributed.WORLD_SIZE
        batches = data.eval_batches(self.dataset, split, size, rank, world_size)
        for _ in range(data.steps_per_epoch(len(split), size * world_size)):
            if self.vote.cast(self.stop.reason is not None):
                self.stop_if_asked()
            yield from islice(batches, 1)  # none at the end, if only other processes have one more

    def flops_utilization(self, images_per_second: float) -> float | None:
        """Percent of the devices' peak rate that the model's arithmetic reaches; None if unknown.

        Counts the matrix products of forward and backward (three times the forward's), and only the
        pairs of tokens that the mask allows; what activation checkpointing computes twice counts
        once (Chowdhery et al. 2022, PaLM, appendix B). Frozen layers have less of a backward, so
        with them it is unknown.
        """
        peak = hardware.peak_flops(self.device, self.settings.machine.precision)
        if peak is None or self.settings.start.freeze is not None:
            return None
        flops = 3 * self.config["attention"]["forward_flops_per_image"] * images_per_second
        return 100 * flops / (peak * distributed.WORLD_SIZE)
