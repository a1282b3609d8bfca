"""Video-LLaVA: LLaVA with a tower for pictures and one for the frames of videos."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.plan.shape import Fields, Shape

from . import llava

FRAMES = 8  # that it was trained with


def count(config: Fields) -> Shape:
    """Count a VideoLlavaForConditionalGeneration, for a video; frames keep their class token."""
    tower, projector, decoder = llava.parts_of(config, "video_llava")
    assert tower.rows is not None
    parts = (
        tower,
        projector,
        replace(tower, name="video_encoder", runs=FRAMES),
        replace(projector, name="video_projector", rows=tower.rows, runs=FRAMES),
        decoder,
    )
    shape = llava.whole(
        config, "video_llava", parts, FRAMES * tower.rows, shared=projector.parameters
    )
    return replace(shape, extra=2 * shape.extra)  # of both towers


SHAPE = count
