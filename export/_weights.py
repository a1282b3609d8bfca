"""A checkpoint's weights as a stream: one tensor at a time, read when it is needed.

safetensors files are read by position rather than mapped: a mapped 7.5 GB file counts as memory
of this process until the kernel takes it back, and a small machine's limits are about just that.
The header is 8 bytes of length and JSON, then the tensors in a row
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vlmedge.contracts import Array
from vlmedge.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# numpy has no bfloat16: its bits are the upper half of a float32
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "uint16", "F64": "float64", "I64": "int64"}


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


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    offset_bytes: int
    dtype: str
    shape: tuple[int, ...]


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
        place = self._places[name]
        count = math.prod(place.shape)
        flat = np.fromfile(place.file, _DTYPES[place.dtype], count, offset=place.offset_bytes)
        if flat.size != count:
            raise CheckpointError(f"{place.file}: it ends inside {name!r}: download it again")
        if place.dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return _finite(name, flat.astype(np.float32, copy=False)).reshape(place.shape)


class PickleWeights:
    """The tensors of .bin files, mapped by torch, which runs no code of theirs."""

    def __init__(self, files: list[Path]) -> None:
        import torch

        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch raises what the pickle makes it raise
                raise CheckpointError(f"{file} cannot be read as weights: {error}") from None
            self._tensors.update(found)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> str:
        """Return the dtype on disk."""
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> Array:
        """Read one tensor as float32 and refuse NaN."""
        return _finite(name, self._tensors[name].float().numpy())


def open_weights(folder: Path, *, allow_pickle: bool) -> Weights:
    """Find the weights of a checkpoint folder, sharded or single, safetensors first."""
    safe = _files(folder, SINGLE, INDEX)
    if safe:
        return SafeWeights(safe)
    pickled = _files(folder, PICKLE, PICKLE_INDEX)
    if pickled and allow_pickle:
        return PickleWeights(pickled)
    if pickled:
        raise CheckpointError(
            f"{folder} has its weights in a pickle file ({pickled[0].name}), which can run code "
            "when it is read: convert it to safetensors, or give --allow-pickle if you trust it"
        )
    raise CheckpointError(f"{folder} has no weights: {SINGLE} or {INDEX} is missing")


def _files(folder: Path, single: str, index: str) -> list[Path]:
    """Return the weight files that one layout names, or none when it is not there."""
    if (folder / index).is_file():
        try:
            names = sorted(set(json.loads((folder / index).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise CheckpointError(f"{folder / index} cannot be read: download it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: {missing[0]} is missing, {index} names it")
        return [folder / name for name in names]
    return [folder / single] if (folder / single).is_file() else []


def _header(file: Path) -> dict[str, _Place]:
    """Read where the tensors of one safetensors file lie, and that they lie inside it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{file} is no safetensors file: download it again")
        try:
            entries = json.loads(stream.read(length))
        except ValueError:
            raise CheckpointError(f"{file} has a broken header: download it again") from None
    places = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise CheckpointError(f"{file}: it ends inside {name!r}: download it again")
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{file}: {name!r} is {entry['dtype']}: only {', '.join(_DTYPES)} are read"
            )
        places[name] = _Place(file, 8 + length + begin, entry["dtype"], tuple(entry["shape"]))
    return places


def _finite(name: str, flat: Array) -> Array:
    """Refuse NaN; min carries it, at one pass and no copy."""
    if flat.size and np.isnan(flat.min()):
        raise CheckpointError(f"weight {name!r} has NaN: the checkpoint is broken")
    return flat
