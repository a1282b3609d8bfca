"""A checkpoint's weights as a stream: one tensor at a time, read when it is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from vlmedge.arrays import Array
from vlmedge.bundle.weights import RowReader, SafeWeights, Weights, finite, row_reader
from vlmedge.errors import CheckpointError

__all__ = [
    "PickleWeights",
    "RowReader",
    "SafeWeights",
    "Weights",
    "open_weights",
    "row_reader",
]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PickleWeights:
    """The tensors of .bin files, mapped by torch, which runs no code of theirs."""

    def __init__(self, files: list[Path], inside: str | None = None) -> None:
        """Open files.

        Args:
            files: Files in a layout that torch.save made.
            inside: Under which name a training's own file has the weights among other things.
        """
        import torch

        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch raises what the pickle makes it raise
                raise CheckpointError(f"{file} cannot be read as weights: {error}") from None
            self._tensors.update(found.get(inside, found))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> str:
        """Return the dtype on disk."""
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> Array:
        """Read one tensor as float32 and refuse NaN."""
        return finite(name, self._tensors[name].float().numpy())

    def row_reader(self, name: str) -> RowReader:
        """Return what reads rows of one tensor, and no others."""
        tensor = self._tensors[name]
        return lambda start, stop: finite(name, tensor[start:stop].float().numpy())


class WeightsView:
    """Weights seen through others: a tensor is one of theirs, as it is, or is made of theirs.

    A subclass says what differs: which tensors there are (`shapes`), where they lie (`source`), and
    which of them it makes (`made`), and how (`make`).
    """

    made: Collection[str] = ()

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return self._weights.shapes()

    def source(self, name: str) -> tuple[Weights, str]:
        """Return the weights where a tensor lies, and its name there; a made one has its dtype."""
        return self._weights, name

    def make(self, name: str) -> Array:
        """Make one of the tensors that are `made`, as float32."""
        raise NotImplementedError(name)

    def dtype(self, name: str) -> str:
        """Return the dtype on disk."""
        weights, stored = self.source(name)
        return weights.dtype(stored)

    def read(self, name: str) -> Array:
        """Read one tensor as float32 and refuse NaN."""
        if name in self.made:
            return self.make(name)
        weights, stored = self.source(name)
        return weights.read(stored)

    def row_reader(self, name: str) -> RowReader:
        """Return what reads rows of one tensor; those of a made one come out of the whole."""
        if name not in self.made:
            return row_reader(*self.source(name))
        whole = self.make(name)
        return lambda start, stop: whole[start:stop]


class Named(WeightsView):
    """Weights under other names than they have on disk."""

    def __init__(self, weights: Weights, sources: Mapping[str, str]) -> None:
        """Rename.

        Args:
            weights: As they lie on disk.
            sources: New name -> the one on disk, of every tensor.
        """
        super().__init__(weights)
        self._sources = sources

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by its new name."""
        shapes = self._weights.shapes()
        return {name: shapes[source] for name, source in self._sources.items()}

    def source(self, name: str) -> tuple[Weights, str]:
        """Return the weights on disk and a tensor's name there, which is known here too."""
        return self._weights, self._sources.get(name, name)


class Renamed(Named):
    """Weights of an older layout, under the names of the newer one."""

    def __init__(self, weights: Weights, prefixes: Mapping[str, str]) -> None:
        """Rename by how a name begins; the first prefix that fits counts.

        Args:
            weights: As they lie on disk.
            prefixes: Old beginning -> new one.
        """
        super().__init__(weights, {_renamed(name, prefixes): name for name in weights.shapes()})


class Joined(WeightsView):
    """Weights, some of which are there as one more: their rows one after the other."""

    def __init__(self, weights: Weights, joined: Mapping[str, tuple[str, ...]]) -> None:
        """Join those of the parts that are there.

        Args:
            weights: As they lie on disk.
            joined: New name -> its parts, in order.
        """
        super().__init__(weights)
        shapes = weights.shapes()
        there = {name: [part for part in parts if part in shapes] for name, parts in joined.items()}
        self.made = self._parts = {name: parts for name, parts in there.items() if parts}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        shapes = dict(self._weights.shapes())
        for name, parts in self._parts.items():
            rows = sum(shapes[part][0] for part in parts)
            shapes[name] = (rows, *shapes[parts[0]][1:])
        return shapes

    def source(self, name: str) -> tuple[Weights, str]:
        """Return where a tensor lies, or the first part of a joined one."""
        return self._weights, self._parts.get(name, [name])[0]

    def make(self, name: str) -> Array:
        """Read the parts, one after the other."""
        found = [self._weights.read(part) for part in self._parts[name]]
        return found[0] if len(found) == 1 else np.concatenate(found)


