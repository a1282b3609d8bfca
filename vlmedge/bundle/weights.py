"""Named tensors on disk: read one at a time, by position, with numpy alone.

safetensors files are read by position rather than mapped: a mapped 7.5 GB file counts as memory
of this process until the kernel takes it back, and a small machine's limits are about just that.
The header is 8 bytes of length and JSON, then the tensors in a row
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import msgspec
import numpy as np

from vlmedge.arrays import Array
from vlmedge.errors import CheckpointError

# numpy has no bfloat16: its bits are the upper half of a float32
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "uint16", "F64": "float64", "I64": "int64"}


Size = Annotated[int, msgspec.Meta(ge=0)]


class Weights(Protocol):
    """Named tensors on disk."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        ...

    def dtype(self, name: str) -> str:
        """Return the dtype on disk: float32, float16 or bfloat16."""
        ...

    def read(self, name: str) -> Array:
        """Read one tensor as float32 and refuse NaN."""
        ...


RowReader = Callable[[int, int], Array]
"""Reads a tensor's rows from the first number up to the second, as float32, and refuses NaN."""


@runtime_checkable
class ReadsRows(Protocol):
    """`Weights` that need not read the whole of a tensor for some rows of it."""

    def row_reader(self, name: str) -> RowReader:
        """Return what reads rows of one tensor."""
        ...


def row_reader(weights: Weights, name: str) -> RowReader:
    """Return what reads rows of one tensor; weights that cannot read it once, as a whole."""
    if isinstance(weights, ReadsRows):
        return weights.row_reader(name)
    whole = weights.read(name)
    return lambda start, stop: whole[start:stop]


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    offset_bytes: int
    dtype: str
    shape: tuple[int, ...]


class _Entry(msgspec.Struct, frozen=True):
    """A tensor's entry in the header of a file."""

    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


class SafeWeights:
    """The tensors of one or several safetensors files."""

    def __init__(self, files: list[Path]) -> None:
        self._places: dict[str, _Place] = {}
        for file in files:
            self._places.update(_header(file))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return {name: place.shape for name, place in self._places.items()}

    def dtype(self, name: str) -> str:
        """Return the dtype on disk: float32, float16, bfloat16, ..."""
        found = self._places[name].dtype
        return "bfloat16" if found == "BF16" else _DTYPES[found]

    def read(self, name: str) -> Array:
        """Read one tensor as float32 and refuse NaN."""
        return self._read(name, 0, math.prod(self._places[name].shape)).reshape(
            self._places[name].shape
        )

    def row_reader(self, name: str) -> RowReader:
        """Return what reads rows of one tensor, and no others."""
        return partial(self._rows, name)

    def _rows(self, name: str, start: int, stop: int) -> Array:
        count, *rest = self._places[name].shape
        width, stop = math.prod(rest), min(stop, count)
        return self._read(name, start * width, (stop - start) * width).reshape(-1, *rest)

    def _read(self, name: str, first: int, count: int) -> Array:
        """Read some of a tensor's numbers, flat."""
        place = self._places[name]
        dtype = np.dtype(_DTYPES[place.dtype])
        begin = place.offset_bytes + first * dtype.itemsize
        flat = np.fromfile(place.file, dtype, count, offset=begin)
        if flat.size != count:
            raise CheckpointError(f"{place.file} ends inside {name!r}: download it again")
        if place.dtype == "BF16":
            wide = flat.astype(np.uint32)
            wide <<= 16  # in place: a vocabulary's table is gigabytes
            flat = wide.view(np.float32)
        return finite(name, flat.astype(np.float32, copy=False))


def finite(name: str, flat: Array) -> Array:
    """Refuse NaN; min carries it, at one pass and no copy."""
    if flat.size and np.isnan(flat.min()):
        raise CheckpointError(f"weight {name!r} has NaN values: choose another checkpoint")
    return flat


def _header(file: Path) -> dict[str, _Place]:
    """Read where the tensors of one safetensors file lie, and that they lie inside it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{file} is not a safetensors file: download it again")
        try:
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            found = {name: msgspec.convert(entry, _Entry) for name, entry in entries.items()}
        except (ValueError, AttributeError, RecursionError):
            raise CheckpointError(f"{file} has a broken header: download it again") from None
    places = {}
    for name, entry in found.items():
        begin, end = entry.data_offsets
        if 8 + length + end > size:
            raise CheckpointError(f"{file} ends inside {name!r}: download it again")
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{file}: {name!r} is {entry.dtype}: only {', '.join(_DTYPES)} are read"
            )
        if math.prod(entry.shape) * np.dtype(_DTYPES[entry.dtype]).itemsize != end - begin:
            raise CheckpointError(
                f"{file}: {name!r} is {entry.dtype}{list(entry.shape)} and has {end - begin} "
                "bytes: download it again"
            )
        places[name] = _Place(file, 8 + length + begin, entry.dtype, entry.shape)
    return places
