"""A checkpoint's weights with LoRA adapters merged in, one tensor at a time, when it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmedge.arrays import Array
from vlmedge.bundle.weights import RowReader, Weights, finite, row_reader
from vlmedge.errors import AdapterError
from vlmedge.lora.adapter import Adapter, Weighted, locate, misfit, read_bias


@dataclass(frozen=True, slots=True)
class _Edit:
    """One thing that an adapter does to one weight.

    Attributes:
        adapter: Which.
        weight: How much of it.
        path: The module's path in the adapter.
        bias: Whether the weight is the module's bias.
        turned: Whether the weight is stored [in, out].
    """

    adapter: Adapter
    weight: float
    path: str
    bias: bool
    turned: bool

    def add_to(self, base: Array) -> Array:
        """Return base + weight * delta, in fresh memory: `base` may be the file's own."""
        if self.bias:
            delta = read_bias(self.adapter, self.path)
            assert delta is not None
        else:
            delta = self.adapter.delta(self.path)
            delta = delta.T if self.turned else delta
        if self.weight != 1.0:
            delta = delta * np.float32(self.weight)
        return np.asarray(base + delta, np.float32)


class Merged:
    """`Weights` of a checkpoint as PEFT's merge_and_unload would leave them."""

    def __init__(
        self,
        weights: Weights,
        adapters: Sequence[Weighted],
        turned: Collection[str] = (),
        tied: Mapping[str, str] | None = None,
    ) -> None:
        """Find every adapter's modules among the weights; no weight is read yet.

        Args:
            weights: Weights of the base model.
            adapters: The adapters to merge, in this order.
            turned: Weights that are stored [in, out] (transformers' Conv1D).
            tied: Weights that may be absent, and the one that stands for them.

        Raises:
            AdapterError: An adapter does not fit.
        """
        self._weights = weights
        self._edits: dict[str, list[_Edit]] = {}
        self._replaced: dict[str, tuple[Adapter, str]] = {}
        self._apart: set[str] = set()  # replaced for one module alone
        self._shapes = dict(weights.shapes())
        self._tied = {
            name: source
            for name, source in (tied or {}).items()
            if name not in self._shapes and source in self._shapes
        }
        for chosen in adapters:
            self._place(chosen, turned)
        for name, source in self._tied.items():
            if source in self._apart and name not in self._replaced:
                adapter, _ = self._replaced[source]
                raise AdapterError(
                    f"{adapter.folder}: it replaces {source!r}, which {name!r} shares: "
                    "merge it with PEFT's merge_and_unload and export the result"
                )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Return the dtype on disk; what an adapter changes is float32."""
        changed = name in self._edits or name in self._replaced
        return "float32" if changed else self._weights.dtype(name)

    def read(self, name: str) -> Array:
        """Read one tensor as float32, merged, and refuse NaN."""
        if name in self._replaced:
            adapter, tensor = self._replaced[name]
            value = adapter.tensors.read(tensor)
        else:
            value = self._weights.read(name)
        for edit in self._edits.get(name, ()):
            value = finite(name, edit.add_to(value))
        return value

    def row_reader(self, name: str) -> RowReader:
        """Return what reads rows of one tensor; of a changed one, out of the whole."""
        if name in self._edits or name in self._replaced:
            whole = self.read(name)
            return lambda start, stop: whole[start:stop]
        return row_reader(self._weights, name)

    def _place(self, chosen: Weighted, turned: Collection[str]) -> None:
        """Find one adapter's modules."""
        adapter = chosen.adapter
        known = {**self._shapes, **{n: self._shapes[source] for n, source in self._tied.items()}}
        stems = {name.rpartition(".")[0] for name in known} - {""}
        owners = {path.rpartition(".")[0] for path in adapter.replaced}

        def shape(stem: str) -> tuple[int, ...] | None:
            found = known.get(f"{stem}.weight")
            return found[::-1] if found and f"{stem}.weight" in turned else found

        def fits(path: str, stem: str) -> bool:
            factors = adapter.modules.get(path)
            return factors is None or shape(stem) == factors.shape

        places = locate(adapter, [*adapter.modules, *sorted(owners - set(adapter.modules))],
                        stems, fits)  # fmt: skip
        for path, tensor in adapter.replaced.items():
            owner, _, leaf = path.rpartition(".")
            self._replace(chosen, path, f"{places[owner]}.{leaf}", tensor, known)
        for path, factors in adapter.modules.items():
            stem = places[path]
            name = f"{stem}.weight"
            if name not in known:
                raise misfit(adapter, path, "a Linear", stem, "not")
            if shape(stem) != factors.shape:
                raise misfit(adapter, path, list(factors.shape), name, list(known[name]))
            if name in self._tied and name not in self._replaced:
                raise AdapterError(
                    f"{adapter.folder}: module {path!r} shares its weight with "
                    f"{self._tied[name]!r}, which merging would change too: save the base model "
                    "with both weights"
                )
            edit = _Edit(adapter, chosen.weight, path, False, name in turned)
            self._edits.setdefault(name, []).append(edit)
            if factors.bias is not None:
                bias = f"{stem}.bias"
                if bias not in known:
                    raise AdapterError(
                        f"{adapter.folder}: module {path!r} has a bias, the model's {stem!r} has "
                        "none: give the adapter the base model that it was trained on"
                    )
                edit = _Edit(adapter, chosen.weight, path, True, False)
                self._edits.setdefault(bias, []).append(edit)

    def _replace(
        self,
        chosen: Weighted,
        path: str,
        name: str,
        tensor: str,
        known: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Take a whole weight from the adapter."""
        adapter = chosen.adapter
        got = adapter.tensors.shapes()[tensor]
        if known.get(name) != got:
            wanted = list(known[name]) if name in known else "not there"
            raise misfit(adapter, path, list(got), name, wanted)
        if chosen.weight != 1.0:
            raise AdapterError(
                f"{adapter.folder}: it replaces {name!r} as a whole, so its weight must be 1: "
                f"it is {chosen.weight:g}"
            )
        if name in self._replaced:
            raise AdapterError(
                f"{self._replaced[name][0].folder} and {adapter.folder} both replace {name!r}: "
                "merge one of them"
            )
        self._replaced[name] = (adapter, tensor)
        if path not in adapter.base:
            self._apart.add(name)
        self._shapes[name] = got
