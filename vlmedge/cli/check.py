"""The command `check`: a bundle against its checkpoint, or an engine against the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmedge.cli import output
from vlmedge.cli.options import BundleFolder, Json, Quiet
from vlmedge.errors import BundleError, ParityError

if TYPE_CHECKING:
    from vlmedge.bundle import Bundle


def check(
    bundle: BundleFolder,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Compare with this checkpoint in PyTorch (levels 1 to 3); it must be the "
            "bundle's own.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare this engine with the bundle's graphs (level 4); not with --against.",
            show_default="ort",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of pictures to compare on, with --against.",
            show_default="drawn scenes",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="DIR[=WEIGHT]",
            help="PEFT adapter that was merged into the bundle. May be repeated.",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also add the result to this JSON file of results."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a bundle with its checkpoint, or an engine on this machine with the bundle."""
    if against is None:
        if images is not None or lora or record is not None:
            raise typer.BadParameter("--images, --lora and --record go with --against CHECKPOINT")
        return _check_engine(bundle, engine or "ort", as_json, quiet)
    if engine is not None:
        raise typer.BadParameter("--against compares on ort: leave out --engine or --against")
    from vlmedge.bundle import Bundle
    from vlmedge.cli.watch import progress
    from vlmedge.make.check import check as compare
    from vlmedge.parity import records

    if record is not None:
        records.read_records(record)  # before the work: it may be refused
    compare(bundle, against, images, lora=lora or (), progress=progress(quiet))
    checked = Bundle.load(bundle)
    if record is not None:
        records.record(checked, record)
    conclude(checked, as_json, quiet)


def _check_engine(bundle: Path, engine: str, as_json: bool, quiet: bool) -> None:
    """Show level 4 of an engine on this machine, and add it to the bundle's report.

    An engine that is compiled was judged when it was built, and that verdict is shown.
    """
    from vlmedge.cli.tables import show_level4
    from vlmedge.cli.watch import progress
    from vlmedge.parity import on_device
    from vlmedge.shelves.registry import ENGINES

    opened, chosen = output.load(bundle), ENGINES[engine]
    found = on_device.recorded(opened)
    if isinstance(chosen, on_device.Judging):
        found = chosen.judge(opened, progress(quiet)) + found
    if not found:
        raise BundleError(f"{bundle}: {engine} has built nothing of it: run `vlmedge build` first")
    written = on_device.report(opened, found)
    output.emit(found) if as_json else show_level4(found)
    if not written and not quiet:
        output.say(f"{bundle} is read-only: the result is not in its report")
    if failed := [f"{one.component} on {one.device}" for one in found if one.failed]:
        raise BundleError(
            f"{bundle}: {', '.join(failed)} is not what its portable graph gives: "
            "build it with --precision float32, or use another --engine"
        )


def conclude(bundle: Bundle, as_json: bool, quiet: bool) -> None:
    """Print what the gate found; fail when it has not passed."""
    if as_json:
        output.emit(_verdict(bundle))
    elif not quiet:
        _show_verdict(bundle)
    if bundle.manifest.parity is None:
        output.warn(bundle)
    elif not bundle.verified:
        raise ParityError(f"{bundle.path} is NOT verified: it differs from PyTorch by too much")


def _verdict(bundle: Bundle) -> dict[str, Any]:
    """Sum up an export, a quantization or a check, for JSON."""
    from vlmedge.cli.tables import size_bytes

    return {
        "bundle": str(bundle.path),
        "checkpoint": bundle.manifest.checkpoint.id,
        "scheme": bundle.manifest.scheme,
        "bytes": size_bytes(bundle),
        "verified": bundle.verified,
        "parity": bundle.manifest.parity,
    }


def _show_verdict(bundle: Bundle) -> None:
    """Print what the gate found, and the bundle's name."""
    from vlmedge.cli.tables import show_parity, size_bytes
    from vlmedge.units import MIB

    word = "verified" if bundle.verified else "NOT verified"
    if bundle.manifest.parity is None:
        word = "unverified"
    else:
        show_parity(bundle.manifest.parity)
    print(f"{bundle.path}: {word} ({bundle.manifest.scheme}, {size_bytes(bundle) / MIB:.1f} MiB)")
