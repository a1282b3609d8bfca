"""LLaVA-NeXT-Video: LLaVA-NeXT whose projector pools the patches of a video's frames too."""

from __future__ import annotations

from vlmedge.plan.shape import Fields, Shape, followed

from . import llava, llava_next

STRIDE = 2


def count(config: Fields) -> Shape:
    """Count a LlavaNextVideoForConditionalGeneration, for the picture that has most tiles."""
    kind = "llava_next_video"
    (tower, projector, decoder), soft_rows = llava_next.tiled(config, kind)
    if config.text("spatial_pool_mode", "average") == "conv":
        stride = config.size("spatial_pool_stride", STRIDE)
        kernel = tower.width**2 * stride**2 + tower.width  # a convolution stays in float
        projector = followed(projector, (0, kernel))
    return llava.whole(config, kind, (tower, projector, decoder), soft_rows)


SHAPE = count
