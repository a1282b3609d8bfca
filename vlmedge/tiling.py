"""A picture cut into tiles that an encoder of one size can take, as Idefics3 does it.

Laurencon et al. 2024, arXiv 2408.12637; the arithmetic is that of transformers'
Idefics3ImageProcessorPil: every resize rounds to whole pixels and to bytes.
"""

from __future__ import annotations

import math

import PIL.Image

from vlmedge.errors import InputError
from vlmedge.image import SIDES_LIMIT_RATIO, Grid
from vlmedge.spec import Tiling

SIDE_LIMIT_PX = 4096


def cut(
    image: PIL.Image.Image, tiling: Tiling, resample: str
) -> tuple[list[PIL.Image.Image], Grid]:
    """Cut a picture into tiles.

    Args:
        image: RGB.
        tiling: How.
        resample: PIL's filter, lower case.

    Returns:
        Its tiles row by row and then the whole, all `tile_size` pixels square, and the grid; the
        whole alone with the grid (0, 0) where one tile holds it.

    Raises:
        InputError: The picture is too long and thin.
    """
    width, height = image.size
    short, long = sorted(image.size)
    if long > SIDES_LIMIT_RATIO * short:
        raise InputError(
            f"sides of {width} x {height} pixels: the longer side may be at most "
            f"{SIDES_LIMIT_RATIO} times the shorter"
        )
    by = PIL.Image.Resampling[resample.upper()]
    side = tiling.tile_size
    image = image.resize(_fitted(width, height, tiling.longest_edge), by)
    if not tiling.split:
        return [image.resize((side, side), by)], (0, 0)
    image = image.resize(_whole_tiles(*image.size, side), by)
    columns, rows = image.width // side, image.height // side
    if (rows, columns) == (1, 1):
        return [image], (0, 0)
    tiles = [
        image.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
        for row in range(rows)
        for column in range(columns)
    ]
    return [*tiles, image.resize((side, side), by)], (rows, columns)


def _fitted(width: int, height: int, longest: int) -> tuple[int, int]:
    """Return (width, height) with the longer side `longest`, and the other one even."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > SIDE_LIMIT_PX:
        width, height = SIDE_LIMIT_PX, int(SIDE_LIMIT_PX / ratio)
    elif height > width and height > SIDE_LIMIT_PX:
        width, height = int(SIDE_LIMIT_PX * ratio), SIDE_LIMIT_PX
    return max(width, 1), max(height, 1)


def _whole_tiles(width: int, height: int, side: int) -> tuple[int, int]:
    """Return (width, height) as multiples of a tile's side; the longer one is rounded first."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = math.ceil(int(width / ratio) / side) * side
    else:
        height = math.ceil(height / side) * side
        width = math.ceil(int(height * ratio) / side) * side
    return width, height
