"""The command that measures a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmedge.cli.options import BundleFolder, EngineName, Json, Quiet


def bench(
    bundle: BundleFolder,
    against: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Measure PyTorch beside it.")
    ] = None,
    engine: EngineName = "ort",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw it too; needs matplotlib.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed, memory, start and energy, beside PyTorch's if asked."""
    from vlmedge.bench.run import bench as measure
    from vlmedge.cli import output as console

    if plot is not None:
        from vlmedge.bench.plot import refuse

        refuse(plot)  # before minutes of work, not after
    result = measure(console.load(bundle), against, console.progress(quiet), engine=engine)
    if plot is not None:
        from vlmedge.bench.plot import draw

        draw(result, plot)
    if as_json:
        console.emit(result)
    elif not quiet:
        from vlmedge.bench.figures import show_bench

        show_bench(result)