class Together(WeightsView):
    """Weights from several places, under their own names; of two with one name the later counts."""

    def __init__(self, *places: Weights) -> None:
        self._owners = {name: place for place in places for name in place.shapes()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        shapes = {id(place): place.shapes() for place in self._owners.values()}
        return {name: shapes[id(place)][name] for name, place in self._owners.items()}

    def source(self, name: str) -> tuple[Weights, str]:
        """Return the place that has a tensor."""
        return self._owners[name], name


class Summed(WeightsView):
    """Weights that were published as what they have more than others: a delta, and its base."""

    def __init__(self, delta: Weights, base: Weights, apart: Iterable[str] = ()) -> None:
        """Add, when a tensor is read.

        Args:
            delta: Weights to add.
            base: Weights that the delta is added to. A tensor may have fewer rows: those beyond are
                the delta's.
            apart: How names begin that only the delta has.
        """
        super().__init__(delta)
        self._base = base
        theirs, beginnings = base.shapes(), tuple(apart)
        for name, shape in delta.shapes().items():
            if name not in theirs and not name.startswith(beginnings):
                raise CheckpointError(
                    f"the base has no weight {name!r}, which the delta changes: give the delta's "
                    "own base"
                )
            other = theirs.get(name, shape)
            if other[0] > shape[0] or other[1:] != shape[1:]:
                raise CheckpointError(
                    f"weight {name!r} is {list(shape)} in the delta and {list(other)} in its base: "
                    "give the delta's own base"
                )
        self.made = theirs.keys() & delta.shapes().keys()

    def make(self, name: str) -> Array:
        """Add a tensor's base to its delta; a half-precision sum is rounded to half."""
        found, base = self._weights.read(name), self._base.read(name)
        found = np.concatenate([found[: len(base)] + base, found[len(base) :]])
        if self.dtype(name) == "float16":  # as those who published it do
            found = finite(name, found.astype(np.float16).astype(np.float32))
        return found


class Padded(WeightsView):
    """Weights, some of which get rows of zeros until they have as many as they need."""

    def __init__(self, weights: Weights, rows: Mapping[str, int]) -> None:
        """Pad.

        Args:
            weights: As they lie on disk.
            rows: How many a tensor must have at least, by name.
        """
        super().__init__(weights)
        self.made = self._rows = rows

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return {
            name: (max(shape[0], self._rows[name]), *shape[1:]) if name in self._rows else shape
            for name, shape in self._weights.shapes().items()
        }

    def make(self, name: str) -> Array:
        """Read a tensor, and put the rows behind it that it lacks."""
        found = self._weights.read(name)
        short = max(0, self._rows[name] - len(found))
        return np.pad(found, [(0, short), *[(0, 0)] * (found.ndim - 1)]) if short else found


class Cut(WeightsView):
    """Weights, some of which lose the rows behind those that are needed."""

    def __init__(self, weights: Weights, rows: Mapping[str, int]) -> None:
        """Cut.

        Args:
            weights: As they lie on disk.
            rows: How many a tensor has at most, by name.
        """
        super().__init__(weights)
        self._rows = rows

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return {
            name: (min(shape[0], self._rows[name]), *shape[1:]) if name in self._rows else shape
            for name, shape in self._weights.shapes().items()
        }

    def read(self, name: str) -> Array:
        """Read one tensor as float32 and refuse NaN."""
        found = self._weights.read(name)
        return found[: self._rows[name]] if name in self._rows else found

    def row_reader(self, name: str) -> RowReader:
        """Return what reads rows of one tensor, which are the first of those on disk."""
        read = row_reader(self._weights, name)
        return lambda start, stop: read(start, min(stop, self._rows.get(name, stop)))


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def open_weights(folder: Path, *, allow_pickle: bool) -> Weights:
    """Find the weights of a checkpoint folder, sharded or single, safetensors first."""
    safe = _files(folder, SINGLE, INDEX)
    if safe:
        return SafeWeights(safe)
    pickled = _files(folder, PICKLE, PICKLE_INDEX)
    if pickled and allow_pickle:
        return PickleWeights(pickled)
    if pickled:
        raise _refused(folder, pickled[0])
    raise CheckpointError(
        f"{folder} has no weights: add {SINGLE}, or {INDEX} with the files that it names"
    )


def open_weights_named(
    folder: Path, patterns: Iterable[str], *, allow_pickle: bool
) -> list[Weights]:
    """Find weight files beside a checkpoint's own, such as a projector's, by their names."""
    found: list[Weights] = []
    for pattern in patterns:
        if safe := sorted(folder.glob(f"{pattern}.safetensors")):
            found.append(SafeWeights(safe))
        if pickled := sorted(folder.glob(f"{pattern}.bin")):
            if not allow_pickle:
                raise _refused(folder, pickled[0])
            found.append(PickleWeights(pickled))
    return found


def open_saved(folder: Path, pattern: str, inside: str, *, allow_pickle: bool) -> Weights:
    """Find the weights, also in the one file that a training of its own kind has saved.

    Args:
        folder: The checkpoint.
        pattern: That file's name.
        inside: Under which name it has the weights, if it has other things too.
        allow_pickle: Whether to read it.
    """
    files = sorted(folder.glob(pattern))
    if not files or any(folder.glob("*.safetensors")):
        return open_weights(folder, allow_pickle=allow_pickle)
    if not allow_pickle:
        raise _refused(folder, files[0])
    return PickleWeights(files[:1], inside=inside)


def _refused(folder: Path, file: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} has its weights in a pickle file ({file.name}), which can run code "
        "when it is read: convert it to safetensors, or give --allow-pickle if you trust it"
    )


def _files(folder: Path, single: str, index: str) -> list[Path]:
    """Return the weight files that one layout names, or none when it is not there."""
    if (folder / index).is_file():
        try:
            data = json.loads((folder / index).read_bytes())
            names = sorted({os.fspath(name) for name in data["weight_map"].values()})
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{folder / index} cannot be read: download it again") from None
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise CheckpointError(
                f"{folder}: {index} names {outside[0]}, outside the folder: do not use it"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {missing[0]} is missing, and {index} names it: download it"
            )
        return [folder / name for name in names]
    return [folder / single] if (folder / single).is_file() else []
