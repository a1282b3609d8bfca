"""Put a task's template, texts and image embeddings together into what a decoder reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array
from vlmedge.errors import InputError
from vlmedge.run.decode.prompt import Prompt
from vlmedge.run.inputs.image import Grid, pieces
from vlmedge.run.inputs.image_files import ImageSource
from vlmedge.run.tasks.context import TaskContext
from vlmedge.run.tasks.encode import Places, Soft, instructed
from vlmedge.spec import GenerateTask, Generation
from vlmedge.spec.wiring import held, reads_text, wanted


@dataclass(frozen=True, slots=True)
class Example:
    """A picture with its correct answer, which a model reads first (few-shot).

    Attributes:
        image: The picture.
        text: The correct caption or answer.
        question: The question, for `Model.ask`; a caption has none.

    Examples:
        >>> shown = [vlmedge.Example("dog.jpg", "a dog in the snow")]
        >>> model.caption("cat.jpg", examples=shown)
        'a cat on a sofa'
    """

    image: ImageSource
    text: str
    question: str = ""


def fill(
    task: GenerateTask,
    text: str,
    grids: Sequence[Grid] = (Grid(),),
    examples: Sequence[tuple[Example, Grid]] = (),
) -> str:
    """Put pictures and the caller's text into a task's template.

    Args:
        task: Its template.
        text: Replacement of `{prompt}` or `{question}`.
        grids: How each picture is cut; they stand one after the other.
        examples: Examples that go before, each with how its picture is cut.

    Raises:
        InputError: There are examples, and the model takes none.
    """
    if examples and task.example is None:
        raise InputError("this model takes no examples: ask about one picture at a time")
    shown = "".join(image_text(task, grid) for grid in grids)
    before = "".join(
        (task.example or "")
        .replace("{image}", image_text(task, grid))
        .replace("{question}", example.question)
        .replace("{text}", example.text)
        for example, grid in examples
    )
    # texts come last, so that they may hold any of the words above
    head, mark, tail = task.prompt.partition("{examples}")
    tail = (tail if mark else head).replace("{image}", shown)
    key = "{question}" if "{question}" in task.prompt else "{prompt}"
    return (head if mark else "") + before + tail.replace(key, text)


def image_text(task: GenerateTask, grid: Grid) -> str:
    """Return what stands for one picture in a text."""
    if task.image_text is None:
        return ""
    found = task.image_text
    if pieces(grid) == 1:
        return found.alone
    lines = [
        "".join(
            found.tile.replace("{row}", str(row)).replace("{column}", str(column))
            for column in range(1, grid.columns + 1)
        )
        for row in range(1, grid.rows + 1)
    ]
    return "".join(line + found.row_end for line in lines) + found.whole


def make_prompt(
    context: TaskContext,
    task: GenerateTask,
    soft: Sequence[Soft],
    texts: Sequence[str],
    options: Generation,
    held: Mapping[str, Array] | None = None,
) -> Prompt:
    """Make the inputs that the decoder reads before it writes.

    Without `read` that is each row's soft prompt among its text, [padding | text and soft prompt];
    with it the start ids, and the text if nobody else reads it.

    Args:
        context: The model.
        task: Its wiring.
        soft: The soft prompt of each row.
        texts: The full prompt of each row, from `fill`.
        options: Options of the decode loop.
        held: The constant inputs that `read` computed, if they are known.
    """
    if not task.read:
        context.tokenizer.encode(texts, reserve=options.max_tokens)  # refuses what is too long
    soft = instructed(context, task, soft, texts)
    made = [row(context, task, seen, text, options) for seen, text in zip(soft, texts, strict=True)]
    if task.read:
        check_room(context, max(len(ids) for ids, _ in made), options)
        known = read(context, task, soft, texts) if held is None else held
        return Prompt(*padded(made), held=known)
    if task.image_text is not None:
        check_room(context, max(len(ids) for ids, _ in made), options)
    embeds, mask, history = padded(made)
    if task.media is None:
        return Prompt(embeds, mask, history)
    media = [np.concatenate(seen) for seen in soft]
    most = max(len(seen) for seen in media)
    fed = np.zeros((len(media), most, media[0].shape[1]), np.float32)
    for i, seen in enumerate(media):
        fed[i, : len(seen)] = seen
    index = np.stack([_looks_at(row, task, options) for row in history])
    return Prompt(embeds, mask, history, held={task.media: fed}, media_index=index)


def row(
    context: TaskContext, task: GenerateTask, soft: Soft, text: str, options: Generation
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Make one row of what the decoder reads: ids, int64 [tokens], and float32 [tokens, width]."""
    if not task.read:
        start = [] if options.bos_id is None else [options.bos_id]
        return spliced(context, task, soft, context.tokenizer.ids(text) or start)
    ids = list(task.start_ids)
    if not reads_text(context.bundle.spec, task):
        ids += context.tokenizer.ids(text, whole=task.special_tokens)
    found = np.array(ids, np.int64)
    return found, context.embed(found)


