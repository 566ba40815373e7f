"""The training loop: schedule, forward, backward, step, log, evaluate, save."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import device as machine
import utils
from checkpoint import rng_state, save_checkpoint, set_rng_state
from eval import evaluate
from utils import UserError


def build_optimizer(model: torch.nn.Module, settings: dict, total_steps: int):
    """AdamW with weight decay on the weight matrices only; a schedule by step: linear warmup, then cosine to zero."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and name not in ("cls_token", "pos_embed")]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or name in ("cls_token", "pos_embed")]
    groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], fused=True)
    warmup_steps = round(settings["warmup_fraction"] * total_steps)

    def lr_factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)


def train_epoch(model, optimizer, scheduler, dataset, settings: dict, epoch: int, device: torch.device) -> dict:
    """One pass over the training images. Losses and hits stay on the device, are read for the bar and at the end."""
    num_images, batch_size = len(dataset.train), settings["batch_size"]
    num_steps = data.num_steps(num_images, batch_size)
    losses = torch.zeros(num_steps, device=device)
    num_correct = torch.zeros((), dtype=torch.int64, device=device)
    weights = torch.full((num_steps,), float(batch_size), device=device)  # images of each step
    weights[-1] = num_images - batch_size * (num_steps - 1)
    model.train()
    start = last_look = time.perf_counter()
    batches = data.train_batches(dataset, batch_size, settings["seed"], epoch)
    title = f"epoch {epoch}/{settings['epochs']}"
    with tqdm(total=num_images, desc=title, unit="img", leave=False, disable=not sys.stdout.isatty()) as bar:
        for step, (images, labels) in enumerate(batches):
            with machine.autocast(device, settings["precision"]):
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"])
            loss.backward()
            if settings["grad_clip"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses[step] = loss.detach()
            num_correct += (logits.argmax(1) == labels).sum()
            bar.update(len(labels))
            if not bar.disable and time.perf_counter() - last_look > 1:  # a look waits for the device: once a second
                last_look = time.perf_counter()
                seen = (step + 1) * batch_size
                bar.set_postfix(loss=f"{losses[step].item():.3f}", accuracy=f"{100 * num_correct.item() / seen:.1f}%")
    losses = losses.cpu().double()  # waits for the device
    seconds = time.perf_counter() - start
    first_step = (epoch - 1) * num_steps
    if not losses.isfinite().all():
        bad = int((~losses.isfinite()).nonzero()[0])
        raise UserError(
            f"the loss became {losses[bad].item()} at step {first_step + bad + 1} (epoch {epoch}); what was saved "
            "before it stays good. A lower --lr, a longer --warmup_fraction or --precision fp32 may help"
        )
    return {
        "epoch": epoch,
        "step": first_step + num_steps,
        "train_loss": (losses @ weights.cpu().double()).item() / num_images,
        "train_accuracy": 100 * num_correct.item() / num_images,
        "lr": scheduler.get_last_lr()[0],
        "train_images_per_second": num_images / seconds,
        "epoch_seconds": seconds,
    }


def train(model, dataset, config: dict, folder: Path, state: dict | None) -> list[dict]:
    """Train to the last epoch, from the beginning or from `state`; the run folder is complete up to each epoch."""
    settings = config["settings"]
    device = torch.device(settings["device"])
    total_steps = settings["epochs"] * data.num_steps(len(dataset.train), settings["batch_size"])
    optimizer, scheduler = build_optimizer(model, settings, total_steps)
    torch.manual_seed(settings["seed"])
    history = []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        set_rng_state(state["rng"], device)
        history = state["history"]
        print(f"resuming after epoch {len(history)}")
    forward = torch.compile(model) if settings["compile"] else model
    utils.write_json_lines(folder / utils.METRICS, history)  # the checkpoint is the truth, the log follows it
    for epoch in range(len(history) + 1, settings["epochs"] + 1):
        machine.reset_peak_memory(device)
        row = train_epoch(forward, optimizer, scheduler, dataset, settings, epoch, device)
        batches = data.eval_batches(dataset, dataset.test, settings["batch_size"])
        result = evaluate(forward, batches, dataset.num_classes, device, settings["precision"])
        if not math.isfinite(result["loss"]):
            raise UserError(
                f"the evaluation loss became {result['loss']} after epoch {epoch}; what was saved before stays good. "
                "A lower --lr, a longer --warmup_fraction or --precision fp32 may help"
            )
        row |= {
            "eval_loss": result["loss"],
            "eval_accuracy": result["top1_accuracy"],
            "eval_images_per_second": result["images_per_second"],
            "epoch_seconds": row["epoch_seconds"] + result["seconds"],
            "peak_memory_bytes": machine.peak_memory_bytes(device),
        }
        history.append(row)
        save_checkpoint(
            folder / utils.CHECKPOINT,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": rng_state(device),
                "epoch": epoch,
                "history": history,
                "settings": settings,
                "model_config": model.config,
                "data": config["data"],
            },
        )
        utils.write_json_lines(folder / utils.METRICS, history)
        print(format_epoch(row, settings["epochs"]), flush=True)
    return history


def format_epoch(row: dict, num_epochs: int) -> str:
    return (
        f"epoch {row['epoch']:>{len(str(num_epochs))}}/{num_epochs}"
        f" | train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:5.2f}%"
        f" | eval loss {row['eval_loss']:.4f}, accuracy {row['eval_accuracy']:5.2f}%"
        f" | {row['train_images_per_second']:.0f} images/s | {row['epoch_seconds']:.1f} s"
    )
