"""Private modules of the shelves, by their names on disk; no other file of the tests knows how."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vlmedge.shelves.registry import DEVICES, ENGINES, FAMILIES, SCHEMES

SHELVES = {registry.folder: registry for registry in (FAMILIES, SCHEMES, ENGINES, DEVICES)}


def module(shelf: str, name: str) -> Any:
    """Import a module of a shelf.

    Args:
        shelf: Such as runtimes.
        name: Such as _ort_store.
    """
    return import_module(f"vlmedge.{SHELVES[shelf].folder}.{name}")
