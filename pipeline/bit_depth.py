"""Images of more than 8 bits: how many their files say they use, how many they do use, and what that makes of 8.

Files of 16 bits often hold 8, 10 or 12: read as they declare, all of them would be nearly black. So where the upper
bits are unused in every image of a folder that declares so many, those that are used are taken for all of them, one
range for the folder, so that its images can still be compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils import UserError

BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, SAMPLE_FORMAT = 258, 262, 281, 339  # tags of TIFF 6.0
SIGNED = 2  # of SAMPLE_FORMAT
UNUSED_BITS = 2  # so many, and the range is taken for a smaller one: of 16 bits, less than a quarter of it used


@dataclass(frozen=True)
class Depth:
    """What a file says of its samples."""

    bits: int  # that it stores of each, more than 8
    declared: int  # how many of these it says it uses
    is_color: bool = False  # of which Pillow reads the upper 8 bits alone
    is_inverted: bool = False  # 0 is white


Ranges = Mapping[int, int]  # bits that files of gray store -> how many of them the folder's images use


def depth_of(image: Image.Image) -> Depth | None:
    """From the header; None for 8 bits and fewer. Raises ValueError for values that Pillow would misread."""
    if image.mode.startswith("I"):
        stored = _stored_bits(image)
        return Depth(stored, min(stored, _declared_bits(image) or stored), is_inverted=_tag(image, PHOTOMETRIC) == 0)

    if image.mode == "L" and _tag(image, SAMPLE_FORMAT) == SIGNED:
        raise ValueError("its pixels are signed numbers of 8 bits, which Pillow takes for unsigned ones")

    return Depth(16, 16, is_color=True) if _keeps_upper_byte_alone(image) else None


def _keeps_upper_byte_alone(image: Image.Image) -> bool:
    """Whether Pillow reads 8 of 16 bits: `RGB;16B` and the like, but not `BGR;16`, of which all channels have 16."""
    for codec, _, _, arguments in image.tile:
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        scales = codec.startswith("ppm") and arguments[-1] > 255  # by the largest value that the header allows
        if codec == "SGI16" or scales or any(re.search(";16[BLN]", str(argument)) for argument in arguments):
            return True
    return False


def _stored_bits(image: Image.Image) -> int:
    bits = _tag(image, BITS_PER_SAMPLE)
    if isinstance(bits, int) and bits > 8:
        return bits
    return 32 if image.mode == "I" and image.format not in ("PNG", "PPM") else 16


def _declared_bits(image: Image.Image) -> int | None:
    """None if the file says nothing but how many it stores."""
    largest = _tag(image, MAX_SAMPLE_VALUE)
    if isinstance(largest, int) and largest > 255:
        return largest.bit_length()

    stored = _stored_bits(image)
    if _tag(image, SAMPLE_FORMAT) == SIGNED or stored == 32:  # Pillow takes all numbers of 32 bits for signed ones
        return stored - 1
    return _significant_bits_of_png(Path(image.filename)) if image.format == "PNG" else None


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
    """Of the pixels; of 16-bit color, of their upper 8 bits. Opacity aside. Raises ValueError for negative ones."""
    values = np.asarray(image)
    if image.getbands()[-1] in ("A", "a"):
        values = values[..., :-1]
    _check_not_negative(values)
    return int(values.max())


def _check_not_negative(values: np.ndarray) -> None:
    if values.min() < 0:
        raise ValueError(
            f"its pixels go down to {values.min()} as Pillow reads them; negative values have no brightness, and "
            "unsigned ones must be below 2^31"
        )


def find_ranges(largest: Mapping[Path, int | None], depths: Mapping[Path, Depth]) -> tuple[dict[int, int], list[str]]:
    """The range of each kind of gray in a folder, and a remark on each that is not as declared.

    `largest` is the largest value of each file, or None where it cannot be read. Raises UserError for color whose upper
    bits are unused, as Pillow does not read the lower ones.
    """
    readable = {path: value for path, value in largest.items() if value is not None}
    _check_color({path: value for path, value in readable.items() if depths[path].is_color})

    gray = [(depths[path], value.bit_length()) for path, value in readable.items() if not depths[path].is_color]
    ranges, declared = {}, {}
    for stored in sorted({depth.bits for depth, _ in gray}):
        declared[stored] = max(depth.declared for depth, _ in gray if depth.bits == stored)
        used = max(bits for depth, bits in gray if depth.bits == stored)
        if used > declared[stored]:  # sBIT may tell of the bits before they were scaled up; other tags may be wrong
            declared[stored] = stored
        ranges[stored] = used if 0 < used <= declared[stored] - UNUSED_BITS else declared[stored]

    # Where several kinds are not as declared, the same value is to be as bright in all of them.
    odd = [stored for stored in ranges if ranges[stored] < declared[stored]]
    widest = max((ranges[stored] for stored in odd), default=0)
    ranges |= {stored: widest for stored in odd if widest <= stored}

    remarks = [
        f"gray images of {stored} bits use {ranges[stored]} of them, and are scaled by these: 0 is black, "
        f"{2 ** ranges[stored] - 1} white"
        for stored in odd
    ]
    return ranges, remarks


def _check_color(largest: Mapping[Path, int]) -> None:
    """`largest`: of the upper 8 bits of each file of 16-bit color."""
    if largest and max(largest.values()).bit_length() <= 8 - UNUSED_BITS:
        raise UserError(
            f"{next(iter(largest))} and all others of 16 bits in color or with opacity leave their upper bits unused, "
            "and only the upper 8 are read: they would be nearly black; convert them to 8 bits"
        )


def to_8_bits(values: np.ndarray, depth: Depth, ranges: Ranges) -> np.ndarray:
    """Gray [H, W] of any integers -> uint8. Of full 16 bits this is the upper byte."""
    bits = ranges.get(depth.bits, depth.bits)
    _check_not_negative(values)
    if depth.is_inverted:
        values = 2**bits - 1 - values.astype(np.int64)
    if bits < 8:
        return (values.astype(np.int64) * 255 // (2**bits - 1)).astype(np.uint8)
    return (values >> (bits - 8)).astype(np.uint8)
