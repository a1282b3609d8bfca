"""Places in a text: location and segment tokens, parsed to boxes and outlines.

"locations" are PaliGemma's. A box is four tokens <loc0000> to <loc1023>, y0 x0 y1 x1 in 1023rds of
the picture's sides, and the name of what is there; things are parted by " ; ". A segment is 16
tokens <seg000> to <seg127> more: codes of a mask, which stay numbers unless the checkpoint brought
their decoder along; fewer, or others, are no mask. Source: Beyer et al. 2024, arXiv 2407.07726,
section 3.2, and the evaluator of segmentation in github.com/google-research/big_vision.

"boxes" and "polygons" are Florence-2's: a name, which may be empty, and then its tokens <loc_0> to
<loc_999>, each the middle of a 1000th of a side. A box is x0 y0 x1 y1, and a name may have several.
A polygon is x y of its corners; <sep> parts those of one thing, and <poly> </poly> stand around
them where a name has several things. Source: Xiao et al. 2023, arXiv 2311.06242, and transformers'
Florence2PostProcessor.

"brackets" are Shikra's: plain figures after the words that they belong to, [x0,y0,x1,y1], parts of
the side of the square that the picture is filled up to; of several things they are parted by ";".
A question has a region so too, with three decimals, and a point as [x,y]. Source: Chen et al. 2023,
arXiv 2306.15195, and the PlainBoxFormatter of github.com/shikras/shikra.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.typing import NDArray

from vlmedge.run.inputs.letterbox import centred
from vlmedge.spec import MASK_CODE_KINDS, MASK_CODES

STEPS = 1023  # that a side is cut into by PaliGemma
BINS = 1000  # and by Florence-2
_THING = re.compile(
    r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>\s*((?:<seg\d{3}>)*)\s*([^;<]*)"
)
_CODE = re.compile(r"<seg(\d{3})>")
_NAMED = re.compile(r"([^<]*)((?:<loc_\d+>|<sep>|</?poly>){4,})")
_PLACE = re.compile(r"<loc_(\d+)>")
_THINGS = re.compile(r"<poly>(.*?)</poly>")
_SIDES = r"\d(?:\.\d*)?(?:,\d(?:\.\d*)?){3}"
_BRACKETS = re.compile(rf"([^\[]*)\[({_SIDES}(?:;{_SIDES})*)\]")
_SENTENCE_END = re.compile(r"[.!?]\s")

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """The place of one thing in a picture; `Model.detect` returns a list of them.

    Sides are fractions of the picture, 0..1; `pixels` and `mask` convert them to a picture's size.

    Attributes:
        label: Name of the thing, in the model's words.
        left: Left side as a fraction of the picture's width; at most `right`.
        top: Upper side as a fraction of the picture's height; at most `bottom`.
        right: Right side as a fraction of the width.
        bottom: Lower side as a fraction of the height.
        codes: The 16 codes of its mask, 0..127, or an empty tuple.
        polygons: Outline of each of its parts, (x, y) corners as fractions of width and height, or
            an empty tuple.
        raster: Mask that `codes` decode to, float32 [rows, columns], stretched over the box; values
            above 0 are inside. None without codes, or without a decoder for them.
    """

    label: str
    left: float
    top: float
    right: float
    bottom: float
    codes: tuple[int, ...] = ()
    polygons: tuple[tuple[Point, ...], ...] = ()
    raster: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    def pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) in pixels of a picture of this size.

        Args:
            width: Width of the picture, pixels.
            height: Height of the picture, pixels.
        """
        return self.left * width, self.top * height, self.right * width, self.bottom * height

    def outlines(self, width: int, height: int) -> list[list[Point]]:
        """Return the (x, y) corners of each polygon in pixels of a picture of this size.

        Args:
            width: Width of the picture, pixels.
            height: Height of the picture, pixels.
        """
        return [[(x * width, y * height) for x, y in polygon] for polygon in self.polygons]

    def mask(self, width: int, height: int) -> NDArray[np.bool_] | None:
        """Return the mask of the thing in a picture of this size.

        A raster is resized to the box, whose sides are cut to whole pixels, as the evaluator of
        segmentation in github.com/google-research/big_vision does. Polygons are filled.

        Args:
            width: Width of the picture, pixels.
            height: Height of the picture, pixels.

        Returns:
            bool [height, width], or None if the box has neither a raster nor polygons.
        """
        if self.raster is None and not self.polygons:
            return None
        filled = PIL.Image.new("1", (width, height))
        if self.raster is not None:
            left, top, right, bottom = map(int, self.pixels(width, height))
            if left < right and top < bottom:
                size = right - left, bottom - top
                fitted = PIL.Image.fromarray(self.raster).resize(
                    size, PIL.Image.Resampling.BILINEAR
                )
                filled.paste(PIL.Image.fromarray(np.asarray(fitted) > 0), (left, top))
        pen = PIL.ImageDraw.Draw(filled)
        for points in self.outlines(width, height):
            pen.polygon(points, fill=1)
        return np.array(filled)


