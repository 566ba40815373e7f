"""Attention that gets faster as its mask gets sparser.

compiled = compile_mask(mask)       # bool [N, N]
out = attend(q, k, v, compiled)     # [B, H, T, D]
"""

from attention.backends import BACKENDS, Choice, unusable
from attention.choice import choose_backend
from attention.compiled_mask import CompiledMask, choose_by_rule, compile_mask, count_pairs
from attention.dispatch import attend, attend_checked, attend_packed
from attention.layers import LayerMasks

__all__ = [
    "BACKENDS",
    "Choice",
    "CompiledMask",
    "LayerMasks",
    "attend",
    "attend_checked",
    "attend_packed",
    "choose_backend",
    "choose_by_rule",
    "compile_mask",
    "count_pairs",
    "unusable",
]
