"""Image in, text out: captions and answers."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from vlmedge import generate as loop
from vlmedge.arrays import Array
from vlmedge.errors import InputError
from vlmedge.generate import Prompt
from vlmedge.image import Grid, ImageSource, pieces
from vlmedge.spec import Component, GenerateTask, Generation, ModelSpec
from vlmedge.tiling import joined

from ._parts import IMAGES_PER_BATCH, Opened, Parts

Places = NDArray[np.int64]
Soft = Sequence[NDArray[np.float32]]
"""What a text's pictures became: for each of its placeholders [n, width]."""


def caption_task(parts: Parts, prompt: str, name: str = "caption") -> GenerateTask:
    """Return the wiring of a caption that begins with `prompt`."""
    task = parts.task(name, GenerateTask)
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
    parts: Parts, question: str, first_token: str | None = None, name: str = "ask"
) -> GenerateTask:
    """Return the wiring of an answer to `question`, which may begin with another token."""
    task = parts.task(name, GenerateTask)
    check_text("question", question)
    if not question.strip():
        raise InputError("the question is empty: ask something")
    if first_token is None:
        return task
    if "input_ids" not in wanted(parts.bundle.spec, task):
        raise InputError("first_token: this model has no encoder for questions: leave it out")
    ids = parts.tokenizer.ids(first_token, whole=False)
    if len(ids) != 1:
        raise InputError(f"first_token {first_token!r} is {len(ids)} tokens: give one")
    return structs.replace(task, first_id=ids[0])


