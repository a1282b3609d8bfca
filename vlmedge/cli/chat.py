"""The command `chat`: a conversation about pictures in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vlmedge.cli import output
from vlmedge.cli.options import (
    AllowFallback,
    BundleFolder,
    EngineName,
    LowMemory,
    MaxTokens,
    Penalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    sampling,
)
from vlmedge.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmedge.run.tasks.chat import Chat

HELP = "/image FILE adds a picture to the next turn, /new starts a new conversation, /quit ends."


def chat(
    context: typer.Context,
    bundle: BundleFolder,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Image files for the first turn.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    engine: EngineName = "ort",
    low_memory: LowMemory = False,
    allow_fallback: AllowFallback = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
) -> None:
    """Chat about pictures in the terminal: each line is a turn.

    /image FILE adds a picture to the next turn, /new starts a new conversation, /quit ends.
    Lines can be piped in as a script: it goes on after a line that fails, and exits with 1 then.
    """
    from vlmedge.run.inputs.image_files import load_image

    model = output.open_model(bundle, engine, low_memory, allow_fallback)
    options = sampling(context)
    seed = options.pop("seed")
    talk = model.chat(system, **options)
    seen = [load_image(image) for image in images or []]
    prompted, failed = sys.stdin.isatty(), False
    if prompted:
        print(HELP, file=sys.stderr)
    while (line := _read(prompted)) is not None:
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/quit":
                break
            if word == "/new":
                talk, seen = model.chat(system, **options), []
            elif word == "/image":
                seen.append(load_image(rest.strip()))
            elif word.startswith("/"):
                raise InputError(f"no command {word!r}: {HELP}")
            elif word:
                _turn(talk, line.strip(), seen, seed)
                seen = []
        except InputError as error:  # the conversation stays as it was
            output.say(output.as_typed(error, context.command))
            failed = True
    if failed and not prompted:
        raise typer.Exit(1)


def _read(prompted: bool) -> str | None:
    """Read a line, or none at the end."""
    if prompted:
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line or None


def _turn(talk: Chat, text: str, images: list[Image], seed: int | None) -> None:
    """Say something and print the reply as it comes; Ctrl-C cuts it short."""
    pieces = talk.stream(text, images, seed=seed)
    try:
        for piece in output.trimmed(pieces):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print(flush=True)
