"""Measurements on a GPU that no other script makes; experiments/gpu.sh calls each.

    python experiments/gpu.py ceilings   # what copies and matrix products reach at most
    python experiments/gpu.py kernels    # full attention at 64x64 patches by each of SDPA's kernels
    python experiments/gpu.py model      # training steps of ViT-B/16 at 224, and a profile of three

Each appends JSON objects, one per line, to --output as soon as they are measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, from wherever this is called

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import models
import utils
from runtime import hardware
from training import optimizers

WHAT = ("ceilings", "kernels", "model")
MODES = ("off", "default", "reduce-overhead")
MILLION = 1_000_000


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Measurements on a GPU, for experiments/gpu.sh.")
    parser.add_argument("what", choices=WHAT, help="what to measure")
    parser.add_argument("--compile", choices=MODES, default="off", help="of the model")
    parser.add_argument("--device", choices=hardware.DEVICES, default="cuda", help="where")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines to append to")
    parser.add_argument("--small", action="store_true", help="tiny sizes and few rounds, to try the script")
    return parser.parse_args(argv)


def median_seconds(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Of a call, after three that warm up and compile."""
    for _ in range(3):
        function()
    return statistics.median(hardware.seconds_of(function, device) for _ in range(rounds))


# ---------------------------------------------------------------------------------------------------------------------
# Ceilings


def ceilings(args, device: torch.device, write: Callable[[dict], None]) -> None:
    write({"what": "versions", "provenance": hardware.provenance(sys.argv[1:], device), **gpu_versions(device)})
    rounds = 3 if args.small else 30
    num_bytes = MILLION if args.small else 2000 * MILLION
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, rounds)
    write({"what": "copy", "bytes_per_second": 2 * num_bytes / seconds})

    side = 128 if args.small else 8192
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        seconds = median_seconds(lambda a=a, b=b: a @ b, device, rounds)
        write({"what": f"matrix product, {name}", "side": side, "flops_per_second": 2 * side**3 / seconds})


def gpu_versions(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Full attention by kernel


def kernels(args, device: torch.device, write: Callable[[dict], None]) -> None:
    """Forward and backward of full attention at 64x64 patches (B 8, H 12, D 64, bf16): what "full" means on a GPU."""
    shape = (1, 2, 64, 64) if args.small else (8, 12, 4096, 64)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, *shape, generator=generator).to(device, torch.bfloat16).unbind(0)
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def run() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), grad)

    for kernel in (None, *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)):
        row = {"what": "full attention, forward and backward", "shape": shape, "dtype": "bf16"}
        row["kernel"] = "default" if kernel is None else kernel.name
        if kernel is not None and device.type != "cuda":
            write(row | {"skipped": "only CUDA has this kernel"})
            continue
        try:
            with sdpa_kernel(kernel or list(SDPBackend.__members__.values())):
                row["largest_error"] = largest_error(run, (q, k, v, grad))
                row["milliseconds"] = 1e3 * median_seconds(run, device, 3 if args.small else 50)
        except RuntimeError as error:
            row["failed"] = utils.first_line(error)
        write(row)


def largest_error(run: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> float:
    """Of outputs and gradients against float64, relative to the largest value; on one image and two heads."""
    q, k, v, grad = (x.detach()[:1, :2].cpu().double() for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    exact = (out, *torch.autograd.grad(out, (q, k, v), grad))
    found = [x.detach()[:1, :2].cpu().double() for x in run()]
    return max(
        ((ours - right).abs().max() / right.abs().max()).item() for ours, right in zip(found, exact, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# ViT-B/16


def model(args, device: torch.device, write: Callable[[dict], None]) -> None:
    """30 training steps of ViT-B/16 at 224 in bf16, batch 256, and the profile of three more."""
    batch_size, steps = (2, 3) if args.small else (256, 30)
    img_size, preset = (32, "vit_micro") if args.small else (224, "vit_base")
    torch.manual_seed(0)
    net = models.VisionTransformer(img_size, backend="dense", **models.PRESETS[preset]).to(device)
    settings = {"lr": 1e-4, "weight_decay": 0.1, "optimizer": "adamw"}
    (optimizer,) = optimizers.build_optimizers(net, settings)
    compiled = net if args.compile == "off" else torch.compile(net, mode=args.compile, dynamic=False)
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    labels = torch.arange(batch_size, device=device) % 10

    def step() -> None:
        if args.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with hardware.autocast(device, "bf16"):
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = median_seconds(step, device, steps)
    flops = 3 * models.count_forward_flops(net)["total"] * batch_size
    peak = hardware.peak_flops(device, "bf16")
    write(
        {
            "what": f"training step of ViT at {img_size}, bf16",
            "compile": args.compile,
            "batch_size": batch_size,
            "images_per_second": batch_size / seconds,
            "flops_utilization_percent": None if peak is None else 100 * flops / seconds / peak,
            "peak_memory_bytes": hardware.peak_memory_bytes(device),
        }
    )
    profile(step, args, device)


def profile(step: Callable[[], None], args, device: torch.device) -> None:
    """A table of the costliest operations, and a trace for chrome://tracing, beside the output."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            step()
        hardware.synchronize(device)
    sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    name = f"profile_{args.compile}"
    (args.output.parent / f"{name}.txt").write_text(profiler.key_averages().table(sort_by=sort_by, row_limit=30))
    profiler.export_chrome_trace(str(args.output.parent / f"{name}.json.gz"))


def main(argv=None) -> int:
    args = parse_args(argv)
    device = hardware.pick_device(args.device)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    card = hardware.device_name(device)

    def write(row: dict) -> None:
        line = json.dumps({**row, "device": card, "torch": torch.__version__})
        print(line, flush=True)
        with open(args.output, "a") as file:
            file.write(line + "\n")

    {"ceilings": ceilings, "kernels": kernels, "model": model}[args.what](args, device, write)
    return 0


if __name__ == "__main__":
    utils.run_cli(main)
