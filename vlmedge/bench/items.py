"""What a benchmark asks of a bundle: one answer of each task, from a decoded picture on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

import numpy as np

from vlmedge.checkpoints.scenes import CLASSES, draw_scene
from vlmedge.parity.samples import codes_for
from vlmedge.run.decode import loop
from vlmedge.run.decode.sampling import options
from vlmedge.run.inputs.image_files import load_image
from vlmedge.run.inputs.video import Video
from vlmedge.run.tasks import embed as embedding
from vlmedge.run.tasks import encode as encoding
from vlmedge.run.tasks import label as labelling
from vlmedge.run.tasks import match as matching
from vlmedge.run.tasks import paint as painting
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks.context import TaskContext
from vlmedge.spec import (
    EmbedTask,
    GenerateTask,
    InfillTask,
    LabelTask,
    MatchTask,
    PaintTask,
    ScoreTask,
    VideoFrontEnd,
)

NEW_TOKENS = 20
TEXT = f"a photo of a {CLASSES[0]}"
PICTURE = load_image(draw_scene(0, "heldout").image)

Facts = dict[str, Any]
"""Of a task that writes: first_token_ms, tokens_per_s, prompt_tokens, new_tokens; else nothing."""


Item = Callable[[int], Facts]
"""Gives one answer; one that is written has so many tokens, or what the model can at most."""


def items(context: TaskContext) -> dict[str, Item]:
    """Return each task by its name; of tasks that would run the same, the first."""
    found: dict[str, Item] = {}
    seen: set[tuple[type, tuple[str, ...]]] = set()
    for name, task in context.bundle.spec.tasks.items():
        runs = _runs(task)
        if runs and (type(task), runs) not in seen:
            seen.add((type(task), runs))
            found[name] = partial(_answer, task, context)
    return found


def _runs(task: object) -> tuple[str, ...]:
    """Name the components that tell a task from another of its kind; none: it has none itself."""
    if isinstance(task, GenerateTask):
        masks = [task.masks.decode] if task.masks is not None and task.masks.decode else []
        return (*task.encode, *task.read, task.decoder, *masks)
    if isinstance(task, MatchTask | ScoreTask | InfillTask):
        return (*task.image, *task.text)
    if isinstance(task, LabelTask | EmbedTask):
        return task.encode
    return task.paint if isinstance(task, PaintTask) else ()


@singledispatch
def _answer(task: Any, context: TaskContext, tokens: int) -> Facts:
    raise NotImplementedError(f"no benchmark of a {type(task).__name__}")


@_answer.register
def _(task: GenerateTask, context: TaskContext, tokens: int) -> Facts:
    """Write a text of fixed length, greedy, so that every side takes the same steps.

    Where texts may have codes of masks, one mask is decoded.
    """
    spec = context.bundle.spec
    assert spec.generation is not None
    count = min(tokens, max(2, spec.generation.max_tokens))
    chosen = options(
        spec.generation, max_tokens=count, min_tokens=count, num_beams=1, do_sample=False
    )
    start = time.perf_counter()
    source = _video(spec.video) if task.source == "video" and spec.video else PICTURE
    soft, grids = encoding.seen(context, task, [context.open(source)])
    question = "what is it?" if "{question}" in task.prompt else ""
    text = prompting.fill(task, question, grids)
    prompt = prompting.make_prompt(context, task, soft, [text], chosen)
    ids = loop.stream(context.graphs[task.decoder], context.embed, prompt, chosen)
    written = [next(ids)]
    first = time.perf_counter()
    written.extend(ids)
    rest_s = time.perf_counter() - first
    context.tokenizer.decode(written)
    if task.masks is not None and task.masks.decode:
        context.graphs[task.masks.decode].run(codes_for(spec, 1))
    return {
        "first_token_ms": 1000 * (first - start),
        "tokens_per_s": (len(written) - 1) / rest_s,
        "prompt_tokens": prompt.embeds.shape[1],
        "new_tokens": len(written),
    }


@_answer.register
def _(task: MatchTask, context: TaskContext, tokens: int) -> Facts:
    image = embedding.embed_images(context, task.image, task.image_output, [PICTURE])
    text = embedding.embed_texts(context, task.text, task.text_output, [TEXT])
    embedding.probabilities(task, image, text)
    return {}


@_answer.register
def _(task: LabelTask, context: TaskContext, tokens: int) -> Facts:
    labelling.probabilities(context, task, context.pixels([PICTURE]))
    return {}


@_answer.register
def _(task: EmbedTask, context: TaskContext, tokens: int) -> Facts:
    if task.modality == "image":
        embedding.embed_images(context, task.encode, task.output, [PICTURE])
    else:
        embedding.embed_texts(context, task.encode, task.output, [TEXT])
    return {}


@_answer.register
def _(task: ScoreTask, context: TaskContext, tokens: int) -> Facts:
    matching.score(context, task, [PICTURE], [TEXT])
    return {}


@_answer.register
def _(task: InfillTask, context: TaskContext, tokens: int) -> Facts:
    matching.infill(context, task, PICTURE, f"a photo of a {task.mask_text}", 1)
    return {}


@_answer.register
def _(task: PaintTask, context: TaskContext, tokens: int) -> Facts:
    painting.paint(context, task, [PICTURE], [(PICTURE, PICTURE)])
    return {}


def _video(front: VideoFrontEnd) -> Video:
    """Show one picture for as many frames as the model is used to."""
    count = min(front.frames, front.limit or front.frames)
    return Video(np.stack([np.asarray(PICTURE)] * count), count)
