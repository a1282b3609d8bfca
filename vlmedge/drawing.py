"""Boxes and outlines on a picture, and masks."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vlmedge.locations import Box

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000")
LINE = 1 / 300  # of the picture's shorter side
TEXT = 1 / 32


def draw(picture: PIL.Image.Image, boxes: Sequence[Box]) -> PIL.Image.Image:
    """Draw boxes and their labels on a copy of an RGB picture; one label has one colour."""
    drawn = picture.copy()
    pen = PIL.ImageDraw.Draw(drawn)
    shorter = min(drawn.size)
    width, font = max(1, round(shorter * LINE)), PIL.ImageFont.load_default(max(9, shorter * TEXT))
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        color = COLORS[labels.index(box.label) % len(COLORS)]
        left, top, right, bottom = box.pixels(*drawn.size)
        pen.rectangle((left, top, right, bottom), outline=color, width=width)
        for points in box.outlines(*drawn.size):
            pen.line([*points, points[0]], fill=color, width=width)
        _write(pen, (left, top), box.label, font, color)
    return drawn


def mask(box: Box, size: tuple[int, int]) -> PIL.Image.Image:
    """Fill what a box's polygons are around: a gray picture (width, height), 255 inside and 0."""
    filled = PIL.Image.new("L", size)
    pen = PIL.ImageDraw.Draw(filled)
    for points in box.outlines(*size):
        pen.polygon(points, fill=255)
    return filled


def _write(
    pen: PIL.ImageDraw.ImageDraw,
    corner: tuple[float, float],
    label: str,
    font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont,
    color: str,
) -> None:
    """Write a label in white on its colour: above the corner, or below it at the upper edge."""
    if not label:
        return
    _, _, right, bottom = pen.textbbox((0, 0), label, font)
    x, y = corner
    y = y - bottom if y >= bottom else y
    pen.rectangle((x, y, x + right, y + bottom), fill=color)
    pen.text((x, y), label, fill="white", font=font)
