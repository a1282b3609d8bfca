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
from typing import TypeVar

from vlmedge.errors import InputError
from vlmedge.image import HUSH, ImageSource
from vlmedge.machine import cores

from ._parts import IMAGES_PER_BATCH, Opened

THREADS_MAX = 4  # Pillow decodes some hundred pictures a second in each

Answer = TypeVar("Answer")
OnError = Callable[[ImageSource, InputError], None]
"""Is told of a picture that cannot be used."""

_Loaded = list[tuple[ImageSource, "Opened | InputError"]]


def answers(
    load: Callable[[ImageSource], Opened],
    sources: Iterable[ImageSource],
    answer: Callable[[Sequence[Opened]], Iterable[Answer]],
    on_error: OnError | None = None,
) -> Iterator[Answer | None]:
    """Answer for each picture, in order.

    Args:
        load: Decodes and resizes one, in a thread.
        sources: Read as they are needed, in the caller's thread, up to two batches ahead.
        answer: Answers for some, in the caller's thread.
        on_error: Is told of a picture that cannot be used, whose answer is then none. Without it
            the first such picture raises, after the answers of those before it.

    Raises:
        InputError: A picture cannot be used; the message names it.
    """
    coming, count = iter(sources), 0
    with ThreadPoolExecutor(min(THREADS_MAX, cores()), "vlmedge-decode") as pool:
        with HUSH:
            batch = _wait(_begin(pool, load, coming))
        while batch:
            usable = [found for _, found in batch if not isinstance(found, InputError)]
            if on_error is None and len(usable) < len(batch):  # it ends here
                coming = iter(())
                usable = usable[
                    : next(i for i, (_, f) in enumerate(batch) if isinstance(f, InputError))
                ]
            with HUSH:
                begun = _begin(pool, load, coming)
                try:
                    made = iter(answer(usable) if usable else ())
                finally:
                    following = _wait(begun)
            for source, found in batch:
                if not isinstance(found, InputError):
                    yield next(made)
                elif on_error is None:
                    raise _named(source, count, found)
                else:
                    on_error(source, _named(source, count, found))
                    yield None
                count += 1
            batch = following


def _begin(
    pool: ThreadPoolExecutor, load: Callable[[ImageSource], Opened], coming: Iterator[ImageSource]
) -> list[tuple[ImageSource, Future[Opened]]]:
    """Let threads open the next batch."""
    return [(source, pool.submit(load, source)) for source in islice(coming, IMAGES_PER_BATCH)]


def _wait(begun: Sequence[tuple[ImageSource, Future[Opened]]]) -> _Loaded:
    """Wait for a batch; what cannot be used is an error in its place."""
    found: _Loaded = []
    for source, future in begun:
        try:
            found.append((source, future.result()))
        except InputError as error:
            found.append((source, error))
    return found


def _named(source: ImageSource, number: int, error: InputError) -> InputError:
    """Say which picture it was, where the message does not."""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else f"image {number}"
    return error if name in str(error) else InputError(f"{name}: {error}")
