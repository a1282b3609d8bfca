"""Questions that a spec answers: which component is fed which tensor, and how many rows."""

from __future__ import annotations

from vlmedge.spec.front_ends import AnyRes, FrontEnd, ImageFrontEnd, VideoFrontEnd
from vlmedge.spec.model import ModelSpec
from vlmedge.spec.tasks import GenerateTask
from vlmedge.spec.tensors import Component


def writing(spec: ModelSpec) -> list[GenerateTask]:
    """Return the tasks that generate text."""
    return [task for task in spec.tasks.values() if isinstance(task, GenerateTask)]


def piece_rows(spec: ModelSpec, task: GenerateTask) -> int:
    """Return how many rows one piece of a picture, or one frame, becomes."""
    sizes = [o.shape[1] for c in spec.components for o in c.outputs if o.name == task.soft_prompt]
    return max((size for size in sizes if isinstance(size, int)), default=0)


def picture_rows(spec: ModelSpec, task: GenerateTask) -> int:
    """Return how many rows the picture with most tiles becomes, or the longest video."""
    each = piece_rows(spec, task)
    if task.source == "video":
        whole = any(spec.component(name).takes_clips for name in task.encode)
        frames = spec.video.limit or spec.video.frames if spec.video else 1
        return each if whole else frames * each
    rows, columns = _grid(spec.image)
    if rows * columns == 1:
        return each
    tiling = spec.image.tiling if spec.image else None
    if isinstance(tiling, AnyRes):  # one row ends each line of the tiles; see tiling.joined
        patches = tiling.patches
        return (1 + rows * columns) * patches**2 + rows * patches
    return (1 + rows * columns) * each


def _grid(front: ImageFrontEnd | None) -> tuple[int, int]:
    """Return the (rows, columns) of tiles that a picture is cut into at most."""
    tiling = front.tiling if front else None
    if isinstance(tiling, AnyRes):
        side = tiling.tile_size
        grids = [(high // side, wide // side) for high, wide in tiling.sizes]
        return max(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))
    if tiling is not None and tiling.split:
        tiles = -(-tiling.longest_edge // tiling.tile_size)
        return tiles, tiles
    return 1, 1


FED = ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""Inputs of a decoder that the decode loop computes."""


def pictured(spec: ModelSpec, task: GenerateTask) -> str:
    """Return the name of the last tensor that `encode` makes."""
    if not task.instruct:
        return task.soft_prompt
    return spec.component(task.encode[-1]).outputs[-1].name


def reads_text(spec: ModelSpec, task: GenerateTask) -> bool:
    """Return whether a component of `read` takes the text, instead of the decoder."""
    return bool(wanted(spec, task) & {"input_ids", "inputs_embeds"})


def wanted(spec: ModelSpec, task: GenerateTask) -> set[str]:
    """Return the names of all inputs of the components of `read`."""
    return {tensor.name for name in task.read for tensor in spec.component(name).inputs}


def held(decoder: Component) -> list[str]:
    """Return the names of a decoder's constant inputs: neither state nor made by the loop."""
    state = {into for _, into in decoder.state}
    names = [spec.name for spec in decoder.inputs]
    return [name for name in names if name not in state and name not in FED]


def front_ends_by_input(spec: ModelSpec) -> dict[str, FrontEnd]:
    """Return the front ends by the input that components take from each.

    Frames of a video are fed where pictures are; where a model has both, pictures stand for both.
    """
    found = dict(spec.front_ends)
    for name, front in spec.front_ends.items():
        if isinstance(front, VideoFrontEnd):
            found.setdefault(spec.pixels, found.pop(name))
    return found
