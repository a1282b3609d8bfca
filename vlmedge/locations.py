"""Places in a text: PaliGemma's location and segment tokens, parsed to boxes.

A box is four tokens <loc0000> to <loc1023>, y0 x0 y1 x1 in 1023rds of the picture's sides, and the
name of what is there; things are parted by " ; ". A segment is 16 tokens <seg000> to <seg127> more:
codes of a mask whose decoder is no part of any checkpoint, so they stay numbers. Source: Beyer et
al. 2024, arXiv 2407.07726, section 3.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STEPS = 1023  # that a side is cut into
_THING = re.compile(
    r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>\s*((?:<seg\d{3}>){16})?\s*([^;<]*)"
)
_CODE = re.compile(r"<seg(\d{3})>")


@dataclass(frozen=True, slots=True)
class Box:
    """Where one thing is.

    Attributes:
        label: What it is, as the model says.
        left: 0 to 1, of the picture's width; at most `right`.
        top: 0 to 1, of its height; at most `bottom`.
        right: As left.
        bottom: As top.
        codes: 16 numbers of its mask, or none.
    """

    label: str
    left: float
    top: float
    right: float
    bottom: float
    codes: tuple[int, ...] = ()

    def pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom in pixels of a picture of this size."""
        return self.left * width, self.top * height, self.right * width, self.bottom * height


def parse(text: str) -> list[Box]:
    """Find every box of a text, in its order; what is no whole box is passed over."""
    found = []
    for *corners, codes, label in _THING.findall(text):
        top, left, bottom, right = (min(int(corner), STEPS) / STEPS for corner in corners)
        found.append(
            Box(
                label.strip(),
                min(left, right),
                min(top, bottom),
                max(left, right),
                max(top, bottom),
                tuple(int(code) for code in _CODE.findall(codes)),
            )
        )
    return found
