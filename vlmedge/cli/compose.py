"""The command `compose`: pictures in, what several bundles together say of them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmedge.cli import output
from vlmedge.cli.options import AllowFallback, EngineName, Images, Json, LowMemory, Quiet

if TYPE_CHECKING:
    from vlmedge.compositions.run import Composed


def compose(
    context: typer.Context,
    composition: Annotated[
        str,
        typer.Argument(
            metavar="COMPOSITION", help="A JSON file, or a built-in one: see vlmedge list."
        ),
    ],
    images: Images,
    bundle: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="Folder of a bundle that the composition names. May be repeated.",
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STEP.WORD=VALUE",
            help="Change a setting of a step, such as kept.at_least=0.3. May be repeated.",
        ),
    ] = None,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a chain of tasks over several bundles, and print the texts that come out, a line each."""
    pairs = [_pair(text, "bundle", "NAME=DIR") for text in bundle or ()]
    bundles = dict(pairs)
    if len(bundles) < len(pairs):
        names = ", ".join(name for name, _ in pairs)
        raise typer.BadParameter(f"--bundle is given for {names}: give each name once")
    changes = {
        path: _value(text)
        for path, text in (_pair(text, "set", "STEP.WORD=VALUE") for text in change or ())
    }
    from vlmedge.compositions.run import compose as put_together

    composed = put_together(
        composition,
        bundles,
        changes,
        engine=engine,
        low_memory=low_memory,
        allow_fallback=allow_fallback,
    )
    for model in {id(model): model for model in composed.models.values()}.values():
        output.warn(model.bundle)
    broken = output.Broken(context, images, "texts")
    _print(composed, images, as_json, quiet, broken)


def _print(
    composed: Composed, images: Sequence[str], as_json: bool, quiet: bool, broken: output.Broken
) -> None:
    """Print the texts of each picture as they come, a line each, with their scores."""
    rows: list[dict[str, Any]] = []
    answers = (
        composed.run(iter(images), on_error=broken.note)
        if len(images) > 1
        else iter([composed.run(images[0])])
    )
    for image, texts in zip(images, answers, strict=True):
        if as_json:
            found: dict[str, Any] = (
                {"error": broken.errors[-1]}
                if texts is None
                else {"texts": [{"text": text, "score": score} for text, score in texts]}
            )
            rows.append({"image": output.file_name(image)} | found)
            continue
        for text, score in texts or ():
            one = output.one_line(text)
            line = one if score is None else f"{score:.3f} {one}"
            print(line if len(images) == 1 else f"{image}: {line}", flush=True)
        if texts == [] and not quiet:
            output.say(f"{image}: no text is left")
    if as_json:
        output.emit(rows)
    broken.conclude()


def _pair(text: str, option: str, shape: str) -> tuple[str, str]:
    """Split NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (equals and name and value):
        raise typer.BadParameter(f"--{option} {text}: give {shape}")
    return name, value


def _value(text: str) -> Any:
    """Read a number, true, null, a list ... as JSON has them, and all else as it stands."""
    import msgspec

    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
