"""The numbers of a model that decide how much memory and time it takes; no weights, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmedge.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Part:
    """One component in numbers.

    Attributes:
        name: The component's.
        linear: Weights of its matrix products, which schemes make smaller.
        other: Weights that stay in float: norms, biases, positions, the patch convolution.
        width: Width of a row.
        inner: Width of a row inside the MLP.
        layers: How many.
        heads: Heads of its attention; 0 for none.
        rows: Tokens or patches that it works on each run; none: as many as the prompt has.
        table: Numbers of a table inside the graph of which few rows are read.
        vocabulary: Weights of the projection to logits.
        logits: How many a row has.
        cache_width: Numbers that the key-value cache keeps of each token, all layers together.
        source_linear: Those of `linear` that work on what is looked at, not on its own rows.
        source_rows: How many rows that has.
        runs: How often a prompt takes it, at most: for each tile of a picture, or frame of a video.
        held: Size of its constant inputs, in numbers: keys and values of the rows it looks at.
        keys: Rows that one of them looks at, or none: all.
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
    held: int = 0
    keys: int | None = None

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
        shared: Parameters that are in two graphs.
    """

    kind: str
    parts: tuple[Part, ...]
    soft_rows: int = 0
    max_positions: int | None = None
    host_table: int = 0
    tied: bool = False
    extra: int = 0
    shared: int = 0

    @property
    def parameters(self) -> int:
        """Count the checkpoint's parameters, each tensor once."""
        twice = self.shared + (self.host_table if self.tied else 0)
        return sum(p.parameters for p in self.parts) + self.host_table + self.extra - twice

    @property
    def decoder(self) -> Part | None:
        """Return the component of the decode loop."""
        return next((part for part in self.parts if part.writes), None)


class Fields:
    """A part of config.json, whose gaps are filled as transformers fills them."""

    def __init__(self, config: Mapping[str, Any], where: str, folder: Path | None = None) -> None:
        """Take what a file says.

        Args:
            config: Its object.
            where: Name of the file, for errors.
            folder: Folder of the file, for configs that name other folders.
        """
        self._config = config
        self._where = where
        self._folder = folder

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

    def maybe(self, name: str) -> Fields | None:
        """Return a nested config, or none where it is left out."""
        return None if self._config.get(name) is None else self.part(name)

    def elsewhere(self, name: str) -> Fields | None:
        """Return the config.json in the folder that a field names, or none without that field."""
        place = self._config.get(name)
        if place is None:
            return None
        file = (self._folder or Path()) / str(place) / "config.json"
        try:
            found: Any = json.loads(file.read_bytes())
        except OSError:
            raise CheckpointError(
                f"{file} is missing: {self._where} says that its {name} part lies there: "
                "put it there"
            ) from None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise CheckpointError(f"{file} is not a JSON object: download it again")
        return Fields(found, str(file), file.parent)

    def has_beside(self, name: str) -> bool:
        """Return whether a file lies beside this config.json."""
        return self._folder is not None and (self._folder / name).is_file()

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

    def whole(self, name: str, default: int) -> int:
        """Return a count that may be 0."""
        return 0 if self._config.get(name) == 0 else self.size(name, default or None)

    def sizes(self, name: str, default: Sequence[int]) -> list[int]:
        """Return several counts; one number stands for a list of it."""
        found = self._config.get(name)
        if found is None:
            return list(default)
        listed = found if isinstance(found, list) else [found]
        for number in listed:
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise CheckpointError(
                    f"{self._where}: {name} has {number!r}: it must be a whole number of 1 or more"
                )
        return listed

    def places(self, name: str, default: int) -> list[int]:
        """Return positions in a list, one or several; those below 0 count from its end."""
        found = self._config.get(name)
        listed = [default] if found is None else found if isinstance(found, list) else [found]
        for place in listed:
            if isinstance(place, bool) or not isinstance(place, int):
                raise CheckpointError(f"{self._where}: {name} has {place!r}: it must be a number")
        return listed

    def ratio(self, name: str, default: float) -> float:
        """Return a factor."""
        found = self._config.get(name)
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, (int, float)) or found <= 0:
            raise CheckpointError(f"{self._where}: {name} is {found!r}: it must be above 0")
        return float(found)

    def entries(self, name: str, default: int) -> int:
        """Count what a nested object has, such as the names of labels."""
        found = self._config.get(name)
        return len(found) if isinstance(found, dict) else default

    def flags(self, name: str, default: Sequence[bool]) -> list[bool]:
        """Return several yes or no."""
        found = self._config.get(name)
        return list(default) if not isinstance(found, list) else [bool(flag) for flag in found]

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

    def names(self, name: str) -> list[str]:
        """Return a list of words."""
        return [str(word) for word in self._config.get(name) or []]

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


def vision_tower(
    fields: Fields,
    name: str,
    *,
    conv_bias: bool,
    norms: int,
    out: int = 0,
    class_tokens: int = 1,
    layers: int | None = None,
) -> Part:
    """Count a ViT.

    Args:
        fields: Its config, gaps filled.
        name: The component's.
        conv_bias: Whether the patch convolution has one.
        norms: LayerNorms outside of the layers.
        out: Width of the projection without bias that follows; 0 for none.
        class_tokens: Rows before the patches; DeiT has two, SigLIP none.
        layers: How many are used, or none: all.
    """
    width, inner = fields.size("hidden_size", None), fields.size("intermediate_size", None)
    patch = fields.size("patch_size", None)
    layers = fields.size("num_hidden_layers", None) if layers is None else layers
    rows = (fields.size("image_size", None) // patch) ** 2 + class_tokens
    weights, rest = transformer(layers, width, inner)
    if not fields.flag("qkv_bias", True):
        rest -= layers * 3 * width
    convolution = 3 * patch * patch * width + (width if conv_bias else 0)
    rest += convolution + class_tokens * width + rows * width + norms * 2 * width
    heads = fields.size("num_attention_heads", None)
    return Part(name, weights + width * out, rest, width, inner, layers, heads, rows)


def followed(part: Part, *layers: tuple[int, int]) -> Part:
    """Return a part with more linear layers, each (weights, bias), behind it."""
    return replace(
        part,
        linear=part.linear + sum(weights for weights, _ in layers),
        other=part.other + sum(bias for _, bias in layers),
    )
