"""Statistics of tensors over calibration samples, and rows that are made or stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.make.calibration_graph import _AMAX, _CHANNELS, _LENGTH, _SIZE, _SOME
from vlmedge.shelves.contracts import Graph, Stats, Watched
from vlmedge.spec import Component

ROWS = 192  # of each watched tensor that are kept: enough to compare roundings


class _Tally:
    """The statistics so far."""

    def __init__(self, wanted: Watched) -> None:
        self._wanted = wanted
        self._amax = dict.fromkeys(wanted.names, 0.0)
        self._squares = dict.fromkeys(wanted.names, 0.0)
        self._sizes = dict.fromkeys(wanted.names, 0)
        self._channels: dict[str, NDArray[np.float32]] = {}
        self._rows: dict[str, list[NDArray[np.float16]]] = {name: [] for name in wanted.names}
        self._seen = dict.fromkeys(wanted.names, 0)
        self._rng = np.random.default_rng(0)

    def add(self, out: Arrays) -> None:
        """Add the statistics of one run."""
        for name in self._wanted.names:
            if not self._wanted.rows:
                self._amax[name] = max(self._amax[name], float(out[name + _AMAX]))
                continue
            self._squares[name] += float(out[name + _LENGTH]) ** 2
            self._sizes[name] += int(out[name + _SIZE])
            channels = out[name + _CHANNELS]
            known = self._channels.get(name)
            self._channels[name] = channels if known is None else np.maximum(known, channels)
            self._keep(name, out[name + _SOME])

    def _keep(self, name: str, rows: Array) -> None:
        """Keep a uniform random sample of all rows so far (Vitter 1985, algorithm R)."""
        kept = self._rows[name]
        for row in np.clip(rows, -65504, 65504).astype(np.float16):
            self._seen[name] += 1
            if len(kept) < ROWS:
                kept.append(row)
            elif (place := int(self._rng.integers(self._seen[name]))) < ROWS:
                kept[place] = row

    def stats(self) -> dict[str, Stats]:
        """Return the statistics of each tensor."""
        if not self._wanted.rows:
            return {name: Stats(amax, 0.0) for name, amax in self._amax.items()}
        return {
            name: Stats(
                float(self._channels[name].max()),
                math.sqrt(self._squares[name] / max(self._sizes[name], 1)),
                self._channels[name],
                np.stack(self._rows[name]),
            )
            for name in self._wanted.names
            if self._rows[name]
        }


class _Recorder:
    """A decoder whose outputs are added to a tally."""

    def __init__(self, graph: Graph, tally: _Tally) -> None:
        self._graph, self._tally = graph, tally
        self.component = graph.component

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        """Run, and add the statistics, which cover all tokens even if `last` is set."""
        out = self._graph.run(feeds)
        self._tally.add(out)
        return out

    def __getattr__(self, name: str) -> Any:
        """Leave the rest to the graph."""
        return getattr(self._graph, name)


def _no_past(component: Component) -> dict[str, Array]:
    """Make the empty state of one row."""
    sizes = {"batch": 1, "past": 0}
    specs = {spec.name: spec for spec in component.inputs}
    found = {}
    for _, into in component.state:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in specs[into].shape]
        found[into] = np.zeros(shape, specs[into].dtype)
    return found


class _Stored:
    """The values of each sample, read from a file: a mapped file would count as memory."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._places: list[tuple[int, tuple[int, ...]]] = []  # offset in bytes, shape
        self._end_bytes = 0
        file.write_bytes(b"")

    def __len__(self) -> int:
        return len(self._places)

    def append(self, row: Array) -> None:
        """Add one sample's values, with a leading axis: 1, or its picture's number of tiles."""
        self._dtype = row.dtype
        self._places.append((self._end_bytes, row.shape))
        self._end_bytes += row.nbytes
        with self._file.open("ab") as stream:
            stream.write(np.ascontiguousarray(row).data)

    def at(self, i: int) -> Array:
        """Return the values of sample i as they were added."""
        offset, shape = self._places[i]
        return np.fromfile(self._file, self._dtype, math.prod(shape), offset=offset).reshape(shape)
