"""Loss, top-1 and top-5, per-class accuracy, confusion matrix and throughput of a model."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime import distributed, hardware


def padded_forward(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """Logits [b, classes] of images [b, C, height, width], in a batch of at least `size` images.

    What is added is empty and dropped again: it has no part in a loss or gradient. So the smaller
    batches of an epoch have the same shape as the others, and nothing is compiled for them.
    """
    num_images = len(images)
    if num_images < size:
        empty = images.new_zeros(size - num_images, *images.shape[1:])
        images = torch.cat([images, empty])
    return model(images)[:num_images]


@torch.no_grad()  # inference_mode would recompile the kernels
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    precision: str,
    padded_size: int = 0,
) -> dict:
    """Run the model over batches of (images [B, C, height, width], labels int64 [B]).

    In a parallel run each process evaluates its own batches, and all return the combined result.
    Nothing waits for the device until the end. Batches of fewer images than `padded_size` are
    padded, see `padded_forward`.

    Returns `loss` (mean cross-entropy, nats), `top1_accuracy`, `top5_accuracy` (percent; None with
    5 classes or fewer), `per_class_accuracy` (percent; None for a class without images),
    `confusion_matrix` (rows true, columns predicted), `num_images`, `seconds` and
    `images_per_second`.
    """
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    loss_sum = torch.zeros((), device=device)
    top5_hits = torch.zeros((), dtype=torch.int64, device=device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)

    for images, labels in batches:
        with hardware.autocast(device, precision):
            logits = padded_forward(model, images, padded_size)
        logits = logits.float()  # [B, classes]
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")

        cells = labels * num_classes + logits.argmax(1)  # [B], of the flattened matrix
        confusion.scatter_add_(0, cells, torch.ones_like(cells))  # bincount would synchronize
        if num_classes > 5:
            top5_hits += (logits.topk(5).indices == labels[:, None]).sum()

    distributed.sum_over_ranks(loss_sum, top5_hits, confusion)
    confusion = confusion.view(num_classes, num_classes).cpu()  # waits for the device
    seconds = time.perf_counter() - start
    model.train(was_training)

    num_images, num_correct = int(confusion.sum()), int(confusion.diag().sum())
    per_class = zip(confusion.diag().tolist(), confusion.sum(1).tolist(), strict=True)
    return {
        "loss": loss_sum.item() / num_images,
        "top1_accuracy": 100 * num_correct / num_images,
        "top5_accuracy": 100 * top5_hits.item() / num_images if num_classes > 5 else None,
        "per_class_accuracy": [100 * hits / n if n else None for hits, n in per_class],
        "confusion_matrix": confusion.tolist(),
        "num_images": num_images,
        "seconds": seconds,
        "images_per_second": num_images / seconds,
    }
