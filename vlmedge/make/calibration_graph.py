"""A graph with outputs that measure the tensors inside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmedge.spec import TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir


ROW_STEP = 7  # every 7th row of each picture is a candidate

_AMAX, _LENGTH, _SIZE, _CHANNELS, _SOME = (
    f".calibration.{name}" for name in ("amax", "length", "size", "channels", "rows")
)


def _figures(
    ir: Any, graph: ir.Graph, x: ir.Value, rows: bool
) -> Iterator[tuple[ir.Node, TensorSpec | None]]:
    """Make the nodes that compute one tensor's statistics, and return the outputs."""
    name = str(x.name)

    def typed(node: ir.Node, kind: Any, rank: int | None) -> ir.Node:
        value = node.outputs[0]
        value.type = ir.TensorType(kind)
        value.shape = None if rank is None else ir.Shape([None] * rank)
        return node

    scalar = [ir.AttrInt64("keepdims", 0)]
    if not rows:
        magnitude = typed(ir.Node("", "Abs", [x]), ir.DataType.FLOAT, None)
        yield magnitude, None
        amax = ir.Node("", "ReduceMax", [magnitude.outputs[0]], scalar)
        yield typed(amax, ir.DataType.FLOAT, 0), TensorSpec(name + _AMAX, "float32", ())
        return
    length = typed(ir.Node("", "ReduceL2", [x], scalar), ir.DataType.FLOAT, 0)
    yield length, TensorSpec(name + _LENGTH, "float32", ())
    size = typed(ir.Node("", "Size", [x]), ir.DataType.INT64, 0)
    yield size, TensorSpec(name + _SIZE, "int64", ())
    constants = {n: graph.initializers[f".calibration.{n}"] for n in ("from", "to", "axis", "step")}
    assert x.shape is not None
    width = int(str(x.shape[-1]))
    flat_shape = _constant(graph, f"{name}.calibration.shape", [-1, width])
    flat = typed(ir.Node("", "Reshape", [x, flat_shape]), ir.DataType.FLOAT, 2)
    yield flat, None
    some = typed(ir.Node("", "Slice", [flat.outputs[0], *constants.values()]), ir.DataType.FLOAT, 2)
    yield some, TensorSpec(name + _SOME, "float32", (f"{name}.rows", width))
    upright = typed(ir.Node("", "Abs", [flat.outputs[0]]), ir.DataType.FLOAT, 2)
    yield upright, None
    channels = typed(
        ir.Node("", "ReduceMax", [upright.outputs[0], constants["axis"]], scalar),
        ir.DataType.FLOAT,
        1,
    )
    yield channels, TensorSpec(name + _CHANNELS, "float32", (width,))


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    """Add an int64 constant to a graph."""
    import onnx_ir as ir

    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(name=name, const_value=tensor)
    value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape([len(numbers)])
    graph.register_initializer(value)
    return value
