"""A graph on the GPU: its state stays there, and steps of one shape are recorded and played again.

host graph -> mask, places --v
feeds ---------------------> buffers on the device -> session -> buffers -> outputs
cache: buffers that are input and output at once (`CachedGraph`), or outputs that become inputs
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.errors import InputError
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.spec import Component

from .attention import LENGTHS
from .gather import Gatherer
from .session import Provider

CAPACITY_MIN = 256  # positions of a new cache; few sizes make few recordings
RECORDINGS = 24  # shapes that are recorded; each holds memory of the device
NOT_RECORDED = "-1"  # ONNX Runtime's word for a run that is neither recorded nor played

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """Sessions that an engine has opened for a component.

    Attributes:
        session: On the device.
        host: The session that makes masks and positions, on the CPU; or none.
        provider: Where `session` runs.
        records: Whether `session` can record runs.
        in_place: Whether the cache is in buffers.
    """

    session: ort.InferenceSession
    host: ort.InferenceSession | None
    provider: Provider
    records: bool
    in_place: bool


@dataclass(slots=True)
class _Call:
    """Runs of one shape: their buffers on the device, bound once.

    Attributes:
        binding: Binding of all inputs and outputs.
        inputs: Buffers that are written before a run.
        outputs: Buffers that are read after a run.
        options: Options of the run; they tell which recording it is.
    """

    binding: ort.IOBinding
    inputs: dict[str, ort.OrtValue]
    outputs: dict[str, ort.OrtValue]
    options: ort.RunOptions


class DeviceGraph(CheckedGraph):
    """One session on a device; state goes from output to input without leaving it."""

    def __init__(self, component: Component, opened: Opened) -> None:
        super().__init__(component)
        self._opened: Opened | None = opened
        self._types = {i.name: i.type for i in opened.session.get_inputs()}
        self._host_takes = [] if opened.host is None else opened.host.get_inputs()
        self._plain = [s.name for s in component.outputs if s.name not in self._became]
        self._seen: set[Any] = set()
        self._calls: dict[Any, _Call] = {}
        self._gatherer: Gatherer | None = None

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run once; state goes in and comes out as OrtValues."""
        full = self._with_host(feeds)
        if self._became:
            return self._run_once(full, {})
        return self._run(full, ())

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now, on the device."""
        self.follow(rows)
        names = [name for name, value in self._state.items() if _is_held(value)]
        if names:
            held = [self._state[name] for name in names]
            self._state = dict(zip(names, self._gathered(held, rows), strict=True))

    def hold(self, array: Array) -> Any:
        """Put an array that is fed again and again onto the device."""
        return self._on_device(array)

    def close(self) -> None:
        """Free the sessions and all that is on the device."""
        super().close()
        self._calls.clear()
        self._opened = self._gatherer = None

    def _now(self) -> Opened:
        if self._opened is None:
            raise RuntimeError(f"{self.component.name} is closed")
        return self._opened

    def _with_host(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Let the host make its part; return what the session on the device takes."""
        host = self._now().host
        if host is not None:
            given = {i.name: feeds[i.name] for i in self._host_takes}
            names = [o.name for o in host.get_outputs()]
            feeds = {**feeds, **dict(zip(names, host.run(names, given), strict=True))}
        return {name: feeds[name] for name in self._types}

    def _run(self, feeds: dict[str, Any], bound: tuple[Any, ...]) -> dict[str, Array]:
        """Run with everything in buffers that stay, once a shape has come a second time.

        Args:
            feeds: Inputs of the session, without its cache.
            bound: (a key, inputs, outputs) of what is bound already; nothing by default.
        """
        key = (bound[:1], tuple(value.shape for value in feeds.values() if not _is_held(value)))
        call = self._calls.get(key)
        state = bound[1:] or ({}, {})
        if call is None:
            if key not in self._seen or len(self._calls) >= RECORDINGS:
                self._seen.add(key)
                return self._run_once({**feeds, **state[0]}, state[1])
            call = self._calls[key] = self._prepared(feeds, *state)
        for name, buffer in call.inputs.items():
            buffer.update_inplace(np.ascontiguousarray(feeds[name]))
        for name, value in feeds.items():
            if _is_held(value):  # adapters, which may have changed
                call.binding.bind_ortvalue_input(name, value)
        self._now().session.run_with_iobinding(call.binding, call.options)
        return {name: value.numpy() for name, value in call.outputs.items()}

    def _prepared(
        self, feeds: dict[str, Any], state_in: dict[str, Any], state_out: dict[str, Any]
    ) -> _Call:
        """Make the buffers of one shape; a run tells how large the outputs are."""
        opened = self._now()
        session = opened.session
        found = self._run_once({**feeds, **state_in}, state_out)
        inputs = {n: self._on_device(v) for n, v in feeds.items() if not _is_held(v)}
        outputs = {name: self._on_device(found[name]) for name in self._plain}
        binding, options = session.io_binding(), ort.RunOptions()
        for name, value in (*inputs.items(), *state_in.items()):
            binding.bind_ortvalue_input(name, value)
        for name, value in (*outputs.items(), *state_out.items()):
            binding.bind_ortvalue_output(name, value)
        held = any(_is_held(value) for value in feeds.values())
        if opened.records and not held:
            options.add_run_config_entry("gpu_graph_id", str(len(self._calls) + 1))
        else:
            self._unrecorded(options)
        return _Call(binding, inputs, outputs, options)

    def _run_once(self, feeds: dict[str, Any], state_out: dict[str, Any]) -> dict[str, Array]:
        """Run on feeds of any shape; state that has no buffer comes out as OrtValues."""
        opened = self._now()
        device = opened.provider.device
        binding, options = opened.session.io_binding(), ort.RunOptions()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value if _is_held(value) else self._on_device(value))
        for name in self._plain:
            binding.bind_output(name, "cpu")
        for name in self._became:
            if name in state_out:
                binding.bind_ortvalue_output(name, state_out[name])
            else:
                binding.bind_output(name, device)
        self._unrecorded(options)
        opened.session.run_with_iobinding(binding, options)
        values = binding.get_outputs()
        found: dict[str, Any] = {
            name: value.numpy()
            for name, value in zip(self._plain, values[: len(self._plain)], strict=True)
        }
        if not state_out:
            found |= dict(zip(self._became, values[len(self._plain) :], strict=True))
        return found

    def _unrecorded(self, options: ort.RunOptions) -> None:
        if self._now().records:
            options.add_run_config_entry("gpu_graph_id", NOT_RECORDED)

    def _on_device(self, array: Array) -> ort.OrtValue:
        device = self._now().provider.device
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)

    def _gathered(self, held: Iterable[Any], rows: NDArray[np.int64]) -> list[ort.OrtValue]:
        if self._gatherer is None:
            self._gatherer = Gatherer(self._now().provider)
        return self._gatherer.take(list(held), rows)

    def _past(self, axes: dict[str, int]) -> dict[str, Array]:
        """Return the state to feed, in the type that the session has for it."""
        past = super()._past(axes)
        return {
            name: value
            if _is_held(value)
            else value.astype(_NUMPY.get(self._types.get(name, ""), value.dtype))
            for name, value in past.items()
        }


