"""The numbers of a model that decide how much memory and time it takes; no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmedge.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Part:
    """One component in numbers.

    Attributes:
        name: The component's.
        linear: Weights of its matrix products, which schemes make smaller.
        other: What stays in float: norms, biases, positions, the patch convolution.
        width: Of a row.
        inner: Of a row inside the MLP.
        layers: How many.
        heads: Of its attention; 0 for none.
        rows: Tokens or patches that it works on each run; none: as many as the prompt has.
        table: Numbers of a table inside the graph of which few rows are read.
        vocabulary: Weights of the projection to logits.
        logits: How many a row has.
        cache_width: Numbers that the key-value cache keeps of each token, all layers together.
        source_linear: Those of `linear` that work on what is looked at, not on its own rows.
        source_rows: How many rows that has.
        runs: How often a prompt takes it, at most: for each tile of a picture, or frame of a video.
    """

    name: str
    linear: int
    other: int
    width: int
    inner: int = 0
    layers: int = 0
    heads: int = 0
    rows: int | None = None
    table: int = 0
    vocabulary: int = 0
    logits: int = 0
    cache_width: int = 0
    source_linear: int = 0
    source_rows: int = 0
    runs: int = 1

    @property
    def parameters(self) -> int:
        """Count every weight of the graph."""
        return self.linear + self.other + self.table + self.vocabulary

    @property
    def writes(self) -> bool:
        """Whether it is the decoder of a loop."""
        return self.cache_width > 0


@dataclass(frozen=True, slots=True)
class Shape:
    """A whole model in numbers.

    Attributes:
        kind: The file in shapes/.
        parts: Its components.
        soft_rows: Rows of the prompt that are the picture's.
        max_positions: The most tokens that the decoder can have, or none without a decoder.
        host_table: Numbers of the token embedding table, which the host reads row by row.
        tied: Whether that table and the vocabulary's projection are one tensor.
        extra: Parameters that are in no graph.
    """

    kind: str
    parts: tuple[Part, ...]
    soft_rows: int = 0
    max_positions: int | None = None
    host_table: int = 0
    tied: bool = False
    extra: int = 0

    @property
    def parameters(self) -> int:
        """Count the checkpoint's parameters, each tensor once."""
        shared = self.host_table if self.tied else 0
        return sum(p.parameters for p in self.parts) + self.host_table + self.extra - shared

    @property
    def decoder(self) -> Part | None:
        """Return the component of the decode loop."""
        return next((part for part in self.parts if part.writes), None)


class Fields:
    """A part of config.json, whose gaps are filled as transformers fills them."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where

    def filled(self, defaults: Mapping[str, int]) -> Fields:
        """Return the same config with its gaps filled."""
        known = {name: self.size(name, value) for name, value in defaults.items()}
        return Fields({**self._config, **known}, self._where)

    def part(self, name: str) -> Fields:
        """Return a nested config; it must be there."""
        found = self._config.get(name)
        if not isinstance(found, dict):
            raise CheckpointError(f"{self._where} has no {name!r}: it is needed to plan")
        return Fields(found, f"{self._where}: {name}")

    def size(self, name: str, default: int | None) -> int:
        """Return a count; a value that is null counts as left out."""
        found = self._config.get(name)
        if found is None:
            found = default
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise CheckpointError(
                f"{self._where}: {name} is {found!r}: it must be a whole number of 1 or more"
            )
        return found

    def pairs(self, name: str, default: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return sizes, each of a height and a width."""
        found = self._config.get(name)
        if found is None:
            return list(default)
        for pair in found if isinstance(found, list) else [found]:
            if not isinstance(pair, list) or [type(n) for n in pair] != [int, int] or min(pair) < 1:
                raise CheckpointError(
                    f"{self._where}: {name} has {pair!r}: it must be a height and a width"
                )
        return [(height, width) for height, width in found]

    def text(self, name: str, default: str) -> str:
        """Return a word."""
        return str(self._config.get(name) or default)

    def flag(self, name: str, default: bool) -> bool:
        """Return a yes or no."""
        found = self._config.get(name)
        return default if found is None else bool(found)


def linear(inputs: int, outputs: int, bias: bool = True) -> tuple[int, int]:
    """Count a linear layer: (weights, bias)."""
    return inputs * outputs, outputs if bias else 0


def transformer(layers: int, width: int, inner: int) -> tuple[int, int]:
    """Count layers of attention and an MLP, with biases and two LayerNorms: (linear, other)."""
    parts = [linear(width, width)] * 4 + [linear(width, inner), linear(inner, width)]
    norms = 2 * 2 * width
    return layers * sum(w for w, _ in parts), layers * (sum(b for _, b in parts) + norms)


def vision_tower(fields: Fields, name: str, *, conv_bias: bool, norms: int, out: int = 0) -> Part:
    """Count a ViT with a class token.

    Args:
        fields: Its config, gaps filled.
        name: The component's.
        conv_bias: Whether the patch convolution has one.
        norms: LayerNorms outside of the layers.
        out: Width of the projection without bias that follows; 0 for none.
    """
    width, inner = fields.size("hidden_size", None), fields.size("intermediate_size", None)
    layers, patch = fields.size("num_hidden_layers", None), fields.size("patch_size", None)
    rows = (fields.size("image_size", None) // patch) ** 2 + 1
    weights, rest = transformer(layers, width, inner)
    convolution = 3 * patch * patch * width + (width if conv_bias else 0)
    rest += convolution + width + rows * width + norms * 2 * width
    heads = fields.size("num_attention_heads", None)
    return Part(name, weights + width * out, rest, width, inner, layers, heads, rows)