def write(
    parts: Parts,
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
        parts: The model.
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
    prompt = make_prompt(parts, task, soft, texts, options, held)
    return loop.generate(parts.graphs[task.decoder], parts.embed, prompt, options, seed, places)


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
    parts: Parts,
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
    soft = instructed(parts, task, [soft], [text])[0]
    task = settled(task)
    once = read(parts, task, [soft], [text]) if task.read else None
    found: list[list[int]] = []
    for start in range(0, count, IMAGES_PER_BATCH):
        some = min(IMAGES_PER_BATCH, count - start)
        held = once and {name: np.repeat(array, some, axis=0) for name, array in once.items()}
        these = range(start, start + some)
        found += write(parts, task, [soft] * some, [text] * some, options, seed, held, these)
    return found


def stream(
    parts: Parts,
    task: GenerateTask,
    soft: Sequence[Soft],
    text: str,
    options: Generation,
    seed: int | None = None,
) -> Generator[str, None, None]:
    """Yield the text of one row in pieces, as it comes; see `write`."""
    prompt = make_prompt(parts, task, soft, [text], options)
    ids = loop.stream(parts.graphs[task.decoder], parts.embed, prompt, options, seed)
    return parts.tokenizer.pieces(ids)


def encode(
    parts: Parts, task: GenerateTask, pixel_values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Turn pixel_values into the soft prompt, or what `instruct` makes one of.

    What takes clips takes all of them at once; its pieces must be the frames of one video.

    Returns:
        float32 [pieces, n, width].
    """
    known: dict[str, Array] = {"pixel_values": pixel_values}
    for name in task.encode:
        graph = parts.graphs[name]
        takes = {spec.name: known[spec.name] for spec in graph.component.inputs}
        count = len(next(iter(takes.values())))
        step = count if graph.component.takes_clips else IMAGES_PER_BATCH
        made = [
            graph.run({tensor: rows[start : start + step] for tensor, rows in takes.items()})
            for start in range(0, count, step)
        ]
        known |= {tensor: np.concatenate([run[tensor] for run in made]) for tensor in made[0]}
    return known[pictured(parts.bundle.spec, task)]


def pictured(spec: ModelSpec, task: GenerateTask) -> str:
    """Name the tensor that `encode` gives."""
    if not task.instruct:
        return task.soft_prompt
    return spec.component(task.encode[-1]).outputs[-1].name


def instructions(
    parts: Parts, task: GenerateTask, soft: Sequence[Soft], texts: Sequence[str]
) -> dict[str, Array]:
    """Make what the components of `instruct` start from: a row for each picture, with its text."""
    ids, mask = parts.instruction_tokenizer.encode(texts)
    row = np.repeat(np.arange(len(texts)), [len(seen) for seen in soft])
    return {
        pictured(parts.bundle.spec, task): np.stack([part for seen in soft for part in seen]),
        "qformer_input_ids": ids[row],
        "qformer_attention_mask": mask[row],
    }


def instructed(
    parts: Parts, task: GenerateTask, soft: Sequence[Soft], texts: Sequence[str]
) -> Sequence[Soft]:
    """Let each row's text have its say in the soft prompt; without `instruct` it has none."""
    if not task.instruct:
        return soft
    known = parts.chain(task.instruct, instructions(parts, task, soft, texts))
    ends = np.cumsum([len(seen) for seen in soft])
    return [list(found) for found in np.split(known[task.soft_prompt], ends[:-1])]


def settled(task: GenerateTask) -> GenerateTask:
    """Return the wiring for what `instructed` gave."""
    return structs.replace(task, instruct=())


def rows(soft: NDArray[np.float32], grids: Sequence[Grid]) -> list[Soft]:
    """Cut what `encode` gave into what each picture puts into a text: its pieces, or one of all."""
    ends = np.cumsum([pieces(grid) for grid in grids])
    return [
        [found.reshape(-1, found.shape[-1])[joined(grid)]] if grid.side else list(found)
        for found, grid in zip(np.split(soft, ends[:-1]), grids, strict=True)
    ]


def flat(soft: NDArray[np.float32]) -> Soft:
    """Make what `encode` gave of a video's frames the one soft prompt that it is."""
    return [soft.reshape(-1, soft.shape[-1])]


def seen(
    parts: Parts, task: GenerateTask, opened: Sequence[Opened]
) -> tuple[list[Soft], Sequence[Grid]]:
    """Encode pictures or videos that are open; say how each is cut."""
    if task.source == "video":
        clips = (encode(parts, task, parts.frames(video)) for video in opened)
        return [flat(clip) for clip in clips], [Grid()] * len(opened)
    pictures = parts.ready(opened)
    return rows(encode(parts, task, pictures.pixel_values), pictures.grids), pictures.grids


@dataclass(frozen=True, slots=True)
class Example:
    """A picture with the right answer, to be read before the one that is asked about.

    Attributes:
        image: The picture.
        text: The right caption or answer.
        question: What was asked, where the task asks.
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
        text: What stands for `{prompt}` or `{question}`.
        grids: How each picture is cut; they stand one after the other.
        examples: What goes before, with how its picture is cut.

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
    parts: Parts,
    task: GenerateTask,
    soft: Sequence[Soft],
    texts: Sequence[str],
    options: Generation,
    held: Mapping[str, Array] | None = None,
) -> Prompt:
    """Make what the decoder reads before it writes.

    Without `read` that is each row's soft prompt among its text, [padding | text and soft prompt];
    with it the start ids, and the text if nobody else reads it.

    Args:
        parts: The model.
        task: Its wiring.
        soft: What each row sees.
        texts: The full prompt of each row, from `fill`.
        options: Of the decode loop.
        held: What `read` gave, if that is known.
    """
    if not task.read:
        parts.tokenizer.encode(texts, reserve=options.max_tokens)  # refuses what is too long
    soft = instructed(parts, task, soft, texts)
    made = [row(parts, task, seen, text, options) for seen, text in zip(soft, texts, strict=True)]
    if task.read:
        check_room(parts, max(len(ids) for ids, _ in made), options)
        known = read(parts, task, soft, texts) if held is None else held
        return Prompt(*padded(made), held=known)
    if task.image_text is not None:
        check_room(parts, max(len(ids) for ids, _ in made), options)
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
    parts: Parts, task: GenerateTask, soft: Soft, text: str, options: Generation
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Make one row of what the decoder reads: ids, int64 [tokens], and float32 [tokens, width]."""
    if not task.read:
        start = [] if options.bos_id is None else [options.bos_id]
        return spliced(parts, task, soft, parts.tokenizer.ids(text) or start)
    ids = list(task.start_ids)
    if not reads_text(parts.bundle.spec, task):
        ids += parts.tokenizer.ids(text, whole=task.special_tokens)
    found = np.array(ids, np.int64)
    return found, parts.embed(found)


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
    """Say which picture each token sees: the last one before it, and none after an end token.

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


def reads_text(spec: ModelSpec, task: GenerateTask) -> bool:
    """Tell whether a component of `read` takes the text, and not the decoder."""
    return bool(wanted(spec, task) & {"input_ids", "inputs_embeds"})


def wanted(spec: ModelSpec, task: GenerateTask) -> set[str]:
    """Name all that the components of `read` take."""
    return {tensor.name for name in task.read for tensor in spec.component(name).inputs}


def sources(
    parts: Parts, task: GenerateTask, soft: Sequence[Soft], texts: Sequence[str]
) -> dict[str, Array]:
    """Make what the components of `read` start from, each [rows, ...].

    A reader's mask is the decoder's encoder_attention_mask too: it must not look at padding.
    """
    names = wanted(parts.bundle.spec, task)
    made: dict[str, Array] = {}
    if task.soft_prompt in names:
        made[task.soft_prompt] = np.stack([part for seen in soft for part in seen])
    if "input_ids" in names:
        made["input_ids"], mask = parts.tokenizer.encode(texts)
        if task.first_id is not None:
            made["input_ids"][np.arange(len(texts)), mask.argmax(axis=1)] = task.first_id
        made |= {"attention_mask": mask, "encoder_attention_mask": mask}
    elif "inputs_embeds" in names:
        parts.tokenizer.encode(texts)  # refuses what is too long
        rows = [
            spliced(parts, task, seen, parts.tokenizer.ids(text))
            for seen, text in zip(soft, texts, strict=True)
        ]
        made["inputs_embeds"], mask, _ = padded(rows)
        made |= {"attention_mask": mask, "encoder_attention_mask": mask}
    return made


def read(
    parts: Parts, task: GenerateTask, soft: Sequence[Soft], texts: Sequence[str]
) -> dict[str, Array]:
    """Run `read`; return what the decoder is fed at every step."""
    known = parts.chain(task.read, sources(parts, task, soft, texts))
    return {name: known[name] for name in held(parts.bundle.spec.component(task.decoder))}


def held(decoder: Component) -> list[str]:
    """Name what a decoder takes beside its state and what the loop makes."""
    state = {into for _, into in decoder.state}
    names = [spec.name for spec in decoder.inputs]
    return [name for name in names if name not in state and name not in loop.FED]


def check_room(parts: Parts, tokens: int, options: Generation) -> None:
    """Refuse a prompt of `tokens` places, pictures among them, that leaves no room to write."""
    room = max(parts.text_front.max_tokens - options.max_tokens, 0)
    if tokens > room:
        raise InputError(
            f"prompt of {tokens} tokens, pictures included: the model has room for {room} "
            f"beside the {options.max_tokens} of max_tokens"
        )


def spliced(
    parts: Parts, task: GenerateTask, soft: Soft, ids: Sequence[int]
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
                f"prompt with {len(places)} places for {len(soft)} pictures or tiles: "
                f"leave {task.image_text.placeholder!r} out of the text"
            )
        if task.media is not None:
            return text, parts.embed(text)
        text = np.delete(text, places)
        places -= np.arange(len(places))  # in the text without them
    vectors = parts.embed(text)
    if not soft:
        return text, vectors
    at = np.repeat(places, [len(part) for part in soft])
    return np.insert(text, at, token), np.insert(vectors, at, np.concatenate(soft), axis=0)
