"""Where the cache of recorded steps lies: state tensors of one shape in one place, with room.

    past     tensor 0 [rows, capacity, position]      tensor 1 ...        one block of memory
    present  tensor 0 [rows, capacity + 1, position]  tensor 1 ...        another

All rows of all tensors have the same distance, so one copy moves the newest position of a whole
cache, where BLIP-2's decoder has 64 tensors and each copy costs microseconds.
"""

from __future__ import annotations

import math

from .._cuda import Cuda
from .graph import _Buffer

ALIGNED_BYTES = 256  # what CUDA's own allocations are, and kernels may count on


class Room:
    """Memory for the past and the present of state tensors of one shape and type."""

    def __init__(self, cuda: Cuda, tensors: int, heads: int, position_bytes: int) -> None:
        """Take no memory yet.

        Args:
            cuda: The GPU.
            tensors: How many there are.
            heads: Rows of each for one text.
            position_bytes: Bytes of one position of one row.
        """
        self.position_bytes = position_bytes
        self.rows = self.capacity = 0
        self._cuda, self._tensors, self._heads = cuda, tensors, heads
        self._distance = 0  # rows from one tensor to the next
        self._past, self._present = _Buffer(cuda), _Buffer(cuda)

    @property
    def places(self) -> tuple[int, int]:
        """The addresses of both blocks."""
        return self._past.address, self._present.address

    def settle(self, batch: int, capacity: int, stream: int) -> None:
        """Make room for so many texts and positions; the past is zeros then.

        What was there is lost. Zeros, since nan times a weight of 0 is nan.
        """
        self.rows, self.capacity = batch * self._heads, capacity
        even = ALIGNED_BYTES // math.gcd(ALIGNED_BYTES, self.position_bytes)
        self._distance = -(-self.rows // even) * even
        size = self._tensors * self._distance * self.position_bytes
        self._present.hold(size * (capacity + 1))
        self._cuda.clear(self._past.hold(size * capacity), size * capacity, stream)

    def past(self, tensor: int) -> int:
        """Return the address of a tensor's past."""
        return self._past.address + tensor * self._distance * self._row(self.capacity)

    def present(self, tensor: int) -> int:
        """Return the address of a tensor's present."""
        return self._present.address + tensor * self._distance * self._row(self.capacity + 1)

    def enter(self, tensor: int, source: int, used: int, stream: int) -> None:
        """Copy a tensor of `used` positions into the past."""
        row = self._row(used)
        place, pitch = self.past(tensor), self._row(self.capacity)
        self._cuda.copy_rows(place, pitch, source, row, row, self.rows, stream)

    def leave(self, tensor: int, target: int, used: int, stream: int) -> None:
        """Copy the first `used` positions of a tensor's past to where nothing lies behind them."""
        row = self._row(used)
        place, pitch = self.past(tensor), self._row(self.capacity)
        self._cuda.copy_rows(target, row, place, pitch, row, self.rows, stream)

    def keep(self, used: int, stream: int) -> None:
        """Copy the last position of every present behind the `used` ones of its past."""
        pitch = self._row(self.capacity)
        self._cuda.copy_rows(
            self._past.address + self._row(used),
            pitch,
            self._present.address + pitch,
            self._row(self.capacity + 1),
            self.position_bytes,
            self._tensors * self._distance,
            stream,
        )

    def close(self) -> None:
        """Give it back."""
        self._past.close()
        self._present.close()

    def _row(self, positions: int) -> int:
        return positions * self.position_bytes
