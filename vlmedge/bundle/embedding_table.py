"""The token embedding table: the one weight that the host reads, a few rows at a time.

On disk: rows [vocabulary, width] in float32, float16 or int8; int8 rows are followed by their
float32 scales [vocabulary], and what a row stands for is row * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from vlmedge.arrays import Array, Ids
from vlmedge.bundle.weights import RowReader
from vlmedge.spec import EmbeddingTable

TABLE = "embed_tokens"  # its name where layers are named by pattern
ROWS_AT_ONCE = 1024  # of a table that is rounded: memory stays at some MiB
HALF_MAX = float(np.finfo(np.float16).max)
LEVELS = 127
ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class ReadRows:
    """A checkpoint's table that is left on disk: each row is read when it is looked up.

    Attributes:
        read: Reads some rows that lie together.
        shape: (vocabulary, width).
    """

    read: RowReader
    shape: tuple[int, int]

    def __getitem__(self, ids: Ids) -> NDArray[np.float32]:
        """Look up token ids, int64 [...], to float32 [..., width]."""
        found, places = np.unique(ids, return_inverse=True)
        rows = np.empty((len(found), self.shape[1]), np.float32)
        for row, i in zip(rows, found.tolist(), strict=True):
            row[:] = self.read(i, i + 1)[0]
        return rows[places.reshape(ids.shape)]

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return self.shape[0]


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """A table, opened; mapped from disk as a rule.

    Attributes:
        rows: [vocabulary, width] in the precision that is stored.
        scale: float32 [vocabulary] of int8 rows, or none.
    """

    rows: Array | ReadRows
    scale: NDArray[np.float32] | None = None

    def __getitem__(self, ids: Ids) -> NDArray[np.float32]:
        """Look up token ids, int64 [...], to float32 [..., width]."""
        found = np.asarray(self.rows[ids], dtype=np.float32)
        return found if self.scale is None else found * self.scale[ids][..., None]

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return len(self.rows)


def open_rows(folder: Path, table: EmbeddingTable) -> EmbeddingRows:
    """Map a bundle's table; rows are read when they are used."""
    file = folder / table.file
    rows = np.memmap(file, np.dtype(table.dtype), "r", table.offset_bytes, table.shape)
    if table.scale_offset_bytes is None:
        return EmbeddingRows(rows)
    # a few bytes a row: read at once
    scale = np.fromfile(file, np.float32, table.shape[0], offset=table.scale_offset_bytes)
    return EmbeddingRows(rows, scale)


def round_rows(folder: Path, table: EmbeddingTable, precision: str) -> EmbeddingTable:
    """Write a bundle's table again in fewer bits, some rows at a time.

    Args:
        folder: The bundle's.
        table: As it is, float32 or float16.
        precision: "float16", or "int8" with one scale a row.

    Returns:
        Its new description; the old one where the file is a graph's too, where it is no larger
        than that already, or where float16 would overflow.
    """
    if table.file.startswith("graphs/") or table.dtype == precision:
        return table
    before = open_rows(folder, table)
    if precision == "float16" and _largest(before) > HALF_MAX:
        return table
    file = folder / table.file
    partial = file.with_name(f".{file.name}.partial")
    scales = np.ones(len(before), np.float32)
    with partial.open("wb") as stream:
        for start in range(0, len(before), ROWS_AT_ONCE):
            piece = before[np.arange(start, min(start + ROWS_AT_ONCE, len(before)))]
            if precision == "float16":
                stream.write(piece.astype(np.float16).data)
                continue
            scale = np.abs(piece).max(axis=1) / LEVELS
            scale[scale == 0] = 1.0
            scales[start : start + len(piece)] = scale
            stream.write(np.rint(piece / scale[:, None]).astype(np.int8).data)
        place = None
        if precision == "int8":
            place = -(-stream.tell() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            stream.seek(place)
            stream.write(scales.data)
    partial.replace(file)
    return msgspec.structs.replace(table, offset_bytes=0, dtype=precision, scale_offset_bytes=place)


def _largest(rows: EmbeddingRows) -> float:
    starts = range(0, len(rows), ROWS_AT_ONCE)
    pieces = (rows[np.arange(i, min(i + ROWS_AT_ONCE, len(rows)))] for i in starts)
    return max(float(np.abs(piece).max()) for piece in pieces)
