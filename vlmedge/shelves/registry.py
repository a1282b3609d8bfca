"""Find a family, a scheme, an engine or a device by its file name."""

from __future__ import annotations

import ast
import difflib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from vlmedge.errors import CheckpointError, MissingExtraError, UnknownNameError
from vlmedge.shelves.contracts import Device, Engine, Family, Scheme, Slotter

T = TypeVar("T")


def unknown(kind: str, name: str, known: Sequence[str]) -> UnknownNameError:
    """Build the error for a name that is not there: the nearest in any case, and all that are."""
    folded = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"did you mean {folded[near[0]]!r}? " if near else ""
    return UnknownNameError(f"no {kind} {name!r}: {hint}choose from {', '.join(known) or 'none'}")


class Registry(Generic[T]):
    """The files of one folder, each of which holds one constant."""

    def __init__(
        self,
        folder: str,
        constant: str,
        kind: str,
        extra: str,
        families: Registry[Family] | None = None,
    ) -> None:
        """Name the folder.

        Args:
            folder: Its import name inside the package.
            constant: Name of the constant that each file holds.
            kind: Word for one file of the folder, for messages.
            extra: The extra of the package that a file needs.
            families: Where a file of the same name says which ARCHITECTURES it covers, if not here.
        """
        self.folder = folder
        self.constant = constant
        self.kind = kind
        self.extra = extra
        self._families = families

    def names(self) -> list[str]:
        """List the files that hold the constant, importing none; an underscore marks a helper."""
        found = pkgutil.iter_modules(self._locations())
        return sorted(m.name for m in found if not m.name.startswith("_") and self._holds(m.name))

    def literal(self, name: str, constant: str, default: Any = ...) -> Any:
        """Read a literal constant of the file `name` without importing it (or torch).

        Args:
            name: The file's.
            constant: The constant's.
            default: Value for a file that lacks the constant; left out: every file must have it.

        Raises:
            UnknownNameError: The file has no such constant, and there is no default.
        """
        # the one statement, up to where the next begins: a whole file takes ten times longer
        statement = re.compile(rf"^{constant}\b.*\n(?:[ )\]}}].*\n|\n)*", re.MULTILINE)
        for folder in self._locations():
            file = Path(folder) / f"{name}.py"
            if file.is_file() and (found := statement.search(file.read_text(encoding="utf-8"))):
                match ast.parse(found[0]).body:
                    case [ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value)]:
                        return ast.literal_eval(value)
        if default is not ...:
            return default
        raise UnknownNameError(f"{self.folder}/{name}.py: it has no literal {constant}")

    def covering(self, config: Any, file: Path, wanted: str) -> str:
        """Name the file here whose ARCHITECTURES hold one of a config.json's `architectures`.

        The literal is the file's own, or that of the family of the same name.

        Args:
            config: The JSON object that was read.
            file: Where from, for messages.
            wanted: Name of the thing that was looked for, for messages.

        Raises:
            CheckpointError: It names no architecture.
            UnknownNameError: Nothing covers what it names.
        """
        found = config.get("architectures") if isinstance(config, dict) else None
        if not isinstance(found, list) or not found:
            raise CheckpointError(f"{file} has no 'architectures': it is needed to know the family")
        known: dict[str, str] = {}
        for name in self.names():
            known |= dict.fromkeys((self._families or self).literal(name, "ARCHITECTURES"), name)
        for architecture in found:
            if architecture in known:
                return known[architecture]
        raise unknown(wanted, str(found[0]), sorted(known))

    def __getitem__(self, name: str) -> T:
        """Import the one file `name`."""
        if name not in self.names():
            raise unknown(self.kind, name, self.names())
        try:
            module = import_module(f"vlmedge.{self.folder}.{name}")
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{self.kind} {name!r} needs the package {error.name}: "
                f"pip install 'vlmedge[{self.extra}]'"
            ) from error
        return cast(T, getattr(module, self.constant))

    def _holds(self, name: str) -> bool:
        """Return whether a file assigns the constant: one folder may have files of two kinds."""
        assigned = re.compile(rf"^{self.constant}\b\s*[:=]", re.MULTILINE)
        files = (Path(folder) / f"{name}.py" for folder in self._locations())
        return any(f.is_file() and assigned.search(f.read_text(encoding="utf-8")) for f in files)

    def _locations(self) -> Sequence[str]:
        spec = find_spec(f"vlmedge.{self.folder}")
        if spec is None or spec.submodule_search_locations is None:
            raise MissingExtraError(
                "vlmedge is not installed: run `pip install -e .` in the checkout"
            )
        return spec.submodule_search_locations


FAMILIES: Registry[Family] = Registry("export", "FAMILY", "family", "export")
SCHEMES: Registry[Scheme] = Registry("quantize", "SCHEME", "scheme", "export")
SLOTTERS: Registry[Slotter] = Registry("quantize", "SLOTS", "way of slots", "export")
ENGINES: Registry[Engine] = Registry("runtimes", "ENGINE", "engine", "cpu")
DEVICES: Registry[Mapping[str, Device]] = Registry("devices", "DEVICES", "product line", "cpu")


def experimental() -> list[str]:
    """List the engines that no device has run yet, importing none."""
    return [name for name in ENGINES.names() if ENGINES.literal(name, "EXPERIMENTAL", False)]


def devices() -> dict[str, Device]:
    """Return every device of every product line by its name, in the lines' own order."""
    return {name: device for line in DEVICES.names() for name, device in DEVICES[line].items()}


def device(name: str) -> Device:
    """Return the device called `name`."""
    known = devices()
    if name not in known:
        raise unknown("device", name, list(known))
    return known[name]
