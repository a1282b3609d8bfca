"""The commands `classify`, `match` and `infill`: probabilities of labels, texts and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmedge.cli import output
from vlmedge.cli.options import (
    AllowFallback,
    BundleFolder,
    EngineName,
    Image,
    Images,
    Json,
    LowMemory,
    Quiet,
)

if TYPE_CHECKING:
    from vlmedge.run.model import Model


def classify(
    context: typer.Context,
    bundle: BundleFolder,
    images: Images,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Labels to choose from; leave it out if the model has labels of its own.",
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Sentence around a label, with {} in its place; imagenet stands for CLIP's 80. "
            "May be repeated: the results are averaged.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Number of labels to print.")] = 5,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank labels for each picture: your own, zero-shot, or those of a trained classifier."""
    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    broken = output.Broken(context, images, "labels")
    rows: list[dict[str, Any]] = []
    for image, ranking in zip(
        images, _rankings(model, images, labels, template, broken), strict=True
    ):
        if as_json:
            found: dict[str, Any] = (
                {"error": broken.errors[-1]}
                if ranking is None
                else {"labels": [{"label": label, "probability": p} for label, p in ranking[:top]]}
            )
            rows.append({"image": output.file_name(image)} | found)
        elif ranking is not None:
            line = ", ".join(f"{label} {p:.1%}" for label, p in ranking[:top])
            print(line if len(images) == 1 else f"{image}: {line}", flush=True)
    if as_json:
        output.emit(rows)
    broken.conclude()


def match(
    bundle: BundleFolder,
    image: Image,
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT", help="Texts to compare the picture with.")
    ],
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print how likely each text is to belong to a picture."""
    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    pairs = list(zip(texts, model.match(image, list(texts)), strict=True))
    if as_json:
        rows = [{"text": text, "probability": p} for text, p in pairs]
        output.emit({"image": output.file_name(image), "texts": rows})
        return
    for text, p in pairs:
        print(f"{p:.1%} {text}")


def infill(
    bundle: BundleFolder,
    image: Image,
    text: Annotated[
        str,
        typer.Argument(metavar="TEXT", help='A text with gaps, such as "a photo of a [MASK]".'),
    ],
    top: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of words to print for each gap.")
    ] = 5,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict the missing words of a text about a picture."""
    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    gaps = model.infill(image, text, top)
    if as_json:
        rows = [[{"word": word, "probability": p} for word, p in gap] for gap in gaps]
        output.emit({"image": output.file_name(image), "text": text, "gaps": rows})
        return
    for gap in gaps:
        print(", ".join(f"{word} {p:.1%}" for word, p in gap))


def _rankings(
    model: Model,
    images: Sequence[str],
    labels: str | None,
    template: Sequence[str] | None,
    broken: output.Broken,
) -> Iterator[list[tuple[str, float]] | None]:
    """Yield the labels of each picture, the likeliest first; none where it cannot be used."""
    names = None
    if labels is not None:
        names = [label.strip() for label in labels.split(",")] if labels.strip() else []
    chosen = template[0] if template and len(template) == 1 else template or None
    if len(images) > 1:
        return model.classify(iter(images), names, chosen, on_error=broken.note)
    return iter(model.classify([*images], names, chosen))
