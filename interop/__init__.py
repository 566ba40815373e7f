"""Other libraries: their Vision Transformers with our attention, weights in and out.

model = localize(model, "2d_all_neighbors", expansion_step=2)
"""

from interop.localize import localize, unlocalize

__all__ = ["localize", "unlocalize"]
