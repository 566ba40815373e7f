"""Image sizes as flags and configs write them: `224` for a square, `192x320` for height x width.

Imports no torch.
"""

from __future__ import annotations

import argparse


def parse(text: str) -> int | str:
    """An argparse type: `"224"` -> 224, `"192x320"` -> `"192x320"`; a square becomes one number."""
    try:
        words = text.lower().split("x")
        height, width = map(int, words if len(words) == 2 else [text, text])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected pixels like 224, or height x width like 192x320, got {text!r}"
        ) from None

    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return of_sides(height, width)


def of_sides(height: int, width: int) -> int | str:
    """What `sides_of` takes apart."""
    return height if height == width else f"{height}x{width}"


def sides_of(img_size: int | str) -> tuple[int, int]:
    """(height, width): 224 -> (224, 224), `"192x320"` -> (192, 320)."""
    if isinstance(img_size, int):
        return img_size, img_size
    height, width = img_size.split("x")
    return int(height), int(width)


def suffix(size: tuple[int, int], usual: tuple[int, int]) -> str:
    """What tells a file about images of another size than usual apart: `""` or `_192x320`."""
    return "" if tuple(size) == tuple(usual) else f"_{size[0]}x{size[1]}"


def in_words(img_size: int | str) -> str:
    """For sentences: 224 -> `224×224`. Anything goes, since a log may be damaged."""
    words = str(img_size).split("x")
    return f"{words[0]}×{words[-1]}"
