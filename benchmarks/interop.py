"""What localize gains: timm's ViT at a high resolution, as it is and with local attention.

    python benchmark.py --level interop --img_size 1024

The localized model is first checked against timm's own attention under the same mask. Then both
models take turns in one process, a forward pass alone and a forward with its backward pass, and
ratios are taken within each round.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attention
import masks
import utils
from benchmarks import training
from benchmarks.candidates import DTYPES
from benchmarks.memory import PEAK_MEMORY_IS, peak_memory_of
from interop import localize
from masks import MaskSpec
from patterns.table import TYPES
from runtime import hardware

# Largest allowed difference from timm's own masked attention, relative to the largest logit.
TOLERANCES = {"fp32": 1e-4, "bf16": 6e-2}

# The check gives timm one mask for all layers, and 2d_window has two.
MASK_TYPES = [name for name in masks.MASK_TYPES[1:] if TYPES[name].num_kinds == 1]

PASSES = ("forward", "forward and backward")
FULL, LOCALIZED = "full", "localized"


def add_arguments(parser: utils.ArgumentParser) -> None:
    positive = utils.number_type(int, minimum=1)

    def add(flag: str, default, help: str, **options) -> None:
        parser.add_argument(flag, default=default, help=help, **options)

    add("--model", "vit_small_patch16_224", "a VisionTransformer or Eva of timm", metavar="NAME")
    add("--img_size", 896, "height and width of the images", type=positive, metavar="PX")
    add("--batch_size", 1, "images per step", type=positive, metavar="N")
    add("--mask_type", "2d_all_neighbors", "attention pattern", choices=MASK_TYPES)
    add("--expansion_step", 2, "how far it reaches, in patches", type=positive, metavar="S")
    add("--dtype", "fp32", "data type: weights are fp32, bf16 is autocast", choices=DTYPES)
    add("--threads", None, "CPU threads (default: torch's choice)", type=positive)
    add("--rounds", 9, "timed rounds", type=utils.number_type(int, minimum=3))


def measure(args, argv: list[str], output: Path) -> None:
    """Time all passes, write the report to `output`, and print it.

    Raises UserError without timm, or if the model cannot be localized or computes something else.
    """
    if importlib.util.find_spec("timm") is None:
        raise utils.UserError("--level interop needs timm: pip install -r requirements-dev.txt")
    machine_tuned = hardware.keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = hardware.pick_device(args.device)

    full = build_model(args).to(device)
    spec = MaskSpec(args.mask_type, args.expansion_step)
    with utils.usage_errors():
        localized = localize(copy.deepcopy(full), spec)
    compiled = compiled_mask_of(localized)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)

    error = largest_error(full, localized, images, compiled, args)
    if not error <= TOLERANCES[args.dtype]:  # True for NaN as well
        raise utils.UserError(
            f"{args.model} localized is off by {error:.1e} from its own masked attention (allowed: "
            f"{TOLERANCES[args.dtype]:.0e}); a wrong result is not timed"
        )

    functions = {}
    for name, model in ((FULL, full), (LOCALIZED, localized)):
        for one_pass in PASSES:
            functions[f"{name}, {one_pass}"] = make_step(model, one_pass, images, args, device)
    seconds = training.time_in_rounds(functions, args, device)

    num_pairs = attention.count_pairs(
        compiled.mask, compiled.num_tokens, compiled.num_global_tokens
    )
    report = {
        "level": "interop",
        "settings": {key: str(x) if isinstance(x, Path) else x for key, x in vars(args).items()},
        "threads": torch.get_num_threads(),
        "malloc_keeps_freed_memory": machine_tuned,
        "memory_is": PEAK_MEMORY_IS[device.type],
        "protocol": f"{args.rounds} rounds of all passes in one process, after one to warm up",
        "provenance": hardware.provenance(argv, device),
        "num_tokens": compiled.num_global_tokens + compiled.num_tokens,
        "num_neighbors_mean": int(compiled.mask.sum()) / compiled.num_tokens,
        "backend": compiled.backend,
        "largest_error": error,
        "ceiling": ceiling_of(full, images, num_pairs),
        "rows": [
            make_row(name, one_pass, seconds, functions, device)
            for one_pass in PASSES
            for name in (FULL, LOCALIZED)
        ],
    }
    utils.write_json(output, report)
    print_report(report)


def build_model(args) -> nn.Module:
    """The model with random weights. Raises UsageError if timm cannot build it."""
    import timm

    torch.manual_seed(0)
    try:
        return timm.create_model(args.model, img_size=args.img_size, num_classes=1000)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise utils.UsageError(
            f"timm cannot build {args.model!r} for {args.img_size} px: {utils.first_line(error)}"
        ) from None


def compiled_mask_of(localized: nn.Module) -> attention.CompiledMask:
    return next(m for m in localized.modules() if isinstance(m, attention.CompiledMask))


def largest_error(
    full: nn.Module, localized: nn.Module, images: Tensor, compiled: attention.CompiledMask, args
) -> float:
    """Largest difference of the logits from those with timm's `attn_mask`, over the largest."""
    allowed = compiled.with_global_tokens().to(images.device)
    with torch.inference_mode(), hardware.autocast(images.device, args.dtype):
        expected = full.eval()(images, attn_mask=allowed)
        found = localized.eval()(images)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def make_step(
    model: nn.Module, one_pass: str, images: Tensor, args, device: torch.device
) -> Callable[[], None]:
    labels = torch.arange(args.batch_size, device=device) % 1000

    def forward() -> None:
        model.eval()
        with torch.inference_mode(), hardware.autocast(device, args.dtype):
            model(images)

    def forward_and_backward() -> None:
        model.train()
        model.zero_grad()
        with hardware.autocast(device, args.dtype):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    return forward if one_pass == "forward" else forward_and_backward


