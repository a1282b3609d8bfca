"""The commands about machines: what will fit on one, and what is wrong with this one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmedge.cli.options import Json, Quiet
from vlmedge.errors import InputError

if TYPE_CHECKING:
    from vlmedge.make.recipe import Recipe

EXIT_FAILED = 1


def plan(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Or a config.json, or a bundle's folder.")
    ],
    device: Annotated[
        str, typer.Option(metavar="NAME", help="See list; `auto` is this machine.")
    ] = "auto",
    scheme: Annotated[
        str | None, typer.Option("--scheme", metavar="NAME", help="Fail if this one does not fit.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What runs it.",
            show_default="the device's best",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Of text, beside the picture.", show_default="64"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="New tokens.", show_default="64")
    ] = None,
    headless: Annotated[
        bool, typer.Option("--headless", help="The board runs without a desktop.")
    ] = False,
    free_gib: Annotated[
        float | None, typer.Option(metavar="X", help="Memory for the model, if you know better.")
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Of a CPU.",
            show_default="this machine's",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell from config.json alone what will fit on a device, and how fast it will be."""
    if free_gib is not None and not 0 < free_gib < math.inf:
        raise typer.BadParameter("--free-gib must be finite and more than 0")
    from vlmedge.cli import output as console
    from vlmedge.cli import tables_device
    from vlmedge.plan import plan as planning

    shape, stored = planning.look_up(model, console.progress(quiet))
    wish = planning.PlanRequest(
        _auto() if device == "auto" else device,
        engine,
        prompt_tokens,
        max_tokens,
        headless,
        free_gib,
        cores,
    )
    made = planning.make_plan(model, shape, wish, stored=stored)
    refused = planning.refusal(made, shape, scheme)
    if as_json:
        console.emit(made)
    elif not quiet:
        tables_device.show_plan(made, scheme)
    if refused is not None:
        raise InputError(refused)


def doctor(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BUNDLE...]", help="Also look at the engines of these."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find what is wrong with this machine, and say what to do about it."""
    from vlmedge.bundle import read_manifest
    from vlmedge.cli import output as console
    from vlmedge.cli import tables_device
    from vlmedge.doctor.examine import examine
    from vlmedge.doctor.patient import this_patient

    for bundle in bundles or ():
        read_manifest(bundle)  # refuse what is no bundle before any work
    findings = examine(this_patient(tuple(bundles or ())))
    console.emit(findings) if as_json else tables_device.show_findings(findings)
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def fit(recipe: Recipe, checkpoint: str, device: str, asked: str | None, quiet: bool) -> Recipe:
    """Give a recipe the scheme that fits a device, or refuse what was asked for."""
    import msgspec

    from vlmedge.cli import output as console
    from vlmedge.plan import plan as planning

    progress = console.progress(quiet)
    name = _auto() if device == "auto" else device
    scheme = planning.follow(checkpoint, name, asked, progress)
    progress.note(f"{scheme} for {name}")
    return msgspec.structs.replace(recipe, scheme=scheme)


def _auto() -> str:
    """Name this machine as the catalogue does."""
    from vlmedge.host.identify import detect

    found = detect()
    if found.device is None:
        name = found.model or (found.gpus[0].name if found.gpus else "this machine")
        raise InputError(f"{name} is not in the catalogue: give --device, see `vlmedge list`")
    return found.device
