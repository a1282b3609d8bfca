"""A quantized graph without its rounding, to be timed beside it.

    x -> QuantizeLinear -> DequantizeLinear -> MatMul        x -> MatMul
    W int8 -> DequantizeLinear ------------------^     =>    W float32 --^

Weights keep the values that they were rounded to; they are computed when they are written.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmedge.arrays import Array
from vlmedge.graphs.edit import promise


def is_rounded(model: ir.Model) -> bool:
    """Return whether activations are quantized; weights alone are quantized to save memory."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph)


def unround(model: ir.Model) -> None:
    """Take all Q/DQ out of a graph, in place."""
    graph = model.graph
    for node in [n for n in graph if n.op_type == "DequantizeLinear"]:
        source, out = node.inputs[0], node.outputs[0]
        assert source is not None
        producer = source.producer()
        if producer is not None and producer.op_type == "QuantizeLinear":
            kept = producer.inputs[0]
            assert kept is not None
        elif source.const_value is not None:
            kept = restored(graph, node, source)
        else:
            continue
        out.replace_all_uses_with(kept)
        graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)


def restored(graph: ir.Graph, node: ir.Node, source: ir.Value) -> ir.Value:
    """Promise the float32 weight that DequantizeLinear makes of a stored one."""
    tensor = source.const_value
    assert tensor is not None
    factors = [v.const_value.numpy() if v and v.const_value else None for v in node.inputs[1:]]
    scale, zero = (*factors, None)[:2]
    assert scale is not None
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)

    def make() -> ir.Tensor[Array]:
        return ir.Tensor(_dequantized(tensor.numpy(), scale, zero, axis, block))

    sizes = tensor.shape.numpy()
    return promise(graph, f"{source.name}.plain", ir.DataType.FLOAT, sizes, make)


def _dequantized(array: Array, scale: Array, zero: Array | None, axis: int, block: int) -> Array:
    """Compute (array - zero) * scale as ONNX's DequantizeLinear does: whole, by axis, by block."""

    def spread(factor: Array) -> Array:
        if block:
            return factor.repeat(block, axis).take(range(array.shape[axis]), axis)
        shape = [1] * array.ndim
        if factor.size > 1:
            shape[axis] = factor.size
        return factor.reshape(shape)

    values = array.astype(np.float32)
    if zero is not None:
        values -= spread(zero.astype(np.float32))
    return values * spread(scale.astype(np.float32))
