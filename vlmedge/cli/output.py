"""What commands share: bundles are opened with a warning, results are printed or saved.

Heavy imports stand inside the functions, for every command's file imports this one.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmedge.errors import InputError

if TYPE_CHECKING:
    import typer
    from PIL.Image import Image

    from vlmedge.bundle import Bundle
    from vlmedge.run.model import Model


def say(text: str) -> None:
    """Print a line of ours on stderr."""
    print(f"vlmedge: {text}", file=sys.stderr)


def as_typed(error: Exception, command: Any) -> str:
    """Return an error's line with a command's options in place of their names in Python.

    A library's error names a parameter, max_tokens, for callers in Python; here it is --max-tokens.
    A name of one word could be any word, and counts where a line or a part of it begins alone:
    "seed is -1: ...", "capfilt: change 'kept': ...".
    """
    text = " ".join(str(error).splitlines())
    for option in command.params:
        name, typed = str(option.name), option.opts[0]
        if option.param_type_name != "option":
            continue
        if "_" in name:  # not inside a path, and --allow-fallback only once where both are named
            text = re.sub(rf"(?<![\w/.'-]){name}(?![\w/.']\w)(?: \({typed}\))?", typed, text)
        else:
            text = re.sub(rf"(^|: ){name}(?= is | ['\"\d-])", rf"\1{typed}", text)
    return text


def load(path: Path) -> Bundle:
    """Load a bundle; warn when it has not passed the gate."""
    from vlmedge.bundle import Bundle

    bundle = Bundle.load(path)
    warn(bundle)
    return bundle


def open_model(
    path: Path, engine: str, low_memory: bool = False, allow_fallback: bool = False
) -> Model:
    """Load a bundle to run it; warn when it has not passed the gate."""
    from vlmedge.run.model import Model

    return Model(load(path), engine, low_memory=low_memory, allow_fallback=allow_fallback)


def warn(bundle: Bundle) -> None:
    """Warn when a bundle has not passed the gate."""
    if not bundle.verified:
        cure = f"run vlmedge check {bundle.path} --against {bundle.manifest.checkpoint.id}"
        say(f"warning: {bundle.path} is unverified: {cure}")


def emit(value: Any) -> None:
    """Print a struct, a dataclass, a list or a dict as JSON; nan becomes null, a path its text."""
    import json

    import msgspec

    print(json.dumps(json.loads(msgspec.json.encode(value, enc_hook=str)), indent=2))


class Broken:
    """Pictures that cannot be used: they do not stop the others, but the command fails at last."""

    def __init__(self, context: typer.Context, images: Sequence[str], lack: str) -> None:
        self._command, self._images, self._lack = context.command, images, lack
        self.errors: list[str] = []

    def note(self, image: object, error: InputError) -> None:
        """Report one picture."""
        self.errors.append(as_typed(error, self._command))
        say(self.errors[-1])

    def conclude(self) -> None:
        """Fail if there are any."""
        if self.errors:
            count = f"{len(self.errors)} of {len(self._images)}"
            raise InputError(f"{count} pictures have no {self._lack}: see above")


def save(picture: Image, out: Path) -> None:
    """Write a PNG whole or not at all."""
    data = io.BytesIO()
    picture.save(data, format="PNG")
    replace(out, data)


def replace(out: Path, data: io.BytesIO) -> None:
    """Write a file whole or not at all."""
    from vlmedge.files import replace_file

    try:
        replace_file(out, data.getvalue())
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from None


def one_line(text: str) -> str:
    """Put a text into one line."""
    return " ".join(text.split("\n"))


def trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """Strip a text that comes in pieces, and keep it on one line."""
    started, held = False, ""
    for piece in pieces:
        text = held + piece.replace("\n", " ")
        text = text if started else text.lstrip()
        kept = text.rstrip()
        held = text[len(kept) :]
        if kept:
            started = True
            yield kept


def file_name(path: str) -> str:
    """Return a file's name as valid Unicode, for JSON."""
    return path.encode(errors="replace").decode()
