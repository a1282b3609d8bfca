"""The base of every engine's graph: names, dtypes and shapes are checked once, here.

It also keeps the state, and feeds the slots of adapters: zeros where none is set. An engine that
holds the cache on its device says how to `fetch` a tensor of it, or overrides the state methods,
of which `reset`, `reorder` and `rewind` call `follow`; the others get numpy arrays that are fed
back as they came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.errors import InputError
from vlmedge.spec import Component, TensorSpec


class CheckedGraph(ABC):
    """A graph that refuses wrong feeds by name before the engine sees them."""

    def __init__(self, component: Component) -> None:
        self.component = component
        self._inputs = {spec.name: spec for spec in component.inputs}
        self._became = dict(component.state)
        state = set(self._became.values())
        self._needed = tuple(name for name in self._inputs if name not in state)
        self.reads = 0
        self._last = False  # whether the logits of the last token are all that is wanted
        self._state: dict[str, Array] = {}
        self._factors: dict[str, Array] = {}  # of adapters: [adapters, ...] for each slot input
        self._adapters = 1  # how many
        self._adapter_of: NDArray[np.int64] | None = None  # by row; none: row i has adapter i
        self._slot_feeds: dict[str, Any] | None = None  # ready for the engine, for these rows

    @abstractmethod
    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run the engine on checked feeds; return every output by name."""

    def close(self) -> None:
        """Give the memory back; the default has none of its own."""
        self._state = {}
        self.reads += 1  # what it had in its cache is gone
        self._factors, self._slot_feeds = {}, None

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        """Run once; see `vlmedge.shelves.contracts.Graph.run`."""
        axes, self._last = self._check(feeds), last
        full = {**self._past(axes), **feeds}
        if self.component.slots:
            full |= self._adapter_feeds(axes)
        outputs = self.infer(full)
        self._state = {into: outputs.pop(out) for out, into in self._became.items()}
        return outputs

    def reset(self) -> None:
        """Forget the state."""
        self._state = {}
        self.follow(None)

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now."""
        self._state = {name: value[rows] for name, value in self._state.items()}
        self.follow(rows)

    def rewind(self, tokens: int) -> None:
        """Keep the first `tokens` positions of state row 0."""
        self._state = self.snapshot(tokens)
        self.follow(np.zeros(1, np.int64))

    def snapshot(self, tokens: int) -> dict[str, Array]:
        """Copy the first `tokens` positions of state row 0, by the name of the input."""
        found = {}
        for name, value in self._state.items():
            time = self._inputs[name].shape.index("past")
            row = self.fetch(name, value)[:1]
            found[name] = row.take(range(tokens), axis=time)
        return found

    def fetch(self, name: str, value: Any) -> Array:
        """Return a tensor of the state as a numpy array."""
        return np.asarray(value)

    def adapt(self, factors: Mapping[str, Array] | None) -> None:
        """Set what the slots are fed from now on.

        Args:
            factors: For each slot input an array [adapters, ...] of its spec; none: zeros. One
                adapter serves every row; of several, row i of a batch is served by adapter i.
        """
        specs = [spec for slot in self.component.slots for spec in (slot.down, slot.up)]
        given = factors or {spec.name: _zeros(spec) for spec in specs}
        for spec in specs:
            got = given[spec.name]
            if got.dtype != spec.dtype or got.shape[1:] != spec.shape[1:] or not len(got):
                raise InputError(
                    f"{self.component.name}: {spec.name!r} is {got.dtype}{list(got.shape)}: it "
                    f"must be {spec.dtype}[{', '.join(map(str, spec.shape))}]"
                )
        self._factors = dict(given)
        self._adapters = max((len(array) for array in given.values()), default=1)
        self._adapter_of = self._slot_feeds = None

    def follow(self, rows: NDArray[np.int64] | None) -> None:
        """Let each row of the batch keep its adapter.

        Args:
            rows: Row i becomes row `rows[i]` of now; none: the first batch comes again.
        """
        self.reads += rows is None
        if self._adapters == 1:
            return
        before = np.arange(self._adapters) if self._adapter_of is None else self._adapter_of
        after = np.arange(self._adapters) if rows is None else before[rows]
        if not np.array_equal(before, after):
            self._adapter_of, self._slot_feeds = after, None

    def hold(self, array: Array) -> Any:
        """Make what `infer` gets for an array that is fed again and again."""
        return array

    def _adapter_feeds(self, axes: dict[str, int]) -> dict[str, Any]:
        """Return what the slots are fed at this call."""
        if not self._factors:
            self.adapt(None)
        rows = np.arange(self._adapters) if self._adapter_of is None else self._adapter_of
        batch = axes.get("batch", 1)
        if self._adapters > 1 and batch != len(rows):
            raise InputError(
                f"{self.component.name}: {len(rows)} adapters for a batch of {batch} rows: "
                "set one adapter, or one for each row"
            )
        if self._slot_feeds is None:
            moved = self._adapter_of is not None
            self._slot_feeds = {
                name: self.hold(array[rows] if moved else array)
                for name, array in self._factors.items()
            }
        return self._slot_feeds

    def _past(self, axes: dict[str, int]) -> dict[str, Array]:
        """Return the state to feed: the last call's, or empty at the start."""
        if self._state:
            return self._state
        return {
            name: _empty(self._inputs[name], axes, self.component.name)
            for name in self._became.values()
        }

    def _check(self, feeds: Arrays) -> dict[str, int]:
        """Refuse feeds that do not fit the spec; return the size of every named axis."""
        where = self.component.name
        needed = self._needed
        missing = [name for name in needed if name not in feeds]
        if missing:
            raise InputError(f"{where}: {missing[0]!r} is missing: feed {', '.join(needed)}")
        extra = [name for name in feeds if name not in self._inputs]
        if extra:
            raise InputError(f"{where}: it has no input {extra[0]!r}: feed {', '.join(needed)}")
        axes: dict[str, int] = {}
        for name, array in feeds.items():
            spec = self._inputs[name]
            if not hasattr(array, "dtype"):
                raise InputError(
                    f"{where}: {name!r} is of type {type(array).__name__}: give a numpy array"
                )
            fits = array.dtype == spec.dtype and array.ndim == len(spec.shape)
            for size, axis in zip(array.shape, spec.shape, strict=False):
                known = axes.setdefault(axis, size) if isinstance(axis, str) else axis
                fits = fits and size == known
            if not fits:  # only then are they put into words, which costs more than the check
                got = f"{array.dtype}{list(array.shape)}"
                wanted = f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"
                raise InputError(f"{where}: {name!r} is {got}: it must be {wanted}")
        if axes.get("batch") == 0:
            raise InputError(f"{where}: a batch of 0 rows: feed at least one")
        self.reads += 1
        return axes


def _zeros(spec: TensorSpec) -> Array:
    """Make what a slot input is fed without an adapter."""
    return np.zeros((1, *(int(size) for size in spec.shape[1:])), spec.dtype)


def _empty(spec: TensorSpec, axes: dict[str, int], where: str) -> Array:
    """Make a state tensor of length 0 along its time axis."""
    shape = []
    for axis in spec.shape:
        if isinstance(axis, int):
            shape.append(axis)
        elif axis == "past":
            shape.append(0)
        elif axis in axes:
            shape.append(axes[axis])
        else:
            raise InputError(
                f"{where}: the size of axis {axis!r} of {spec.name!r} is not known: feed "
                f"{spec.name!r}"
            )
    return np.zeros(shape, spec.dtype)
