"""What each patch of a picture shows: the supervision that teaches a small ViT shapes quickly.

BLIP-2 starts from an image encoder that was pretrained elsewhere. There is none to download here,
so the towers get this dense loss instead; its head is dropped when a checkpoint is saved.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmedge.checkpoints.scenes import BACKGROUNDS, COLORS, IMAGE_SIZE_PX, SHAPES, Plan

PATCH_SIZE_PX = 8
_COLORS = (*BACKGROUNDS, *COLORS)
_COUNTS = (len(SHAPES) + 1, len(_COLORS), 3)  # shape or none, colour, size or none


def patch_labels(plans: list[Plan]) -> Tensor:
    """Shape, colour and size of what covers each patch: uint8 (pictures, 64, 3)."""
    centres = np.arange(IMAGE_SIZE_PX // PATCH_SIZE_PX) * PATCH_SIZE_PX + PATCH_SIZE_PX / 2
    y, x = (axis.ravel() for axis in np.meshgrid(centres, centres, indexing="ij"))
    labels = np.zeros((len(plans), len(x), len(_COUNTS)), dtype=np.uint8)
    for row, plan in zip(labels, plans, strict=True):
        row[:, 1] = _COLORS.index(plan.background)
        for thing in plan.things:
            away = np.maximum(abs(x - thing.x_px), abs(y - thing.y_px))
            row[away <= thing.radius_px + 1] = (
                SHAPES.index(thing.shape) + 1,
                _COLORS.index(thing.color),
                1 + (thing.size == "large"),
            )
    return torch.from_numpy(labels)


class PatchHead(nn.Module):
    """Reads shape, colour and size off each patch's state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(_COUNTS)))

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy.

        Args:
            states: float (batch, 1 + 64, width), the class token first.
            labels: uint8 (batch, 64, 3).
        """
        logits = self.read(states[:, 1:]).float().split(_COUNTS, dim=-1)
        losses = [
            functional.cross_entropy(logit.flatten(0, 1), labels[..., i].flatten().long())
            for i, logit in enumerate(logits)
        ]
        return torch.stack(losses).sum()
