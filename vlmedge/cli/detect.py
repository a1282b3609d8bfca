"""The command `detect`: a picture and names of things in, where they are out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmedge.cli import output
from vlmedge.cli.options import (
    AllowFallback,
    BundleFolder,
    EngineName,
    Image,
    Json,
    LowMemory,
    MaxTokens,
    NumBeams,
    Quiet,
    sampling,
)
from vlmedge.errors import InputError

if TYPE_CHECKING:
    from vlmedge.run.tasks.boxes import Box


def detect(
    context: typer.Context,
    bundle: BundleFolder,
    image: Image,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="WHAT",
            help='Objects to find, such as "cat" or "cat; dog".',
            show_default="all that the model knows",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Task of the bundle to run, such as segment."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--draw", metavar="FILE", help="Also draw the boxes on the picture, into this PNG."
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            "--masks",
            metavar="DIR",
            help="Also write masks of outlined objects here, 255 inside: 0.png is the first box's.",
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
    """Find objects in a picture: each line is left, top, right, bottom, in pixels, and a label."""
    from vlmedge.cli.drawing import draw
    from vlmedge.run.inputs.image_files import load_image
    from vlmedge.run.tasks.detect import check_masks, usual

    if out is not None:
        _check_drawing(out, Path(image))
    if masks is not None:
        _check_masks(masks)
    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    if masks is not None:
        check_masks(model.bundle, task or usual(model.bundle, what))
    picture = load_image(image)
    boxes = model.detect(picture, what, task=task, **sampling(context))
    saved = {} if masks is None else _save_masks(boxes, picture.size, masks)
    if out is not None:
        output.save(draw(picture, boxes), out)
    if as_json:
        _emit(image, picture.size, boxes, saved, out)
        return
    for box in boxes:
        sides = ",".join(f"{side:.0f}" for side in box.pixels(*picture.size))
        print(sides, output.one_line(box.label))
    if out is not None and not quiet:
        print(out)


def _emit(
    image: str,
    size: tuple[int, int],
    boxes: Sequence[Box],
    masks: Mapping[int, Path],
    drawing: Path | None,
) -> None:
    """Print boxes as JSON, with their codes, polygons and masks.

    Args:
        image: The picture's name.
        size: Its width and height, pixels.
        boxes: What was found.
        masks: Files of masks, by the box's place.
        drawing: The file that the boxes were drawn into, or none.
    """
    rows = [
        {"label": box.label, "box": box.pixels(*size)}
        | ({"codes": box.codes} if box.codes else {})
        | ({"polygons": box.outlines(*size)} if box.polygons else {})
        | ({"mask": output.file_name(str(masks[i]))} if i in masks else {})
        for i, box in enumerate(boxes)
    ]
    name, (width, height) = output.file_name(image), size
    table = {"image": name, "width": width, "height": height, "boxes": rows}
    output.emit(table if drawing is None else table | {"drawing": output.file_name(str(drawing))})


def _save_masks(boxes: Sequence[Box], size: tuple[int, int], folder: Path) -> dict[int, Path]:
    """Write a PNG for each box that has an outline, and return which; the folder is made.

    Args:
        boxes: What was found.
        size: Width and height of the picture, pixels.
        folder: Where to; the files are called after the boxes' places.
    """
    import numpy as np
    import PIL.Image

    folder.mkdir(exist_ok=True)
    saved = {}
    for i, box in enumerate(boxes):
        inside = box.mask(*size)
        if inside is not None:
            saved[i] = folder / f"{i}.png"
            mask = PIL.Image.fromarray(np.where(inside, np.uint8(255), np.uint8(0)))
            output.save(mask, saved[i])
    return saved


def _check_drawing(out: Path, image: Path) -> None:
    """Refuse what cannot be written before there is any work; a file that is there is replaced."""
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: drawings are written as PNG: name a .png file")
    _check_parent(out)
    if out.exists() and image.exists() and out.samefile(image):
        raise InputError(f"{out} is the picture that is looked at: name another file to draw on")


def _check_masks(folder: Path) -> None:
    """Refuse a folder with something in it: masks of an earlier picture would stay among these."""
    _check_parent(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: name another one for the masks")


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}: make it")
