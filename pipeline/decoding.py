"""One image file -> 8-bit RGB pixels, or what is known of it before it is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipeline import bit_depth
from pipeline.imagefiles import readable_formats
from utils import UserError, first_line

MAX_PIXELS = 64_000_000  # per file; decoding takes 4 bytes per pixel, 8 with transparency

# A tag of TIFF 6.0 that says what the channels beyond color are, and its values for opacity.
EXTRA_SAMPLES = 338
OPACITY = (1, 2)


class UnreadableError(UserError):
    """A file that should be an image but cannot be read."""


@dataclass(frozen=True)
class Header:
    """What is known about an image before its pixels are decoded."""

    size: tuple[int, int]  # (width, height), after rotation by the EXIF orientation
    depth: bit_depth.Depth | None  # None for 8 bits or fewer
    is_tiff: bool
    is_animated: bool
    has_unused_channels: bool


def read_image(
    path: Path, height: int, width: int, ranges: bit_depth.Ranges | None = None
) -> Image.Image:
    """The file as RGB, resized and center-cropped to height x width if it has another size.

    A copy of a large image takes hundreds of megabytes, so it is rotated in place, and resized
    before the transparency is resolved.
    """
    with _opened(path) as image:
        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is enough.
        enough = 2 * max(height, width)
        image.draft(None, (enough, enough))
        image.load()  # the first frame of an animation
        ImageOps.exif_transpose(image, in_place=True)

        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        if image.mode.startswith("I"):  # 16- or 32-bit gray, which convert() would clip at 255
            image = _gray_to_8_bits(image, ranges or {})

        mode = "RGBA" if image.has_transparency_data else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.BILINEAR)

        if mode == "RGBA":
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("RGB")
        return image


def _gray_to_8_bits(image: Image.Image, ranges: bit_depth.Ranges) -> Image.Image:
    values = np.asarray(image)
    pixels = bit_depth.to_8_bits(values, bit_depth.depth_of(image), ranges)

    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a PNG may declare one value to be transparent
        pixels[values == transparent] = 255
    return Image.fromarray(pixels)


def read_header(path: Path) -> Header:
    with _opened(path) as image:
        # Not image.getexif(), which for a PNG decodes the whole file.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)

        # For a TIFF, Pillow gives the size after rotation.
        is_on_its_side = orientation in (5, 6, 7, 8) and image.format != "TIFF"
        size = image.size[::-1] if is_on_its_side else image.size

        # The second picture in a phone's JPEG (MPO) may be a preview.
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)

        extra_channels = getattr(image, "tag_v2", {}).get(EXTRA_SAMPLES, ())
        return Header(
            size=size,
            depth=bit_depth.depth_of(image),
            is_tiff=image.format == "TIFF",
            is_animated=is_animated,
            has_unused_channels=any(meaning not in OPACITY for meaning in extra_channels),
        )


def largest_value(path: Path) -> int:
    with _opened(path) as image:
        return bit_depth.largest_value(image)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image in a file, not yet decoded.

    Whatever fails here or in the caller's block becomes an UnreadableError that names the file.
    """
    try:
        # Restricted to these formats, as Pillow would pass an EPS to Ghostscript, which runs it.
        with Image.open(path, formats=readable_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableError(
                    f"{path} has {image.width}x{image.height} pixels, more than "
                    f"{MAX_PIXELS // 1_000_000} million; make it smaller"
                )
            yield image
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # Pillow may raise anything
        reason = _reason(error)
        raise UnreadableError(
            f"cannot read {path} as an image: {reason}; remove or replace it"
        ) from error


def short_reason(error: UnreadableError) -> str:
    if error.__cause__ is None:
        return f"more than {MAX_PIXELS // 1_000_000} million pixels"
    return _reason(error.__cause__)


def _reason(error: BaseException) -> str:
    """On one line, without the name of the file."""
    if isinstance(error, UnidentifiedImageError):
        return "not in a format that Pillow can read"
    return first_line(error)
