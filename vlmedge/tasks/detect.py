"""Image and the names of things in, where they are out: what is asked for, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlmedge.errors import InputError
from vlmedge.locations import Box, parse
from vlmedge.spec import GenerateTask
from vlmedge.square import out_of_square

from ._parts import Opened, Parts


def detect_task(parts: Parts, name: str) -> GenerateTask:
    """Return the wiring of a task that says where things are."""
    known = parts.bundle.spec.tasks
    found = [n for n, t in known.items() if isinstance(t, GenerateTask) and t.answer != "text"]
    if not found:
        raise InputError(
            f"{parts.bundle.path} says of nothing where it is: its tasks are {', '.join(known)}"
        )
    task = parts.task(name, GenerateTask)
    if task.answer == "text":
        raise InputError(f"task {name!r} answers in words: use ask, or {' or '.join(found)}")
    return task


def usual(parts: Parts, what: str | None) -> str:
    """Name the task that is meant: without anything to look for one that finds all, if there is."""
    return "detect_all" if what is None and "detect_all" in parts.bundle.spec.tasks else "detect"


def requests(task: GenerateTask, name: str, what: str | None) -> list[str]:
    """Make what stands for `{question}`: one text, or one for each thing of "cat; dog"."""
    if "{question}" not in task.prompt:
        if what is not None:
            raise InputError(f"task {name!r} finds all that it knows: leave {what!r} out")
        return [""]
    things = [thing.strip() for thing in (what or "").split(";") if thing.strip()]
    if not things:
        raise InputError("nothing to look for: name it")
    return things if task.several is None else [task.several.join(things)]


def boxes(
    parts: Parts, task: GenerateTask, asked: str, ids: Sequence[int], picture: Opened
) -> list[Box]:
    """Read where things are out of an answer; its location tokens may be special ones.

    Args:
        parts: The model.
        task: Its wiring.
        asked: What was looked for.
        ids: Of the answer.
        picture: Where; a model whose pictures are filled up to squares counts from their corners.
    """
    generation = parts.bundle.spec.generation
    assert generation is not None
    around = {generation.bos_id, generation.pad_id, *generation.eos_ids}
    text = parts.tokenizer.decode([i for i in ids if i not in around], special=True)
    found = parse(text, task.answer)
    if task.named_by == "question":
        found = [replace(box, label=asked) for box in found]
    if parts.image_front.square is None:
        return found
    return [box for each in found if (box := out_of_square(each, picture.size)) is not None]
