"""Resizing of float pictures as torch.nn.functional.interpolate does it (align_corners=False).

PIL's filters are wider where a picture gets smaller, and its bicubic is another one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_CUBIC = -0.75  # torch's coefficient of Keys' kernel (1981); PIL's is -0.5


def interpolate(
    planes: Floats, size: tuple[int, int], kind: Literal["nearest", "bilinear", "bicubic"]
) -> Floats:
    """Resize along the last two axes.

    Args:
        planes: float32 [..., height, width].
        size: The new height and width, pixels.
        kind: The filter.

    Returns:
        float32 [..., new height, new width].
    """
    for axis, length in zip((-2, -1), size, strict=True):
        if planes.shape[axis] != length:
            planes = _along(planes, axis, length, kind)
    return planes


def _along(planes: Floats, axis: int, length: int, kind: str) -> Floats:
    """Resize along one axis: a weighted sum of a few pixels for each new one."""
    old = planes.shape[axis]
    scale = np.float32(old / length)
    places = np.arange(length, dtype=np.float32)
    if kind == "nearest":
        index = np.minimum((places * scale).astype(np.int64), old - 1)
        nearest: Floats = np.take(planes, index, axis)
        return nearest
    centres = (places + np.float32(0.5)) * scale - np.float32(0.5)
    if kind == "bilinear":
        centres = np.maximum(centres, 0)
    first = np.floor(centres).astype(np.int64)
    offset = (centres - first).astype(np.float32)
    weights = _linear(offset) if kind == "bilinear" else _cubic(offset)
    shape = [-1 if i == axis % planes.ndim else 1 for i in range(planes.ndim)]
    found = np.zeros((), np.float32)
    for step, weight in weights.items():
        index = np.clip(first + step, 0, old - 1)
        found = found + np.take(planes, index, axis) * weight.reshape(shape)
    return found


def _linear(offset: Floats) -> dict[int, Floats]:
    return {0: 1 - offset, 1: offset}


def _cubic(offset: Floats) -> dict[int, Floats]:
    """Weigh the four pixels around; `offset`, 0..1, is the way from the second to the third."""

    def near(x: Floats) -> Floats:  # at a distance up to 1
        return ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1

    def far(x: Floats) -> Floats:  # from 1 to 2
        return ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC

    weights = {-1: far(offset + 1), 0: near(offset), 1: near(1 - offset), 2: far(2 - offset)}
    return {step: weight.astype(np.float32) for step, weight in weights.items()}
