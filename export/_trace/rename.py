"""Weights under the names that today's transformers gives them.

transformers 5 renamed parameters of old models (vit.encoder.layer.0.attention.attention.query is
vit.layers.0.attention.q_proj in memory) while every checkpoint on disk keeps its names; which
models are renamed differs between its releases.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from vlmedge.arrays import Array

from .._checkpoint.weights import RowReader, Weights, row_reader
from .torch_modules import Build, build_on_meta

Rules = Sequence[tuple[str, str]]
"""Regular expression -> replacement, applied one after the other, each wherever it fits."""

VIT: Rules = (  # transformers.conversion_mapping 5.23, "ViT-style vision models"
    (r"\.encoder\.layer\.", ".layers."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)


class Respelled:
    """Tensors on disk under the names of the modules that need them."""

    def __init__(self, weights: Weights, rules: Rules, needed: Collection[str]) -> None:
        """Rename what `needed` does not know as it is.

        Args:
            weights: As they lie on disk.
            rules: From the disk's names to the modules'.
            needed: The modules' names.
        """
        self._weights = weights
        self._sources = {
            name if name in needed else _respell(name, rules): name for name in weights.shapes()
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        shapes = self._weights.shapes()
        return {name: shapes[source] for name, source in self._sources.items()}

    def dtype(self, name: str) -> str:
        """Return the dtype on disk."""
        return self._weights.dtype(self._sources[name])

    def read(self, name: str) -> Array:
        """Read one tensor as float32 and refuse NaN."""
        return self._weights.read(self._sources[name])

    def row_reader(self, name: str) -> RowReader:
        """Return what reads rows of one tensor."""
        return row_reader(self._weights, self._sources[name])


def respell(weights: Weights, rules: Rules, builds: Mapping[str, Build]) -> Respelled:
    """Rename weights to what the modules of `builds` call them."""
    needed: set[str] = set()
    for build in builds.values():
        module, _ = build_on_meta(build)
        needed |= {name for name, _ in module.named_parameters()}
    return Respelled(weights, rules, needed)


def _respell(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
