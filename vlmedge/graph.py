"""The base of every engine's graph: names, dtypes and shapes are checked once, here.

It also keeps the state. An engine that holds the cache on its device overrides the four state
methods; the others get numpy arrays that are fed back as they came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from vlmedge.contracts import Array, Arrays
from vlmedge.errors import InputError
from vlmedge.spec import Component, TensorSpec


class CheckedGraph(ABC):
    """A graph that refuses wrong feeds by name before the engine sees them."""

    def __init__(self, component: Component) -> None:
        self.component = component
        self._inputs = {spec.name: spec for spec in component.inputs}
        self._became = dict(component.state)
        self._state: dict[str, Array] = {}

    @abstractmethod
    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run the engine on checked feeds; return every output by name."""

    def close(self) -> None:
        """Give the memory back; the default has none of its own."""
        self._state = {}

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """Run once; see `vlmedge.contracts.Graph.run`."""
        axes = self._check(feeds)
        full = {**self._past(axes), **feeds}
        outputs = self.infer(full)
        self._state = {into: outputs.pop(out) for out, into in self._became.items()}
        return outputs

    def reset(self) -> None:
        """Forget the state."""
        self._state = {}

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now."""
        self._state = {name: value[rows] for name, value in self._state.items()}

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
        state = set(self._became.values())
        needed = [name for name in self._inputs if name not in state]
        missing = [name for name in needed if name not in feeds]
        if missing:
            raise InputError(f"{where}: {missing[0]!r} is missing: feed {', '.join(needed)}")
        extra = [name for name in feeds if name not in self._inputs]
        if extra:
            raise InputError(f"{where}: it has no input {extra[0]!r}: feed {', '.join(needed)}")
        axes: dict[str, int] = {}
        for name, array in feeds.items():
            spec = self._inputs[name]
            got = f"{array.dtype}{list(array.shape)}"
            wanted = f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"
            fits = array.dtype == spec.dtype and array.ndim == len(spec.shape)
            for size, axis in zip(array.shape, spec.shape, strict=False):
                known = axes.setdefault(axis, size) if isinstance(axis, str) else axis
                fits = fits and size == known
            if not fits:
                raise InputError(f"{where}: {name!r} is {got}: it must be {wanted}")
        return axes


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
            raise InputError(f"{where}: the size of axis {axis!r} of {spec.name!r} is not known")
    return np.zeros(shape, spec.dtype)
