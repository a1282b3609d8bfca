"""The numbers that a weight may be made of: int8, fp8 and int4, all symmetric."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlmedge.arrays import Array

from ._linear import Floats

INT8_LEVELS = 127  # -127..127: -128 stays unused
FP8_LARGEST = 448.0  # of E4M3 (Micikevicius et al. 2022, arXiv 2209.05433)
STRIP = 1024  # columns that are rounded at once, so that memory stays at a few tensors

# What a block's largest magnitude becomes: int4 holds -8..7, so 7 clips nothing, and clipping a
# little buys finer steps for the rest.
INT4_ENDS = (7.0, 7.5, 8.0, 8.75)


@dataclass(frozen=True)
class Int8Columns:
    """int8 with one scale a column: its largest magnitude over 127."""

    dtype = ir.DataType.INT8
    bits = 8

    @property
    def attributes(self) -> list[ir.Attr]:
        """Attributes of DequantizeLinear."""
        return [ir.AttrInt64("axis", 1)]

    def scale_shape(self, rows: int, columns: int) -> list[int]:
        """One a column."""
        return [columns]

    def scale(self, weight: Floats, importance: Floats | None = None) -> Floats:
        """Choose scales [out]."""
        return _column_amax(weight) / np.float32(INT8_LEVELS)

    def round(self, weight: Floats, scale: Floats) -> NDArray[np.int8]:
        """Round to int8 [in, out]."""
        found = np.empty(weight.shape, np.int8)
        for start in range(0, weight.shape[1], STRIP):
            strip = slice(start, start + STRIP)
            found[:, strip] = np.rint(weight[:, strip] / scale[strip])
        return found

    def restore(self, values: Array, scale: Array) -> Floats:
        """Return float32 [in, out]."""
        return np.asarray(values.astype(np.float32) * scale)


@dataclass(frozen=True)
class Fp8Columns:
    """E4M3 with one scale a column: its largest magnitude becomes 448."""

    dtype = ir.DataType.FLOAT8E4M3FN
    bits = 8

    @property
    def attributes(self) -> list[ir.Attr]:
        """Attributes of DequantizeLinear."""
        return [ir.AttrInt64("axis", 1)]

    def scale_shape(self, rows: int, columns: int) -> list[int]:
        """One a column."""
        return [columns]

    def scale(self, weight: Floats, importance: Floats | None = None) -> Floats:
        """Choose scales [out]."""
        return _column_amax(weight) / np.float32(FP8_LARGEST)

    def round(self, weight: Floats, scale: Floats) -> Array:
        """Round to float8_e4m3fn [in, out]."""
        return (weight / scale).astype(ml_dtypes.float8_e4m3fn)

    def restore(self, values: Array, scale: Array) -> Floats:
        """Return float32 [in, out]."""
        return np.asarray(values.astype(np.float32) * scale)


@dataclass(frozen=True)
class Int4Blocks:
    """int4 with one scale for every `block` rows of a column.

    Of a few candidate scales each block takes the one with the least squared error, weighted by
    how strong each input channel is where that is known (the clipping of AWQ, Lin et al. 2023,
    arXiv 2306.00978).
    """

    block: int = 128
    dtype = ir.DataType.INT4
    bits = 4

    @property
    def attributes(self) -> list[ir.Attr]:
        """Attributes of DequantizeLinear, opset 21."""
        return [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", self.block)]

    def scale_shape(self, rows: int, columns: int) -> list[int]:
        """One a block and column."""
        return [rows // self.block, columns]

    def scale(self, weight: Floats, importance: Floats | None = None) -> Floats:
        """Choose scales [in / block, out]."""
        rows, columns = weight.shape
        heavy = np.ones(rows, np.float32) if importance is None else importance + 1e-12
        heavy = heavy.reshape(-1, self.block, 1)
        scale = np.empty((rows // self.block, columns), np.float32)
        for start in range(0, columns, STRIP):
            strip = np.ascontiguousarray(weight[:, start : start + STRIP])
            blocks = strip.reshape(-1, self.block, strip.shape[1])
            scale[:, start : start + STRIP] = _search(blocks, heavy)
        return scale

    def round(self, weight: Floats, scale: Floats) -> Array:
        """Round to int4 [in, out]."""
        rows, columns = weight.shape
        scaled = weight.reshape(-1, self.block, columns) / scale[:, None]
        np.rint(scaled, out=scaled)
        np.clip(scaled, -8, 7, out=scaled)
        return scaled.reshape(rows, columns).astype(ml_dtypes.int4)

    def restore(self, values: Array, scale: Array) -> Floats:
        """Return float32 [in, out]."""
        return np.asarray(values.astype(np.float32) * np.repeat(scale, self.block, axis=0))


def _search(blocks: Floats, heavy: Floats) -> Floats:
    """Return the best of the candidate scales, [n, columns], of blocks [n, block, columns]."""
    amax = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
    amax[amax == 0] = 1.0
    least = np.full(amax.shape, np.inf, np.float32)
    best: Floats = amax / np.float32(INT4_ENDS[0])
    for end in INT4_ENDS:
        scale = amax / np.float32(end)
        off = blocks / scale[:, None]
        np.subtract(np.clip(np.rint(off), -8, 7), off, out=off)
        np.square(off, out=off)
        error = np.einsum("nbc,nb->nc", off, heavy[:, :, 0]) * np.square(scale)
        better = error < least
        np.copyto(best, scale, where=better)
        np.copyto(least, error, where=better)
    return np.asarray(best)


def _column_amax(weight: Floats) -> Floats:
    amax = np.maximum(weight.max(axis=0), -weight.min(axis=0))
    amax[amax == 0] = 1.0  # a column of zeros: any scale will do
    return np.asarray(amax, np.float32)
