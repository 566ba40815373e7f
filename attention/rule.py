"""Which backend `auto` takes on the CPU: a rule fitted to measurements, so that nothing waits.

docs/attention.md has the measurements. `choose_backend` with the backend `measure` checks the rule.
"""

from __future__ import annotations

from attention import build

# The native kernel takes time for each allowed pair, dense attention for each pair. What one costs
# the former is this many times what it costs the latter: measured on random masks, where both are
# equally fast if half of the pairs are allowed (28x28 tokens; with fewer, native is faster still).
COST_OF_NATIVE = 2.0

# The same for the eager formulas of diagonal.py, which serve where there is no C++ compiler.
COST_OF_EAGER = 40.0


def choose(num_tokens: int, num_edges: int, num_diagonals: int) -> tuple[str, str]:
    """(backend, why) for so many tokens, allowed pairs and non-zero diagonals (0: too many)."""
    num_pairs = num_tokens**2
    share = f"{num_edges:,} of {num_pairs:,} pairs are allowed"
    if build.is_available():
        if COST_OF_NATIVE * num_edges < num_pairs:
            return "native", f"by rule: {share}"
        return "dense", f"by rule: {share}, too many to gain from skipping the rest"

    if num_diagonals and COST_OF_EAGER * num_edges < num_pairs:
        return "diagonal", f"by rule, as the native kernel cannot be built here: {share}"
    return "dense", f"by rule, as the native kernel cannot be built here: {share}"
