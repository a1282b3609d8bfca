"""One engine with its execution context; the state stays on the GPU.

Past and present of each state tensor take turns in two buffers: what a call wrote is what the next
one reads, so the cache is never copied. (One buffer for both would need a graph that writes in
place: a longer cache has other strides, and concatenation cannot run over its own input.) Buffers
keep their addresses until a longer text needs more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.errors import BundleError, InputError, VlmEdgeError
from vlmedge.shelves.build_options import AxisRange
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.spec import Component

from .._cuda import Cuda
from . import versions as api
from .contexts import Contexts
from .profiles import Profile, choose

SMALLEST_BYTES = 256  # an empty tensor needs an address too
_INT32 = np.iinfo(np.int32)


class _Buffer:
    """Memory on the GPU that grows."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._size = 0
        self.address = 0

    def hold(self, size: int) -> int:
        """Make room for `size` bytes; return the address. What was in it may be lost."""
        if size > self._size or not self.address:
            wanted = max(size + (size >> 1) if self._size else size, SMALLEST_BYTES)
            self.close()
            self.address, self._size = self._cuda.allocate(wanted), wanted
        return self.address

    def close(self) -> None:
        """Give it back."""
        if self.address:
            self._cuda.release(self.address)
        self.address = self._size = 0


@dataclass(frozen=True, slots=True)
class _Held:
    """A state tensor on the GPU.

    Attributes:
        turn: In which of its two buffers it is.
        shape: Its sizes; batch comes first.
    """

    turn: int
    shape: tuple[int, ...]


