"""One call of a model at a time: its graphs keep state, so threads take turns.

A turn is a batch, an answer or a piece of a stream. If another call comes between two pieces of a
stream, the decoder's cache no longer holds the stream's text; the decode loop notices and raises.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])
Piece = TypeVar("Piece")


def in_turn(method: Method) -> Method:
    """Make a method wait until no other call uses the graphs; its class must have `_context`."""

    @wraps(method)
    def waits(self: Any, *args: Any, **options: Any) -> Any:
        with self._context.turn:
            return method(self, *args, **options)

    return cast(Method, waits)


def each_in_turn(
    turn: AbstractContextManager[Any], pieces: Generator[Piece, None, None]
) -> Iterator[Piece]:
    """Make each piece of a stream wait; no turn is held while the caller has a piece in hand."""
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
