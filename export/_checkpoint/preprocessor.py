"""The image front end of a checkpoint, from its preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import numpy as np

from vlmedge.errors import CheckpointError
from vlmedge.spec import ImageFrontEnd

_FILTERS: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


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
            _refuse(config, name, f"the steps that a bundle has are {', '.join(_STEPS)}")
    if not config.get("do_resize", True):
        _refuse(config, "do_resize", "it must be true, since a graph takes one size")
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
        _refuse(config, field, "give three numbers, one for each of R, G and B, a std not 0")
    red, green, blue = figures
    return float(red), float(green), float(blue)
