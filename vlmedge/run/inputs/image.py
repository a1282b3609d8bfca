"""Pictures to pixel_values, equal to the PIL processors of transformers bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from vlmedge.errors import CheckpointError, InputError
from vlmedge.run.inputs.image_files import _check_size
from vlmedge.run.inputs.letterbox import squared
from vlmedge.spec import ImageFrontEnd

SIDES_LIMIT_RATIO = 200  # a shortest_edge resize keeps the ratio, so this bounds its memory

_FILTERS: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


class Grid(NamedTuple):
    """How a picture is cut; by default it is in one piece.

    Attributes:
        rows: Of tiles.
        columns: Of tiles.
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
        front: What the checkpoint was trained with.

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


def front_end(config: Mapping[str, Any]) -> ImageFrontEnd:
    """Read what a preprocessor_config.json says, in any of its spellings.

    A lone int for `size` is a square if `default_to_square` says so; without that key it is the
    shorter edge where a centre crop follows (CLIP) and a square where none does (BLIP, ViT).
    Of the do_* switches only do_center_crop is off when it is left out.

    Args:
        config: The parsed file, with the family's own defaults filled in.

    Raises:
        CheckpointError: A field is missing or asks for something that no front end does.
    """
    for name, value in config.items():
        if name.startswith("do_") and value and name not in _STEPS:
            _refuse(config, name, f"the steps are {', '.join(_STEPS)}")
    if not config.get("do_resize", True):
        _refuse(config, "do_resize", "a graph takes one size, so it must be true")
    crop = _square(config, "crop_size") if config.get("do_center_crop") else None
    size = config.get("size")
    edges = _sides(size)
    if isinstance(size, int):
        square = config.get("default_to_square", crop is None)
        edges = {"height": size, "width": size} if square else {"shortest_edge": size}
    resize: Literal["exact", "shortest_edge"] = "exact"
    resize_size = (edges.get("height", 0), edges.get("width", 0))
    if edges.keys() == {"shortest_edge"}:
        if crop is None:
            _refuse(config, "size", "a shortest_edge needs do_center_crop, or shapes vary")
        resize, resize_size = "shortest_edge", (edges["shortest_edge"],) * 2
    elif edges.keys() != {"height", "width"}:
        _refuse(config, "size", "give height and width, or shortest_edge")
    if not (_is_side(resize_size[0]) and _is_side(resize_size[1])):
        _refuse(config, "size", "sides are whole pixels, at least 1")
    resample = config.get("resample")
    if not isinstance(resample, int) or isinstance(resample, bool) or resample not in _FILTERS:
        filters = ", ".join(f"{number} ({name})" for number, name in _FILTERS.items())
        _refuse(config, "resample", f"choose from {filters}")
    normalize = config.get("do_normalize", True)
    return ImageFrontEnd(
        resize=resize,
        resize_size=resize_size,
        resample=_FILTERS[resample],
        crop_size=crop,
        rescale_factor=_factor(config) if config.get("do_rescale", True) else 1.0,
        image_mean=_three(config, "image_mean") if normalize else (0.0, 0.0, 0.0),
        image_std=_three(config, "image_std") if normalize else (1.0, 1.0, 1.0),
    )


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
                f"sides of {width} x {height} pixels: the longer side may be at most "
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


def _refuse(config: Mapping[str, Any], field: str, allowed: str) -> NoReturn:
    got = f"{config[field]!r}" if field in config else "is missing"
    raise CheckpointError(f"preprocessor_config.json: {field} {got}: {allowed}")


def _sides(size: object) -> dict[str, Any]:
    """The sides that a size names; transformers writes unused ones as null."""
    if not isinstance(size, Mapping):
        return {}
    return {name: side for name, side in size.items() if side is not None}


def _is_side(side: object) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and side >= 1


def _square(config: Mapping[str, Any], field: str) -> tuple[int, int]:
    size = config.get(field)
    sides = _sides(size) or {"height": size, "width": size}
    if sides.keys() != {"height", "width"} or not all(map(_is_side, sides.values())):
        _refuse(config, field, "give a side, or height and width, in whole pixels, at least 1")
    return sides["height"], sides["width"]


def _factor(config: Mapping[str, Any]) -> float:
    factor = config.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < np.inf:
        _refuse(config, "rescale_factor", "give a number above 0, as 1/255")
    return float(factor)


def _three(config: Mapping[str, Any], field: str) -> tuple[float, float, float]:
    value = config.get(field)
    figures = [value] * 3 if isinstance(value, int | float) else value
    if (
        not isinstance(figures, Sequence)
        or len(figures) != 3
        or not all(isinstance(x, int | float) and np.isfinite(x) for x in figures)
        or (field == "image_std" and not all(figures))
    ):
        _refuse(config, field, "give three figures, one for each of R, G and B, a std not 0")
    red, green, blue = figures
    return float(red), float(green), float(blue)
