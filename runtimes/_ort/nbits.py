"""Weights of 4 or 8 bits in the layout of MatMulNBits: uint8 [out, blocks, bytes of a block]."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlmedge.arrays import Array
from vlmedge.graphs.edit import promise

BLOCK = 128  # weights of one column that share a scale, where the scheme has one for the column
BLOCK_MIN = 16
STRIP = 32  # columns that are transposed at once, so that they stay in the CPU's cache


def block_of(weight: ir.Value, scale: ir.Value) -> int:
    """Return int4's own, or for int8 a power of two: `BLOCK`, or what holds a short column."""
    rows, _ = size(weight)
    if bits_of(weight) == 4:
        return rows // size(scale)[0]
    return min(BLOCK, max(BLOCK_MIN, 1 << (rows - 1).bit_length()))


def bits_of(weight: ir.Value) -> int:
    """Return 4 or 8."""
    return 4 if weight.dtype == ir.DataType.INT4 else 8


def size(weight: ir.Value) -> tuple[int, int]:
    """Return rows and columns."""
    assert weight.const_value is not None
    rows, columns = weight.const_value.shape.numpy()
    return rows, columns


def pack(graph: ir.Graph, weight: ir.Value, scale: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Register a weight in this layout, and its scales, float32 [out * blocks].

    Both are made when they are written; what is packed twice is packed once. Values are offset so
    that they are unsigned; of two int4 in a byte the first is the lower half.
    """
    (rows, columns), block, bits = size(weight), block_of(weight, scale), bits_of(weight)
    blocks = -(-rows // block)
    source, factor = weight.const_value, scale.const_value
    assert source is not None and factor is not None
    zero = 1 << (bits - 1)

    def values() -> ir.Tensor[NDArray[np.uint8]]:
        full = np.full((columns, blocks * block), zero, np.uint8)  # padding adds nothing
        signed = read(source)
        for begin in range(0, columns, STRIP):
            strip = np.ascontiguousarray(signed[:, begin : begin + STRIP].astype(np.int8))
            np.add(strip.view(np.uint8).T, zero, out=full[begin : begin + STRIP, :rows])
        if bits == 4:
            full = np.bitwise_or(full[:, 0::2], np.left_shift(full[:, 1::2], np.uint8(4)))
        return ir.Tensor(full.reshape(columns, blocks, block * bits // 8))

    def scales() -> ir.Tensor[NDArray[np.float32]]:
        found = factor.numpy().astype(np.float32)
        if found.ndim == 2:
            return ir.Tensor(np.ascontiguousarray(found.T).ravel())
        return ir.Tensor(np.repeat(found, blocks))

    shape = (columns, blocks, block * bits // 8)
    return (
        promise(graph, f"{weight.name}.packed", ir.DataType.UINT8, shape, values),
        promise(graph, f"{weight.name}.block_scale", ir.DataType.FLOAT, [columns * blocks], scales),
    )


def read(tensor: ir.TensorProtocol) -> Array:
    """Read a tensor without mapping its file, which would count as memory of this process."""
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype == ir.DataType.INT4:
        return np.ascontiguousarray(tensor.numpy())
    dtype, shape = tensor.dtype.numpy(), tensor.shape.numpy()
    flat = np.fromfile(tensor.path, dtype, tensor.size, offset=tensor.offset or 0)
    return flat.reshape(shape)
