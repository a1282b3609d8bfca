"""From pictures and videos to the image embeddings that a text model reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from vlmedge.arrays import Array
from vlmedge.run.inputs.image import Grid, pieces
from vlmedge.run.inputs.tiling import joined
from vlmedge.run.tasks.context import IMAGES_PER_BATCH, Opened, TaskContext
from vlmedge.spec import GenerateTask
from vlmedge.spec.wiring import pictured

Places = NDArray[np.int64]
Soft = Sequence[NDArray[np.float32]]
"""What a text's pictures became: for each of its placeholders [n, width]."""


def encode(
    context: TaskContext, task: GenerateTask, pixel_values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Turn pixel_values into the soft prompt, or what `instruct` makes one of.

    What takes clips takes all of them at once; its pieces must be the frames of one video.

    Returns:
        float32 [pieces, n, width].
    """
    known: dict[str, Array] = {context.bundle.spec.pixels: pixel_values}
    for name in task.encode:
        graph = context.graphs[name]
        takes = {spec.name: known[spec.name] for spec in graph.component.inputs}
        count = len(next(iter(takes.values())))
        step = count if graph.component.takes_clips else IMAGES_PER_BATCH
        made = [
            graph.run({tensor: rows[start : start + step] for tensor, rows in takes.items()})
            for start in range(0, count, step)
        ]
        known |= {tensor: np.concatenate([run[tensor] for run in made]) for tensor in made[0]}
    return known[pictured(context.bundle.spec, task)]


def instructions(
    context: TaskContext, task: GenerateTask, soft: Sequence[Soft], texts: Sequence[str]
) -> dict[str, Array]:
    """Make what the components of `instruct` start from: a row for each picture, with its text."""
    ids, mask = context.instruction_tokenizer.encode(texts)
    row = np.repeat(np.arange(len(texts)), [len(seen) for seen in soft])
    return {
        pictured(context.bundle.spec, task): np.stack([part for seen in soft for part in seen]),
        "qformer_input_ids": ids[row],
        "qformer_attention_mask": mask[row],
    }


def instructed(
    context: TaskContext, task: GenerateTask, soft: Sequence[Soft], texts: Sequence[str]
) -> Sequence[Soft]:
    """Let each row's text have its say in the soft prompt; without `instruct` it has none."""
    if not task.instruct:
        return soft
    known = context.chain(task.instruct, instructions(context, task, soft, texts))
    ends = np.cumsum([len(seen) for seen in soft])
    return [list(found) for found in np.split(known[task.soft_prompt], ends[:-1])]


def settled(task: GenerateTask) -> GenerateTask:
    """Return the wiring for what `instructed` gave."""
    return structs.replace(task, instruct=())


def rows(soft: NDArray[np.float32], grids: Sequence[Grid]) -> list[Soft]:
    """Cut the rows from `encode` into each picture's soft prompts: one a piece, or one of all."""
    ends = np.cumsum([pieces(grid) for grid in grids])
    return [
        [found.reshape(-1, found.shape[-1])[joined(grid)]] if grid.side else list(found)
        for found, grid in zip(np.split(soft, ends[:-1]), grids, strict=True)
    ]


def flat(soft: NDArray[np.float32]) -> Soft:
    """Make what `encode` gave of a video's frames the one soft prompt that it is."""
    return [soft.reshape(-1, soft.shape[-1])]


def seen(
    context: TaskContext, task: GenerateTask, opened: Sequence[Opened]
) -> tuple[list[Soft], Sequence[Grid]]:
    """Encode pictures or videos that are open; say how each is cut."""
    if task.source == "video":
        clips = (encode(context, task, context.frames(video)) for video in opened)
        return [flat(clip) for clip in clips], [Grid()] * len(opened)
    pictures = context.ready(opened)
    return rows(encode(context, task, pictures.pixel_values), pictures.grids), pictures.grids
