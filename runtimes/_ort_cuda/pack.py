"""MatMul on a weight of 4 or 8 bits as MatMulNBits, which keeps it small on the device."""

from __future__ import annotations

import onnx_ir as ir

from vlmedge.graphs.edit import is_symmetric

from .._ort import nbits
from .attention import CONTRIB


def pack(graph: ir.Graph, node: ir.Node, *, always: bool) -> ir.Node | None:
    """Make MatMulNBits of a MatMul on a dequantized weight.

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
    if len(weight.const_value.shape) != 2 or not is_symmetric(dequantize):
        return None
    axis, rank = dequantize.attributes.get_int("axis", 1), len(scale.const_value.shape)
    by_column = weight.dtype == ir.DataType.INT8 and rank == 1 and axis in (1, -1)
    by_block = weight.dtype == ir.DataType.INT4 and rank == 2 and axis == 0
    if not by_block and not (by_column and always):
        return None
    rows, columns = nbits.size(weight)
    packed, factors = nbits.pack(graph, weight, scale)
    block = nbits.block_of(weight, scale)
    numbers = {"K": rows, "N": columns, "bits": nbits.bits_of(weight), "block_size": block}
    return ir.Node(
        CONTRIB,
        "MatMulNBits",
        [node.inputs[0], packed, factors],
        [ir.AttrInt64(name, number) for name, number in numbers.items()],
        name=node.name,
    )
