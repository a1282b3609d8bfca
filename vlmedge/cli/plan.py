"""The command `plan`: what will fit on a device, and how fast it will be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from vlmedge.cli import output
from vlmedge.cli.options import Json, Quiet
from vlmedge.errors import InputError

if TYPE_CHECKING:
    from vlmedge.plan.plan import Plan, SchemePlan

_GOOD = {"fits": "green", "tight": "yellow"}


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint as for export, a config.json, or a bundle."
        ),
    ],
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Device to plan for (names: vlmedge list); auto is this machine."
        ),
    ] = "auto",
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", metavar="NAME", help="Show this scheme, and fail if it won't fit."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Engine to plan for.", show_default="the device's best"),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Text tokens of the prompt, beside the picture's.",
            show_default="64",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of new tokens.", show_default="64"),
    ] = None,
    headless: Annotated[
        bool, typer.Option("--headless", help="Assume that the board runs without a desktop.")
    ] = False,
    free_gib: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Memory for the model, in GiB.",
            show_default="what the device has free",
        ),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of CPU cores.",
            show_default="this machine's",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Estimate from config.json alone what fits on a device, and how fast it runs."""
    if free_gib is not None and not 0 < free_gib < math.inf:
        raise typer.BadParameter("--free-gib must be finite and more than 0")
    from vlmedge.cli.watch import progress
    from vlmedge.plan import plan as planning

    shape, stored = planning.look_up(model, progress(quiet))
    wish = planning.PlanRequest(
        this_device() if device == "auto" else device,
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
        output.emit(made)
    elif not quiet:
        _show_plan(made, scheme)
    if refused is not None:
        raise InputError(refused)


def this_device() -> str:
    """Name this machine as the catalogue does."""
    from vlmedge.host.identify import detect

    found = detect()
    if found.device is None:
        name = found.model or (found.gpus[0].name if found.gpus else "this machine")
        raise InputError(f"{name} is not in the catalogue: give --device, see `vlmedge list`")
    return found.device


def _show_plan(made: Plan, scheme: str | None) -> None:
    """Print the schemes side by side, then the components of one of them.

    Args:
        made: The plan to print.
        scheme: Whose components; none: the recommended one's, else the smallest one's.
    """
    smallest = min(made.schemes, key=lambda s: s.total_bytes).scheme
    _print_schemes(made)
    _print_components(made.scheme(scheme or made.recommended or smallest))
    text = f"{made.picture_tokens} + {made.prompt_tokens} tokens in, {made.new_tokens} out"
    work = f"one picture, {text}" if made.picture_tokens else "one picture, one text"
    ranges = ", ".join(f"{axis} {sizes}" for axis, sizes in made.profile.items())
    print(f"for {work}; profile (min:opt:max): {ranges}")
    for note in made.notes:
        print(f"note: {note}")
    if made.recommended is not None:
        print(f"recommended: {made.recommended}")


def _print_schemes(made: Plan) -> None:
    from rich.text import Text

    from vlmedge.cli.tables import print_table, row, table
    from vlmedge.units import GIB

    print(
        f"{made.model} ({made.parameters / 1e6:.1f} M parameters) on {made.title} "
        f"by {made.engine}: {made.free_bytes / GIB:.1f} GiB free {made.free_is}"
    )
    time = "first token" if made.picture_tokens else "picture + text"
    columns = ("scheme", "weights", "all", "build peak", time, "tokens/s", "verdict")
    schemes = table(*columns, left=(0, 6))
    for one in made.schemes:
        row(
            schemes,
            one.scheme,
            _size(sum(part.weights_bytes for part in one.parts)),
            _size(one.total_bytes),
            _size(one.build_bytes) if one.build_bytes else "-",
            *_speed(one),
            Text(one.verdict, _GOOD.get(one.verdict, "bold red")),
        )
    print_table(schemes)


def _print_components(chosen: SchemePlan) -> None:
    from vlmedge.cli.tables import print_table, row, table

    sizes = ("weights", "activations", "cache", "workspace", "build peak")
    parts = table(chosen.scheme, "M parameters", *sizes, "ms", left=(0,))
    for part in chosen.parts:
        step = "" if part.step_ms is None else f" + {part.step_ms:.1f} a token"
        row(
            parts,
            part.component,
            f"{part.parameters / 1e6:.1f}",
            _size(part.weights_bytes),
            _size(part.activations_bytes),
            _size(part.cache_bytes) if part.cache_bytes else "-",
            _size(part.workspace_bytes),
            _size(part.build_bytes) if part.build_bytes else "-",
            f"{part.run_ms:.1f}{step}",
        )
    row(parts, "the engine itself", "", _size(chosen.process_bytes), *[""] * 5)
    print_table(parts)


def _speed(one: SchemePlan) -> tuple[str, str]:
    if one.verdict == "no arithmetic":
        return "-", "-"
    if one.first_token_ms is None or one.tokens_per_s is None:
        return f"{sum(part.run_ms for part in one.parts):.1f} ms", "-"
    return f"{one.first_token_ms:.0f} ms", f"{one.tokens_per_s:.1f}"


def _size(size: float) -> str:
    """Write bytes in the unit that people would take."""
    from vlmedge.units import GIB, MIB

    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
