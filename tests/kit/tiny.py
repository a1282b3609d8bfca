"""The smallest random checkpoint of each kind, written by the family that exports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmedge.checkpoints.resolve import built_ins
from vlmedge.shelves.registry import FAMILIES, SCHEMES

KINDS = {kind: family for family in FAMILIES.names() for kind in FAMILIES.literal(family, "TINY")}
FIRST = {FAMILIES.literal(family, "TINY")[0] for family in FAMILIES.names()}
QUICK_SCHEME = "int8"  # beside float32
SHOWN = ("tiny-blip2", "tiny-clip")  # the built-in checkpoints that `vlmedge demo` quantizes


def tiny(kind: str, folder: Path) -> Any:
    """Write a checkpoint and return its PyTorch model."""
    return FAMILIES[KINDS[kind]].tiny(kind, folder)


def kinds(*chosen: str) -> list[Any]:
    """List some kinds, or all, as a parameter; the quick tier has each family's first.

    What carries the mark `rest` by any of its parameters is left out there, see pyproject.toml.
    """
    return [_param(kind, kind in FIRST) for kind in chosen or KINDS]


def schemes(*chosen: str) -> list[Any]:
    """List some schemes, or all, as parameters; the quick tier has the one that is used most."""
    return [_param(scheme, scheme == QUICK_SCHEME) for scheme in chosen or SCHEMES.names()]


def trained() -> list[Any]:
    """List the built-in checkpoints as a parameter; the quick tier has those of the demo."""
    return [_param(name, name in SHOWN) for name in built_ins()]


def _param(value: str, first: bool) -> Any:
    marks = [pytest.mark.kinds] if first else [pytest.mark.kinds, pytest.mark.rest]
    return pytest.param(value, marks=marks)
