"""The command line: every command, its options, and what happens when it fails.

Only typer and the errors are imported here; a command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from vlmedge.cli import bench as cli_bench
from vlmedge.cli import build as cli_build
from vlmedge.cli import chat as cli_chat
from vlmedge.cli import compose as cli_compose
from vlmedge.cli import detect as cli_detect
from vlmedge.cli import paint as cli_paint
from vlmedge.cli import plan as cli_device
from vlmedge.cli import run as cli_model
from vlmedge.cli.options import (
    AllowUnverified,
    BudgetMib,
    BundleFolder,
    Calibrate,
    Checkpoint,
    DeviceName,
    Fp8,
    Fp16,
    Int4,
    Int8,
    Json,
    Keep,
    KeepSlower,
    Lora,
    LoraModules,
    LoraSlots,
    NoCheck,
    Out,
    Overwrite,
    Quiet,
    SchemeName,
    TargetDrop,
)
from vlmedge.errors import ParityError, VlmEdgeError
from vlmedge.version import __version__

if TYPE_CHECKING:
    from vlmedge.bundle import Bundle
    from vlmedge.make.recipe import Recipe

FLAGS = ("int8", "int4", "fp8", "fp16")  # the same as --scheme and their name

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _Commands(TyperGroup):
    """Every command: errors that we raise on purpose become one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe shows here, and not at the interpreter's exit
            return result
        except VlmEdgeError as error:
            _say(" ".join(str(error).splitlines()))
            raise typer.Exit(EXIT_FAILED) from None
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:  # `| head` has read enough
            _write_no_more()
            raise typer.Exit(EXIT_FAILED) from None
        except OSError as error:
            if error.errno not in FULL:
                raise
            _say(f"{error.filename or 'output'} cannot be written: {error.strerror}")
            _write_no_more()
            raise typer.Exit(EXIT_FAILED) from None


