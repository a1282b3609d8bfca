"""From the options of `vlmedge.load` to an engine, and from PEFT folders to what fills slots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmedge.errors import InputError
from vlmedge.lora.adapter import open_adapter
from vlmedge.lora.slots import Factors, fill
from vlmedge.run.tasks.context import IMAGES_PER_BATCH
from vlmedge.shelves.contracts import Engine, FallsBack, Spins
from vlmedge.shelves.registry import ENGINES
from vlmedge.spec import ModelSpec

Adapter = str | Path


def choose_engine(name: str, *, allow_fallback: bool, spin: bool | None) -> Engine:
    """Return an engine of the shelf as one model wants it.

    Raises:
        InputError: The engine has no such option.
    """
    engine = ENGINES[name]
    if allow_fallback:
        if not isinstance(engine, FallsBack):
            raise InputError(
                f"{name} has nothing to fall back to: leave allow_fallback (--allow-fallback) out"
            )
        engine = engine.falling_back()
    if isinstance(engine, Spins):
        return engine.spinning(spin)
    if spin is not None:
        raise InputError(f"{name} has no threads that spin: leave spin out")
    return engine


def read_factors(
    spec: ModelSpec, adapter: Adapter | Sequence[Adapter | None] | None, weight: float
) -> Factors:
    """Read what fills the slots of a model; see `Model.set_adapter`."""
    if adapter is None:
        return {}
    folders = [adapter] if isinstance(adapter, Adapter) else list(adapter)
    if not 1 <= len(folders) <= IMAGES_PER_BATCH:
        raise InputError(
            f"{len(folders)} adapters: give 1 to {IMAGES_PER_BATCH}, the size of one batch"
        )
    opened = {folder: open_adapter(Path(folder)) for folder in folders if folder is not None}
    rows = [None if folder is None else opened[folder] for folder in folders]
    return fill(spec, rows, weight)
