"""The smallest random checkpoint of each kind, written by the family that exports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmedge.shelves.registry import FAMILIES, SCHEMES

KINDS = {kind: family for family in FAMILIES.names() for kind in FAMILIES.literal(family, "TINY")}
FIRST = {FAMILIES.literal(family, "TINY")[0] for family in FAMILIES.names()}
QUICK_SCHEME = "int8"  # beside float32


def tiny(kind: str, folder: Path) -> Any:
    """Write a checkpoint and return its PyTorch model."""
    return FAMILIES[KINDS[kind]].tiny(kind, folder)


def kinds() -> list[Any]:
    """List every kind as a parameter; the tier `kinds` has all, the quick one each family's first.

    What carries the mark `rest` by any of its parameters is left out there, see pyproject.toml.
    """
    return [_param(kind, kind in FIRST) for kind in KINDS]


def schemes(*chosen: str) -> list[Any]:
    """List some schemes, or all, as parameters; the quick tier has the one that is used most."""
    return [_param(scheme, scheme == QUICK_SCHEME) for scheme in chosen or SCHEMES.names()]


def _param(value: str, first: bool) -> Any:
    marks = [pytest.mark.kinds] if first else [pytest.mark.kinds, pytest.mark.rest]
    return pytest.param(value, marks=marks)