class CachedGraph(DeviceGraph):
    """A decoder whose cache lies in buffers on the device that its kernels write into.

    Buffers are float16 [rows, heads, capacity, width] and grow by doubling. One step of one token
    looks at the whole capacity, what is not written yet masked, so that every step is the same.
    """

    def __init__(self, component: Component, opened: Opened) -> None:
        super().__init__(component, opened)
        self._specs = {i.name: i for i in component.inputs if i.name in self._became.values()}
        self._buffers: dict[str, ort.OrtValue] = {}
        self._version = 0  # of the buffers: a recording knows their addresses
        self._newest = 0
        self._kept: list[tuple[int, dict[str, ort.OrtValue]]] = []  # for the next of their shape
        self._used = 0
        self._mask = self._mask_name(opened)

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        """Run once; see `vlmedge.shelves.contracts.Graph.run`."""
        axes = self._check(feeds)
        given = {name: value for name, value in feeds.items() if name in self._specs}
        others = {name: value for name, value in feeds.items() if name not in self._specs}
        batch, total = axes["batch"], axes["total"]
        if given:
            self._used, self._buffers = axes["past"], {}
        self._make_room(batch, total, given)
        if self.component.slots:
            others |= self._adapter_feeds(axes)
        tokens = total - self._used
        if tokens > 1 and self._used and batch > 1:
            raise InputError(
                f"{self.component.name}: {tokens} tokens for each of {batch} rows with a filled "
                "cache: feed one row, or one token at a time"
            )
        outputs = self._step(others, batch, total, tokens)
        self._used = total
        return outputs

    def reset(self) -> None:
        """Forget the state; the buffers stay for the next text."""
        self._used = 0
        self.follow(None)

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now."""
        if not self._buffers or np.array_equal(rows, np.arange(self._rows())):
            return
        self.follow(rows)
        before, shape = self._buffers, (len(rows), self._capacity())
        same = len(rows) == self._rows()
        target = self._taken(shape)
        if self._gatherer is None:
            self._gatherer = Gatherer(self._now().provider)
        made = self._gatherer.take(
            list(before.values()), rows, None if target is None else list(target[1].values())
        )
        self._kept.append((self._version, before))
        if target is None:
            self._version = self._fresh_version()
            self._buffers = dict(zip(before, made, strict=True))
        else:
            self._version, self._buffers = target
        if not same:
            self._kept = self._kept[-2:]

    def close(self) -> None:
        """Free the sessions and the buffers."""
        super().close()
        self._buffers, self._kept = {}, []

    def _step(self, feeds: dict[str, Any], batch: int, total: int, tokens: int) -> dict[str, Array]:
        shaped = {
            name: np.zeros((batch, *_without_past(spec.shape)), np.float16)
            for name, spec in self._specs.items()
            if name in {i.name for i in self._host_takes}
        }
        lengths = np.full(batch, total - 1, np.int32)
        types = dict(self._types)
        for name in self._specs:
            self._types.pop(name, None)
        try:
            full = self._with_host({**feeds, **shaped, LENGTHS: lengths})
        finally:
            self._types = types
        state_in = self._buffers
        state_out = {out: self._buffers[into] for out, into in self._became.items()}
        if tokens > 1:
            return self._run_once({**full, **state_in}, state_out)
        if not self._mask:
            return self._run_once({**full, **state_in}, state_out)
        room = self._capacity() - total
        mask = full[self._mask]
        hidden = np.full((*mask.shape[:3], room), np.finfo(mask.dtype).min / 2, mask.dtype)
        full[self._mask] = np.concatenate([mask, hidden], axis=3)
        return self._run(full, (self._version, state_in, state_out))

    def _mask_name(self, opened: Opened) -> str:
        """Name the input that is the mask: the kernel's, whose last axis is every key."""
        metadata = opened.session.get_modelmeta().custom_metadata_map
        return str(metadata["vlmedge.mask"])

    def _rows(self) -> int:
        return int(next(iter(self._buffers.values())).shape()[0])

    def _capacity(self) -> int:
        return int(next(iter(self._buffers.values())).shape()[2])

    def _make_room(self, batch: int, total: int, given: dict[str, Array]) -> None:
        """See that the buffers hold `total` positions of `batch` rows, and what is given."""
        if self._buffers and not given:
            if batch == self._rows() and total <= self._capacity():
                return
            if self._used and batch != self._rows():
                raise InputError(
                    f"{self.component.name}: the feeds have {batch} rows, the cache has "
                    f"{self._rows()}: call reset first"
                )
        capacity = max(CAPACITY_MIN, 1 << (total - 1).bit_length())
        kept = self._taken((batch, capacity)) if not self._used else None
        if self._buffers:
            self._kept = [*self._kept, (self._version, self._buffers)][-2:]
        if kept is not None:
            self._version, self._buffers = kept
            return
        before, self._buffers = self._buffers, {}
        for name, spec in self._specs.items():
            _, heads, _, width = spec.shape
            # zeros: what is masked is multiplied by 0, and nan would survive that
            fresh = np.zeros((batch, int(heads), capacity, int(width)), np.float16)
            if name in given:
                fresh[:, :, : self._used] = given[name]
            elif self._used and before:
                fresh[:, :, : self._used] = before[name].numpy()[:, :, : self._used]
            self._buffers[name] = self._on_device(fresh)
        self._version = self._fresh_version()

    def _taken(self, shape: tuple[int, int]) -> tuple[int, dict[str, ort.OrtValue]] | None:
        """Take buffers of [rows, capacity] that were used before, with their recordings."""
        for index, (_, buffers) in enumerate(self._kept):
            sizes = next(iter(buffers.values())).shape()
            if (sizes[0], sizes[2]) == shape:
                return self._kept.pop(index)
        return None

    def _fresh_version(self) -> int:
        self._newest += 1
        return self._newest


_NUMPY: dict[str, Any] = {"tensor(float16)": np.float16, "tensor(float)": np.float32}


def _is_held(value: Any) -> bool:
    return isinstance(value, ort.OrtValue)


def _without_past(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    """Return [heads, 0, width] of a cache's shape."""
    return tuple(0 if isinstance(size, str) else size for size in shape[1:])
