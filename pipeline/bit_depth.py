"""Images of more than 8 bits: how many their files say they use, how many they do use, and what that makes of 8.

Files of 16 bits often hold 8, 10 or 12: read as they declare, all of them would be nearly black. So where the upper
bits are unused in every image of a folder that declares so many, those that are used are taken for all of them, one
range for the folder, so that its images can still be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils import UserError

BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE = 258, 262, 281  # tags of TIFF 6.0
UNUSED_BITS = 2  # so many, and the range is taken for a smaller one: of 16 bits, less than a quarter of it used


@dataclass(frozen=True)
class Depth:
    """What a file says of its samples."""

    bits: int  # more than 8
    is_color: bool = False  # of which Pillow reads the upper 8 bits alone
    is_inverted: bool = False  # 0 is white


Ranges = Mapping[Depth, int]  # how many bits the images of a depth use


def depth_of(image: Image.Image) -> Depth | None:
    """From the header; None for 8 bits and fewer."""
    if image.mode.startswith("I"):
        return Depth(_declared_bits(image), is_inverted=_tag(image, PHOTOMETRIC) == 0)
    raw_modes = {str(part) for tile in image.tile for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))}
    if any(";16" in raw_mode for raw_mode in raw_modes):
        return Depth(16, is_color=True)
    return None


def _declared_bits(image: Image.Image) -> int:
    largest = _tag(image, MAX_SAMPLE_VALUE)
    bits = _tag(image, BITS_PER_SAMPLE)
    if isinstance(largest, int) and largest > 255:
        return largest.bit_length()
    if isinstance(bits, int) and bits > 8:
        return bits
    if image.format == "PNG":
        return _significant_bits_of_png(Path(image.filename)) or 16
    return 32 if image.format == "TIFF" else 16


def _tag(image: Image.Image, number: int) -> int | None:
    """A TIFF's tag, of the first sample; None if it has none."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _significant_bits_of_png(path: Path) -> int | None:
    """What the chunk sBIT says (PNG specification, 11.3.2.4), which comes before the pixels."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            size, kind = int.from_bytes(start[:4], "big"), start[4:]
            if kind == b"sBIT":
                return file.read(1)[0] or None
            if kind == b"IDAT":
                return None
            file.seek(size + 4, 1)
    return None


def largest_value(image: Image.Image) -> int:
    """Of the pixels; of 16-bit color, of their upper 8 bits. Raises ValueError for negative ones."""
    values = np.asarray(image)
    if values.min() < 0:
        raise ValueError(f"its pixels go down to {values.min()}; negative values have no brightness")
    return int(values.max())


def find_ranges(largest: Mapping[Path, int | None], depths: Mapping[Path, Depth]) -> dict[Depth, int]:
    """How many bits the images of each depth use, all together; `largest` is None for a file that cannot be read.

    Raises UserError for color whose upper bits are unused, as Pillow does not read the lower ones.
    """
    used: dict[Depth, int] = {}
    for path, value in largest.items():
        if value is not None:
            found = depths[path]
            bits = value.bit_length() + (8 if found.is_color and value else 0)
            used[found] = max(used.get(found, 0), bits)
    for found, bits in used.items():
        if found.is_color and bits <= found.bits - UNUSED_BITS:
            example = next(path for path in largest if depths[path] == found)
            raise UserError(
                f"{example} and all others of 16 bits in color leave their upper bits unused, and only the upper 8 are "
                "read: they would be nearly black; convert them to 8 bits"
            )
    return {found: bits if 0 < bits <= found.bits - UNUSED_BITS else found.bits for found, bits in used.items()}


def remarks(ranges: Ranges) -> list[str]:
    """A sentence for each depth that is not taken as declared."""
    return [
        f"gray images of {found.bits} bits use {bits} of them, and are scaled by these: 0 is black, {2**bits - 1} white"
        for found, bits in ranges.items()
        if bits < found.bits
    ]


def to_8_bits(values: np.ndarray, found: Depth, ranges: Ranges) -> np.ndarray:
    """Gray [H, W] of any integers -> uint8; exact powers of two, so that full 16 bits keep their upper byte."""
    bits = ranges.get(found, found.bits)
    if values.min() < 0:
        raise ValueError(f"its pixels go down to {values.min()}; negative values have no brightness")
    values = values.astype(np.int64)
    if found.is_inverted:
        values = 2**bits - 1 - values
    return (values * 256 >> bits).clip(0, 255).astype(np.uint8)
