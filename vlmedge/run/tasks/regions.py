"""Regions in a question: what the user points at on the picture, in the model's own writing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmedge.errors import InputError
from vlmedge.run.tasks.boxes import into_square, write
from vlmedge.spec import GenerateTask, ImageFrontEnd

PLACE = "{region}"

Region = Sequence[float]
"""A box (left, top, right, bottom) or a point (x, y), in pixels of the picture as it was given."""


def check_regions(task: GenerateTask, question: str, regions: Sequence[Region]) -> None:
    """Refuse regions that the model or the question has no place for.

    Raises:
        InputError: The model takes no regions, their number is not that of the question's
            `{region}`, or one is neither a box nor a point.
    """
    if not regions and task.regions is None:
        return  # and the question may hold any words
    if task.regions is None:
        raise InputError("this model takes no regions: say in words where to look")
    places = question.count(PLACE)
    if places != len(regions):
        raise InputError(
            f"question with {places} marks {PLACE} for {len(regions)} regions: "
            f"put a {PLACE} where each belongs"
        )
    for region in regions:
        if len(region) not in (2, 4) or not all(map(math.isfinite, region)):
            raise InputError(
                f"region {_text(region)}: give left, top, right and bottom, or x and y, in pixels"
            )
        if len(region) == 4 and (region[0] >= region[2] or region[1] >= region[3]):
            raise InputError(
                f"region {_text(region)}: left must be below right, and top below bottom"
            )


def placed(
    question: str, regions: Sequence[Region], size: tuple[int, int], front: ImageFrontEnd
) -> str:
    """Replace each `{region}` of a question by a region, in the model's own writing.

    Args:
        question: Question with one `{region}` for each region, which `check_regions` has checked.
        regions: Regions in the same order; what reaches beyond the picture is cut off.
        size: (width, height) of the picture, pixels.
        front: The image front end; its `square` decides from which corner the model counts.

    Raises:
        InputError: A region lies outside the picture.
    """
    if not regions:
        return question
    width, height = size
    made = []
    for region in regions:
        xs, ys = region[::2], region[1::2]
        if xs[-1] < 0 or ys[-1] < 0 or xs[0] > width or ys[0] > height:
            raise InputError(
                f"region {_text(region)} is beside the picture of {width} x {height} pixels: "
                "count from its upper left corner"
            )
        inside = [min(max(s, 0), height if i % 2 else width) for i, s in enumerate(region)]
        if front.square is not None:
            made.append(write(into_square(inside, size)))
        else:
            made.append(write([s / (height if i % 2 else width) for i, s in enumerate(inside)]))
    first, *rest = question.split(PLACE)
    return first + "".join(text + after for text, after in zip(made, rest, strict=True))


def _text(region: Region) -> str:
    return ",".join(f"{side:g}" for side in region)
