"""How long work tells what it does; the CLI draws it, a library call stays silent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

Advance = Callable[[int], None]


class Progress(Protocol):
    """Someone who watches."""

    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Open a step; what the block gets is called with how much further it is."""
        ...

    def note(self, text: str) -> None:
        """Say one line."""
        ...


@runtime_checkable
class Passing(Protocol):
    """A watcher whose words can vanish again, as on a terminal."""

    def passing(self, title: str) -> AbstractContextManager[Any]:
        """Show something while the block runs."""
        ...


def passing(progress: Progress, title: str) -> AbstractContextManager[Any]:
    """Show where there is a terminal what is no news when it has ended; it leaves no line."""
    return progress.passing(title) if isinstance(progress, Passing) else nullcontext()


class _Silent:
    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        return nullcontext(_ignore)

    def note(self, text: str) -> None:
        return None


def _ignore(amount: int) -> None:
    return None


SILENT: Progress = _Silent()
