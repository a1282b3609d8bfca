"""Boxes, outlines and masks on a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vlmedge.run.tasks.boxes import Box

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000")
LINE = 1 / 300  # of the picture's shorter side
TEXT = 1 / 32
TINT = 0.4  # of a mask's colour


def draw(picture: PIL.Image.Image, boxes: Sequence[Box]) -> PIL.Image.Image:
    """Draw boxes, what is known of their insides, and labels, on a copy of an RGB picture.

    One label has one colour: polygons are lines, and a raster is a tint.
    """
    drawn = picture.copy()
    pen = PIL.ImageDraw.Draw(drawn)
    shorter = min(drawn.size)
    width, font = max(1, round(shorter * LINE)), PIL.ImageFont.load_default(max(9, shorter * TEXT))
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        color = COLORS[labels.index(box.label) % len(COLORS)]
        inside = None if box.raster is None else box.mask(*drawn.size)
        if inside is not None:
            share = PIL.Image.fromarray(np.where(inside, np.uint8(255 * TINT), np.uint8(0)))
            drawn.paste(color, mask=share)
        left, top, right, bottom = box.pixels(*drawn.size)
        pen.rectangle((left, top, right, bottom), outline=color, width=width)
        for points in box.outlines(*drawn.size):
            pen.line([*points, points[0]], fill=color, width=width)
        _write(pen, (left, top), box.label, font, color)
    return drawn


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
