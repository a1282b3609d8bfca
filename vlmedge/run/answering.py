"""Answers about one picture, about each of a list, or about a stream of them.

    one picture ---.
    a list --------+-> [ open ] -> Opened -> [ encode, fill, write ] -> one | a list | an iterator
    an iterator ---'   in threads            in turn, a batch at a time

`Model` has the signatures and says what they mean; the work of its methods is here and in tasks/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from vlmedge.errors import InputError
from vlmedge.run.inputs.image import Grid
from vlmedge.run.inputs.image_files import ImageSource, is_images
from vlmedge.run.inputs.video import Video
from vlmedge.run.tasks import detect as detecting
from vlmedge.run.tasks import encode as encoding
from vlmedge.run.tasks import generate as generating
from vlmedge.run.tasks import prompt as prompting
from vlmedge.run.tasks import regions as pointing
from vlmedge.run.tasks.boxes import Box
from vlmedge.run.tasks.context import Opened, TaskContext
from vlmedge.run.tasks.prompt import Example
from vlmedge.run.tasks.regions import Region
from vlmedge.run.tasks.streaming import Answers, OnError, is_stream, respond
from vlmedge.run.tasks.turns import each_in_turn
from vlmedge.spec import GenerateTask, Generation

Images = list[Any] | tuple[ImageSource | Video, ...]
Stream = Iterator[ImageSource]


class DecodeOptions(TypedDict, total=False):
    """Options of the decode loop, the fields of `vlmedge.spec.Generation`; None is not given."""

    max_tokens: int | None
    min_tokens: int | None
    num_beams: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    length_penalty: float | None
    early_stopping: bool | None
    no_repeat_ngram_size: int | None
    forced_bos_id: int | None
    forced_eos_id: int | None
    bos_id: int | None
    eos_ids: Sequence[int] | None
    pad_id: int | None


class CaptionOptions(DecodeOptions, total=False):
    """Keywords of `Model.caption`."""

    task: str
    examples: Sequence[Example]
    seed: int | None


class AskOptions(DecodeOptions, total=False):
    """Keywords of `Model.ask`."""

    regions: Sequence[Region]
    examples: Sequence[Example]
    first_token: str | None
    seed: int | None


class DetectOptions(DecodeOptions, total=False):
    """Keywords of `Model.detect`."""

    task: str | None


@dataclass(frozen=True, slots=True)
class Request:
    """A call's question to every picture.

    Attributes:
        task: The wiring.
        text: The caller's prompt or question.
        options: Options of the decode loop.
        seed: Random seed for sampling.
        examples: Pictures with their right answers, read first.
        regions: Boxes or points that the text has places for.
    """

    task: GenerateTask
    text: str
    options: Generation
    seed: int | None = None
    examples: Sequence[Example] = ()
    regions: Sequence[Region] = ()


def several(images: object) -> list[Any] | tuple[Any, ...]:
    """Return a list or tuple of images as it is, and one image as a list."""
    return images if isinstance(images, list | tuple) else [images]


def task_about(context: TaskContext, task: str, images: object) -> str:
    """Name the task that does with videos what `task` does with images, where videos are given.

    Raises:
        InputError: The bundle takes only the other kind, or both kinds are given at once.
    """
    if is_stream(images):
        return task  # of images; nobody knows yet what comes
    bundle = context.bundle
    kinds = {isinstance(source, Video) for source in several(images)}
    if len(kinds) > 1:
        raise InputError(
            f"images and videos in one call{_videos(images)}: pass them in separate calls"
        )
    name, other = (f"{task}_video", task) if True in kinds else (task, f"{task}_video")
    known = bundle.spec.tasks
    if name not in known and other in known:
        if other != task:
            raise InputError(f"{bundle.path} takes videos only: give it a Video")
        raise InputError(f"{bundle.path} takes images, no videos{_videos(images)}")
    return name


def answer_each(
    context: TaskContext, images: Any, answer: Answers[Opened], on_error: OnError | None = None
) -> Any:
    """Answer for one image, for a list of them, or for a stream as its answers are taken.

    Args:
        context: The model; each batch waits for its turn with it.
        images: One, several, or an iterator.
        answer: Answers for a batch that is open.
        on_error: For a stream, see `Model.caption`.
    """

    def in_turn(opened: Sequence[Opened], places: Sequence[int]) -> Iterable[Any]:
        with context.turn:
            return answer(opened, places)

    return respond(context.open, images, in_turn, on_error)


def write(
    context: TaskContext,
    request: Request,
    images: Any,
    on_error: OnError | None = None,
    read: Callable[[list[int], Opened], Any] | None = None,
) -> Any:
    """Write about one image, about each of several, or about a stream of them.

    Args:
        context: The model.
        request: The question to each.
        images: One, several, or an iterator.
        on_error: For a stream, see `Model.caption`.
        read: Makes an answer of token ids and the picture; default: their text.
    """
    task = request.task
    before, shown = _examples(context, task, request.examples)
    pointing.check_regions(task, request.text, request.regions)

    def answer(opened: Sequence[Opened], places: Sequence[int]) -> list[Any]:
        seen, grids = encoding.seen(context, task, opened)
        soft = [[*shown, *each] for each in seen]
        prompts = [
            prompting.fill(task, _pointed(context, request, picture), [grid], before)
            for picture, grid in zip(opened, grids, strict=True)
        ]
        ids = generating.write(
            context, task, soft, prompts, request.options, request.seed, places=places
        )
        if read is None:
            return [context.tokenizer.text(row) for row in ids]
        return [read(row, picture) for row, picture in zip(ids, opened, strict=True)]

    return answer_each(context, images, answer, on_error)


def write_several(
    context: TaskContext, request: Request, image: ImageSource | Video, count: int
) -> list[str]:
    """Draw `count` texts about one image, which is encoded once."""
    generating.check_draws(count, request.options)
    [soft], grids = encoding.seen(context, request.task, [context.open(image)])
    text = prompting.fill(request.task, request.text, grids)
    ids = generating.draws(context, request.task, soft, text, count, request.options, request.seed)
    return [context.tokenizer.text(row) for row in ids]


def write_in_pieces(
    context: TaskContext, request: Request, image: ImageSource | Video
) -> Iterator[str]:
    """Write about one image, in pieces as they come; each piece waits for its turn."""
    pointing.check_regions(request.task, request.text, request.regions)
    opened = context.open(image)
    pointed = _pointed(context, request, opened)
    soft, grids = encoding.seen(context, request.task, [opened])
    text = prompting.fill(request.task, pointed, grids)
    pieces = generating.stream(context, request.task, soft, text, request.options, request.seed)
    return each_in_turn(context.turn, pieces)


def detect(
    context: TaskContext, images: Any, what: str | None, name: str, given: Mapping[str, Any]
) -> list[Box] | list[list[Box]]:
    """Find things on one image, or on each of several, by the task of this name."""
    task = detecting.detect_task(context, name)
    texts = detecting.requests(task, name, what)
    options = context.options(given)
    found: list[list[Box]] = []
    for text in texts:
        read = partial(detecting.boxes, context, task, text)
        made = write(context, Request(task, text, options), images, read=read)
        rows = made if is_images(images) else [made]
        found = [a + b for a, b in zip(found, rows, strict=True)] if found else rows
    return found if is_images(images) else found[0]


def _examples(
    context: TaskContext, task: GenerateTask, examples: Sequence[Example]
) -> tuple[list[tuple[Example, Grid]], list[NDArray[np.float32]]]:
    """Encode the pictures of examples: for each placeholder float32 [n, width]."""
    if not examples or task.example is None:  # the latter is refused where it is filled in
        return [(example, Grid()) for example in examples], []
    with context.turn:
        opened = [context.open(example.image) for example in examples]
        found, grids = encoding.seen(context, task, opened)
    return list(zip(examples, grids, strict=True)), [part for seen in found for part in seen]


def _pointed(context: TaskContext, request: Request, picture: Opened) -> str:
    """Write the regions of a question into it, by the size of this picture."""
    return pointing.placed(request.text, request.regions, picture.size, context.image_front)


def _videos(images: object) -> str:
    """Name the videos among what was given, in brackets, as far as they have names."""
    clips = [each.source for each in several(images) if isinstance(each, Video)]
    names = [
        f"{clip} is a folder, of a video's frames: give its files"
        if Path(clip).is_dir()
        else f"{clip}"
        for clip in clips
        if isinstance(clip, str | Path)
    ]
    return f" ({', '.join(names)})" if names else ""
