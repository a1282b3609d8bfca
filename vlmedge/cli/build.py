"""The commands that compile a bundle for this machine, and look after what was compiled."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

from vlmedge.cli.options import BundleFolder, Json, Quiet
from vlmedge.errors import BundleError, InputError

if TYPE_CHECKING:
    from pathlib import Path

    from vlmedge.shelves.build_options import AxisRange, Dla, Precision

engines = typer.Typer(help="List or remove what engines have built of a bundle.")


def build(
    bundle: BundleFolder,
    engine: Annotated[str, typer.Option(metavar="NAME", help="What to build for.")] = "tensorrt",
    precision: Annotated[
        str, typer.Option(metavar="TYPE", help="Of float layers: float16 or float32.")
    ] = "float16",
    axis: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MIN:OPT:MAX", help="Sizes to build for: batch, tokens, past."),
    ] = None,
    level: Annotated[
        int | None, typer.Option(metavar="N", help="Optimization level, 0 quick to 5 thorough.")
    ] = None,
    workspace: Annotated[
        int | None,
        typer.Option(metavar="MIB", help="Scratch memory.", show_default="half of what's free"),
    ] = None,
    memory: Annotated[
        int | None, typer.Option(metavar="MIB", help="Stop a build that takes more of the host's.")
    ] = None,
    component: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    keep_slower: Annotated[
        bool, typer.Option("--keep-slower", help="Keep int8 where float16 is faster here.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Record a decoder's steps, if equal and faster.")
    ] = False,
    dla: Annotated[
        str,
        typer.Option(
            metavar="MODE", help="Vision tower on a DLA: off, auto, faster, always. Experimental."
        ),
    ] = "off",
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Refuse what it cannot do; see list. Build only there."),
    ] = None,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Only say what would be refused; needs no GPU.")
    ] = False,
    tensorrt: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Of --check-only: 8.6, 10.3, 11.x, ...")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile a bundle for this machine's GPU; what is there already is kept."""
    if tensorrt is not None and not check_only:
        raise typer.BadParameter("--check-only and --tensorrt VERSION go together")
    if check_only and tensorrt is None and device is None:
        raise typer.BadParameter("--check-only wants --tensorrt VERSION or --device NAME")
    from vlmedge.cli import output as console
    from vlmedge.cli import tables_build
    from vlmedge.parity import on_device as level4
    from vlmedge.shelves.build_options import BuildOptions, Compiler
    from vlmedge.shelves.registry import ENGINES

    compiler = ENGINES[engine]
    if not isinstance(compiler, Compiler):
        raise InputError(f"engine {engine!r} is not built: it opens bundles as they are")
    options = BuildOptions(
        precision=cast("Precision", precision),  # BuildOptions judges it
        axes=_axes(axis or []),
        level=level,
        workspace_mib=workspace,
        memory_mib=memory,
        components=tuple(component or ()),
        keep_slower=keep_slower,
        record=cuda_graphs,
        dla=cast("Dla", dla),
    )
    opened = console.load(bundle)
    versions: tuple[str, ...] = (tensorrt,) if tensorrt else ()
    if device is not None:
        from vlmedge.plan import target as targeting

        progress = console.progress(quiet)
        versions = targeting.refuse_unfit(opened, device, precision, tensorrt, progress)
        if dla in ("faster", "always"):
            targeting.refuse_without_dla(device, versions)
        if not check_only:
            targeting.refuse_elsewhere(device)
        elif not versions:
            raise InputError(f"{device} takes any TensorRT: give --tensorrt VERSION")
    if not check_only:
        built = compiler.build(opened, options, console.progress(quiet))
        level4.report(opened, level4.recorded(opened))
        console.emit(built) if as_json else tables_build.show_built(built)
        failed = [one.component for one in built if one.parity and not one.parity.passed]
        if failed:
            raise BundleError(
                f"{bundle}: {', '.join(failed)} on this device is not what its graph gives: "
                "try --precision float32, or --engine ort"
            )
        return
    found = {version: compiler.lint(opened, options, version) for version in versions}
    findings = [finding for each in found.values() for finding in each]
    if as_json:
        console.emit(findings)
    else:
        tables_build.show_findings(findings)
    refusing = [f"{v} would refuse {len(each)} nodes" for v, each in found.items() if each]
    if refusing:
        raise BundleError(f"{bundle}: {engine} {', '.join(refusing)}")
    if not as_json and not quiet:
        print(f"{bundle}: {engine} {', '.join(versions)} takes it")


def check_engine(bundle: Path, engine: str, as_json: bool, quiet: bool) -> None:
    """Show level 4 of an engine on this machine, and add it to the bundle's report.

    An engine that is compiled has been judged by its build, whose word is shown.
    """
    from vlmedge.cli import output as console
    from vlmedge.cli import tables
    from vlmedge.parity import on_device as level4
    from vlmedge.shelves.registry import ENGINES

    opened, chosen = console.load(bundle), ENGINES[engine]
    found = level4.recorded(opened)
    if isinstance(chosen, level4.Judging):
        found = chosen.judge(opened, console.progress(quiet)) + found
    if not found:
        raise BundleError(f"{bundle}: {engine} has built nothing of it: run `vlmedge build` first")
    written = level4.report(opened, found)
    console.emit(found) if as_json else tables.show_level4(found)
    if not written and not quiet:
        print(f"{bundle} cannot be written: its report does not tell of this", file=sys.stderr)
    if failed := [f"{one.component} on {one.device}" for one in found if one.failed]:
        raise BundleError(
            f"{bundle}: {', '.join(failed)} is not what its portable graph gives: "
            "build it with --precision float32, or use another --engine"
        )


@engines.command("list")
def list_(bundle: BundleFolder, as_json: Json = False) -> None:
    """List the engines of a bundle, and what each was built for."""
    from vlmedge.bundle import read_manifest
    from vlmedge.cli import output as console
    from vlmedge.cli import tables_build
    from vlmedge.shelves.engine_store import stored_engines

    read_manifest(bundle)  # refuses what is no bundle
    found = stored_engines(bundle)
    console.emit(found) if as_json else tables_build.show_engines(found)


@engines.command()
def clean(bundle: BundleFolder, as_json: Json = False) -> None:
    """Remove the engines of a bundle; the next run builds them again."""
    from vlmedge.bundle import read_manifest
    from vlmedge.cli import output as console
    from vlmedge.cli import tables_build
    from vlmedge.shelves.engine_store import clean_engines

    read_manifest(bundle)
    removed = clean_engines(bundle)
    console.emit(removed) if as_json else tables_build.show_removed(removed)


def _axes(texts: list[str]) -> dict[str, AxisRange]:
    from vlmedge.shelves.build_options import AxisRange

    found = {}
    for text in texts:
        name, equals, sizes = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"--axis {text}: give NAME=MIN:OPT:MAX")
        found[name] = AxisRange.parse(sizes)
    return found
