"""Image and the names of things in, where they are out: what is asked for, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vlmedge.bundle import Bundle
from vlmedge.errors import InputError
from vlmedge.run.tasks.boxes import Box, out_of_square, parse
from vlmedge.run.tasks.context import Opened, TaskContext
from vlmedge.spec import GenerateTask


def detect_task(context: TaskContext, name: str) -> GenerateTask:
    """Return the wiring of a task that says where things are."""
    known = context.bundle.spec.tasks
    found = [n for n, t in known.items() if isinstance(t, GenerateTask) and t.answer != "text"]
    if not found:
        raise InputError(
            f"{context.bundle.path} has no task that finds objects: "
            f"its tasks are {', '.join(known)}"
        )
    task = context.task(name, GenerateTask)
    if task.answer == "text":
        raise InputError(f"task {name!r} answers in words: use ask, or {' or '.join(found)}")
    return task


def check_masks(bundle: Bundle, name: str) -> None:
    """Refuse masks that a task of a bundle does not give, before it does any work.

    Raises:
        InputError: It gives boxes alone, or codes that the bundle has no decoder for.
    """
    tasks = {n: t for n, t in bundle.spec.tasks.items() if isinstance(t, GenerateTask)}
    outlines = [n for n, t in tasks.items() if t.answer == "polygons" or t.masks is not None]
    task = tasks.get(name)
    if task is None or task.answer == "text":
        return  # detect_task has a better word for it
    if name not in outlines:
        others = f", or give --task {' or '.join(outlines)}" if outlines else ""
        raise InputError(
            f"{bundle.path}: task {name!r} gives boxes without masks: leave --masks out{others}"
        )
    if task.masks is not None and task.masks.decode is None:
        raise InputError(
            f"{bundle.path} has no decoder for its masks: put {task.masks.file} beside the "
            "checkpoint's config.json and export it again"
        )


def usual(bundle: Bundle, what: str | None) -> str:
    """Name the task that is meant: without anything to look for one that finds all, if there is."""
    return "detect_all" if what is None and "detect_all" in bundle.spec.tasks else "detect"


def requests(task: GenerateTask, name: str, what: str | None) -> list[str]:
    """Make what stands for `{question}`: one text, or one for each thing of "cat; dog"."""
    if "{question}" not in task.prompt:
        if what is not None:
            raise InputError(f"task {name!r} finds every object that it knows: leave {what!r} out")
        return [""]
    things = [thing.strip() for thing in (what or "").split(";") if thing.strip()]
    if not things:
        raise InputError("nothing to look for: name one thing or several")
    return things if task.several is None else [task.several.join(things)]


def boxes(
    context: TaskContext, task: GenerateTask, asked: str, ids: Sequence[int], picture: Opened
) -> list[Box]:
    """Read where things are out of an answer; its location tokens may be special ones.

    Args:
        context: The model.
        task: Its wiring.
        asked: The thing that was looked for.
        ids: Token ids of the answer.
        picture: Where; a model whose pictures are filled up to squares counts from their corners.
    """
    generation = context.bundle.spec.generation
    assert generation is not None
    around = {generation.bos_id, generation.pad_id, *generation.eos_ids}
    text = context.tokenizer.decode([i for i in ids if i not in around], special=True)
    found = parse(text, task.answer)
    if task.named_by == "question":
        found = [replace(box, label=asked) for box in found]
    if task.masks is not None and task.masks.decode is not None:
        found = _with_rasters(context, task.masks.decode, found)
    if context.image_front.square is None:
        return found
    return [box for each in found if (box := out_of_square(each, picture.size)) is not None]


def _with_rasters(context: TaskContext, decode: str, found: list[Box]) -> list[Box]:
    """Decode the masks of those boxes that have codes."""
    coded = [box for box in found if box.codes]
    if not coded:
        return found
    component = context.bundle.spec.component(decode)
    codes, rasters = component.inputs[0].name, component.outputs[0].name
    given = np.array([box.codes for box in coded], np.int64)
    decoded = iter(context.graphs[decode].run({codes: given})[rasters])
    return [replace(box, raster=next(decoded)) if box.codes else box for box in found]