class TrtGraph(CheckedGraph):
    """One deserialized engine."""

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        component: Component,
        plan: bytes,
        profiles: Sequence[Profile],
        where: Path,
        dla_core: int | None = None,
    ) -> None:
        super().__init__(component)
        self._cuda = cuda
        self.profiles = profiles
        self._heard: list[str] = []
        log = api.logger(trt, self._heard.append)
        runtime = trt.Runtime(log)
        if dla_core is not None:
            runtime.DLA_core = dla_core
        engine = runtime.deserialize_cuda_engine(plan)
        self._stream = cuda.stream()
        contexts = None
        if engine is not None:
            contexts = Contexts(trt, engine, cuda, len(profiles), self._stream)
        if contexts is None or not contexts.fits:
            cuda.close_stream(self._stream)
            raise BundleError(
                f"{where} cannot be opened by TensorRT {trt.__version__}: {self._last_words()}: "
                "remove it (vlmedge engines clean BUNDLE) or free some memory"
            )
        self._owners: tuple[Any, ...] = (log, runtime, engine)  # released after the contexts
        self._contexts: Contexts | None = contexts
        self._context: Any = contexts.of(0)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._dtypes = {n: api.dtype_of(trt, engine.get_tensor_dtype(n)) for n in names}
        self._resident: dict[str, Array] = {}  # fed at every call, sent up once
        self._kept = self._fed_again(component)
        turns = {into: out for out, into in self._became.items()}
        self._buffers = {name: _Buffer(cuda) for name in names if name not in turns.values()}
        self._twins = {name: _Buffer(cuda) for name in turns}

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        """Run once; a batch that is longer than the engine's goes through in pieces."""
        most = max((p["batch"].max for p in self.profiles if "batch" in p), default=0)
        rows = max((len(array) for array in feeds.values() if array.ndim), default=0)
        if not self._is_split_by_rows() or not most or rows <= most:
            return super().run(feeds, last=last)
        self._check(feeds)
        parts = []
        for start in range(0, rows, most):
            piece = {name: array[start : start + most] for name, array in feeds.items()}
            parts.append(super().run(piece))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Run the engine once; state goes in and comes out as addresses on the GPU."""
        if self._contexts is None:
            raise RuntimeError(f"{self.component.name} is closed")
        self._heard.clear()
        self._context = self._choose(self._contexts, feeds)
        for name, value in feeds.items():
            self._put(name, value)
        found = {spec.name: self._room(spec.name, feeds) for spec in self.component.outputs}
        if not self._context.execute_async_v3(stream_handle=self._stream):
            raise VlmEdgeError(f"{self.component.name}: TensorRT: {self._last_words()}")
        arrays = {
            name: np.empty(shape, self._dtypes[name])
            for name, shape in found.items()
            if name not in self._became
        }
        for name, array in arrays.items():
            self._cuda.download(array, self._buffers[name].address, self._stream)
        self._cuda.wait(self._stream)
        wanted = {spec.name: np.dtype(spec.dtype) for spec in self.component.outputs}
        return {
            name: arrays[name].astype(wanted[name], copy=False)
            if name in arrays
            else _Held(self._next_turn(feeds[self._became[name]]), shape)
            for name, shape in found.items()
        }

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now: copied on the GPU, into the other buffer."""
        self.follow(rows)
        moved: dict[str, Any] = {}
        for name, value in self._state.items():
            if not isinstance(value, _Held):
                moved[name] = value[rows]
            elif np.array_equal(rows, np.arange(value.shape[0])):
                moved[name] = value
            else:
                moved[name] = self._gather(name, value, rows)
        self._cuda.wait(self._stream)
        self._state = moved

    def fetch(self, name: str, value: Any) -> Array:
        """Bring a tensor of the state down, in the type that the component has it in."""
        if not isinstance(value, _Held):
            return np.asarray(value)
        array = np.empty(value.shape, self._dtypes[name])
        self._cuda.download(array, self._turn(name, value.turn).address, self._stream)
        self._cuda.wait(self._stream)
        return array.astype(self._inputs[name].dtype, copy=False)

    def close(self) -> None:
        """Free the context, the engine and all memory."""
        super().close()
        if self._contexts is None:
            return
        self._cuda.wait(self._stream)
        for buffer in (*self._buffers.values(), *self._twins.values()):
            buffer.close()
        self._context = None
        self._contexts.close()
        self._cuda.close_stream(self._stream)
        self._contexts = None
        self._owners = ()

    def reset(self) -> None:
        """Forget the state, and what was looked at."""
        super().reset()
        for name in self._kept:
            self._resident.pop(name, None)

    @staticmethod
    def _fed_again(component: Component) -> frozenset[str]:
        """Name what a decoder is fed unchanged: keys and values of the picture, its mask."""
        state = {into for _, into in component.state}
        return frozenset(
            spec.name
            for spec in component.inputs
            if state and spec.name not in state and not {"tokens", "total"} & set(spec.shape)
        )

    def _is_split_by_rows(self) -> bool:
        specs = (*self.component.inputs, *self.component.outputs)
        return not self.component.state and all(s.shape[:1] == ("batch",) for s in specs)

    def _choose(self, contexts: Contexts, feeds: Mapping[str, Any]) -> Any:
        """Return the context of the profile that covers all axes."""
        sizes = {
            axis: size
            for name, value in feeds.items()
            if name in self._inputs  # an adapter's slots have an axis of their own
            for axis, size in zip(self._inputs[name].shape, value.shape, strict=True)
            if isinstance(axis, str)
        }
        context = contexts.of(choose(self.component.name, self.profiles, sizes))
        if context is None:
            raise VlmEdgeError(f"{self.component.name}: TensorRT: {self._last_words()}")
        return context

    def _put(self, name: str, value: Any) -> None:
        """Give the context an input: an array goes up, a state tensor is there already."""
        if isinstance(value, _Held):
            address = self._turn(name, value.turn).address
        else:
            state = name in self._twins
            address = self._sent(name, value, self._turn(name, 0) if state else self._buffers[name])
        if not self._context.set_input_shape(name, tuple(value.shape)):
            raise VlmEdgeError(f"{self.component.name}: {name}: {self._last_words()}")
        self._context.set_tensor_address(name, address)

    def _sent(self, name: str, value: Array, buffer: _Buffer) -> int:
        """Have an array in a buffer; return the address."""
        array = self._fitted(name, value)
        address = buffer.hold(array.nbytes)
        if self._resident.get(name) is not array:
            self._cuda.upload(address, array, self._stream)
        if name in self._kept or name not in self._inputs:  # or an adapter's
            self._resident[name] = array
        return address

    def _room(self, name: str, feeds: Mapping[str, Any]) -> tuple[int, ...]:
        """Give the context room for an output; return its shape."""
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise VlmEdgeError(
                f"{self.component.name}: the shape of {name!r} depends on values: use --engine ort"
            )
        size = math.prod(shape) * self._dtypes[name].itemsize
        into = self._became.get(name)
        if into is None:
            buffer = self._buffers[name]
        else:
            buffer = self._turn(into, self._next_turn(feeds[into]))
        self._context.set_tensor_address(name, buffer.hold(size))
        return shape

    def _turn(self, name: str, turn: int) -> _Buffer:
        """Return one of the two buffers of a state input."""
        if turn == 0:
            return self._twins[name]
        other = f"{name}#1"
        if other not in self._twins:
            self._twins[other] = _Buffer(self._cuda)
        return self._twins[other]

    def _next_turn(self, value: Any) -> int:
        return 1 - value.turn if isinstance(value, _Held) else 1

    def _gather(self, name: str, value: _Held, rows: NDArray[np.int64]) -> _Held:
        batch, *rest = value.shape
        if len(rows) and not 0 <= rows.min() <= rows.max() < batch:
            raise IndexError(f"{self.component.name}: rows {rows.tolist()} of {batch}")
        size = math.prod(rest) * self._dtypes[name].itemsize
        source = self._turn(name, value.turn).address
        turn = 1 - value.turn
        target = self._turn(name, turn).hold(size * len(rows))
        for i, row in enumerate(rows.tolist()):
            self._cuda.copy(target + i * size, source + row * size, size, self._stream)
        return _Held(turn, (len(rows), *rest))

    def _fitted(self, name: str, array: Array) -> Array:
        """Return an array in the engine's type: 8.6 takes int64 as int32, state may be float16."""
        dtype = self._dtypes[name]
        if dtype == np.int32 and array.dtype == np.int64 and array.size:
            low, high = int(array.min()), int(array.max())
            if low < _INT32.min or high > _INT32.max:
                worst = low if low < _INT32.min else high
                raise InputError(
                    f"{self.component.name}: {name!r} holds {worst}: this TensorRT takes values "
                    "of int32 only"
                )
        return np.ascontiguousarray(array, dtype)

    def _last_words(self) -> str:
        return " ".join(" ".join(self._heard[-2:]).split())[:300] or "no reason given"


def read_profiles(stored: Sequence[Mapping[str, str]]) -> tuple[Profile, ...]:
    """Read the profiles that an engine's record names."""
    return tuple({a: AxisRange.parse(text) for a, text in one.items()} for one in stored)
