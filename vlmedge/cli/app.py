"""The command line: its list of commands, and what happens when one fails.

Only typer and the errors are imported here; a command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlmedge.cli import output
from vlmedge.cli.bench import bench
from vlmedge.cli.build import build, engines
from vlmedge.cli.caption import ask, caption
from vlmedge.cli.chat import chat
from vlmedge.cli.check import check
from vlmedge.cli.classify import classify, infill, match
from vlmedge.cli.compose import compose
from vlmedge.cli.demo import demo
from vlmedge.cli.detect import detect
from vlmedge.cli.doctor import doctor
from vlmedge.cli.export import export, quantize
from vlmedge.cli.info import info, list_
from vlmedge.cli.paint import paint
from vlmedge.cli.plan import plan
from vlmedge.cli.search import embed, index, search
from vlmedge.errors import VlmEdgeError
from vlmedge.version import __version__

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _Commands(TyperGroup):
    """Every command: errors that are raised on purpose become one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe shows here, and not at the interpreter's exit
            return result
        except VlmEdgeError as error:
            output.say(output.as_typed(error, self.get_command(ctx, ctx.invoked_subcommand)))
            raise typer.Exit(EXIT_FAILED) from None
        except KeyboardInterrupt:
            output.say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:  # `| head` has read enough
            _write_no_more()
            raise typer.Exit(EXIT_FAILED) from None
        except OSError as error:
            if error.errno not in FULL:
                raise
            output.say(f"{error.filename or 'output'} cannot be written: {error.strerror}")
            _write_no_more()
            raise typer.Exit(EXIT_FAILED) from None


app = typer.Typer(
    cls=_Commands,
    help="Export and quantize vision-language models, compare them with PyTorch, and run them.",
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
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


COMMANDS: tuple[Callable[..., None], ...] = (
    *(export, quantize, check, build),
    *(caption, ask, classify, match, infill, embed, index, search),
    *(chat, detect, paint, compose),
    *(plan, doctor, bench, info),
)
for _command in COMMANDS:
    app.command()(_command)
app.add_typer(engines, name="engines", no_args_is_help=True)
app.command("list")(list_)
app.command()(demo)


def _write_no_more() -> None:
    """Let what is still to be printed go nowhere: the interpreter prints it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
