"""Which backend `auto` takes without measuring, so that nothing waits.

Both rules, on the CPU and on a GPU, are fitted to measurements, which docs/attention.md has.
`choose_backend` with the backend `measure` checks them.
"""

from __future__ import annotations

from attention import build
from attention.backends import Choice

# The native kernel takes time for each allowed pair, dense attention for each pair. They are as
# fast as each other if the share of allowed pairs is this number over the cube root of the number
# of tokens: 81 % for 196 tokens, 51 % for 784, 40 % for 1,600. Fitted to random masks; the head dim
# makes little difference, and bf16 favors the kernel (experiments/rule_fit.py).
SHARE_OF_EQUAL_SPEED = 4.7

# A pair costs the eager formulas of diagonal.py, which serve where there is no compiler, this many
# times what it costs dense attention.
COST_OF_EAGER = 40.0


def choose(num_tokens: int, num_edges: int, num_diagonals: int) -> Choice:
    """On a CPU, for so many tokens, allowed pairs and non-zero diagonals (0: too many)."""
    if not build.is_available():
        return choose_uncompiled(num_tokens, num_edges, num_diagonals, "the native kernel")

    share = f"{num_edges:,} of {num_tokens**2:,} pairs are allowed"
    if num_edges / num_tokens**2 < SHARE_OF_EQUAL_SPEED / num_tokens ** (1 / 3):
        return Choice("native", f"by rule: {share}")
    return Choice("dense", f"by rule: {share}, too many to gain from skipping the rest")


def choose_uncompiled(num_tokens: int, num_edges: int, num_diagonals: int, missing: str) -> Choice:
    """Where nothing can be compiled: the formulas of diagonal.py, or dense attention."""
    reason = f"{num_edges:,} of {num_tokens**2:,} pairs are allowed"
    reason = f"by rule, as {missing} cannot be used here: {reason}"
    is_sparse = num_diagonals and COST_OF_EAGER * num_edges < num_tokens**2
    return Choice("diagonal" if is_sparse else "dense", reason)


# --------------------------------------------------------------------------------------------------
# On a GPU
#
# A forward and backward costs the GPU some time per row (a token of a head) and some per pair that
# is computed, with 64 channels in bf16. Fitted to benchmark/attention_cuda.json and
# attention_cuda_patterns.json, from an H200: within 8 % for dense and tiled, 22 % for flex. There,
# tiles have lists of 96 to 160 keys; longer ones, other channels and types are extrapolated. The
# numbers of diagonal are counted.

ROW_SECONDS = {"dense": 2.4e-9, "tiled": 0.45e-9, "flex": 2e-9, "diagonal": 0.0}
PAIR_SECONDS = {"dense": 9.2e-12, "tiled": 2.8e-12, "flex": 4e-12, "diagonal": 125e-12}

# However little there is to compute; assumed. Launching a call from Python takes longer on that
# machine, about 0.5 ms for dense and 1.2 ms for the others, but a busy GPU hides some of it.
FIXED_SECONDS = {"dense": 3e-5, "tiled": 3e-5, "flex": 1e-4, "diagonal": 2e-4}

# The first call, roughly: 2 s, 5 to 9 s, and 20 to 55 s for 9 and 25 diagonals on that machine.
COMPILE_SECONDS = {"dense": 0.0, "tiled": 3.0, "flex": 10.0, "diagonal": 60.0}

USUAL_HEADS = 96  # images times heads, where they are not known
USUAL_CHANNELS = 64


def estimate(
    pairs: dict[str, int], num_tokens: int, num_heads: int, head_dim: int
) -> dict[str, float]:
    """Seconds of a forward and backward, for the pairs that each backend computes per head."""
    work = num_heads * head_dim / USUAL_CHANNELS
    return {
        backend: FIXED_SECONDS[backend]
        + work * (ROW_SECONDS[backend] * num_tokens + PAIR_SECONDS[backend] * count)
        for backend, count in pairs.items()
    }


def choose_on_gpu(
    pairs: dict[str, int],
    num_tokens: int,
    num_heads: int = USUAL_HEADS,
    head_dim: int = USUAL_CHANNELS,
    num_calls: float = float("inf"),
) -> Choice:
    """On a CUDA GPU, for the pairs that each usable backend computes per image and head.

    It stays dense if, over `num_calls` calls, it would gain less time than compiling takes.
    """
    seconds = estimate(pairs, num_tokens, num_heads, head_dim)
    best = min(seconds, key=seconds.get)
    estimates = ", ".join(f"{name} {1e3 * value:.2g} ms" for name, value in seconds.items())

    gain = seconds["dense"] - seconds[best]
    if best != "dense" and gain * num_calls < COMPILE_SECONDS[best]:
        compiling = f"{best} would gain {gain * num_calls:.1g} s, less than compiling it takes"
        return Choice("dense", f"by rule, an estimate: {compiling} ({estimates})")
    return Choice(best, f"by rule, an estimate: {estimates}")
