"""Pictures to pixel_values, equal to the PIL processors of transformers bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from vlmedge.errors import InputError
from vlmedge.run.inputs.image_files import _check_size
from vlmedge.run.inputs.letterbox import squared
from vlmedge.spec import ImageFrontEnd

SIDES_LIMIT_RATIO = 200  # a shortest_edge resize keeps the ratio, so this bounds its memory


class Grid(NamedTuple):
    """How a picture is cut; by default it is in one piece.

    Attributes:
        rows: Number of rows of tiles.
        columns: Number of columns of tiles.
        side: Patches along a tile, where all tiles make one soft prompt; 0: each makes its own.
        trim: Lines of patches that hold padding, on either side: (top and bottom, left and right).
    """

    rows: int = 0
    columns: int = 0
    side: int = 0
    trim: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures as an encoder takes them.

    Attributes:
        pixel_values: float32 [pieces, 3, height, width]: of each picture its tiles, row by row,
            and the whole after them (spec.Tiling) or before (spec.AnyRes).
        grids: How each picture is cut.
    """

    pixel_values: NDArray[np.float32]
    grids: tuple[Grid, ...]


def pieces(grid: Grid) -> int:
    """Count what a picture becomes: its tiles, and the whole."""
    return grid.rows * grid.columns + 1


def preprocess(images: Sequence[PIL.Image.Image], front: ImageFrontEnd) -> NDArray[np.float32]:
    """Resize, crop, rescale and normalise.

    Args:
        images: From `load_image`; at least one, in any sizes.
        front: The front end that the checkpoint was trained with.

    Returns:
        pixel_values, float32 [batch, 3, height, width], RGB.
    """
    return normalize([fit(image, front) for image in images], front)


def fit(image: PIL.Image.Image, front: ImageFrontEnd) -> NDArray[np.uint8]:
    """Resize and crop one picture from `load_image`: uint8 [height, width, 3], RGB."""
    return np.asarray(_fit(image, front))


def normalize(rows: Sequence[NDArray[np.uint8]], front: ImageFrontEnd) -> NDArray[np.float32]:
    """Rescale and normalise what `fit` gave: float32 [batch, 3, height, width]."""
    if not rows:
        raise InputError("no images: give at least one")
    height, width, _ = rows[0].shape
    for row in rows:
        if row.shape != rows[0].shape:
            raise InputError(
                f"images of {width} x {height} and {row.shape[1]} x {row.shape[0]} pixels after "
                "the resize: without a crop a batch needs one shape; give them one by one"
            )
    # A byte has 256 values: with a table the reference's own formula, in its own precision
    # (transformers.image_transforms.rescale and normalize), costs one lookup a value.
    values = (np.arange(256, dtype=np.float64) * front.rescale_factor).astype(np.float32)
    mean = np.array(front.image_mean, np.float32)
    std = np.array(front.image_std, np.float32)
    table = (values[:, None] - mean) / std  # [256, 3]
    pixels = np.empty((len(rows), 3, height, width), np.float32)
    for row, planes in zip(rows, pixels, strict=True):
        for channel in range(3):
            np.take(table[:, channel], row[..., channel], out=planes[channel], mode="clip")
    return pixels


def _fit(image: PIL.Image.Image, front: ImageFrontEnd) -> PIL.Image.Image:
    if image.mode != "RGB":
        raise InputError(f"image of mode {image.mode}: open it with load_image, which gives RGB")
    width, height = image.size
    _check_size(image.size, "image")
    if front.square is not None:
        side = max(image.size)
        _check_size((side, side), f"image of {width} x {height} pixels, in a square,")
        image = squared(image, front.square)
        width = height = side
    new_height, new_width = front.resize_size
    if front.resize == "shortest_edge":
        short, long = sorted(image.size)
        if long > SIDES_LIMIT_RATIO * short:
            raise InputError(
                f"image of {width} x {height} pixels: the longer side may be at most "
                f"{SIDES_LIMIT_RATIO} times the shorter"
            )
        # transformers.image_transforms.get_resize_output_image_size: the long side is cut off,
        # not rounded, and the product comes before the division.
        edge = front.resize_size[0]
        new_long = int(edge * long / short)
        new_height, new_width = (new_long, edge) if width <= height else (edge, new_long)
    if front.resample == "floor":
        image = _picked(image, new_width, new_height)
    else:
        resample = PIL.Image.Resampling[front.resample.upper()]
        image = image.resize((new_width, new_height), resample)
    if front.crop_size is None:
        return image
    # Floors like transformers' center_crop; PIL fills what lies outside the picture with zeros.
    crop_height, crop_width = front.crop_size
    top, left = (new_height - crop_height) // 2, (new_width - crop_width) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def _picked(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """Resize as torch.nn.functional.interpolate does by default, whose scale is a float32."""
    rows, columns = (
        np.floor(np.arange(to, dtype=np.float32) * (np.float32(size) / np.float32(to)))
        for size, to in ((image.height, height), (image.width, width))
    )
    pixels = np.asarray(image)
    rows = np.minimum(rows, image.height - 1).astype(np.int64)
    columns = np.minimum(columns, image.width - 1).astype(np.int64)
    return PIL.Image.fromarray(pixels[rows[:, None], columns])
