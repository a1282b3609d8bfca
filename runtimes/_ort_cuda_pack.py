"""A weight of 4 or 8 bits in the layout of MatMulNBits: uint8 [out, blocks, bytes of a block]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ._ort_cuda_attention import CONTRIB

BLOCK = 128  # weights of one column that share a scale, where the scheme has one for the column
BLOCK_MIN = 16
STRIP = 32  # columns that are transposed at once, so that they stay in the CPU's cache


def pack(graph: ir.Graph, node: ir.Node, *, always: bool) -> ir.Node | None:
    """Make MatMulNBits of a MatMul on a restored weight.

    Args:
        graph: Where the weight is registered; what is packed twice is packed once.
        node: Any node.
        always: Take int8 weights too, not those of 4 bits alone.

    Returns:
        The node to put in its place, or none where it is not such a product.
    """
    if node.op_type != "MatMul" or node.domain or node.inputs[1] is None:
        return None
    dequantize = node.inputs[1].producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    weight, scale = dequantize.inputs[0], dequantize.inputs[1]
    if weight is None or scale is None or weight.const_value is None or scale.const_value is None:
        return None
    if len(weight.const_value.shape) != 2 or not _is_symmetric(dequantize):
        return None
    axis, rank = dequantize.attributes.get_int("axis", 1), len(scale.const_value.shape)
    by_column = weight.dtype == ir.DataType.INT8 and rank == 1 and axis in (1, -1)
    by_block = weight.dtype == ir.DataType.INT4 and rank == 2 and axis == 0
    if not by_block and not (by_column and always):
        return None
    bits = 4 if by_block else 8
    rows, columns = weight.const_value.shape.numpy()
    block = rows // scale.const_value.shape.numpy()[0] if by_block else _block(rows)
    packed, factors = _promised(graph, weight, scale, bits, block)
    numbers = {"K": rows, "N": columns, "bits": bits, "block_size": block}
    return ir.Node(
        CONTRIB,
        "MatMulNBits",
        [node.inputs[0], packed, factors],
        [ir.AttrInt64(name, number) for name, number in numbers.items()],
        name=node.name,
    )


def _promised(
    graph: ir.Graph, weight: ir.Value, scale: ir.Value, bits: int, block: int
) -> tuple[ir.Value, ir.Value]:
    """Register a packed weight and its scales, which are made when they are written.

    Values are offset so that they are unsigned; of two int4 in a byte the first is the lower half.
    """
    source, factor = weight.const_value, scale.const_value
    assert source is not None and factor is not None
    rows, columns = source.shape.numpy()
    blocks = -(-rows // block)
    zero = 1 << (bits - 1)

    def values() -> ir.Tensor[NDArray[np.uint8]]:
        full = np.full((columns, blocks * block), zero, np.uint8)  # padding adds nothing
        signed = source.numpy()
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

    shape = ir.Shape([columns, blocks, block * bits // 8])
    return (
        _promise(graph, f"{weight.name}.packed", ir.DataType.UINT8, shape, values),
        _promise(
            graph, f"{weight.name}.block_scale", ir.DataType.FLOAT,
            ir.Shape([columns * blocks]), scales,
        ),
    )  # fmt: skip


def _promise(
    graph: ir.Graph,
    name: str,
    dtype: ir.DataType,
    shape: ir.Shape,
    make: Callable[[], ir.TensorProtocol],
) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    value.const_value = ir.LazyTensor(make, dtype, shape, name=name)
    graph.register_initializer(value)
    return value


def _block(rows: int) -> int:
    """Return a power of two: `BLOCK`, or what holds a short column."""
    return min(BLOCK, max(BLOCK_MIN, 1 << (rows - 1).bit_length()))


def _is_symmetric(dequantize: ir.Node) -> bool:
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    if zero is None:
        return True
    return zero.const_value is not None and not zero.const_value.numpy().any()
