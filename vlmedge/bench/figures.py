"""The values of a benchmark: the rows of its table, and the panels of its plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

from vlmedge.bench.result import BenchResult, Latency, Side

MS, SECONDS = 1.0, 1000.0
Figure = Callable[[Side], "Latency | float | None"]


class Line(NamedTuple):
    """One row of the table, or one panel of the plot.

    Attributes:
        title: With its unit.
        of: Function that takes the value from a side.
        better: Whether lower or higher is better.
        unit_ms: Milliseconds in one unit of a latency.
    """

    title: str
    of: Figure
    better: Literal["less", "more"] = "less"
    unit_ms: float = MS


def lines(result: BenchResult) -> Iterator[Line]:
    """Yield the lines for which the first side has a value."""
    ours = result.sides[0]
    for name in ours.components:
        yield Line(f"{name}, ms", partial(_component, name=name))
    for name in ours.end_to_end:
        yield Line(f"{name}, end to end, ms", partial(_end_to_end, name=name))
    rest = (
        Line("first token, ms", lambda side: side.first_token),
        Line("tokens/s", lambda side: side.tokens_per_s, "more"),
        Line("start cold, s", lambda side: side.start_cold, unit_ms=SECONDS),
        Line("start warm, s", lambda side: side.start_warm, unit_ms=SECONDS),
        Line("peak memory, MiB", lambda side: side.peak_memory_mib),
        Line("energy an answer, J", _joules),
        Line("power, W", _watts),
    )
    for line in rest:
        if line.of(ours) is not None:
            yield line


def _component(side: Side, name: str) -> Latency | None:
    return side.components.get(name)


def _end_to_end(side: Side, name: str) -> Latency | None:
    return side.end_to_end.get(name)


def _joules(side: Side) -> float | None:
    return None if side.energy is None else side.energy.joules_per_item


def _watts(side: Side) -> float | None:
    return None if side.energy is None else side.energy.watts
