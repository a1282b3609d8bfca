"""The commands `build` and `engines`: a bundle is compiled for this machine, and cleaned up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmedge.cli import output
from vlmedge.cli.options import BundleFolder, Json, Quiet
from vlmedge.errors import BundleError, InputError

if TYPE_CHECKING:
    from vlmedge.bundle import Bundle
    from vlmedge.progress import Progress
    from vlmedge.shelves.build_options import AxisRange, BuildOptions, Built, Compiler, Finding
    from vlmedge.shelves.engine_store import StoredEngine

engines = typer.Typer(help="List or remove the engines that were compiled for a bundle.")

Target = Annotated[str, typer.Option("--engine", metavar="NAME", help="Engine to compile for.")]
PrecisionName = Annotated[
    str, typer.Option(metavar="TYPE", help="Precision of float layers: float16 or float32.")
]
Axes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=MIN:OPT:MAX",
        help="Sizes of an axis to compile for: batch, tokens or past. May be repeated.",
    ),
]
Level = Annotated[
    int | None, typer.Option(metavar="N", help="Optimization level, 0 (quick) to 5 (thorough).")
]
WorkspaceMib = Annotated[
    int | None,
    typer.Option(
        "--workspace",
        metavar="MIB",
        help="Scratch memory that a layer may take.",
        show_default="half of what's free",
    ),
]
MemoryMib = Annotated[
    int | None,
    typer.Option(
        "--memory", metavar="MIB", help="Stop the build if it takes more of the host's memory."
    ),
]
Components = Annotated[
    list[str] | None,
    typer.Option(
        "--component", metavar="NAME", help="Compile this component only. May be repeated."
    ),
]
KeepSlower = Annotated[
    bool,
    typer.Option("--keep-slower", help="Keep int8 layers even where float16 is faster here."),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs", help="Run a decoder's steps as CUDA graphs, if equal and faster."
    ),
]
DlaMode = Annotated[
    str,
    typer.Option(
        metavar="MODE",
        help="Vision encoder on a DLA: off, auto, faster or always. Experimental.",
    ),
]
BuildDevice = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Compile for this device; fail if it cannot run the bundle or is not this machine.",
    ),
]
CheckOnly = Annotated[
    bool,
    typer.Option(
        "--check-only",
        help="List the nodes that TensorRT would reject; needs --tensorrt or --device, but no GPU.",
    ),
]
TensorRtVersion = Annotated[
    str | None,
    typer.Option(
        metavar="VERSION", help="TensorRT version for --check-only, such as 8.6, 10.3 or 11.x."
    ),
]


def build(
    context: typer.Context,
    bundle: BundleFolder,
    engine: Target = "tensorrt",
    precision: PrecisionName = "float16",
    axis: Axes = None,
    level: Level = None,
    workspace_mib: WorkspaceMib = None,
    memory_mib: MemoryMib = None,
    component: Components = None,
    keep_slower: KeepSlower = False,
    cuda_graphs: CudaGraphs = False,
    dla: DlaMode = "off",
    device: BuildDevice = None,
    check_only: CheckOnly = False,
    tensorrt: TensorRtVersion = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile a bundle for this machine's GPU; engines that exist are kept."""
    if tensorrt is not None and not check_only:
        raise typer.BadParameter("--tensorrt VERSION goes with --check-only")
    if check_only and tensorrt is None and device is None:
        raise typer.BadParameter("--check-only needs --tensorrt VERSION or --device NAME")
    from vlmedge.cli.watch import progress

    watcher = progress(quiet)
    compiler, options = _compiler(engine), _options(context.params)
    opened = output.load(bundle)
    versions = _versions(opened, options, device, check_only, tensorrt, watcher)
    if check_only:
        _lint(compiler, opened, options, versions, engine, as_json, quiet)
    else:
        _compile(compiler, opened, options, as_json, watcher)


@engines.command("list")
def list_(bundle: BundleFolder, as_json: Json = False) -> None:
    """List the compiled engines of a bundle, and what each was compiled for."""
    from vlmedge.bundle import read_manifest
    from vlmedge.shelves.engine_store import stored_engines

    read_manifest(bundle)  # refuses what is no bundle
    found = stored_engines(bundle)
    output.emit(found) if as_json else _show_engines(found)


@engines.command()
def clean(bundle: BundleFolder, as_json: Json = False) -> None:
    """Remove the compiled engines of a bundle; the next run builds them again."""
    from vlmedge.bundle import read_manifest
    from vlmedge.shelves.engine_store import clean_engines
    from vlmedge.units import MIB

    read_manifest(bundle)
    removed = clean_engines(bundle)
    if as_json:
        output.emit(removed)
    else:
        size = sum(one.bytes for one in removed) / MIB
        print(f"{len(removed)} engines removed, {size:.1f} MiB")


