"""How a user wants a bundle quantized, as data: the scheme, and exceptions from it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from vlmedge.errors import InputError
from vlmedge.shelves.contracts import Scheme
from vlmedge.shelves.registry import SCHEMES, unknown
from vlmedge.spec.manifest import FLOAT

PRECISIONS = (FLOAT, "int8")


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to make a bundle smaller.

    Attributes:
        scheme: A file name in quantize/, or float32 for none.
        keep: Layers by the pattern of their weights' names (`*` and `?`), and the precision that
            they get instead: float32, or int8 where the scheme is int4. The token embedding table
            is "embed_tokens".
        options: Fields of the scheme's own, such as {"blocks": [32], "vocabulary": "int4"}; its
            file in quantize/ says what they are.
        target_drop: Layers go back to more bits, the largest error first, until no task has lost
            more than this: points of accuracy where answers are known, else hundredths of a nat
            of the first token's divergence.
        budget_mib: Layers get more bits, the largest error first, while the graphs fit this size.
        keep_slower: Keep a component small also where that made it slower on this machine.
    """

    scheme: str = FLOAT
    keep: dict[str, str] = {}
    options: dict[str, Any] = {}
    target_drop: float | None = None
    budget_mib: float | None = None
    keep_slower: bool = False

    def __post_init__(self) -> None:
        """Refuse options that contradict each other or are out of range."""
        if self.scheme != FLOAT and self.scheme not in SCHEMES.names():
            raise unknown("scheme", self.scheme, [FLOAT, *SCHEMES.names()])
        for pattern, precision in self.keep.items():
            if precision not in PRECISIONS:
                raise InputError(
                    f"keep {pattern!r} asks for {precision!r}: choose from {', '.join(PRECISIONS)}"
                )
        if self.options and self.scheme == FLOAT:
            raise InputError("scheme float32 has no options: leave them out")
        if self.target_drop is not None and not 0 <= self.target_drop < math.inf:
            raise InputError(
                f"target_drop is {self.target_drop:g}: it must be finite and at least 0"
            )
        if self.budget_mib is not None and not 0 < self.budget_mib < math.inf:
            raise InputError(f"budget_mib is {self.budget_mib:g}: it must be finite and above 0")
        if self.target_drop is not None and self.budget_mib is not None:
            raise InputError("target_drop and budget_mib exclude each other: give one of them")

    @property
    def mixes(self) -> bool:
        """Whether layers are ranked by their quantization error."""
        return self.target_drop is not None or self.budget_mib is not None

    def chosen(self) -> Scheme:
        """Return the scheme, with the options that are asked for.

        Raises:
            InputError: It has no such options.
        """
        scheme = SCHEMES[self.scheme]
        if not self.options:
            return scheme
        if not isinstance(scheme, msgspec.Struct):
            raise InputError(f"scheme {self.scheme} has no options: leave them out")
        try:
            return msgspec.convert(self.options, type(scheme))
        except msgspec.ValidationError as error:
            raise InputError(f"options of {self.scheme}: {error}") from None

    def precision(self, layer: str) -> str | None:
        """Return the precision that the patterns give one layer, or none if no pattern matches."""
        return self.kept([layer]).get(layer)

    def kept(self, layers: Iterable[str]) -> dict[str, str]:
        """Return the layers that the patterns match, with their precision."""
        return {
            layer: precision
            for layer in layers
            for pattern, precision in self.keep.items()
            if fnmatch.fnmatchcase(layer, pattern)
        }


def read_recipe(file: Path) -> Recipe:
    """Read a recipe from JSON, such as {"scheme": "int4", "keep": {"*.fc2.*": "int8"}}."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Recipe)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise InputError(f"{file} is no recipe: {error}") from None
