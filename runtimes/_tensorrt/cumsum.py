"""Sums over what came before, which parsers before 10.8 make loops of.

Source: the importer of CumSum in onnx-tensorrt before it had addCumulative. An engine with a loop
cannot be recorded (8.6.0: "condition: !isCapturing"), so one that is to be recorded gets a sum
without: the tiny LLaVA and BLIP-2 are recorded so, and give the same. The others keep the loop,
since 8.6.0 takes long to build OPT-2.7b's layers without it: four of them take 76 s with the loop,
and were not there after 250 s without, nor all 32 after 380 s.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmedge.graphs.edit import cast, constant

SUMS_AT_ONCE = (10, 8)  # the first version with ICumulativeLayer
_FLOAT, _INDEX = ir.DataType.FLOAT, ir.DataType.INT64


def sum_in_float(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    """Put Cast around a CumSum of integers; floats count exactly up to 2^24, more than positions.

    x int64 -> Cast float32 -> CumSum -> Cast int64
    """
    source, old = node.inputs[0], node.outputs[0]
    assert source is not None
    before = cast(source, _FLOAT, f"{source.name}.float")
    graph.insert_before(node, before)
    node.replace_input_with(0, before.outputs[0])
    after = cast(old, dtype, f"{old.name}.integer")
    old.replace_all_uses_with(after.outputs[0], replace_graph_outputs=True)
    after.replace_input_with(0, old)
    old.type = ir.TensorType(_FLOAT)
    graph.insert_after(node, after)


def is_over_last_axis(node: ir.Node) -> bool:
    """Return whether a CumSum gives the sum of x[0] to x[t] for each t of the last axis."""
    x, axis = node.inputs
    assert x is not None and axis is not None
    constant = ir.convenience.get_const_tensor(axis)
    others = [node.attributes.get_int(name, 0) for name in ("exclusive", "reverse")]
    if x.shape is None or constant is None or any(others):
        return False
    return int(constant.numpy().item()) in (-1, len(x.shape) - 1)


def sum_of_pairs(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """Write a CumSum over the last axis, of n, as sums of all x[s] with s <= t, at once for all t.

    x [..., n] -> Shape -> Gather -> Range -> Unsqueeze: s [1, n], t [n, 1] -> LessOrEqual [n, n]
               -> Unsqueeze [..., 1, n] -> Where(s <= t, x[s], 0) [..., n, n] -> ReduceSum [..., n]
    """
    x, old = node.inputs[0], node.outputs[0]
    assert x is not None and x.dtype is not None and x.shape is not None
    prefix, rank, dtype = str(node.name or old.name), len(x.shape), x.dtype
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value, dtype: ir.DataType, **attributes: int) -> ir.Value:
        made = ir.node(kind, list(inputs), attributes, name=f"{prefix}.{kind}.{len(nodes)}")
        nodes.append(made)
        out = made.outputs[0]
        out.name, out.type = f"{prefix}.pairs.{len(nodes)}", ir.TensorType(dtype)
        return out

    def index(what: str, number: int | list[int]) -> ir.Value:
        return constant(graph, f"{prefix}.{what}", np.array(number, np.int64))

    shape = add("Shape", x, dtype=_INDEX)
    length = add("Gather", shape, index("last", rank - 1), dtype=_INDEX)
    place = add("Range", index("from", 0), length, index("by", 1), dtype=_INDEX)
    s = add("Unsqueeze", place, index("row", [0]), dtype=_INDEX)
    t = add("Unsqueeze", place, index("column", [1]), dtype=_INDEX)
    counts = add("LessOrEqual", s, t, dtype=ir.DataType.BOOL)
    each = add("Unsqueeze", x, index("ends", [rank - 1]), dtype=dtype)
    nothing = constant(graph, f"{prefix}.nothing", np.zeros((), dtype.numpy()))
    counted = add("Where", counts, each, nothing, dtype=dtype)
    add("ReduceSum", counted, index("starts", [rank]), dtype=dtype, keepdims=0)
    return nodes
