"""The command `detect`: a picture and names of things in, where they are out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmedge.cli.options import (
    AllowFallback,
    BundleFolder,
    EngineName,
    Json,
    LowMemory,
    MaxTokens,
    NumBeams,
    Quiet,
)


def detect(
    bundle: BundleFolder,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file.")],
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[WHAT]", help='As "cat", or "cat; dog"; none: all that the model knows.'
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another task of the bundle, such as segment."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--draw", metavar="FILE", help="Draw what is found on the picture: a PNG."),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            "--masks",
            metavar="DIR",
            help="Write a PNG for each thing that is outlined, 255 inside: 0.png of the first box.",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    num_beams: NumBeams = None,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say where things are on a picture: a line each, pixels from its upper left corner."""
    from vlmedge.cli import output as console
    from vlmedge.cli.drawing import draw
    from vlmedge.run.inputs.image_files import load_image
    from vlmedge.run.tasks.detect import check_masks, usual

    if out is not None:
        _check_drawing(out, Path(image))
    if masks is not None:
        _check_masks(masks)
    model = console.open_model(bundle, engine, low_memory, allow_fallback)
    if masks is not None:
        check_masks(model.bundle, task or usual(model.bundle, what))
    picture = load_image(image)
    options = {"max_tokens": max_tokens, "num_beams": num_beams}
    boxes = model.detect(picture, what, task=task, **options)
    saved = {} if masks is None else console.save_masks(boxes, picture.size, masks)
    if out is not None:
        console.save(draw(picture, boxes), out)
    console.detect(image, picture.size, boxes, saved, out, as_json, quiet)


def _check_drawing(out: Path, image: Path) -> None:
    """Refuse what cannot be written before there is any work; a file that is there is replaced."""
    from vlmedge.errors import InputError

    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: drawings are written as PNG: name a .png file")
    _check_parent(out)
    if out.exists() and image.exists() and out.samefile(image):
        raise InputError(f"{out} is the picture that is looked at: name another file to draw on")


def _check_masks(folder: Path) -> None:
    """Refuse a folder with something in it: masks of an earlier picture would stay among these."""
    from vlmedge.errors import InputError

    _check_parent(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is no empty folder: name another for the masks")


def _check_parent(path: Path) -> None:
    from vlmedge.errors import InputError

    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}: make it")
