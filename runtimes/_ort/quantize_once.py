"""Integer Linears that read the same x: it is quantized once for all of them.

    x -> DynamicQuantizeMatMul(W1)     =>     x -> DynamicQuantizeLinear -> MatMulIntegerToFloat(W1)
    x -> DynamicQuantizeMatMul(W2)                                     '--> MatMulIntegerToFloat(W2)

Queries, keys and values of ViT-B/16: 59.3 ms an image in place of 60.6. One product of joined
weights is no faster, since what comes of it must be parted again.

An x86 processor without VNNI adds up products of uint8 and int8 in 16 bits, which overflow. Its
weights are stored as uint8, whose products are added up in 32 bits:

    W int8 [in, out]     =>     W + 128 uint8 [in, out], zero point 128

ONNX Runtime's own option for it, session.x64quantprecision, does the same at each opening, beside
the int8 weight in memory, and cannot open a graph in which two nodes read one weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlmedge.graphs.edit import constant, promise

from .nbits import read

CONTRIB = "com.microsoft"
OFFSET = np.uint8(128)


def quantize_once(graph: ir.Graph, x: ir.Value, before: ir.Node) -> Sequence[ir.Value]:
    """Quantize x by its own range: uint8 of its shape, its scale and its zero point."""
    node = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3, name=f"{x.name}.once")
    types = ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8
    names = "uint8", "step", "zero"
    for value, dtype, name in zip(node.outputs, types, names, strict=True):
        value.name, value.type = f"{x.name}.dynamic.{name}", ir.TensorType(dtype)
    graph.insert_before(before, node)
    return node.outputs


def unsigned(graph: ir.Graph, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Register an int8 weight as uint8, made when it is written; and the zero point of all such.

    A weight that several nodes read is stored once.
    """
    source = weight.const_value
    assert source is not None

    def values() -> ir.Tensor[NDArray[np.uint8]]:
        return ir.Tensor(np.add(read(source).view(np.uint8), OFFSET))  # 256 wraps to 0

    shape = source.shape.numpy()
    moved = promise(graph, f"{weight.name}.unsigned", ir.DataType.UINT8, shape, values)
    return moved, _zero(graph)


def multiply(
    x: Sequence[ir.Value],
    weight: ir.Value,
    zero: ir.Value | None,
    scale: ir.Value,
    bias: ir.Value | None,
    name: str,
) -> ir.Node:
    """Multiply the quantized tensors, and dequantize the product."""
    values, step, x_zero = x
    inputs = [values, weight, step, scale, x_zero, zero, bias]
    return ir.Node(CONTRIB, "MatMulIntegerToFloat", inputs, name=name)


def _zero(graph: ir.Graph) -> ir.Value:
    """Return the zero point of unsigned weights, uint8 []; it is registered once."""
    if (name := "unsigned.zero") in graph.initializers:
        return graph.initializers[name]
    return constant(graph, name, np.array(OFFSET))
