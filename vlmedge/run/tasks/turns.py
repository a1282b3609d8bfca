"""One call of a model at a time: its graphs keep state, so threads take turns.

A turn is a batch, an answer or a piece of a stream. What a stream of one thread has in the cache
when another call comes between is gone; the decode loop finds that out and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])
Piece = TypeVar("Piece")


def in_turn(method: Method) -> Method:
    """Let a method of what has `_context` wait until no other call works with its graphs."""

    @wraps(method)
    def waits(self: Any, *args: Any, **options: Any) -> Any:
        with self._context.turn:
            return method(self, *args, **options)

    return cast(Method, waits)


def each_in_turn(
    turn: AbstractContextManager[Any], pieces: Generator[Piece, None, None]
) -> Iterator[Piece]:
    """Let each piece of a stream wait; nothing is held while the caller has one in hand."""
    try:
        while True:
            with turn:
                try:
                    piece = next(pieces)
                except StopIteration:
                    return
            yield piece
    finally:
        pieces.close()
