"""The command `paint`: a picture and examples in, what the picture becomes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmedge.cli import output
from vlmedge.cli.options import AllowFallback, BundleFolder, EngineName, Image, Quiet
from vlmedge.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from vlmedge.run.tasks.paint import Painting


def paint(
    bundle: BundleFolder,
    image: Image,
    out: Annotated[Path, typer.Option(metavar="FILE", help="PNG file to write.")],
    example: Annotated[
        list[str],
        typer.Option(
            metavar="PICTURE=PAINTING",
            help="An example: a picture, and what it was turned into. May be repeated.",
        ),
    ],
    task: Annotated[
        str, typer.Option(metavar="NAME", help="Task of the bundle to run, such as depth.")
    ] = "paint",
    labels: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Read the paintings as labels 1 to N, and write labels, as an indexed PNG.",
        ),
    ] = None,
    engine: EngineName = "ort",
    allow_fallback: AllowFallback = False,
    quiet: Quiet = False,
) -> None:
    """Turn a picture into what the examples show, such as a segmentation."""
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: paintings are written as PNG: name a .png file")
    examples = [_example(text) for text in example]
    model = output.open_model(bundle, engine, allow_fallback=allow_fallback)
    painting = model.paint(image, examples, task=task, labels=labels)
    output.save(_picture(painting, labels), out)
    if not quiet:
        print(out)


def _example(text: str) -> tuple[str, str]:
    """Part PICTURE=PAINTING."""
    picture, separator, painting = text.partition("=")
    if not (separator and picture and painting):
        raise InputError(f"--example {text}: give PICTURE=PAINTING, two image files")
    return picture, painting


def _picture(painting: Painting, labels: int | None) -> Picture:
    """Make what is saved: labels as an indexed picture in the model's own colours, else pixels."""
    import numpy as np
    import PIL.Image

    from vlmedge.run.tasks.paint import palette

    if labels is None or painting.values is None:
        return PIL.Image.fromarray(painting.pixels)
    indexed = PIL.Image.fromarray(painting.values.astype(np.uint8))
    indexed.putpalette([channel for color in palette(labels) for channel in color])
    return indexed
