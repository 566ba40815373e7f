"""Reduce images of more than 8 bits to 8: the bits that files declare, and those they use.

16-bit files often hold only 8, 10 or 12 bits, and would be nearly black if they were read as
declared. So if no image of a folder uses the upper bits, the bits that are used are scaled to the
full range. The whole folder shares one range, so that its images remain comparable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils import UserError

# Tags of TIFF 6.0, and a value of SAMPLE_FORMAT.
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
MAX_SAMPLE_VALUE = 281
SAMPLE_FORMAT = 339
SIGNED = 2

# If at least this many upper bits are unused, the range is taken to be smaller than declared.
UNUSED_BITS = 2


@dataclass(frozen=True)
class Depth:
    """What the header of a file says about its samples, the single values of its pixels."""

    bits: int  # stored per sample, more than 8
    declared: int  # used per sample, according to the file
    is_color: bool = False  # 16-bit color, of which Pillow only reads the upper 8 bits
    is_inverted: bool = False  # 0 is white


Ranges = Mapping[int, int]  # bits stored in gray files -> bits used by the folder's images


def depth_of(image: Image.Image) -> Depth | None:
    """From the header; None for 8 bits or fewer.

    Raises ValueError for values that Pillow would misread.
    """
    if image.mode.startswith("I"):
        stored = _stored_bits(image)
        declared = min(stored, _declared_bits(image) or stored)
        return Depth(stored, declared, is_inverted=_tag(image, PHOTOMETRIC) == 0)

    if image.mode == "L" and _tag(image, SAMPLE_FORMAT) == SIGNED:
        raise ValueError("its pixels are signed 8-bit numbers, which Pillow reads as unsigned")

    if _keeps_upper_byte_only(image):
        return Depth(16, 16, is_color=True)
    return None


def _keeps_upper_byte_only(image: Image.Image) -> bool:
    """Whether Pillow reads 8 of the 16 bits per channel.

    It does for raw modes such as `RGB;16B`. The 16 bits of `BGR;16` are those of a whole pixel.
    """
    for codec, _, _, arguments in image.tile:
        if not isinstance(arguments, tuple):
            arguments = (arguments,)
        if codec == "SGI16":
            return True
        if codec.startswith("ppm") and arguments[-1] > 255:  # the largest value, from the header
            return True
        if any(re.search(";16[BLN]", str(argument)) for argument in arguments):
            return True
    return False


def _stored_bits(image: Image.Image) -> int:
    bits = _tag(image, BITS_PER_SAMPLE)
    if isinstance(bits, int) and bits > 8:
        return bits
    # Pillow opens 16-bit PNG and PPM in mode I too.
    return 32 if image.mode == "I" and image.format not in ("PNG", "PPM") else 16


def _declared_bits(image: Image.Image) -> int | None:
    """None if the file only says how many bits it stores."""
    largest = _tag(image, MAX_SAMPLE_VALUE)
    if isinstance(largest, int) and largest > 255:
        return largest.bit_length()

    stored = _stored_bits(image)
    if stored == 32 or _tag(image, SAMPLE_FORMAT) == SIGNED:  # Pillow reads all 32 bits as signed.
        return stored - 1
    if image.format == "PNG":
        return _significant_bits_of_png(Path(image.filename))
    return None


def _tag(image: Image.Image, number: int) -> int | None:
    """A TIFF tag, for the first sample; None if it is missing."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _significant_bits_of_png(path: Path) -> int | None:
    """The value of the sBIT chunk, which precedes the pixels (PNG specification, 11.3.2.4)."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            size = int.from_bytes(start[:4], "big")
            kind = start[4:]
            if kind == b"sBIT":
                return file.read(1)[0] or None
            if kind == b"IDAT":
                return None
            file.seek(size + 4, 1)  # the content and its checksum
    return None


def largest_value(image: Image.Image) -> int:
    """The largest pixel value, not counting opacity; for 16-bit color, of the upper 8 bits.

    Raises ValueError if there are negative values.
    """
    values = np.asarray(image)
    if image.getbands()[-1] in ("A", "a"):
        values = values[..., :-1]
    _check_not_negative(values)
    return int(values.max())


def _check_not_negative(values: np.ndarray) -> None:
    if values.min() < 0:
        raise ValueError(
            f"its pixels go down to {values.min()} as Pillow reads them; they must not be "
            "negative, and unsigned ones must be below 2^31"
        )


def find_ranges(
    largest: Mapping[Path, int | None], depths: Mapping[Path, Depth]
) -> tuple[dict[int, int], list[str]]:
    """The range of each kind of gray file in a folder, and a remark on each not as declared.

    `largest` is the largest value in each file, or None if it cannot be read. Raises UserError for
    color images whose upper bits are unused, as Pillow does not read the lower ones.
    """
    readable = {path: value for path, value in largest.items() if value is not None}
    _check_color({path: value for path, value in readable.items() if depths[path].is_color})

    gray = [path for path in readable if not depths[path].is_color]
    ranges, declared = {}, {}
    for stored in sorted({depths[path].bits for path in gray}):
        paths = [path for path in gray if depths[path].bits == stored]
        declared[stored] = max(depths[path].declared for path in paths)
        used = max(readable[path].bit_length() for path in paths)

        # sBIT may describe the bits before they were scaled up, and other tags may be wrong.
        if used > declared[stored]:
            declared[stored] = stored

        has_smaller_range = 0 < used <= declared[stored] - UNUSED_BITS
        ranges[stored] = used if has_smaller_range else declared[stored]

    # If several kinds are not as declared, the same value must be equally bright in all of them.
    odd = [stored for stored in ranges if ranges[stored] < declared[stored]]
    widest = max((ranges[stored] for stored in odd), default=0)
    for stored in odd:
        if widest <= stored:
            ranges[stored] = widest

    remarks = [
        f"{stored}-bit gray images use only {ranges[stored]} bits and are scaled to match: "
        f"0 is black, {2 ** ranges[stored] - 1} white"
        for stored in odd
    ]
    return ranges, remarks


def _check_color(largest: Mapping[Path, int]) -> None:
    """`largest` is the largest value of the upper 8 bits of each file of 16-bit color."""
    if largest and max(largest.values()).bit_length() <= 8 - UNUSED_BITS:
        raise UserError(
            f"{next(iter(largest))} and all other 16-bit images with color or opacity leave their "
            "upper bits unused; as only the upper 8 bits are read, they would be nearly black; "
            "convert them to 8 bits"
        )


def to_8_bits(values: np.ndarray, depth: Depth, ranges: Ranges) -> np.ndarray:
    """Gray [H, W] of any integer type -> uint8. For full 16 bits, this is the upper byte."""
    bits = ranges.get(depth.bits, depth.bits)
    _check_not_negative(values)
    if depth.is_inverted:
        values = 2**bits - 1 - values.astype(np.int64)

    if bits < 8:
        return (values.astype(np.int64) * 255 // (2**bits - 1)).astype(np.uint8)
    return (values >> (bits - 8)).astype(np.uint8)
