"""A picture in the middle of a square: the padding, and the pixel coordinates afterwards.

Half of what lacks, rounded down, is above the picture or left of it.
"""

from __future__ import annotations

import PIL.Image


def squared(image: PIL.Image.Image, color: tuple[int, int, int]) -> PIL.Image.Image:
    """Fill an RGB picture up to a square with one colour, RGB, 0..255."""
    side, left, top = centred(image.size)
    if image.size == (side, side):
        return image
    filled = PIL.Image.new("RGB", (side, side), color)
    filled.paste(image, (left, top))
    return filled


def centred(size: tuple[int, int]) -> tuple[int, int, int]:
    """Return the square's side, and how far the picture is from its left and its top."""
    width, height = size
    side = max(size)
    return side, (side - width) // 2, (side - height) // 2
