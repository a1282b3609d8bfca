"""The struct that every part of a spec is."""

from __future__ import annotations

from msgspec import Struct


class Data(Struct, frozen=True, forbid_unknown_fields=True):
    """Immutable, comparable, and strict about its fields."""
