"""A decoder whose steps of one token are recorded once and played again (CUDA graphs).

A recording knows shapes and addresses, and a cache that grows has others at every step. So here it
lies in buffers of a capacity, of which a step looks at everything, masked where nothing is yet:

    past    [batch, heads, capacity, width]        0 .. used-1 are filled, zeros behind them
    mask    [batch, capacity + 1]                  ones, zeros up to the capacity, the new token
    present [batch, heads, capacity + 1, width]    its last position is copied to past[used]

That gives what a plain step gives where a graph finds out positions from its mask or is fed them.
Where it counts keys instead (a window, a bias by distance) it does not, so a build tries both, and
keeps recordings only where they are equal and faster (`proven`), for one row and for several.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array
from vlmedge.errors import VlmEdgeError
from vlmedge.parity.probe import Probe
from vlmedge.parity.tolerances import compare, worst
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import Component
from vlmedge.spec.manifest import ComponentParity

from .graph import TrtGraph, _Held
from .recorded_cache import Room

CAPACITY_MIN = 256  # positions of a new cache; few sizes make few recordings
PLAIN_STEPS = 2  # before a text is worth a recording; beams, which move rows, never get that far
PROOF_STEPS = 12  # of which the second half is timed
PROOF_ROWS = 3  # a kernel that is wrong about rows was seen to be wrong from the third on
_LOG = logging.getLogger("vlmedge.tensorrt")


@dataclass(frozen=True, slots=True)
class _Padded:
    """A state tensor that lies in its buffer of a capacity; `shape` is of what is used of it."""

    shape: tuple[int, ...]


class RecordedGraph(TrtGraph):
    """One deserialized engine that plays its steps."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._rooms, self._places = self._make_rooms()
        self._most = self.profiles[-1]["past"].max
        assert self._contexts is not None
        self._alone: Any = self._contexts.fresh(len(self.profiles) - 1)
        self._capacity = self._batch = 0
        self._streak = 0  # plain steps in a row
        self._recording: int | None = None
        self._recorded_for: tuple[Any, ...] = ()
        self._fails = self._alone is None  # no memory for one more context

    @property
    def recorded(self) -> bool:
        """Whether there is a recording, as there is after some steps of one text."""
        return self._recording is not None

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Play a step, or run what is none."""
        held = [feeds[name] for name in self._places]
        step = all(isinstance(value, (_Held, _Padded)) for value in held)
        step = step and self._tokens(feeds) == 1 and not self._fails
        used = self._used(next(iter(self._places)), held[0]) if step else 0
        self._streak = self._streak + 1 if step else 0
        if step and self._streak > PLAIN_STEPS and used < self._most:
            return self._step(feeds, used)
        return super().infer({name: self._packed(name, value) for name, value in feeds.items()})

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now."""
        held = next(iter(self._state.values()), None)
        if isinstance(held, _Padded) and np.array_equal(rows, np.arange(held.shape[0])):
            self.follow(rows)
            return
        self._streak = 0
        self._state = {name: self._packed(name, value) for name, value in self._state.items()}
        super().reorder(rows)

    def fetch(self, name: str, value: Any) -> Array:
        """Bring a tensor of the state down."""
        return super().fetch(name, self._packed(name, value))

    def reset(self) -> None:
        """Forget the state; buffers and recording stay for the next text."""
        super().reset()
        self._streak = 0

    def close(self) -> None:
        """Free all of it."""
        if self._contexts is not None:
            self._forget()
            self._alone = None
            for room in self._rooms:
                room.close()
        super().close()

    def _step(self, feeds: dict[str, Any], used: int) -> dict[str, Any]:
        self._heard.clear()
        self._enter({name: feeds[name] for name in self._places}, used)
        given = {n: self._widened(n, v, used) for n, v in feeds.items() if n not in self._places}
        for name, array in given.items():
            self._sent(name, array, self._buffers[name])
        self._run(given)
        for room in self._rooms:
            room.keep(used, self._stream)
        plain = [spec for spec in self.component.outputs if spec.name not in self._became]
        arrays = {}
        for spec in plain:
            sizes = tuple(int(size) for size in self._alone.get_tensor_shape(spec.name))
            array = np.empty(sizes, self._dtypes[spec.name])
            self._cuda.download(array, self._buffers[spec.name].address, self._stream)
            arrays[spec.name] = array
        self._cuda.wait(self._stream)
        found: dict[str, Any] = {
            spec.name: arrays[spec.name].astype(spec.dtype, copy=False) for spec in plain
        }
        alike: dict[Any, _Padded] = {}
        for out, into in self._became.items():
            shape = self._inputs[into].shape
            if shape not in alike:
                alike[shape] = _Padded(self._shape(into, used + 1))
            found[out] = alike[shape]
        return found

    def _run(self, given: Mapping[str, Any]) -> None:
        """Play the recording of these shapes and addresses; a first time runs and makes it."""
        if self._recording is not None and self._recorded_for == self._known(given):
            self._cuda.play(self._recording, self._stream)
            return
        self._forget()
        self._set_up(given)
        # a run settles what TensorRT puts off until shapes are known, which no recording may hold
        self._execute()
        self._cuda.wait(self._stream)
        try:
            self._cuda.begin_recording(self._stream)
            try:
                self._execute()
            finally:
                self._recording = self._cuda.end_recording(self._stream)
        except VlmEdgeError as error:
            _LOG.warning("%s: its steps cannot be recorded: %s", self.component.name, error)
            self._forget()
            self._fails = True
            return
        self._recorded_for = self._known(given)

    def _set_up(self, given: Mapping[str, Any]) -> None:
        """Set the context's shapes and addresses; changing them later spoils its recording.

        Source: "Modifying the context from which the graph was captured will cause undefined
        behaviors", NVIDIA's guide. So plain runs have a context apart from this one.
        """
        context = self._alone
        sent = [(name, array.shape, self._buffers[name].address) for name, array in given.items()]
        held = [
            (name, self._shape(name, self._capacity), room.past(number))
            for name, (room, number) in self._places.items()
        ]
        for name, shape, address in (*sent, *held):
            if not context.set_input_shape(name, tuple(shape)):
                raise VlmEdgeError(f"{self.component.name}: {name}: {self._last_words()}")
            context.set_tensor_address(name, address)
        for spec in self.component.outputs:
            into = self._became.get(spec.name)
            if into is None:
                shape = tuple(int(size) for size in context.get_tensor_shape(spec.name))
                size = math.prod(shape) * self._dtypes[spec.name].itemsize
                address = self._buffers[spec.name].hold(size)
            else:
                room, number = self._places[into]
                address = room.present(number)
            context.set_tensor_address(spec.name, address)

    def _execute(self) -> None:
        if not self._alone.execute_async_v3(stream_handle=self._stream):
            raise VlmEdgeError(f"{self.component.name}: TensorRT: {self._last_words()}")

    def _enter(self, state: Mapping[str, Any], used: int) -> None:
        """See that the cache is in buffers with room for one position more."""
        batch = next(iter(state.values())).shape[0]
        capacity = min(max(CAPACITY_MIN, 1 << used.bit_length()), self._most)
        inside = all(isinstance(value, _Padded) for value in state.values())
        if inside and batch == self._batch and used < self._capacity:
            return
        packed = {name: self._packed(name, value) for name, value in state.items()}
        self._batch, self._capacity = batch, capacity
        for room in self._rooms:
            room.settle(batch, capacity, self._stream)
        for name, value in packed.items():
            room, number = self._places[name]
            room.enter(number, self._turn(name, value.turn).address, used, self._stream)

    def _packed(self, name: str, value: Any) -> Any:
        """Return a state tensor without the room behind it, as plain runs have it."""
        if not isinstance(value, _Padded):
            return value
        (room, number), used = self._places[name], self._used(name, value)
        target = self._turn(name, 0).hold(math.prod(value.shape) * self._dtypes[name].itemsize)
        room.leave(number, target, used, self._stream)
        return _Held(0, value.shape)

    def _widened(self, name: str, value: Any, used: int) -> Any:
        """Put zeros between what is used and the new token, along an axis that counts both."""
        shape = self._inputs[name].shape if name in self._inputs else ()
        if "total" not in shape:
            return value
        room = [(0, 0)] * value.ndim
        axis = shape.index("total")
        before, new = np.split(value, [used], axis)
        room[axis] = (0, self._capacity - used)
        return np.concatenate([np.pad(before, room), new], axis)

    def _tokens(self, feeds: Mapping[str, Any]) -> int:
        for name, spec in self._inputs.items():
            if "tokens" in spec.shape and name in feeds:
                return int(feeds[name].shape[spec.shape.index("tokens")])
        return 0

    def _used(self, name: str, value: Any) -> int:
        return int(value.shape[self._inputs[name].shape.index("past")])

    def _shape(self, name: str, positions: int) -> tuple[int, ...]:
        known = {"batch": self._batch, "past": positions}
        return tuple(s if isinstance(s, int) else known[s] for s in self._inputs[name].shape)

    def _make_rooms(self) -> tuple[list[Room], dict[str, tuple[Room, int]]]:
        """Return the rooms of the state, and for each of its inputs its room and number there."""
        alike: dict[Any, list[str]] = {}
        for name in self._became.values():
            alike.setdefault((self._inputs[name].shape, self._dtypes[name]), []).append(name)
        rooms: list[Room] = []
        places: dict[str, tuple[Room, int]] = {}
        for (shape, dtype), names in alike.items():
            axis, sizes = shape.index("past"), [s if isinstance(s, int) else 1 for s in shape]
            position_bytes = math.prod(sizes[axis + 1 :]) * dtype.itemsize
            room = Room(self._cuda, len(names), math.prod(sizes[:axis]), position_bytes)
            rooms.append(room)
            places |= {name: (room, number) for number, name in enumerate(names)}
        return rooms, places

    def _known(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return all that a recording knows: shapes, and where tensors lie."""
        shapes = [(name, value.shape) for name, value in given.items()]
        plain = [buffer.address for buffer in self._buffers.values()]
        return (*shapes, self._capacity, *plain, *(room.places for room in self._rooms))

    def _forget(self) -> None:
        if self._recording is not None:
            self._cuda.drop_recording(self._recording)
        self._recording, self._recorded_for = None, ()


def recordable(graph: TrtGraph) -> bool:
    """Return whether a component has steps that can be recorded: a cache that grows, with room."""
    component = graph.component
    state = {into for _, into in component.state}
    grown = all("past" in spec.shape for spec in component.inputs if spec.name in state)
    others = any("past" in spec.shape for spec in component.inputs if spec.name not in state)
    if not state or not grown or others:
        return False
    prompt, steps = graph.profiles[0], graph.profiles[-1]
    return steps["past"].max >= prompt["tokens"].opt + PROOF_STEPS


def walked(graph: Graph, probe: Probe) -> tuple[list[dict[str, Array]], float]:
    """Run a prompt and some steps; return what they gave, and how long a late step takes, ms."""
    graph.reset()
    found, times = [], []
    for feeds in probe.steps(graph, PROOF_STEPS):
        start = time.perf_counter()
        found.append(graph.run(feeds))
        times.append(time.perf_counter() - start)
    graph.reset()
    return found, 1000 * float(np.median(times[-PROOF_STEPS // 2 :]))


def together(graph: TrtGraph, probe: Probe) -> tuple[list[dict[str, Array]], int]:
    """Run the same with equal rows beside each other; return what they gave, and how many."""
    rows = min(PROOF_ROWS, *(p["batch"].max for p in graph.profiles))
    graph.reset()
    steps = probe.steps(graph, PROOF_STEPS)
    found = [graph.run(repeated(graph.component, feeds, rows)) for feeds in steps]
    graph.reset()
    return found, rows


def repeated(component: Component, arrays: Mapping[str, Array], rows: int) -> dict[str, Array]:
    """Return inputs or outputs of one row as those of so many equal ones."""
    tensors = (*component.inputs, *component.outputs)
    by_row = {tensor.name for tensor in tensors if tensor.shape[:1] == ("batch",)}
    return {n: np.repeat(a, rows, 0) if n in by_row else a for n, a in arrays.items()}


def proven(
    scheme: str, plain: list[dict[str, Array]], played: list[dict[str, Array]]
) -> ComponentParity:
    """Compare played steps with plain ones."""
    return worst(
        [
            compare("steps", scheme, expected[name], got[name])
            for expected, got in zip(plain, played, strict=True)
            for name in expected
            if expected[name].dtype.kind == "f"
        ]
    )
