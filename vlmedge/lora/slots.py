"""Put LoRA adapters into the slots of a bundle: from PEFT's tensors to the graphs' inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmedge.arrays import Array
from vlmedge.errors import AdapterError
from vlmedge.lora.adapter import Adapter, locate, misfit
from vlmedge.spec import AdapterSlot, ModelSpec

Factors = dict[str, dict[str, Array]]
"""Component -> slot input -> float32 [adapters, ...]."""


def fill(spec: ModelSpec, adapters: Sequence[Adapter | None], weight: float = 1.0) -> Factors:
    """Make the tensors that the slots are fed.

    Args:
        spec: Spec of a bundle with slots.
        adapters: One for every row of a batch, or one for all; none is the base model.
        weight: Multiplies their scale.

    Raises:
        AdapterError: The bundle has no slots, or an adapter does not fit into them.
    """
    slots = {slot.module: slot for c in spec.components for slot in c.slots}
    if not slots:
        raise AdapterError(
            "the bundle has no slots for adapters: export it with --lora-slots RANK, "
            "or merge the adapter with --lora DIR"
        )
    places = [{} if a is None else _place(a, slots) for a in adapters]
    zeros: dict[tuple[int, ...], Array] = {}
    made: dict[str, Array] = {}
    for module, slot in slots.items():
        for tensor in (slot.down, slot.up):
            shape = (len(adapters), *(int(size) for size in tensor.shape[1:]))
            if any(module in place for place in places):
                made[tensor.name] = np.empty(shape, np.float32)
            else:  # shared, so that untouched slots take no memory
                made[tensor.name] = zeros.setdefault(shape, np.zeros(shape, np.float32))
    for module in {module for place in places for module in place}:
        down, up = made[slots[module].down.name], made[slots[module].up.name]
        for row, (adapter, place) in enumerate(zip(adapters, places, strict=True)):
            rank = 0
            if adapter is not None and module in place:
                factors = adapter.modules[place[module]]
                a, b = adapter.pair(place[module])
                rank = factors.rank
                down[row, :, :rank] = a.T
                np.multiply(b.T, np.float32(factors.scale * weight), out=up[row, :rank])
            down[row, :, rank:] = 0.0
            up[row, rank:] = 0.0
    return {
        component.name: {
            tensor.name: made[tensor.name]
            for slot in component.slots
            for tensor in (slot.down, slot.up)
        }
        for component in spec.components
    }


def _place(adapter: Adapter, slots: dict[str, AdapterSlot]) -> dict[str, str]:
    """Find the adapter's path for each slot that it fills, or say what does not fit."""
    merge = "merge the adapter at export with --lora DIR"
    for path, factors in adapter.modules.items():
        if factors.embedding or factors.bias is not None:
            what = "an embedding table" if factors.embedding else "a bias"
            raise AdapterError(f"{adapter.folder}: it changes {what}, {path!r}: {merge}")
    if adapter.replaced:
        path = next(iter(adapter.replaced))
        raise AdapterError(f"{adapter.folder}: it replaces {path!r} as a whole: {merge}")

    def fits(path: str, module: str) -> bool:
        return adapter.modules[path].shape == _shape(slots[module])

    try:
        found = locate(adapter, adapter.modules, slots, fits)
    except AdapterError as error:
        raise AdapterError(f"{error}; only modules with a slot can be adapted: {merge}") from None
    for path, module in found.items():
        factors, slot = adapter.modules[path], slots[module]
        if factors.shape != _shape(slot):
            raise misfit(adapter, path, list(factors.shape), module, list(_shape(slot)))
        if factors.rank > int(slot.down.shape[-1]):
            raise AdapterError(
                f"{adapter.folder}: module {path!r} has rank {factors.rank}, the slots have "
                f"{slot.down.shape[-1]}: export with --lora-slots {factors.rank}"
            )
    return {module: path for path, module in found.items()}


def _shape(slot: AdapterSlot) -> tuple[int, int]:
    """Return (out, in)."""
    return int(slot.up.shape[-1]), int(slot.down.shape[1])
