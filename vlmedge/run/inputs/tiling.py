"""A picture cut into tiles that an encoder of one size can take.

Two ways: Idefics3's (Laurencon et al. 2024, arXiv 2408.12637), whose pieces stand one by one in a
text, and LLaVA-NeXT's (Liu et al. 2024, llava-vl.github.io/blog/2024-01-30-llava-next), whose tiles
are put together again. The arithmetic is that of transformers' Idefics3ImageProcessorPil,
LlavaNextImageProcessorPil and LlavaNextModel: every resize rounds to whole pixels and to bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vlmedge.errors import InputError
from vlmedge.run.inputs.image import SIDES_LIMIT_RATIO, Grid
from vlmedge.spec import AnyRes, Tiling

SIDE_LIMIT_PX = 4096


def cut(
    image: PIL.Image.Image, tiling: Tiling | AnyRes, resample: str
) -> tuple[list[PIL.Image.Image], Grid]:
    """Cut a picture into tiles.

    Args:
        image: RGB.
        tiling: How.
        resample: PIL's filter, lower case.

    Returns:
        Its pieces, all squares, in the order that `tiling` says, and the grid.

    Raises:
        InputError: The picture is too long and thin.
    """
    short, long = sorted(image.size)
    if long > SIDES_LIMIT_RATIO * short:
        raise InputError(
            f"image of {image.width} x {image.height} pixels: the longer side may be at most "
            f"{SIDES_LIMIT_RATIO} times the shorter"
        )
    by = PIL.Image.Resampling[resample.upper()]
    if isinstance(tiling, AnyRes):
        return _cut_padded(image, tiling, by)
    return _cut_stretched(image, tiling, by)


def joined(grid: Grid) -> NDArray[np.int64]:
    """Return which rows of all pieces make the one soft prompt of an AnyRes picture, in order.

    A piece has side * side rows and one more, which ends a line: the whole comes without, then

        tile 1, line 1 | tile 2, line 1 | end
        tile 1, line 2 | tile 2, line 2 | end
        ...
        tile 3, line 1 | tile 4, line 1 | end

    Returns:
        int64 [rows], into the [pieces * (side * side + 1)] of the whole and its tiles.
    """
    side = grid.side
    tiles = 1 + np.arange(grid.rows * grid.columns).reshape(grid.rows, 1, grid.columns, 1)
    patches = np.arange(side * side).reshape(1, side, 1, side)
    places = tiles * (side * side + 1) + patches  # [rows, side, columns, side]
    places = places.reshape(grid.rows * side, grid.columns * side)
    top, left = grid.trim
    places = places[top : len(places) - top, left : places.shape[1] - left]
    ended = np.pad(places, ((0, 0), (0, 1)), constant_values=side * side)
    return np.concatenate([np.arange(side * side), ended.ravel()])


def _cut_stretched(
    image: PIL.Image.Image, tiling: Tiling, by: PIL.Image.Resampling
) -> tuple[list[PIL.Image.Image], Grid]:
    """Stretch a picture to whole tiles; the whole comes last, and alone where one tile holds it."""
    side = tiling.tile_size
    image = image.resize(_fitted(*image.size, tiling.longest_edge), by)
    if not tiling.split:
        return [image.resize((side, side), by)], Grid()
    image = image.resize(_whole_tiles(*image.size, side), by)
    if image.size == (side, side):
        return [image], Grid()
    grid = Grid(image.height // side, image.width // side)
    return [*_tiles(image, side), image.resize((side, side), by)], grid


def _cut_padded(
    image: PIL.Image.Image, tiling: AnyRes, by: PIL.Image.Resampling
) -> tuple[list[PIL.Image.Image], Grid]:
    """Fit a picture into the best of several sizes, in the middle of black; the whole is first."""
    width, height = image.size
    canvas = PIL.Image.new("RGB", _best(width, height, tiling.sizes))
    across, down = canvas.width / width, canvas.height / height
    if across < down:
        inner = canvas.width, min(math.ceil(height * across), canvas.height)
    else:
        inner = min(math.ceil(width * down), canvas.width), canvas.height
    place = (canvas.width - inner[0]) // 2, (canvas.height - inner[1]) // 2
    canvas.paste(image.resize(inner, by), place)
    whole = image.resize((tiling.whole_size, tiling.whole_size), by)
    rows, columns = canvas.height // tiling.tile_size, canvas.width // tiling.tile_size
    trim = _padding(width, height, columns * tiling.patches, rows * tiling.patches)
    return [whole, *_tiles(canvas, tiling.tile_size)], Grid(rows, columns, tiling.patches, trim)


def _tiles(image: PIL.Image.Image, side: int) -> Iterable[PIL.Image.Image]:
    """Cut a picture of whole tiles, row by row."""
    for top in range(0, image.height, side):
        for left in range(0, image.width, side):
            yield image.crop((left, top, left + side, top + side))


def _best(width: int, height: int, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the (width, height) that keeps most of a picture's pixels, and wastes fewest."""
    found, most, least = (0, 0), 0, math.inf
    for high, wide in sizes:
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = wide * high - kept
        if kept > most or (kept == most and wasted < least):
            found, most, least = (wide, high), kept, wasted
    return found


def _padding(width: int, height: int, across: int, down: int) -> tuple[int, int]:
    """Count the lines of patches, of `down` x `across`, that a picture's padding fills."""
    if width / height > across / down:
        return (down - int(round(height * (across / width), 7))) // 2, 0
    return 0, (across - int(round(width * (down / height), 7))) // 2


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