def parse(text: str, kind: str = "locations") -> list[Box]:
    """Find every box of a text, in its order; what is no whole box is passed over.

    Args:
        text: With its location tokens.
        kind: How it is written: `GenerateTask.answer`, but "text".
    """
    return _PARSERS[kind](text)


def _locations(text: str) -> list[Box]:
    found = []
    for *corners, codes, label in _THING.findall(text):
        top, left, bottom, right = (min(int(corner), STEPS) / STEPS for corner in corners)
        numbers = tuple(int(code) for code in _CODE.findall(codes))[:MASK_CODES]
        whole = len(numbers) == MASK_CODES and max(numbers) < MASK_CODE_KINDS
        found.append(_box(label, (left, right), (top, bottom), codes=numbers if whole else ()))
    return found


def _boxes(text: str) -> list[Box]:
    found = []
    for label, tokens in _NAMED.findall(text):
        places = _places(tokens)
        for i in range(0, len(places) - 3, 4):
            x0, y0, x1, y1 = places[i : i + 4]
            found.append(_box(label, (x0, x1), (y0, y1)))
    return found


def _polygons(text: str) -> list[Box]:
    found = []
    for label, tokens in _NAMED.findall(text):
        for thing in _THINGS.findall(tokens) or [tokens]:
            parts = (_places(part) for part in thing.split("<sep>"))
            outlines = tuple(
                tuple(zip(part[::2], part[1::2], strict=False)) for part in parts if len(part) >= 6
            )
            if outlines:
                xs, ys = zip(*(point for outline in outlines for point in outline), strict=True)
                found.append(_box(label, xs, ys, polygons=outlines))
    return found


def _brackets(text: str) -> list[Box]:
    found = []
    for words, boxes in _BRACKETS.findall(text):
        label = _SENTENCE_END.split(words)[-1].strip(" \n.,;:")
        for box in boxes.split(";"):
            x0, y0, x1, y1 = (min(float(side), 1.0) for side in box.split(","))
            found.append(_box(label, (x0, x1), (y0, y1)))
    return found


_PARSERS: Mapping[str, Callable[[str], list[Box]]] = {
    "locations": _locations,
    "boxes": _boxes,
    "polygons": _polygons,
    "brackets": _brackets,
}


def write(region: Sequence[float]) -> str:
    """Write a region, x and y in turn, 0 to 1, as "brackets" have it; the only way so far."""
    return f"[{','.join(f'{side:.3f}' for side in region)}]"


def _places(tokens: str) -> list[float]:
    return [(min(int(number), BINS - 1) + 0.5) / BINS for number in _PLACE.findall(tokens)]


def _box(
    label: str,
    xs: tuple[float, ...],
    ys: tuple[float, ...],
    *,
    codes: tuple[int, ...] = (),
    polygons: tuple[tuple[Point, ...], ...] = (),
) -> Box:
    """Return the box around some points."""
    return Box(label.strip(), min(xs), min(ys), max(xs), max(ys), codes, polygons)


def into_square(region: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Return where a region of a picture lies in its square.

    Args:
        region: x and y in turn, pixels of the picture.
        size: (width, height) of the picture.

    Returns:
        The same in parts of the square's side, 0 to 1.
    """
    side, left, top = centred(size)
    return [
        min(max((length + (top if i % 2 else left)) / side, 0.0), 1.0)
        for i, length in enumerate(region)
    ]


def out_of_square(box: Box, size: tuple[int, int]) -> Box | None:
    """Return where a box of the square lies on the picture; none: where there is no picture.

    Args:
        box: In parts of the square's side.
        size: (width, height) of the picture, pixels.

    Returns:
        The box in parts of the picture's sides, cut off at its edges.
    """
    side, left, top = centred(size)
    width, height = size
    xs = [(x * side - left) / width for x in (box.left, box.right)]
    ys = [(y * side - top) / height for y in (box.top, box.bottom)]
    if xs[1] < 0 or ys[1] < 0 or xs[0] > 1 or ys[0] > 1:
        return None
    (x0, x1), (y0, y1) = ([min(max(place, 0.0), 1.0) for place in ends] for ends in (xs, ys))
    return replace(box, left=x0, top=y0, right=x1, bottom=y1)