def _compiler(engine: str) -> Compiler:
    from vlmedge.shelves.build_options import Compiler
    from vlmedge.shelves.registry import ENGINES

    compiler = ENGINES[engine]
    if not isinstance(compiler, Compiler):
        raise InputError(f"engine {engine!r} is not built: it opens bundles as they are")
    return compiler


def _options(given: Mapping[str, Any]) -> BuildOptions:
    """Take the options of a build out of the command's."""
    from vlmedge.shelves.build_options import BuildOptions

    same = ("precision", "level", "workspace_mib", "memory_mib", "keep_slower", "dla")
    return BuildOptions(
        **{name: given[name] for name in same},
        axes=_axes(given["axis"] or ()),
        components=tuple(given["component"] or ()),
        record=given["cuda_graphs"],
    )


def _axes(texts: Sequence[str]) -> dict[str, AxisRange]:
    from vlmedge.shelves.build_options import AxisRange

    found = {}
    for text in texts:
        name, equals, sizes = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"--axis {text}: give NAME=MIN:OPT:MAX")
        found[name] = AxisRange.parse(sizes)
    return found


def _versions(
    bundle: Bundle,
    options: BuildOptions,
    device: str | None,
    check_only: bool,
    tensorrt: str | None,
    progress: Progress,
) -> tuple[str, ...]:
    """Return the versions of TensorRT that are asked about; refuse what a device cannot do."""
    if device is None:
        return (tensorrt,) if tensorrt else ()
    from vlmedge.plan import target

    versions = target.refuse_unfit(bundle, device, options.precision, tensorrt, progress)
    if options.dla in ("faster", "always"):
        target.refuse_without_dla(device, versions)
    if not check_only:
        target.refuse_elsewhere(device)
    elif not versions:
        raise InputError(f"{device} takes any TensorRT: give --tensorrt VERSION")
    return versions


def _compile(
    compiler: Compiler, bundle: Bundle, options: BuildOptions, as_json: bool, progress: Progress
) -> None:
    """Build engines, and fail when one gives something else than its graph."""
    from vlmedge.parity import on_device

    built = compiler.build(bundle, options, progress)
    on_device.report(bundle, on_device.recorded(bundle))
    output.emit(built) if as_json else show_built(built)
    failed = [one.component for one in built if one.parity and not one.parity.passed]
    if failed:
        raise BundleError(
            f"{bundle.path}: {', '.join(failed)} on this device is not what its graph gives: "
            "try --precision float32, or --engine ort"
        )


def _lint(
    compiler: Compiler,
    bundle: Bundle,
    options: BuildOptions,
    versions: Sequence[str],
    engine: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print what versions of an engine would refuse, and fail when there is anything."""
    found = {version: compiler.lint(bundle, options, version) for version in versions}
    findings = [finding for each in found.values() for finding in each]
    output.emit(findings) if as_json else _show_findings(findings)
    refusing = [f"{v} would refuse {len(each)} nodes" for v, each in found.items() if each]
    if refusing:
        raise BundleError(f"{bundle.path}: {engine} {', '.join(refusing)}")
    if not as_json and not quiet:
        print(f"{bundle.path}: {engine} {', '.join(versions)} takes it")


def show_built(built: Sequence[Built]) -> None:
    """Print what became of each component."""
    from vlmedge.cli.tables import level4_cells, print_table, row, table
    from vlmedge.units import MIB

    rows = table("component", "precision", "MiB", "built in", "ms", "level 4", left=(0, 1, 5))
    for one in built:
        taken = "already there" if one.reused else f"{one.seconds:.1f} s"
        precision = one.precision
        if one.restored:
            precision += f", {len(one.restored)} nodes float32"
        if one.dla:
            precision += " on the DLA (experimental)"
        for what, latency_ms in one.dropped.items():
            precision += f" ({what}: {latency_ms:.2f} ms)"
        level4 = level4_cells(one.parity, one.latency_ms)
        row(rows, one.component, precision, f"{one.bytes / MIB:.1f}", taken, *level4)
    print_table(rows)


def _show_findings(findings: Sequence[Finding]) -> None:
    """Print what an engine would refuse, a row each."""
    from vlmedge.cli.tables import print_table, row, table

    if not findings:
        return
    columns = "component", "operator", "node", "problem", "what to do"
    rows = table(*columns, left=(0, 1, 2, 3, 4))
    for f in findings:
        row(rows, f.component, f.operator, f.node, f.problem, f.remedy)
    print_table(rows)


def _show_engines(found: Sequence[StoredEngine]) -> None:
    """Print the engines of a bundle."""
    from vlmedge.cli.tables import print_table, row, table
    from vlmedge.units import MIB

    if not found:
        return print("no engines: vlmedge build makes them")
    rows = table("engine", "component", "MiB", "for", left=(0, 1, 3))
    for one in found:
        component = str(one.identity.get("component", ""))
        known = [one.identity.get(name) for name in ("tensorrt", "gpu", "precision")]
        target = ", ".join(str(word) for word in known if word)
        row(rows, one.name, component, f"{one.bytes / MIB:.1f}", target)
    print_table(rows)
