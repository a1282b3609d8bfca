"""LLaVA-NeXT: LLaVA on the tiles of a picture, planned for the one that has most of them."""

from __future__ import annotations

from dataclasses import replace

from vlmedge.plan.shape import Fields, Part, Shape

from . import llava

# What transformers' LlavaNextConfig takes for image_grid_pinpoints
SIZES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def count(config: Fields) -> Shape:
    """Count a LlavaNextForConditionalGeneration."""
    parts, soft_rows = tiled(config, "llava_next")
    return llava.whole(config, "llava_next", parts, soft_rows)


def tiled(config: Fields, kind: str) -> tuple[tuple[Part, Part, Part], int]:
    """Count the parts, and the rows of the picture that has most tiles.

    The projector has the row that ends a line of patches.
    """
    tower, projector, decoder = llava.parts_of(config, kind)
    vision = config.part("vision_config")
    vision = vision.filled(llava.TOWERS[llava.tower_kind(vision, kind)])
    size = vision.size("image_size", None)
    side = size // vision.size("patch_size", None)
    grids = [(high // size, wide // size) for high, wide in config.pairs(*_PINPOINTS)]
    rows, columns = max(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))
    runs = rows * columns + 1
    soft_rows = runs * side * side + rows * side
    projector = replace(projector, runs=runs, other=projector.other + decoder.width)
    return (replace(tower, runs=runs), projector, decoder), soft_rows


_PINPOINTS = ("image_grid_pinpoints", SIZES)

SHAPE = count
