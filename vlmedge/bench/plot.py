"""The plot of a benchmark: a panel for each value, a bar for each side; ours is in colour."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path
from typing import Any

from vlmedge.bench.figures import Line, lines
from vlmedge.bench.result import BenchResult, Latency
from vlmedge.errors import InputError, MissingExtraError
from vlmedge.files import replace_file

ENDINGS = (".png", ".svg", ".pdf")
COLUMNS = 3
OURS, THEIRS, INK = "#1f6f8b", "#b8c4cc", "#333333"


def refuse(file: Path) -> None:
    """Refuse a plot that could not be drawn or written.

    Raises:
        InputError: It has another ending, or no folder.
        MissingExtraError: matplotlib is not installed.
    """
    if file.suffix.lower() not in ENDINGS:
        raise InputError(f"{file}: a plot's name must end in {', '.join(ENDINGS)}")
    if not file.parent.is_dir():
        raise InputError(f"{file} cannot be written: there is no folder {file.parent}")
    if file.is_dir():
        raise InputError(f"{file} is a folder: name a file")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plots need the package matplotlib: pip install 'vlmedge[report]'")


def draw(result: BenchResult, file: Path) -> None:
    """Draw a benchmark into a file, whole or not at all: p50 as a bar, up to p99 as a line."""
    refuse(file)
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    panels = list(lines(result))
    rows = math.ceil(len(panels) / COLUMNS)
    height = 0.8 + 0.3 * len(result.sides)
    figure = Figure(figsize=(4.2 * COLUMNS, height * rows + 0.6))
    for place, line in enumerate(panels, 1):
        _panel(figure.add_subplot(rows, COLUMNS, place), line, result)
    machine = result.machine
    figure.suptitle(f"{result.checkpoint}, batch 1", x=0.01, ha="left", fontsize=10, color=INK)
    note = f"{machine.cpu}, {machine.threads} threads. Bars: median; lines: up to p99."
    figure.text(0.01, 0.01, note, fontsize=7, color=INK)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    data = io.BytesIO()
    figure.savefig(data, format=file.suffix.lower()[1:], dpi=130)
    try:
        replace_file(file, data.getvalue())
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def _panel(axis: Any, line: Line, result: BenchResult) -> None:
    for place, side in enumerate(result.sides):
        found = line.of(side)
        low = found.p50_ms / line.unit_ms if isinstance(found, Latency) else found
        text = " -" if low is None else f" {low:.4g}"
        if low is not None:
            axis.barh(place, low, color=THEIRS if place else OURS, height=0.7)
        if isinstance(found, Latency):
            high = found.p99_ms / line.unit_ms
            axis.plot([low, high], [place, place], color=INK, linewidth=1.2)
        box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0, "alpha": 0.6}
        axis.text(0, place, text, va="center", fontsize=7, color=INK, bbox=box)
    axis.set_yticks(range(len(result.sides)), [side.name for side in result.sides], fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{line.title} ({line.better} is better)", fontsize=8, loc="left")
