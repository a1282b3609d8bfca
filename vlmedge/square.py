"""A picture in the middle of a square: how it comes there, and where its places are then.

Half of what lacks, rounded down, is above the picture or left of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import PIL.Image

from vlmedge.locations import Box


def squared(image: PIL.Image.Image, color: tuple[int, int, int]) -> PIL.Image.Image:
    """Fill an RGB picture up to a square with one colour, RGB, 0..255."""
    side, left, top = _place(image.size)
    if image.size == (side, side):
        return image
    filled = PIL.Image.new("RGB", (side, side), color)
    filled.paste(image, (left, top))
    return filled


def into_square(region: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Say where a region of a picture lies in its square.

    Args:
        region: x and y in turn, pixels of the picture.
        size: (width, height) of the picture.

    Returns:
        The same in parts of the square's side, 0 to 1.
    """
    side, left, top = _place(size)
    return [
        min(max((length + (top if i % 2 else left)) / side, 0.0), 1.0)
        for i, length in enumerate(region)
    ]


def out_of_square(box: Box, size: tuple[int, int]) -> Box | None:
    """Say where a box of the square lies on the picture; none: where there is no picture.

    Args:
        box: In parts of the square's side.
        size: (width, height) of the picture, pixels.

    Returns:
        The box in parts of the picture's sides, cut off at its edges.
    """
    side, left, top = _place(size)
    width, height = size
    xs = [(x * side - left) / width for x in (box.left, box.right)]
    ys = [(y * side - top) / height for y in (box.top, box.bottom)]
    if xs[1] < 0 or ys[1] < 0 or xs[0] > 1 or ys[0] > 1:
        return None
    (x0, x1), (y0, y1) = ([min(max(place, 0.0), 1.0) for place in ends] for ends in (xs, ys))
    return replace(box, left=x0, top=y0, right=x1, bottom=y1)


def _place(size: tuple[int, int]) -> tuple[int, int, int]:
    """Return the square's side, and how far the picture is from its left and its top."""
    width, height = size
    side = max(size)
    return side, (side - width) // 2, (side - height) // 2
