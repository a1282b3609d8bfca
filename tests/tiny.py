"""The smallest random checkpoint of each kind, written by the family that exports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmedge.shelves.registry import FAMILIES

KINDS = {kind: family for family in FAMILIES.names() for kind in FAMILIES.literal(family, "TINY")}


def tiny(kind: str, folder: Path) -> Any:
    """Write a checkpoint and return its PyTorch model."""
    return FAMILIES[KINDS[kind]].tiny(kind, folder)