def padded(
    rows: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]],
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Pad rows of ids and embeddings on the left: embeddings, attention mask, history."""
    longest, width = max(len(ids) for ids, _ in rows), rows[0][1].shape[1]
    embeds = np.zeros((len(rows), longest, width), np.float32)
    mask = np.zeros((len(rows), longest), np.int64)
    history = np.full((len(rows), longest), -1, np.int64)
    for i, (ids, vectors) in enumerate(rows):
        begin = longest - len(ids)
        mask[i, begin:] = 1
        history[i, begin:] = ids
        embeds[i, begin:] = vectors
    return embeds, mask, history


def _looks_at(history: NDArray[np.int64], task: GenerateTask, options: Generation) -> Places:
    """Return which picture each token sees: the last one before it, and none after an end token.

    Source: transformers' image_attention_mask_for_packed_input_ids_pt.
    """
    pictures = (history == task.image_token_id).cumsum() - 1
    found: Places = pictures.copy()
    ended = False
    for i, token in enumerate(history.tolist()):
        ended = ended and token != task.image_token_id
        if ended:
            found[i] = -1
        ended = ended or token in options.eos_ids
    return found


def sources(
    context: TaskContext, task: GenerateTask, soft: Sequence[Soft], texts: Sequence[str]
) -> dict[str, Array]:
    """Make what the components of `read` start from, each [rows, ...].

    A reader's mask is the decoder's encoder_attention_mask too: it must not look at padding.
    """
    names = wanted(context.bundle.spec, task)
    made: dict[str, Array] = {}
    if task.soft_prompt in names:
        made[task.soft_prompt] = np.stack([part for seen in soft for part in seen])
    if "input_ids" in names:
        made["input_ids"], mask = context.tokenizer.encode(texts)
        if task.first_id is not None:
            made["input_ids"][np.arange(len(texts)), mask.argmax(axis=1)] = task.first_id
        made |= {"attention_mask": mask, "encoder_attention_mask": mask}
    elif "inputs_embeds" in names:
        context.tokenizer.encode(texts)  # refuses what is too long
        rows = [
            spliced(context, task, seen, context.tokenizer.ids(text))
            for seen, text in zip(soft, texts, strict=True)
        ]
        made["inputs_embeds"], mask, _ = padded(rows)
        made |= {"attention_mask": mask, "encoder_attention_mask": mask}
    return made


def read(
    context: TaskContext, task: GenerateTask, soft: Sequence[Soft], texts: Sequence[str]
) -> dict[str, Array]:
    """Run `read`; return what the decoder is fed at every step."""
    known = context.chain(task.read, sources(context, task, soft, texts))
    return {name: known[name] for name in held(context.bundle.spec.component(task.decoder))}


def check_room(context: TaskContext, tokens: int, options: Generation) -> None:
    """Refuse a prompt of `tokens` positions, pictures included, that leaves no room to write."""
    room = max(context.text_front.max_tokens - options.max_tokens, 0)
    if tokens > room:
        raise InputError(
            f"prompt of {tokens} tokens, pictures included: the model has room for {room} "
            f"beside {options.max_tokens} new ones (max_tokens)"
        )


def spliced(
    context: TaskContext, task: GenerateTask, soft: Soft, ids: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Put the soft prompts of one row where its ids have placeholders, or before them all.

    Returns:
        Its history, int64 [tokens], and its embeddings, float32 [tokens, width].
    """
    text = np.array(ids, np.int64)
    token = -1 if task.image_token_id is None else task.image_token_id
    if task.image_text is None:
        places = np.zeros(len(soft), np.int64)
    else:
        places = np.flatnonzero(text == token)
        if len(places) != len(soft):
            raise InputError(
                f"prompt with {len(places)} placeholders for {len(soft)} pictures or tiles: "
                f"leave {task.image_text.placeholder!r} out of the text"
            )
        if task.media is not None:
            return text, context.embed(text)
        text = np.delete(text, places)
        places -= np.arange(len(places))  # in the text without them
    vectors = context.embed(text)
    if not soft:
        return text, vectors
    at = np.repeat(places, [len(part) for part in soft])
    return np.insert(text, at, token), np.insert(vectors, at, np.concatenate(soft), axis=0)
