"""From a boolean mask to attention that pays for it: `compile_mask(mask) -> plan`, `attend(q, k, v, plan)`."""

from attention.choice import choose_backend
from attention.compiled_mask import BACKENDS, Plan, attend, attend_packed, compile_mask, count_pairs

__all__ = ["BACKENDS", "Plan", "attend", "attend_packed", "choose_backend", "compile_mask", "count_pairs"]
