"""Tables that people read, and those of them that several commands print."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmedge.bundle import Bundle
from vlmedge.parity.on_device import OnDevice
from vlmedge.spec.manifest import ComponentParity, Parity

WIDE = 1000  # a file or a pipe has no edge to wrap at


def table(*columns: str, left: tuple[int, ...]) -> Table:
    """Make a table; `left` has the places of the columns that are aligned left."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i in left else "right")
    return made


def row(table: Table, *cells: str | Text) -> None:
    """Add a row; a plain string is no markup, whatever brackets it has."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def print_table(table: Table, *, spaced: bool = True) -> None:
    """Print a table, with an empty line after it."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else WIDE, highlight=False)
    console.print(table)
    if spaced:
        console.print()


def show_parity(parity: Parity) -> None:
    """Print the gate's two tables."""
    heads = ["component", "max abs difference", "cosine", "allowed", "verdict"]
    components = table(*heads, left=(0, 3, 4))
    for c in parity.components:
        error = f"{c.max_abs:.2e}", f"{c.cosine:.7f}"
        row(components, c.component, *error, c.tolerance, _passed(c.passed))
    print_table(components)
    if not parity.tasks:
        return
    heads = ["task", "samples", "agreement", "ours / PyTorch", "allowed", "verdict"]
    tasks = table(*heads, left=(0, 4, 5))
    for t in parity.tasks:
        accuracy = f"{_percent(t.accuracy)} / {_percent(t.reference_accuracy)}"
        figures = str(t.samples), _percent(t.agreement), accuracy
        row(tasks, t.task, *figures, t.tolerance, _passed(t.passed))
    print_table(tasks)


def show_level4(found: Sequence[OnDevice]) -> None:
    """Print what engines give on their machines, against the portable graphs."""
    engines = table("component", "engine", "on", "ms", "level 4", left=(0, 1, 2, 4))
    for one in found:
        cells = level4_cells(one.verdict.parity, one.verdict.latency_ms)
        row(engines, one.component, one.engine, one.device, *cells)
    print_table(engines)


def level4_cells(parity: ComponentParity | None, latency_ms: float | None) -> tuple[str, str]:
    """Write how fast an engine is, and how far from its portable graph."""
    latency = "" if latency_ms is None else f"{latency_ms:.2f}"
    if parity is None:
        return latency, "not compared"
    word = "passed" if parity.passed else "FAILED"
    return latency, f"{word}, cosine {parity.cosine:.6f} ({parity.tolerance})"


def size_bytes(bundle: Bundle) -> int:
    """Return the size of all that a bundle ships."""
    return sum(file.bytes for file in bundle.manifest.files)


def _passed(passed: bool) -> Text:
    return Text("passed", "green") if passed else Text("FAILED", "bold red")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
