"""Tests that run Triton's kernels in its interpreter, on the CPU.

Triton decides when it is imported, for a whole process: tests/test_tiled.py runs this folder in a
process of its own.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
