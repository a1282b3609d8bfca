"""The table of a benchmark: one column a side; ours comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

from vlmedge.bench.result import BenchResult, Latency, Side
from vlmedge.cli.tables import _print, _row, _table

MS, SECONDS = 1.0, 1000.0
Figure = Callable[[Side], "Latency | float | None"]


class Line(NamedTuple):
    """One row of the table, or one panel of the plot.

    Attributes:
        title: With its unit.
        of: A side's figure.
        better: Which one is.
        unit_ms: What a latency is counted in.
    """

    title: str
    of: Figure
    better: Literal["less", "more"] = "less"
    unit_ms: float = MS


def lines(result: BenchResult) -> Iterator[Line]:
    """Yield what the first side has figures of."""
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


def show_bench(result: BenchResult) -> None:
    """Print a column a side; all but the first say how many times more theirs is."""
    ours = result.sides[0]
    table = _table("batch 1", *(side.name for side in result.sides), left=(0,))
    for line in lines(result):
        _row(table, line.title, *(_cell(line, side, ours) for side in result.sides))
    _print(table)
    for side in result.sides:
        if side.error is not None:
            print(f"{side.name}: {side.error}")
    if result.no_cold_start is not None:
        print(f"no cold start: {result.no_cold_start}")
    machine, board = result.machine, result.board
    if machine.load is not None and machine.load > machine.cores / 4:
        print(f"the machine was busy (load {machine.load:.1f}): the figures are worth little")
    print(f"times are p50 / p90 / p99 of {result.rounds} rounds after {result.warm_ups} to warm up")
    if len(result.sides) > 1:
        print("(x) is how many times the first column's; of tokens/s, how many times fewer")
    print(f"energy: {result.energy_source}")
    parts = (board.model, board.jetpack and f"JetPack {board.jetpack}", board.power_mode)
    known = [part for part in (*parts, *board.gpus) if part]
    print(
        f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads a side, "
        f"{', '.join([f'{machine.memory_gib} GiB', *known])}"
    )
    versions = (f"{name} {value}" for name, value in machine.versions.items())
    print(f"{machine.system}, {', '.join((f'Python {machine.python}', *versions))}")


def _component(side: Side, name: str) -> Latency | None:
    return side.components.get(name)


def _end_to_end(side: Side, name: str) -> Latency | None:
    return side.end_to_end.get(name)


def _joules(side: Side) -> float | None:
    return None if side.energy is None else side.energy.joules_per_item


def _watts(side: Side) -> float | None:
    return None if side.energy is None else side.energy.watts


def _cell(line: Line, side: Side, ours: Side) -> str:
    """Write one figure, with how many times it is the first column's."""
    found, first = line.of(side), line.of(ours)
    if found is None or first is None:
        return "-"
    if isinstance(found, Latency) and isinstance(first, Latency):
        times = (found.p50_ms, found.p90_ms, found.p99_ms)
        text = " / ".join(f"{ms / line.unit_ms:.2f}" for ms in times)
        ratio = found.p50_ms / first.p50_ms
    else:
        assert isinstance(found, float) and isinstance(first, float)
        text, ratio = f"{found:.4g}", found / first
    if side is ours:
        return text
    return f"{text} ({1 / ratio if line.better == 'more' else ratio:.1f}x)"
