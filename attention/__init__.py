"""From a boolean mask to attention that pays for it: `compile_mask(mask) -> compiled`, `attend(q, k, v, compiled)`."""

from attention.choice import choose_backend
from attention.compiled_mask import (
    BACKENDS,
    Choice,
    CompiledMask,
    attend,
    attend_checked,
    attend_packed,
    compile_mask,
    count_pairs,
)

__all__ = [
    "BACKENDS",
    "Choice",
    "CompiledMask",
    "attend",
    "attend_checked",
    "attend_packed",
    "choose_backend",
    "compile_mask",
    "count_pairs",
]
