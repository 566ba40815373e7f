"""The training loop: forward, backward, step, log, evaluate, save; one run, on one process or on many.

Nothing in a step waits for the device: losses and hits add up there, and are read once an epoch (or every
`--log_every` steps, and for the progress bar of a terminal, once a second).
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import models
import utils
from runtime import distributed, hardware
from runtime.stopping import StopRequest
from training import optimizers
from training.checkpoints import rng_state, save_checkpoint, set_rng_state
from training.evaluation import evaluate
from utils import UserError

REMEDIES = "what was saved before stays good. A lower --lr, a longer --warmup_fraction or --precision fp32 may help"


class Stopped(Exception):
    """The run was asked to stop, and all that it has done is saved."""


def micro_batch_size(settings: dict) -> int:
    """Images that a process takes through the model at once."""
    return max(1, settings["batch_size"] // distributed.WORLD_SIZE // settings["grad_accumulation"])


class Trainer:
    """One run. `load` a saved state or not; `train` goes on to the last epoch and keeps the run folder complete."""

    # Plain numbers that are saved as they are. The epoch and its step are those in progress; the seconds are of it,
    # those of a process's first step with so many images, which compiles, apart from the others and their images.
    PROGRESS = ("history", "epoch", "epoch_step", "compile_seconds", "timed_seconds", "timed_images")

    def __init__(
        self,
        model: models.VisionTransformer,
        dataset: data.Dataset,
        config: dict,
        folder: Path,
        device: torch.device,
        stop: StopRequest,
    ):
        self.model, self.dataset, self.config, self.folder = model, dataset, config, folder
        self.device, self.stop, self.settings = device, stop, config["settings"]
        s = self.settings
        self.num_images, self.batch_size = len(dataset.train), s["batch_size"]
        self.steps_per_epoch = data.steps_per_epoch(self.num_images, self.batch_size)
        self.optimizers = optimizers.build_optimizers(model, s)
        self.schedulers = optimizers.build_schedulers(self.optimizers, s, s["epochs"] * self.steps_per_epoch)
        self.average = optimizers.WeightAverage(model, s["ema"]) if s["ema"] else None
        model.checkpoint_activations = s["checkpoint_activations"]
        compiled = model if s["compile"] == "off" else torch.compile(model, mode=s["compile"], dynamic=False)
        self.compiled_model = distributed.wrap(compiled, device)
        self.history: list[dict] = []
        self.start_epoch(1)
        self.sizes_seen, self.saved_at = set(), time.monotonic()
        torch.manual_seed((s["seed"] + distributed.RANK) % 2**63)

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.epoch_step = epoch, 0
        self.losses = torch.zeros(self.steps_per_epoch, device=self.device)  # this process's part of each step's
        self.num_correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.compile_seconds = self.timed_seconds = 0.0
        self.timed_images = 0

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def save(self) -> None:
        """Write last.pt. Raises UserError, and keeps the one before, if the weights are not finite."""
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            raise UserError(f"the weights are not finite after step {self.step} (epoch {self.epoch}); {REMEDIES}")
        of_rank = {"rng": rng_state(self.device), "losses": self.losses.cpu(), "num_correct": self.num_correct.cpu()}
        of_ranks = distributed.from_all(of_rank)
        if distributed.IS_FIRST:
            state = {
                "model": self.model.state_dict(),
                "average": self.average and self.average.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
                "ranks": of_ranks,
                "settings": self.settings,
                "model_config": self.model.config,
                "data": self.config["data"],
            }
            save_checkpoint(self.folder, state | {name: getattr(self, name) for name in self.PROGRESS})
        self.saved_at = time.monotonic()

    def load(self, state: dict) -> None:
        """Go on from a saved state, on as many processes as it was saved by or on others."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
        for name in ("optimizers", "schedulers"):
            for mine, saved in zip(getattr(self, name), state[name], strict=True):
                mine.load_state_dict(saved)
        for name in self.PROGRESS:
            setattr(self, name, state[name])
        ranks = state["ranks"]
        if len(ranks) == distributed.WORLD_SIZE:
            mine = ranks[distributed.RANK]
            set_rng_state(mine["rng"], self.device)
            losses, num_correct = mine["losses"], mine["num_correct"]
        else:  # other processes: what all have summed up goes to the first
            share = 1 if distributed.IS_FIRST else 0
            losses, num_correct = (share * sum(rank[name] for rank in ranks) for name in ("losses", "num_correct"))
        self.losses, self.num_correct = losses.to(self.device), num_correct.to(self.device)

    @property
    def step(self) -> int:
        """Steps of the run that are done."""
        return (self.epoch - 1) * self.steps_per_epoch + self.epoch_step

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def train(self) -> list[dict]:
        """Train to the last epoch -> the rows of metrics.jsonl. Raises Stopped if asked to stop; all is saved then."""
        self.write_metrics()  # the checkpoint is the truth, the log follows it
        hardware.reset_peak_memory(self.device)  # of choosing a backend
        while self.epoch <= self.settings["epochs"]:
            self.train_epoch()
            row = self.finish_epoch()
            self.history.append(row)
            self.start_epoch(self.epoch + 1)
            self.save()
            self.write_metrics()
            if distributed.IS_FIRST:
                print(format_epoch(row, self.settings["epochs"]), flush=True)
            if self.epoch <= self.settings["epochs"]:
                self.stop_if_asked()
        return self.history

    def stop_if_asked(self) -> None:
        """Raise Stopped, on all processes, if one was asked to stop; all that is done must be saved."""
        if distributed.any_rank(self.stop.reason is not None):
            raise Stopped

    def write_metrics(self) -> None:
        if distributed.IS_FIRST:
            utils.write_json_lines(self.folder / utils.METRICS, self.history)

    def train_epoch(self) -> None:
        """The rest of the epoch in progress; saved within, now and then and when asked to stop."""
        s, minutes = self.settings, self.settings["checkpoint_every_minutes"]
        mixes = self.epoch <= s["epochs"] - round(s["mix_off"] * s["epochs"])
        augmentation = data.Augmentation(**{field.name: s[field.name] for field in fields(data.Augmentation)})
        if not mixes:
            augmentation = replace(augmentation, mix=0.0)
        batches = data.train_batches(
            self.dataset,
            batch_size=self.batch_size,
            seed=s["seed"],
            epoch=self.epoch,
            augmentation=augmentation,
            start_step=self.epoch_step,
            rank=distributed.RANK,
            world_size=distributed.WORLD_SIZE,
        )
        self.model.train()
        self.clock = time.perf_counter()
        with Progress(self) as progress:
            for images, labels in batches:
                size = self.size_of_batch(self.epoch_step)
                if size not in self.sizes_seen:
                    self.timed_seconds += self.read_clock()
                self.train_step(images, labels)
                self.epoch_step += 1
                if size in self.sizes_seen:
                    self.timed_images += size
                else:
                    self.sizes_seen.add(size)
                    self.compile_seconds += self.read_clock()
                progress.show()
                if self.epoch_step == self.steps_per_epoch:
                    break
                due = minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
                if distributed.any_rank(due or self.stop.reason is not None):
                    self.timed_seconds += self.read_clock()
                    self.save()
                    self.stop_if_asked()
                    self.clock = time.perf_counter()
        self.timed_seconds += self.read_clock()

    def read_clock(self) -> float:
        """Seconds since the last reading, when the device has done all that it was given."""
        hardware.synchronize(self.device)
        last, self.clock = self.clock, time.perf_counter()
        return self.clock - last

    def size_of_batch(self, epoch_step: int) -> int:
        """Images of a step, over all processes."""
        return min(self.batch_size, self.num_images - epoch_step * self.batch_size)

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step on this process's images [b, C, h, w] of a batch; labels int64 [b] or float [b, classes]."""
        size = self.size_of_batch(self.epoch_step)
        first, stop = data.rank_part(size, distributed.RANK, distributed.WORLD_SIZE)
        weight = 1 / size if stop > first else 0.0  # of each image; none if this one belongs to another process
        num_parts = min(self.settings["grad_accumulation"], len(images))
        parts = list(zip(images.tensor_split(num_parts), labels.tensor_split(num_parts), strict=True))
        for number, (x, y) in enumerate(parts, start=1):
            last = contextlib.nullcontext() if number == num_parts else distributed.without_sync(self.compiled_model)
            with last:
                loss, hits = self.loss_of(x, y)
                loss = weight * loss
                (distributed.WORLD_SIZE * loss).backward()  # the processes' gradients are averaged
            self.losses[self.epoch_step] += loss.detach()
            self.num_correct += hits if weight else 0
        if self.settings["grad_clip"]:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["grad_clip"])
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if self.average:
            self.average.update(self.step + 1)

    def loss_of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the images, nats, and how many are classified right."""
        if self.settings["compile"] == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with hardware.autocast(self.device, self.settings["precision"]):
            logits = self.compiled_model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.settings["label_smoothing"], reduction="sum")
        true = labels if labels.ndim == 1 else labels.argmax(1)  # of a mixed image the class it has more of
        return loss, (logits.argmax(1) == true).sum()

    # -----------------------------------------------------------------------------------------------------------------
    # The end of an epoch

    def finish_epoch(self) -> dict:
        """Evaluate -> the epoch's row of metrics.jsonl."""
        losses, num_correct = self.losses.clone(), self.num_correct.clone()
        distributed.sum_over_ranks(losses, num_correct)
        losses = losses.cpu().double()
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            step = self.step - self.steps_per_epoch + bad + 1
            raise UserError(f"the loss became {losses[bad].item()} at step {step} (epoch {self.epoch}); {REMEDIES}")
        sizes = torch.tensor([float(self.size_of_batch(step)) for step in range(self.steps_per_epoch)])
        result = self.evaluate()
        timed = self.timed_images > 0  # else all steps of the epoch compiled
        rate = self.timed_images / self.timed_seconds if timed else self.num_images / self.compile_seconds
        seconds = self.compile_seconds + self.timed_seconds + result["seconds"]
        return {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": (losses @ sizes.double()).item() / self.num_images,
            "train_accuracy": 100 * num_correct.item() / self.num_images,
            "lr": self.schedulers[0].get_last_lr()[0],
            "train_images_per_second": rate,
            "epoch_seconds": seconds,
            "compile_seconds": self.compile_seconds,
            "flops_utilization": self.flops_utilization(rate),
            "eval_loss": result["loss"],
            "eval_accuracy": result["top1_accuracy"],
            "eval_images_per_second": result["images_per_second"],
            "peak_memory_bytes": hardware.peak_memory_bytes(self.device),
        }

    def evaluate(self) -> dict:
        """On the test images, with the averaged weights if there are any."""
        model = self.average.model if self.average else self.model
        size = micro_batch_size(self.settings)
        result = evaluate(
            model, self.test_batches(size), self.dataset.num_classes, self.device, self.settings["precision"]
        )
        if not math.isfinite(result["loss"]):
            raise UserError(f"the evaluation loss became {result['loss']} after epoch {self.epoch}; {REMEDIES}")
        return result

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of this process. Asked to stop before one, all is saved, and the run goes on with the whole evaluation."""
        batches = data.eval_batches(self.dataset, self.dataset.test, size, distributed.RANK, distributed.WORLD_SIZE)
        for _ in range(data.steps_per_epoch(len(self.dataset.test), size * distributed.WORLD_SIZE)):
            if distributed.any_rank(self.stop.reason is not None):
                self.save()
                raise Stopped
            yield from islice(batches, 1)  # none at last, if only other processes have one more

    def flops_utilization(self, images_per_second: float) -> float | None:
        """Percent of the devices' peak rate that the model's own arithmetic makes up; None for an unknown device.

        Counted are the matrix products of forward and backward (three times the forward's), and only the pairs of
        tokens that the mask allows; what activation checkpointing computes twice counts once (Chowdhery et al. 2022,
        PaLM, appendix B).
        """
        peak = hardware.peak_flops(self.device, self.settings["precision"])
        if peak is None:
            return None
        flops = 3 * self.config["attention"]["forward_flops_per_image"] * images_per_second
        return 100 * flops / (peak * distributed.WORLD_SIZE)


class Progress:
    """A bar on a terminal, and a line every `log_every` steps; on the first process alone."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.log_every = trainer, trainer.settings["log_every"]
        self.quiet = not distributed.IS_FIRST
        done = trainer.epoch_step * trainer.batch_size
        self.title = f"epoch {trainer.epoch}/{trainer.settings['epochs']}"
        off = self.quiet or not sys.stdout.isatty()
        self.bar = tqdm(total=trainer.num_images, initial=done, desc=self.title, unit="img", leave=False, disable=off)
        self.last_look = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def show(self) -> None:
        t, step = self.trainer, self.trainer.epoch_step
        self.bar.update(t.size_of_batch(step - 1))
        if not self.bar.disable and time.perf_counter() - self.last_look > 1:  # a look waits for the device
            self.last_look = time.perf_counter()
            accuracy = 100 * t.num_correct.item() / (step * t.batch_size / distributed.WORLD_SIZE)
            self.bar.set_postfix(loss=f"{self.mean_loss(1):.3f}", accuracy=f"{accuracy:.1f}%")
        if self.log_every and step % self.log_every == 0 and not self.quiet:
            self.bar.write(f"{self.title}, step {step}/{t.steps_per_epoch}: loss {self.mean_loss(self.log_every):.4f}")

    def mean_loss(self, num_steps: int) -> float:
        """Of the last steps, as this process has seen it."""
        step = self.trainer.epoch_step
        return distributed.WORLD_SIZE * self.trainer.losses[max(0, step - num_steps) : step].mean().item()


def format_epoch(row: dict, num_epochs: int) -> str:
    utilization = "" if row["flops_utilization"] is None else f" ({row['flops_utilization']:.1f}% of peak)"
    compiling = f", {row['compile_seconds']:.1f} s of it the first steps" if row["compile_seconds"] > 1 else ""
    return (
        f"epoch {row['epoch']:>{len(str(num_epochs))}}/{num_epochs}"
        f" | train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:5.2f}%"
        f" | eval loss {row['eval_loss']:.4f}, accuracy {row['eval_accuracy']:5.2f}%"
        f" | {row['train_images_per_second']:.0f} images/s{utilization} | {row['epoch_seconds']:.1f} s{compiling}"
    )
