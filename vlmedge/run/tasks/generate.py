"""Image in, text out: captions and answers."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import numpy as np
from msgspec import structs

from vlmedge.arrays import Array
from vlmedge.errors import InputError
from vlmedge.run.decode import loop
from vlmedge.run.tasks.context import IMAGES_PER_BATCH, TaskContext
from vlmedge.run.tasks.encode import Soft, instructed, settled
from vlmedge.run.tasks.prompt import make_prompt, read
from vlmedge.spec import GenerateTask, Generation
from vlmedge.spec.wiring import wanted


def caption_task(context: TaskContext, prompt: str, name: str = "caption") -> GenerateTask:
    """Return the wiring of a caption that begins with `prompt`."""
    task = context.task(name, GenerateTask)
    check_text("prompt", prompt)
    if "{question}" in task.prompt or task.answer != "text":
        raise InputError(f"task {name!r} describes no picture: use ask or detect")
    if prompt and "{prompt}" not in task.prompt:
        raise InputError("this model begins its captions by itself: leave the prompt out")
    return task


def check_text(name: str, text: object) -> None:
    """Refuse what is no text, such as one for each picture."""
    if not isinstance(text, str):
        raise InputError(f"{name} of type {type(text).__name__}: give one str, for all pictures")


def ask_task(
    context: TaskContext, question: str, first_token: str | None = None, name: str = "ask"
) -> GenerateTask:
    """Return the wiring of an answer to `question`, which may begin with another token."""
    task = context.task(name, GenerateTask)
    check_text("question", question)
    if not question.strip():
        raise InputError("the question is empty: ask something")
    if first_token is None:
        return task
    if "input_ids" not in wanted(context.bundle.spec, task):
        raise InputError("first_token: this model has no encoder for questions: leave it out")
    ids = context.tokenizer.ids(first_token, whole=False)
    if len(ids) != 1:
        raise InputError(f"first_token {first_token!r} is {len(ids)} tokens: give one")
    return structs.replace(task, first_id=ids[0])


def write(
    context: TaskContext,
    task: GenerateTask,
    soft: Sequence[Soft],
    texts: Sequence[str],
    options: Generation,
    seed: int | None = None,
    held: Mapping[str, Array] | None = None,
    places: Sequence[int] | None = None,
) -> list[list[int]]:
    """Write on after a soft prompt and a text, for each row.

    Args:
        context: The model.
        task: Its wiring.
        soft: What each row sees: from `encode`, by `rows`.
        texts: The full prompt of each row, from `fill`.
        options: Of the decode loop.
        seed: Of the draw.
        held: What `read` gave, if that is known.
        places: Of the rows among all that are drawn with this seed; default: 0, 1, ...

    Returns:
        New token ids of each row, without the end token.
    """
    prompt = make_prompt(context, task, soft, texts, options, held)
    return loop.generate(context.graphs[task.decoder], context.embed, prompt, options, seed, places)


def check_draws(count: int, options: Generation) -> None:
    """Refuse several texts that would all be the same."""
    if not isinstance(count, int):
        raise InputError(f"count is {count!r}: it must be a whole number")
    if count < 1:
        raise InputError(f"count is {count}: it must be at least 1")
    if count > 1 and not options.do_sample:
        raise InputError(
            f"count is {count}, and without sampling all would be the same: "
            "give a temperature, top_k or top_p, or count 1"
        )


def draws(
    context: TaskContext,
    task: GenerateTask,
    soft: Soft,
    text: str,
    count: int,
    options: Generation,
    seed: int | None = None,
) -> list[list[int]]:
    """Write several times after one soft prompt and text, some at a time; see `write`.

    Text n is drawn as row n of `write`, however many are written at a time.
    """
    soft = instructed(context, task, [soft], [text])[0]
    task = settled(task)
    once = read(context, task, [soft], [text]) if task.read else None
    found: list[list[int]] = []
    for start in range(0, count, IMAGES_PER_BATCH):
        some = min(IMAGES_PER_BATCH, count - start)
        held = once and {name: np.repeat(array, some, axis=0) for name, array in once.items()}
        these = range(start, start + some)
        found += write(context, task, [soft] * some, [text] * some, options, seed, held, these)
    return found


def stream(
    context: TaskContext,
    task: GenerateTask,
    soft: Sequence[Soft],
    text: str,
    options: Generation,
    seed: int | None = None,
) -> Generator[str, None, None]:
    """Yield the text of one row in pieces, as it comes; see `write`."""
    prompt = make_prompt(context, task, soft, [text], options)
    ids = loop.stream(context.graphs[task.decoder], context.embed, prompt, options, seed)
    return context.tokenizer.pieces(ids)
