"""Other libraries' Vision Transformers with our attention.

model = localize(model, "2d_all_neighbors", expansion_step=2)
"""

from interop.localize import localize, unlocalize

__all__ = ["localize", "unlocalize"]
