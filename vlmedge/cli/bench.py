"""The command `bench`: a bundle is measured; a table has a column a side, ours first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmedge.cli import output
from vlmedge.cli.options import BundleFolder, EngineName, Json, Quiet

if TYPE_CHECKING:
    from vlmedge.bench.figures import Line
    from vlmedge.bench.result import BenchResult, Side


def bench(
    bundle: BundleFolder,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Also measure this checkpoint in PyTorch."),
    ] = None,
    engine: EngineName = "ort",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Also draw the result; needs matplotlib."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a bundle's speed, memory, start-up time and energy, next to PyTorch's if asked."""
    from vlmedge.bench.run import bench as measure
    from vlmedge.cli.watch import progress

    if plot is not None:
        from vlmedge.bench.plot import refuse

        refuse(plot)  # before minutes of work, not after
    result = measure(output.load(bundle), against, progress(quiet), engine=engine)
    if plot is not None:
        from vlmedge.bench.plot import draw

        draw(result, plot)
    if as_json:
        output.emit(result)
    elif not quiet:
        show_bench(result)


def show_bench(result: BenchResult) -> None:
    """Print a column a side; all but the first say how many times the first one theirs is."""
    from vlmedge.bench.figures import lines
    from vlmedge.cli.tables import print_table, row, table

    ours = result.sides[0]
    sides = table("batch 1", *(side.name for side in result.sides), left=(0,))
    for line in lines(result):
        row(sides, line.title, *(_cell(line, side, ours) for side in result.sides))
    print_table(sides)
    _print_conditions(result)
    _print_machine(result)


def _print_conditions(result: BenchResult) -> None:
    """Print what failed, what was not measured, and how the rest was."""
    for side in result.sides:
        if side.error is not None:
            print(f"{side.name}: {side.error}")
    if result.no_cold_start is not None:
        print(f"no cold start: {result.no_cold_start}")
    machine = result.machine
    if machine.load is not None and machine.load > machine.cores / 4:
        print(f"the machine was busy (load {machine.load:.1f}): the figures are worth little")
    print(f"times are p50 / p90 / p99 of {result.rounds} rounds after {result.warm_ups} to warm up")
    if len(result.sides) > 1:
        print("(x) is how many times the first column's; of tokens/s, how many times fewer")
    print(f"energy: {result.energy_source}")


def _print_machine(result: BenchResult) -> None:
    machine, board = result.machine, result.board
    parts = (board.model, board.jetpack and f"JetPack {board.jetpack}", board.power_mode)
    known = [part for part in (*parts, *board.gpus) if part]
    print(
        f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads a side, "
        f"{', '.join([f'{machine.memory_gib} GiB', *known])}"
    )
    versions = (f"{name} {value}" for name, value in machine.versions.items())
    print(f"{machine.system}, {', '.join((f'Python {machine.python}', *versions))}")


def _cell(line: Line, side: Side, ours: Side) -> str:
    """Write one figure, with how many times it is the first column's."""
    from vlmedge.bench.result import Latency

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
