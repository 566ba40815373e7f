"""Masks in files, for `--mask_file`, and a checksum to know them again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

SUFFIXES = (".npy", ".pt", ".png")


def read(path: str | Path) -> np.ndarray:
    """The bool [N, N] mask in a .npy, .pt or .png file, in which white is True.

    Raises ValueError for a file that holds something else, or no mask for attention.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        expected = ", ".join(SUFFIXES)
        raise ValueError(f"cannot read the mask {path}: expected a name ending in {expected}")
    try:
        mask = reader(path)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot read the mask {path}: {reason}") from error
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read the mask {path}: {reason}") from error

    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or len(mask) == 0:
        shape = "x".join(map(str, mask.shape))
        raise ValueError(f"the mask {path} has shape {shape}, expected NxN for N patches")
    if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"the mask {path} holds more than two values; expected booleans, zeros and ones, or a "
            "picture in black and white"
        )
    mask = mask.astype(bool)
    alone = np.flatnonzero(~mask.any(1))
    if len(alone):
        raise ValueError(f"row {alone[0]} of the mask {path} is empty: nothing to attend to")
    return mask


def _read_npy(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def _read_pt(path: Path) -> np.ndarray:
    import torch  # deferred: nothing else here needs it

    return torch.load(path, map_location="cpu", weights_only=True).numpy()


def _read_png(path: Path) -> np.ndarray:
    from PIL import Image  # deferred likewise

    with Image.open(path, formats=["PNG"]) as image:
        gray = np.asarray(image.convert("L"))
    return np.select([gray == 255, gray == 0], [1, 0], default=2)


_READERS = dict(zip(SUFFIXES, (_read_npy, _read_pt, _read_png), strict=True))


def hash_of(mask: np.ndarray) -> str:
    """Equal for equal masks of any size, and different for others."""
    content = f"{mask.shape} ".encode() + np.packbits(mask).tobytes()
    return hashlib.sha256(content).hexdigest()
