"""The commands `caption` and `ask`: pictures or videos in, text out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmedge.cli import output
from vlmedge.cli.options import (
    AllowFallback,
    BundleFolder,
    EngineName,
    Frames,
    Json,
    LowMemory,
    MaxTokens,
    NumBeams,
    Penalty,
    Quiet,
    Seed,
    Temperature,
    TopK,
    TopP,
    sampling,
)
from vlmedge.errors import InputError

if TYPE_CHECKING:
    from vlmedge.run.inputs.video import Video
    from vlmedge.run.model import Model


def caption(
    context: typer.Context,
    bundle: BundleFolder,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image or video files.")],
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Text that the caption starts with.")
    ] = "",
    task: Annotated[
        str,
        typer.Option(metavar="NAME", help="Task of the bundle to run, such as detailed_caption."),
    ] = "caption",
    frames: Frames = None,
    max_tokens: MaxTokens = None,
    num_beams: NumBeams = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Describe pictures or videos, one line each."""
    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    sources = _sources(images, frames)
    options = {"task": task, **sampling(context)}
    if _streams(model, images, as_json, options):
        _print_pieces(model.stream(sources[0], prompt, **options))
    elif len(images) > 1 and sources == [*images]:
        broken = output.Broken(context, images, "caption")
        _caption_each(model, images, prompt, as_json, broken, options)
    else:
        texts = model.caption(sources, prompt, **options)
        if as_json:
            pairs = zip(sources, images, texts, strict=True)
            output.emit([_row(source, image, caption=text) for source, image, text in pairs])
        else:
            _print_texts(images, texts)


def ask(
    context: typer.Context,
    bundle: BundleFolder,
    image: Annotated[
        str,
        typer.Argument(metavar="IMAGE", help="An image file, a video, or a folder of its frames."),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="A question in plain words.")],
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            metavar="X0,Y0,X1,Y1",
            help="Box in pixels, or point X,Y, that replaces {region} in the question. "
            "May be repeated.",
        ),
    ] = None,
    frames: Frames = None,
    max_tokens: MaxTokens = None,
    num_beams: NumBeams = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer a question about a picture or a video."""
    regions = [_region(text) for text in region or ()]
    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    sources = _sources([image], frames)
    options = {"regions": regions, **sampling(context)}
    if _streams(model, [image], as_json, options):
        _print_pieces(model.stream(sources[0], question=question, **options))
        return
    answers = model.ask(sources, question, **options)
    if as_json:
        output.emit(_row(sources[0], image, question=question, answer=answers[0]))
    else:
        _print_texts([image], answers)


def _sources(images: Sequence[str], frames: int | None) -> list[str | Video]:
    """Tell videos from pictures, by the names of their files."""
    from vlmedge.run.inputs.video import Video, is_video

    sources = [Video(image, frames) if is_video(image) else image for image in images]
    if frames is not None and sources == [*images]:
        raise InputError("--frames is for videos: leave it out, or give a video or a folder")
    return sources


def _streams(model: Model, images: Sequence[str], as_json: bool, options: dict[str, Any]) -> bool:
    """Whether the text is printed as it is written: one picture, no beams, on a terminal."""
    defaults = model.bundle.spec.generation
    beams = options["num_beams"] or (1 if defaults is None else defaults.num_beams)
    return len(images) == 1 and beams == 1 and not as_json and sys.stdout.isatty()


def _print_pieces(pieces: Any) -> None:
    for piece in output.trimmed(pieces):
        print(piece, end="", flush=True)
    print()


def _print_texts(images: Sequence[str], texts: Sequence[str]) -> None:
    for image, text in zip(images, texts, strict=True):
        line = output.one_line(text)
        print(line if len(images) == 1 else f"{image}: {line}")


def _caption_each(
    model: Model,
    images: Sequence[str],
    prompt: str,
    as_json: bool,
    broken: output.Broken,
    options: dict[str, Any],
) -> None:
    """Print captions of several pictures as they come."""
    rows: list[dict[str, str]] = []
    texts = model.caption(iter(images), prompt, on_error=broken.note, **options)
    for image, text in zip(images, texts, strict=True):
        if as_json:
            found = {"error": broken.errors[-1]} if text is None else {"caption": text}
            rows.append({"image": output.file_name(image)} | found)
        elif text is not None:
            print(f"{image}: {output.one_line(text)}", flush=True)
    if as_json:
        output.emit(rows)
    broken.conclude()


def _row(source: str | Video, image: str, **texts: str) -> dict[str, str]:
    """Make what JSON has of one picture or video."""
    kind = "image" if isinstance(source, str) else "video"
    return {kind: output.file_name(image), **texts}


def _region(text: str) -> tuple[float, ...]:
    """Read four numbers, or two."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--region {text}: give X0,Y0,X1,Y1, or a point X,Y, in pixels") from None
