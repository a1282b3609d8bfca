"""A component in an ONNX Runtime session; a decoder writes its cache in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.errors import InputError
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.spec import Component

from .last_logits import FROM

CAPACITY_MIN = 64  # positions of a new cache

# What a head that can choose is fed: the first token that it reads.
ALL = ort.OrtValue.ortvalue_from_numpy(np.array([0]))
LAST = ort.OrtValue.ortvalue_from_numpy(np.array([-1]))


class OrtGraph(CheckedGraph):
    """One session; the state stays in ONNX Runtime's own memory from call to call."""

    def __init__(
        self,
        component: Component,
        session: ort.InferenceSession,
        fusions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Wrap a session; `fusions` is what the lowering tells of it (fusion.py)."""
        super().__init__(component)
        self.fusions = fusions
        self._session: ort.InferenceSession | None = session
        self._outputs = [spec.name for spec in component.outputs]
        # whether its head can be set to read the last token alone (last_logits.py)
        self._chooses = any(put.name == FROM for put in session.get_inputs())

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run the session once; state goes in and comes out as OrtValues."""
        if self._session is None:
            raise RuntimeError(f"{self.component.name} is closed")
        values = {name: _held(value) for name, value in feeds.items()}
        if self._chooses:
            values[FROM] = LAST if self._last else ALL
        found = self._session.run_with_ort_values(self._outputs, values)
        return {
            name: value if name in self._became else value.numpy()
            for name, value in zip(self._outputs, found, strict=True)
        }

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now, in place where the number of rows stays.

        Fresh memory for a whole cache is what costs: its pages are made one by one.
        """
        arrays = {name: self.fetch(name, value) for name, value in self._state.items()}
        batch = next((len(array) for array in arrays.values()), 0)
        if np.array_equal(rows, np.arange(batch)):
            return
        self.follow(rows)
        buffer = np.empty(0)
        for name, array in arrays.items():
            if len(rows) != batch:
                arrays[name] = array[rows]
                continue
            if (buffer.shape, buffer.dtype) != (array.shape, array.dtype):
                buffer = array[rows]
            # a mode other than "raise" spares another copy; the line above has checked the rows
            np.take(array, rows, axis=0, out=buffer, mode="clip")
            array[...] = buffer
        self._state = arrays

    def fetch(self, name: str, value: Any) -> Array:
        """Return a tensor of the state, without a copy."""
        array: Array = value.numpy() if isinstance(value, ort.OrtValue) else value
        return array

    def hold(self, array: Array) -> ort.OrtValue:
        """Wrap an array once: a decoder with slots has hundreds of them at every step."""
        return _held(array)

    def close(self) -> None:
        """Free the session."""
        super().close()
        self._session = None


class InPlaceGraph(OrtGraph):
    """A decoder whose cache lies in buffers that its kernels write into; no step copies it.

    Buffers are float32 [rows, heads, capacity, width] and grow by doubling. After a prompt is
    repeated for beams, rows of one origin hold the same prompt, which is never copied again.
    """

    def __init__(
        self,
        component: Component,
        session: ort.InferenceSession,
        fusions: Sequence[Mapping[str, Any]] = (),
        *,
        counts: bool = False,
    ) -> None:
        """Wrap a session; `counts` tells that its kernels count positions, padding included."""
        super().__init__(component, session, fusions)
        self._counts = counts
        self._specs = {i.name: i for i in component.inputs if i.name in self._became.values()}
        self._buffers: dict[str, Array] = {}
        self._binding: ort.IOBinding | None = None
        self._used = 0
        self._origin = np.zeros(0, np.int64)  # of each row: the row that it was repeated from
        self._shared = 0  # positions that rows of one origin have in common
        self._slots: dict[str, Any] | None = None  # what the binding has of adapters

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        """Run once; see `vlmedge.shelves.contracts.Graph.run`."""
        if self._session is None:
            raise RuntimeError(f"{self.component.name} is closed")
        axes = self._check(feeds)
        if self._counts and (np.diff(feeds["attention_mask"], axis=1) < 0).any():
            raise InputError(
                f"{self.component.name}: attention_mask has a gap: its rows may only begin with "
                "zeros: pad on the left"
            )
        given = {name: value for name, value in feeds.items() if name in self._specs}
        if given:
            self._used, self._shared = axes["past"], 0
            self._buffers = {}
        self._make_room(axes["batch"], axes["total"])
        for name, value in given.items():
            self._buffers[name][:, :, : self._used] = value
        binding = self._bound()
        held = {name: _held(value) for name, value in feeds.items() if name not in given}
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        if self._chooses:
            binding.bind_ortvalue_input(FROM, LAST if last else ALL)
        if self.component.slots and self._slots is not (slots := self._adapter_feeds(axes)):
            for name, value in slots.items():
                binding.bind_ortvalue_input(name, value)
            self._slots = slots
        plain = [name for name in self._outputs if name not in self._became]
        for name in plain:  # anew: what is bound already has the shape of the call before
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        self._used = axes["total"]
        found = binding.get_outputs()[-len(plain) :]
        return {name: value.numpy() for name, value in zip(plain, found, strict=True)}

    def reset(self) -> None:
        """Forget the state; the buffers stay for the next text."""
        self._used = self._shared = 0
        self.follow(None)

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now."""
        batch = len(self._origin)
        if np.array_equal(rows, np.arange(batch)):
            return
        self.follow(rows)
        if len(rows) != batch:
            capacity = self._capacity()
            self._allocate(len(rows), capacity, rows)
            self._origin = self._origin[rows] if self._shared else rows.copy()
            self._shared = self._shared or self._used
            return
        start = self._shared if np.array_equal(self._origin[rows], self._origin) else 0
        moved = np.flatnonzero(rows != np.arange(batch))
        for buffer in self._buffers.values():
            buffer[moved, :, start : self._used] = buffer[rows[moved], :, start : self._used]
        self._origin = self._origin[rows]

    def rewind(self, tokens: int) -> None:
        """Keep the first `tokens` positions of row 0; of one row nothing is copied."""
        self._used, self._shared = tokens, min(self._shared, tokens)
        if len(self._origin) > 1:
            self.reorder(np.zeros(1, np.int64))

    def snapshot(self, tokens: int) -> dict[str, Array]:
        """Copy the first `tokens` positions of row 0."""
        return {name: buffer[:1, :, :tokens].copy() for name, buffer in self._buffers.items()}

    def close(self) -> None:
        """Free the session and the buffers."""
        super().close()
        self._buffers, self._binding, self._slots = {}, None, None

    def _capacity(self) -> int:
        return next(iter(self._buffers.values())).shape[2] if self._buffers else 0

    def _make_room(self, batch: int, total: int) -> None:
        """See that the buffers hold `total` positions of `batch` rows."""
        if self._used == 0 or not self._buffers:
            self._origin = np.arange(batch)
        rows = next(iter(self._buffers.values())).shape[0] if self._buffers else 0
        if rows == batch and total <= self._capacity():
            return
        if self._used and self._buffers and batch != rows:
            raise InputError(
                f"{self.component.name}: the feeds have {batch} rows, the cache has {rows}: call "
                "reset first"
            )
        capacity = max(CAPACITY_MIN, 1 << (total - 1).bit_length())
        self._allocate(batch, capacity, np.arange(rows))

    def _allocate(self, batch: int, capacity: int, rows: NDArray[np.int64]) -> None:
        """Make new buffers, with the given rows of the old ones as far as they are used."""
        for name, spec in self._specs.items():
            _, heads, _, width = spec.shape
            fresh = np.empty((batch, int(heads), capacity, int(width)), spec.dtype)
            if self._used and name in self._buffers:
                fresh[:, :, : self._used] = self._buffers[name][rows, :, : self._used]
            self._buffers[name] = fresh
        self._binding = None

    def _bound(self) -> ort.IOBinding:
        """Bind each buffer as the past and as what comes of it, once."""
        if self._binding is None:
            assert self._session is not None
            self._binding, self._slots = self._session.io_binding(), None
            for out, into in self._became.items():
                value = ort.OrtValue.ortvalue_from_numpy(self._buffers[into])
                self._binding.bind_ortvalue_input(into, value)
                self._binding.bind_ortvalue_output(out, value)
        return self._binding


def _held(value: Any) -> ort.OrtValue:
    """Wrap a numpy array without a copy; leave an OrtValue alone."""
    if isinstance(value, ort.OrtValue):
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
