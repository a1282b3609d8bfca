"""The commands that run a model: caption, ask, classify, embed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmedge.cli.options import (
    AllowFallback,
    BundleFolder,
    EngineName,
    Frames,
    Images,
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
)

SAMPLING = (
    "seed",
    "max_tokens",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
)


def caption(
    context: typer.Context,
    bundle: BundleFolder,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Image files, or videos.")
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="How the caption begins.")] = "",
    task: Annotated[
        str, typer.Option(metavar="NAME", help="Another one of the bundle, as detailed_caption.")
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
    from vlmedge.cli import output as console

    model = console.open_model(bundle, engine, low_memory, allow_fallback)
    console.write(model, images, prompt, None, as_json, frames, task, **_sampling(context))


def ask(
    context: typer.Context,
    bundle: BundleFolder,
    image: Annotated[
        str,
        typer.Argument(metavar="IMAGE", help="An image file, a video, or a folder of its frames."),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In plain words.")],
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            metavar="X0,Y0,X1,Y1",
            help="Stands where the question has {region}: a box, or a point X,Y; pixels.",
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
    from vlmedge.cli import output as console

    regions = [_region(text) for text in region or ()]
    model = console.open_model(bundle, engine, low_memory, allow_fallback)
    given = {"regions": regions, **_sampling(context)}
    console.write(model, [image], "", question, as_json, frames, **given)


def classify(
    bundle: BundleFolder,
    images: Images,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="What to choose from; none for a closed head's own."),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Around a label; {} is the label. Several are averaged; 'imagenet' is CLIP's 80.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Labels to print.")] = 5,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which label fits each picture: one of yours without training, or of a closed head."""
    from vlmedge.cli import output as console

    console.classify(
        console.open_model(bundle, engine, low_memory, allow_fallback),
        images,
        labels,
        template,
        top,
        as_json,
    )


def embed(
    bundle: BundleFolder,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE...]", help="Image files.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="TEXT", help="May be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="Save them there, float32, a row each.")
    ] = None,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn pictures and texts into vectors of length 1: pictures first, then texts."""
    if not images and not text:
        raise typer.BadParameter("give an IMAGE or a --text")
    from vlmedge.cli import output as console

    console.embed(
        console.open_model(bundle, engine, low_memory, allow_fallback),
        images or [],
        text or [],
        out,
        as_json,
        quiet,
    )


def match(
    bundle: BundleFolder,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="In plain words.")],
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say how likely it is that a picture and each text belong together."""
    from vlmedge.cli import output as console

    console.match(
        console.open_model(bundle, engine, low_memory, allow_fallback), image, texts, as_json
    )


def infill(
    bundle: BundleFolder,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help='As "a photo of a [MASK]".')],
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Words to print.")] = 5,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fill the gaps of a text about a picture."""
    from vlmedge.cli import output as console

    console.infill(
        console.open_model(bundle, engine, low_memory, allow_fallback), image, text, top, as_json
    )


def index(
    bundle: BundleFolder,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Of pictures.")],
    out: Annotated[Path, typer.Option(metavar="FILE.npz", help="Where the index goes.")] = Path(
        "index.npz"
    ),
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Embed every picture of a folder, so that it can be searched."""
    from vlmedge.cli import output as console

    console.index(
        console.open_model(bundle, engine, low_memory, allow_fallback), folder, out, as_json, quiet
    )


def search(
    bundle: BundleFolder,
    file: Annotated[Path, typer.Argument(metavar="FILE.npz", help="Made by index.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to find.")] = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Find pictures that look like this one.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures to print.")] = 5,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find pictures of an index by a text or by another picture."""
    if (text is None) == (image is None):
        raise typer.BadParameter("give a TEXT or an --image, one of them")
    from vlmedge.cli import output as console

    console.search(
        console.open_model(bundle, engine, low_memory, allow_fallback),
        file,
        text,
        image,
        top,
        as_json,
    )


def _sampling(context: typer.Context) -> dict[str, Any]:
    """Take the options of the decode loop out of a command's."""
    return {name: context.params[name] for name in SAMPLING}


def _region(text: str) -> tuple[float, ...]:
    """Read four figures, or two."""
    from vlmedge.errors import InputError

    try:
        return tuple(float(figure) for figure in text.split(","))
    except ValueError:
        raise InputError(f"region {text!r}: give X0,Y0,X1,Y1, or a point X,Y, in pixels") from None
