"""Which backend `auto` takes on the CPU: a rule fitted to measurements, so that nothing waits.

docs/attention.md has the measurements. `choose_backend` with the backend `measure` checks the rule.
"""

from __future__ import annotations

from attention import build

# The native kernel takes time for each allowed pair, dense attention for each pair. They are as
# fast as each other if the share of allowed pairs is this number over the cube root of the number
# of tokens: 81 % for 196 tokens, 51 % for 784, 40 % for 1,600. Fitted to random masks; the head dim
# makes little difference, and bf16 favors the kernel (experiments/rule_fit.py).
SHARE_OF_EQUAL_SPEED = 4.7

# A pair costs the eager formulas of diagonal.py, which serve where there is no C++ compiler, this
# many times what it costs dense attention.
COST_OF_EAGER = 40.0


def choose(num_tokens: int, num_edges: int, num_diagonals: int) -> tuple[str, str]:
    """(backend, why) for so many tokens, allowed pairs and non-zero diagonals (0: too many)."""
    num_pairs = num_tokens**2
    share = f"{num_edges:,} of {num_pairs:,} pairs are allowed"
    if build.is_available():
        if num_edges / num_pairs < SHARE_OF_EQUAL_SPEED / num_tokens ** (1 / 3):
            return "native", f"by rule: {share}"
        return "dense", f"by rule: {share}, too many to gain from skipping the rest"

    if num_diagonals and COST_OF_EAGER * num_edges < num_pairs:
        return "diagonal", f"by rule, as the native kernel cannot be built here: {share}"
    return "dense", f"by rule, as the native kernel cannot be built here: {share}"
