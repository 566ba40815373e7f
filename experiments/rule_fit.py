"""Where the native kernel and dense attention are equally fast: the fit of attention/rule.py.

    python experiments/rule_fit.py   # ~3 minutes; writes experiments/benchmark/rule_fit.json

For random masks of several densities, times a forward and backward of both, alternating, and
reports how many times as fast the native kernel is, and the share of pairs at which it would be as
fast if its time were proportional to them.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

# The repository, wherever this is called from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import attention
import utils
from runtime import hardware

REPORT = utils.REPOSITORY / "experiments" / "benchmark" / "rule_fit.json"
ROUNDS = 7
CASES = [("fp32", 16), ("fp32", 32), ("fp32", 64), ("fp32", 128), ("bf16", 32), ("bf16", 64)]
NUM_TOKENS = (49, 196, 784, 1600)
DENSITIES = (0.1, 0.3, 0.5, 0.7, 1.0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(num_tokens: int, density: float, dtype: str, head_dim: int) -> dict:
    """One row of the report."""
    mask = torch.rand(num_tokens, num_tokens) < density
    mask |= torch.eye(num_tokens, dtype=torch.bool)
    batch_size = max(1, 8 * 196 // num_tokens)
    shape = (batch_size, num_tokens, 3, 6 if head_dim == 128 else 12, head_dim)
    qkv = torch.randn(shape).to(DTYPES[dtype]).requires_grad_()
    grad = torch.randn(shape)[:, :, 0].to(DTYPES[dtype])

    def seconds_with(compiled: attention.CompiledMask) -> float:
        def step():
            torch.autograd.grad(attention.attend_packed(qkv, compiled), qkv, grad)

        return hardware.seconds_of(step, torch.device("cpu"))

    native, dense = (attention.compile_mask(mask, backend=name) for name in ("native", "dense"))
    ratios = [seconds_with(dense) / seconds_with(native) for _ in range(ROUNDS + 2)]
    share, ratio = mask.float().mean().item(), statistics.median(ratios[2:])
    case = {"num_tokens": num_tokens, "dtype": dtype, "head_dim": head_dim}
    return {**case, "share": share, "speedup_over_dense": ratio, "share_of_equal": share * ratio}


def main() -> None:
    hardware.keep_freed_memory()
    torch.manual_seed(0)

    rows = []
    for dtype, head_dim in CASES:
        for num_tokens in NUM_TOKENS:
            rows += [measure(num_tokens, density, dtype, head_dim) for density in DENSITIES]
            shares = ", ".join(f"{row['share_of_equal']:.2f}" for row in rows[-len(DENSITIES) :])
            print(f"{dtype}, head dim {head_dim}, {num_tokens} tokens: {shares}", flush=True)

    provenance = hardware.provenance(sys.argv[1:], torch.device("cpu"))
    utils.write_json(REPORT, {"rounds": ROUNDS, "rows": rows, "provenance": provenance})


if __name__ == "__main__":
    main()