app = typer.Typer(
    cls=_Commands,
    help="Export vision-language models, quantize them, prove them equal to PyTorch, run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends in SystemExit.

    Args:
        arguments: Default: the process's.
    """
    if not sys.warnoptions:  # other libraries' advice to programmers is no news to a user
        warnings.simplefilter("ignore")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the shell has closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):  # a caption may hold what the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if hasattr(sys.stdout, "reconfigure") and sys.stdout.encoding.lower() == "utf-8":
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name comes out as it is
    app(None if arguments is None else list(arguments), prog_name="vlmedge")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmedge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def export(
    context: typer.Context,
    checkpoint: Checkpoint,
    int8: Int8 = False,
    int4: Int4 = False,
    fp8: Fp8 = False,
    fp16: Fp16 = False,
    scheme: SchemeName = None,
    device: DeviceName = None,
    keep: Keep = None,
    calibrate: Calibrate = None,
    target_drop: TargetDrop = None,
    budget_mib: BudgetMib = None,
    keep_slower: KeepSlower = False,
    allow_unverified: AllowUnverified = False,
    lora: Lora = None,
    lora_slots: LoraSlots = None,
    lora_modules: LoraModules = None,
    out: Out = None,
    overwrite: Overwrite = False,
    no_check: NoCheck = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights, which can run code.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a checkpoint into a bundle, and compare it with PyTorch."""
    recipe = _recipe(context)
    from vlmedge.cli import output as console
    from vlmedge.make import export as exporting

    if device is not None:
        asked = recipe.scheme if scheme or any(context.params[name] for name in FLAGS) else None
        recipe = cli_device.fit(recipe, checkpoint, device, asked, quiet)
    bundle = exporting.export(
        checkpoint,
        out,
        recipe,
        calibrate=calibrate,
        lora=lora or (),
        lora_slots=lora_slots,
        lora_modules=[] if lora_modules is None else lora_modules.split(","),
        overwrite=overwrite,
        check=not no_check,
        allow_unverified=allow_unverified,
        allow_pickle=allow_pickle,
        progress=console.progress(quiet),
    )
    _conclude(bundle, as_json, quiet)


@app.command()
def quantize(
    context: typer.Context,
    bundle: BundleFolder,
    int8: Int8 = False,
    int4: Int4 = False,
    fp8: Fp8 = False,
    fp16: Fp16 = False,
    scheme: SchemeName = None,
    keep: Keep = None,
    calibrate: Calibrate = None,
    target_drop: TargetDrop = None,
    budget_mib: BudgetMib = None,
    keep_slower: KeepSlower = False,
    allow_unverified: AllowUnverified = False,
    lora: Lora = None,
    out: Out = None,
    overwrite: Overwrite = False,
    no_check: NoCheck = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a smaller bundle of a float32 one, and compare it with PyTorch."""
    recipe = _recipe(context)
    from vlmedge.cli import output as console
    from vlmedge.make import quantize

    if recipe.scheme == "float32":
        raise typer.BadParameter("give --int8, --int4, --fp8, --fp16 or --scheme NAME")
    made = quantize.quantize(
        bundle,
        recipe,
        out,
        calibrate=calibrate,
        lora=lora or (),
        overwrite=overwrite,
        check=not no_check,
        allow_unverified=allow_unverified,
        progress=console.progress(quiet),
    )
    _conclude(made, as_json, quiet)


@app.command()
def check(
    bundle: BundleFolder,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="What it was exported from: levels 1 to 3."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Level 4 of this engine, without --against.", show_default="ort"
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Pictures to compare on.",
            show_default="drawn",
        ),
    ] = None,
    lora: Lora = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add the result to a JSON file, as docs/ keeps one."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a bundle with its checkpoint; or an engine of this machine with the bundle."""
    from vlmedge.bundle import Bundle
    from vlmedge.cli import output as console
    from vlmedge.make import check
    from vlmedge.parity import records

    if against is None:
        if images is not None or lora or record is not None:
            raise typer.BadParameter("--images, --lora and --record go with --against CHECKPOINT")
        return cli_build.check_engine(bundle, engine or "ort", as_json, quiet)
    if engine is not None:
        raise typer.BadParameter("--against compares on ort: leave one of it and --engine out")
    if record is not None:
        records.read_records(record)  # before the work: it may be refused
    check.check(bundle, against, images, lora=lora or (), progress=console.progress(quiet))
    checked = Bundle.load(bundle)
    if record is not None:
        records.record(checked, record)
    _conclude(checked, as_json, quiet)


app.command()(cli_build.build)
app.add_typer(cli_build.engines, name="engines", no_args_is_help=True)
for _command in (
    cli_model.caption,
    cli_model.ask,
    cli_model.classify,
    cli_model.match,
    cli_model.infill,
    cli_model.embed,
    cli_model.index,
    cli_model.search,
    cli_chat.chat,
    cli_detect.detect,
    cli_paint.paint,
    cli_compose.compose,
):
    app.command()(_command)
app.command()(cli_device.plan)
app.command()(cli_device.doctor)
app.command()(cli_bench.bench)


@app.command()
def info(bundle: BundleFolder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what a bundle holds."""
    from vlmedge.cli import output as console
    from vlmedge.cli import tables

    opened = console.load(bundle)
    console.emit(opened.manifest) if as_json else tables.show_info(opened)


@app.command("list")
def list_(as_json: Json = False, quiet: Quiet = False) -> None:
    """List checkpoints, families, schemes, engines, devices and compositions."""
    from vlmedge.cli import output as console
    from vlmedge.cli import tables

    console.emit(tables.shelves()) if as_json else tables.show_list()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where all of it goes.")] = Path(
        "vlmedge-demo"
    ),
) -> None:
    """Do the main job on the built-in checkpoints: export, quantize, check, caption, ask."""
    from vlmedge.cli.demo import demo as show

    show(out)


def _write_no_more() -> None:
    """Let what is still to be printed go nowhere: the interpreter prints it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    typer.echo(f"vlmedge: {text}", err=True)


def _recipe(context: typer.Context) -> Recipe:
    """Make a recipe of a command's options; a file's own entries may be overruled."""
    from vlmedge.make.recipe import Recipe, read_recipe

    given = context.params
    named = [name for name in FLAGS if given[name]]
    named += [given["scheme"]] if given["scheme"] is not None else []
    if len(set(named)) > 1:
        raise typer.BadParameter(f"{' and '.join(named)} disagree: give one scheme")
    asked = named[0] if named else "float32"
    file = Path(asked)
    recipe = read_recipe(file) if file.suffix == ".json" else Recipe(asked)
    keep = dict(recipe.keep)
    for entry in given["keep"] or ():
        pattern, equals, precision = entry.partition("=")
        keep[pattern] = precision if equals else "float32"
    changes = {
        name: given[name]
        for name in ("target_drop", "budget_mib", "keep_slower")
        if given[name] is not None and given[name] is not False  # 0 is neither
    }
    return Recipe(**{**_fields(recipe), **changes, "keep": keep})


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in recipe.__struct_fields__}


def _conclude(bundle: Bundle, as_json: bool, quiet: bool) -> None:
    """Print what the gate found; fail when it has not passed."""
    from vlmedge.cli import output as console
    from vlmedge.cli import tables

    if as_json:
        console.emit(tables.verdict(bundle))
    elif not quiet:
        tables.show_verdict(bundle)
    if bundle.manifest.parity is None:
        console.warn(bundle)
    elif not bundle.verified:
        raise ParityError(f"{bundle.path} is NOT verified: it differs from PyTorch by too much")
