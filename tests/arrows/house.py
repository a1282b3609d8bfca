"""The imports of the house, read from its files as text: files, rooms, floors, circles.

An arrow is an import, wherever its statement stands: inside a function and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SHELVES = ("export", "quantize", "runtimes", "devices")
NESTED = ("run",)  # packages of the core whose folders are rooms of their own
Arrows = Mapping[str, set[str]]


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        file: Path of the importing file, from the root of the checkout.
        module: Dotted name of the module that is imported, or that the name is taken from.
        name: The name that is taken out of the module, or "" for the module itself.
    """

    file: str
    module: str
    name: str


class House:
    """A checkout of the project.

    Args:
        root: Folder that holds vlmedge/ and the shelves.
    """

    def __init__(self, root: Path) -> None:
        trees = ("vlmedge", *SHELVES)
        paths = [path for tree in trees for path in sorted((root / tree).rglob("*.py"))]
        self.files = [path.relative_to(root).as_posix() for path in paths]
        self.lines = {
            file: path.read_text(encoding="utf-8").count("\n")
            for file, path in zip(self.files, paths, strict=True)
        }
        self._trees = {
            file: ast.parse(path.read_text(encoding="utf-8"))
            for file, path in zip(self.files, paths, strict=True)
        }
        self._files_by_module = {module_of(file): file for file in self.files}

    def imports(self, file: str) -> Iterator[Import]:
        """Yield every import of a file, relative ones resolved."""
        here = module_of(file).split(".")
        package = here if file.endswith("__init__.py") else here[:-1]
        for node in ast.walk(self._trees[file]):
            if isinstance(node, ast.Import):
                yield from (Import(file, alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*start, *([node.module] if node.module else [])])
                for alias in node.names:
                    if f"{module}.{alias.name}" in self._files_by_module:
                        yield Import(file, f"{module}.{alias.name}", "")
                    else:
                        yield Import(file, module, alias.name)

    def file_arrows(self) -> dict[str, set[str]]:
        """Return, for each file, the files of the house that it imports."""
        known = self._files_by_module
        return {
            file: {known[found.module] for found in self.imports(file) if found.module in known}
            - {file}
            for file in self.files
        }

    def room_arrows(self, tree: str = "vlmedge") -> dict[str, set[str]]:
        """Return, for each room of the core or of one shelf, the rooms that it imports."""
        rooms: dict[str, set[str]] = {}
        for file, targets in self.file_arrows().items():
            if file.split("/")[0] == tree:
                found = {room_of(target) for target in targets if target.split("/")[0] == tree}
                rooms.setdefault(room_of(file), set()).update(found - {room_of(file)})
        return rooms

    def private_names(self) -> list[Import]:
        """List the names with an underscore that are taken out of a module of another package."""
        return [
            found
            for file in self.files
            for found in self.imports(file)
            if found.name.startswith("_") and not found.name.startswith("__")
            if found.module in self._files_by_module
            if _folder(self._files_by_module[found.module]) != _folder(file)
        ]


def module_of(file: str) -> str:
    """Return the dotted name under which a file is imported."""
    dotted = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return dotted if dotted.split(".")[0] == "vlmedge" else f"vlmedge.{dotted}"


def room_of(file: str) -> str:
    """Name the room of a file: its package, or the file where it lies in the open."""
    tree, *inner = file.removesuffix(".py").split("/")
    depth = 2 if inner[0] in NESTED and len(inner) > 2 else 1
    return "/".join(inner[:depth]) if inner != ["__init__"] else tree


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def circles(arrows: Arrows) -> list[list[str]]:
    """Return the groups that reach each other (Tarjan 1972), largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(arrows[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            cut = stack.index(node)
            found.append(sorted(stack[cut:]))
            del stack[cut:]

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return sorted((group for group in found if len(group) > 1), key=len, reverse=True)


def floors(arrows: Arrows) -> dict[str, int]:
    """Put each room on a floor above all that it imports; the rooms of a circle share one floor."""
    together = {room: i for i, group in enumerate(circles(arrows)) for room in group}
    key = {room: str(together.get(room, room)) for room in arrows}
    below: dict[str, set[str]] = {}
    for room, targets in arrows.items():
        below.setdefault(key[room], set()).update({key[t] for t in targets} - {key[room]})
    height: dict[str, int] = {}

    def climb(node: str) -> int:
        if node not in height:
            height[node] = 1 + max((climb(target) for target in below[node]), default=0)
        return height[node]

    return {room: climb(key[room]) for room in arrows}
