"""Pictures by the thousand: the next batch is decoded while this one is answered.

    sources -> [ threads: decode, resize ] -> bytes -> [ normalise, vision, text ] -> answers
               '------- next batch ------'            '------ this batch -------'

Two batches are in memory, however many pictures come. No thread runs while the caller has an
answer in hand, so nothing happens behind its back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeGuard, TypeVar

import numpy as np

from vlmedge.errors import InputError
from vlmedge.host.hardware import cores
from vlmedge.run.inputs.image_files import HUSH, ImageSource, is_images
from vlmedge.run.tasks.context import IMAGES_PER_BATCH

THREADS_MAX = 4  # Pillow decodes some hundred pictures a second in each

Loaded = TypeVar("Loaded")
Answers = Callable[[Sequence[Loaded], Sequence[int]], Iterable[Any]]
"""Answers a batch that is loaded, given its positions in the whole list or stream."""
OnError = Callable[[ImageSource, InputError], None]
"""Called with (image, error) for each image of a stream that cannot be used."""


def is_stream(images: object) -> TypeGuard[Iterator[ImageSource]]:
    """Return whether `images` is an iterable to stream from, not one image or a list of them."""
    single = (str, bytes, bytearray, memoryview, np.ndarray, list, tuple)
    file = hasattr(images, "read")  # its lines are no pictures
    return hasattr(images, "__iter__") and not file and not isinstance(images, single)


def respond(
    load: Callable[[Any], Loaded],
    images: Any,
    answer: Answers[Loaded],
    on_error: OnError | None = None,
    per_batch: int = IMAGES_PER_BATCH,
) -> Any:
    """Answer for one image, for a list of them, or for a stream as its answers are taken.

    The arguments are those of `answers`.
    """
    if is_stream(images):
        return answers(load, images, answer, on_error, per_batch)
    if on_error is not None:
        raise InputError("on_error is for a stream of images: pass iter(images)")
    if not is_images(images):
        found = next(iter(answer([load(images)], [0])))
        if isinstance(found, InputError):
            raise found
        return found
    if not images:
        raise InputError("no images: give at least one")
    return list(answers(load, images, answer, per_batch=per_batch))


def answers(
    load: Callable[[ImageSource], Loaded],
    sources: Iterable[ImageSource],
    answer: Answers[Loaded],
    on_error: OnError | None = None,
    per_batch: int = IMAGES_PER_BATCH,
) -> Iterator[Any]:
    """Answer for each picture, in order.

    Args:
        load: Decodes and resizes one picture, in a thread.
        sources: Pictures, read in the caller's thread when they are needed, at most two batches
            ahead.
        answer: Answers for a batch, in the caller's thread, given its positions in `sources`. An
            error in place of an answer means that the picture cannot be used after all.
        on_error: Called with (image, error) for each picture that cannot be used; its answer is
            None. If omitted, the error is raised after the answers of the pictures before it.
        per_batch: Number of pictures that are loaded and answered for at a time.

    Raises:
        InputError: A picture cannot be used; the message names it.
        Exception: What `sources` raised, after the answers of the pictures before it.
    """
    coming, count = _Coming(iter(sources)), 0
    with ThreadPoolExecutor(min(THREADS_MAX, cores()), "vlmedge-decode") as pool:
        with HUSH:
            batch = _wait(_begin(pool, load, coming, per_batch))
        while batch:
            usable: list[Loaded] = []
            places: list[int] = []
            for place, (_, found) in enumerate(batch, count):
                if not isinstance(found, InputError):
                    usable.append(found)
                    places.append(place)
                elif on_error is None:  # it ends here
                    coming = _Coming(iter(()))
                    break
            with HUSH:
                begun = _begin(pool, load, coming, per_batch)
                try:
                    made = iter(answer(usable, places) if usable else ())
                finally:
                    following = _wait(begun)
            for source, loaded in batch:
                found = loaded if isinstance(loaded, InputError) else next(made)
                if not isinstance(found, InputError):
                    yield found
                elif on_error is None:
                    raise _named(source, count, found)
                else:
                    on_error(source, _named(source, count, found))
                    yield None
                count += 1
            batch = following
    if coming.error is not None:
        raise coming.error


class _Coming:
    """The caller's pictures; what goes wrong in getting them waits for the answers before it."""

    def __init__(self, sources: Iterator[ImageSource]) -> None:
        self._sources = sources
        self.error: Exception | None = None

    def take(self, count: int) -> list[ImageSource]:
        """Take the next ones, fewer at the end."""
        taken: list[ImageSource] = []
        try:
            taken.extend(islice(self._sources, count))  # keeps what came before an error
        except Exception as error:
            self.error, self._sources = error, iter(())
        return taken


def _begin(
    pool: ThreadPoolExecutor,
    load: Callable[[ImageSource], Loaded],
    coming: _Coming,
    count: int,
) -> list[tuple[ImageSource, Future[Loaded]]]:
    """Let threads open the next batch."""
    return [(source, pool.submit(load, source)) for source in coming.take(count)]


def _wait(
    begun: Sequence[tuple[ImageSource, Future[Loaded]]],
) -> list[tuple[ImageSource, Loaded | InputError]]:
    """Wait for a batch; what cannot be used is an error in its place."""
    found: list[tuple[ImageSource, Loaded | InputError]] = []
    for source, future in begun:
        try:
            found.append((source, future.result()))
        except InputError as error:
            found.append((source, error))
    return found


def _named(source: ImageSource, number: int, error: InputError) -> InputError:
    """Return the error with the picture's name, if its message lacks it."""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else f"image {number}"
    return error if name in str(error) else InputError(f"{name}: {error}")
