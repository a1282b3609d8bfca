"""The progress of a command, on stderr: bars on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from vlmedge.progress import SILENT, Advance, Progress


class _Drawn:
    """Bars on a terminal; nothing of them stays."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._open = 0

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Show one bar while the block runs."""
        self._open += 1
        self._bars.start()
        task = self._bars.add_task(title, total=total)
        try:
            yield lambda amount: self._bars.advance(task, amount)
        finally:
            self._bars.remove_task(task)
            self._open -= 1
            if not self._open:
                self._bars.stop()

    def passing(self, title: str) -> AbstractContextManager[Any]:
        """Show a bar without an end; none of the steps leaves anything here."""
        return self.step(title)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)


class _Printed:
    """One line a step, for logs: its title when it begins, its time when it ends."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Print a line around the block."""
        print(f"{title} ...", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            yield lambda amount: None
        except BaseException:
            print(" stopped", file=sys.stderr, flush=True)
            raise
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)


def progress(quiet: bool) -> Progress:
    """Choose who watches: bars on a terminal, lines elsewhere, nobody when quiet."""
    if quiet:
        return SILENT
    return _Drawn() if sys.stderr.isatty() else _Printed()
