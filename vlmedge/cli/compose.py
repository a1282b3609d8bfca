"""The command `compose`: pictures in, what several bundles together say of them out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vlmedge.cli.options import AllowFallback, EngineName, Images, Json, LowMemory, Quiet


def compose(
    composition: Annotated[
        str, typer.Argument(metavar="COMPOSITION", help="A JSON file, or capfilt.")
    ],
    images: Images,
    bundle: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="A bundle that it asks for. May be repeated."),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STEP.WORD=VALUE",
            help="Change a step, as kept.at_least=0.3. May be repeated.",
        ),
    ] = None,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run tasks of several bundles as a file puts them together: a line for each text."""
    pairs = [_pair(text, "bundle", "NAME=DIR") for text in bundle or ()]
    bundles = dict(pairs)
    if len(bundles) < len(pairs):
        raise typer.BadParameter(f"--bundle: {', '.join(name for name, _ in pairs)}: each once")
    changes = {
        path: _value(text)
        for path, text in (_pair(text, "set", "STEP.WORD=VALUE") for text in change or ())
    }
    from vlmedge.cli import output as console
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
        console.warn(model.bundle)
    console.compose(composed, images, as_json, quiet)


def _pair(text: str, option: str, shape: str) -> tuple[str, str]:
    """Part NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (equals and name and value):
        raise typer.BadParameter(f"--{option} {text}: it must be {shape}")
    return name, value


def _value(text: str) -> Any:
    """Read a number, true, null, a list ... as JSON has them, and all else as it stands."""
    import msgspec

    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
