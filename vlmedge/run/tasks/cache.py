"""What was computed once and may be asked for again, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

Key = tuple[int, str]
"""Whose it is, and what."""


class ByteBudgetCache:
    """Values by key; what was used longest ago goes first when there are too many bytes."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._values: OrderedDict[Key, tuple[Any, int]] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: Key) -> Any:
        """Return a value, or none if it is not there (any more)."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def fits(self, size_bytes: int) -> bool:
        """Return whether a value of this size would be kept at all."""
        return size_bytes <= self._budget_bytes

    def put(self, key: Key, value: Any, size_bytes: int) -> None:
        """Keep a value in place of what has its key, if it fits."""
        self._remove(key)
        if not self.fits(size_bytes):
            return
        while self.size_bytes + size_bytes > self._budget_bytes:
            self._remove(next(iter(self._values)))
        self._values[key] = value, size_bytes
        self.size_bytes += size_bytes

    def drop(self, owner: int) -> None:
        """Forget all of one owner's."""
        for key in [key for key in self._values if key[0] == owner]:
            self._remove(key)

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
        self.size_bytes = 0

    def _remove(self, key: Key) -> None:
        _, size_bytes = self._values.pop(key, (None, 0))
        self.size_bytes -= size_bytes