def ceiling_of(full: nn.Module, images: Tensor, num_pairs: int) -> float:
    """The most that local attention could gain: FLOPs of the full model over the masked one's.

    Matrix products alone count. On a meta device, those of attention are the batched ones.
    """
    model, images = copy.deepcopy(full).to("meta").eval(), images.to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    by_operator = counter.get_flop_counts()["Global"]
    of_attention = by_operator.get(torch.ops.aten.bmm, 0)
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    of_local = of_attention * num_pairs / num_tokens**2
    total = counter.get_total_flops()
    return total / (total - of_attention + of_local)


def make_row(
    name: str,
    one_pass: str,
    seconds: dict[str, list[float]],
    functions: dict[str, Callable],
    device: torch.device,
) -> dict:
    key = f"{name}, {one_pass}"
    pairs = zip(seconds[f"{FULL}, {one_pass}"], seconds[key], strict=True)
    return {
        "model": name,
        "pass": one_pass,
        "milliseconds": quartiles([1e3 * value for value in seconds[key]]),
        "speedup": quartiles([theirs / ours for theirs, ours in pairs]),
        "peak_memory_bytes": peak_memory_of(functions[key], device),
    }


def quartiles(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def print_report(report: dict) -> None:
    settings = report["settings"]
    print(
        f"{settings['model']} at {settings['img_size']} px, {report['num_tokens']:,} tokens with "
        f"{report['num_neighbors_mean']:.1f} neighbors on average, backend {report['backend']}"
    )
    for row in report["rows"]:
        times, speedup, memory = row["milliseconds"], row["speedup"], row["peak_memory_bytes"]
        mebibytes = "-" if memory is None else f"{memory / 2**20:,.0f} MiB"
        print(
            f"{row['pass']:<21} {row['model']:<10} {times['median']:9.1f} ms "
            f"({times['q1']:.1f} to {times['q3']:.1f}), {speedup['median']:.2f} times as fast "
            f"({speedup['q1']:.2f} to {speedup['q3']:.2f}), {mebibytes}"
        )
    print(f"arithmetic alone allows {report['ceiling']:.2f} times as fast")
