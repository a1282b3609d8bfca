"""What `vlmedge build` asks of an engine that compiles, and what it gets; the engines on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmedge.bundle import ENGINES, Bundle
from vlmedge.errors import BundleError

SIDECAR = "engine.json"  # beside an engine: what it was made from and for


@dataclass(frozen=True, slots=True)
class StoredEngine:
    """One folder in engines/.

    Attributes:
        name: The folder's.
        bytes: Its size.
        identity: The inputs and the device that it was built for; empty for engines that keep no
            record.
        fusions: For each kind of pattern, how many of how many the engine's own kernels replaced,
            and why the rest was left.
    """

    name: str
    bytes: int
    identity: Mapping[str, Any]
    fusions: Sequence[Mapping[str, Any]] = ()


def stored_engines(bundle: Path) -> list[StoredEngine]:
    """List the engines of a bundle."""
    found = []
    for folder in _folders(bundle):
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        record = read_sidecar(folder)
        fusions = record.get("fusions") or ()
        found.append(StoredEngine(folder.name, size, record.get("identity") or {}, fusions))
    return found


def clean_engines(bundle: Path) -> list[StoredEngine]:
    """Remove a bundle's engines, timings included; return those that were there."""
    found = stored_engines(bundle)
    try:
        for folder in _folders(bundle):
            shutil.rmtree(folder)
        for file in (bundle / ENGINES).glob("*.timing"):
            file.unlink()
    except OSError as error:
        raise BundleError(f"{bundle}: engines cannot be removed: {error.strerror}") from None
    return found


def engines_folder(bundle: Bundle, name: str) -> Path:
    """Return the folder in which the engine `name` is, or will be: the bundle's if it can be.

    A bundle that cannot be written has its engines in $VLMEDGE_CACHE, else in
    $XDG_CACHE_HOME/vlmedge or ~/.cache/vlmedge.
    """
    engines = bundle.path / ENGINES
    writable = os.access(engines if engines.is_dir() else bundle.path, os.W_OK)
    if (engines / name).is_dir() or writable:
        return engines
    return _users_cache()


def engine_records(bundle: Bundle) -> list[dict[str, Any]]:
    """Read what all engines say that a bundle may have: its own, and those in the user's cache."""
    places = (bundle.path / ENGINES, _users_cache())
    return [read_sidecar(file.parent) for each in places for file in each.glob(f"[!.]*/{SIDECAR}")]


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Read what an engine was made from; empty if it does not say, or not in JSON."""
    try:
        data = json.loads((folder / SIDECAR).read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _users_cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VLMEDGE_CACHE") or home / "vlmedge")


def _folders(bundle: Path) -> list[Path]:
    """List whole engines; a name with a dot in front is one under construction."""
    engines = bundle / ENGINES
    if not engines.is_dir():
        return []
    return sorted(f for f in engines.iterdir() if f.is_dir() and not f.name.startswith("."))
