"""From a portable graph to one that a version of TensorRT parses, with its types in the graph.

    Gelu                  below 10.6    x * (1 + Erf(x / sqrt 2)) / 2, or tanh's approximation
    CumSum of integers    always        Cast -> CumSum -> Cast: it sums floats alone
    opset 18 and above    8.6           opset 17: axes of reductions become attributes

float16 is written into the graph, since TensorRT 11 knows no other way (and 10 takes it): products,
convolutions and what lies between them become float16; sums of squares, exponentials and what
follows them directly stay float32. A graph that a scheme has typed keeps its types. Weights and
scales are cast when they are written.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmedge.building import Precision
from vlmedge.contracts import Array

from ._trt_api import BeyondHalfError
from ._trt_operators import Version, names, operators

HALF_MAX = 65504.0
HALF_NORMAL = 2.0**-14  # below it a float16 loses digits
# A mask of float32's -3.4e38 becomes this: far enough from any logit, and adding one to it stays
# finite, so that a row without any key gives an even distribution and not nan.
MASKED = 3e4

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_EXACT = names(
    "Cast CastLike Constant ConstantOfShape CumSum Exp Log Pow RMSNormalization Range Reciprocal "
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd ReduceSum "
    "ReduceSumSquare Sqrt"
)
_FOLLOWING = names("Abs Add Clip Div Max Min Mul Neg Sigmoid Sub")
_REDUCTIONS = frozenset(name for name in _EXACT if name.startswith("Reduce")) | {
    "ReduceMax",
    "ReduceMin",
}


def lower(
    model: ir.Model,
    version: Version,
    precision: Precision,
    state: Collection[str] = (),
) -> bool:
    """Make a graph fit for a version, in place; tell whether anything changed.

    Args:
        model: A portable graph; its weights are not read, but for scales.
        version: TensorRT's.
        precision: What float layers compute in.
        state: Inputs and outputs that never leave the device; they become float16 too.
    """
    table = operators(version)
    changed = False
    for node in list(model.graph):
        if node.op_type == "Gelu" and "Gelu" not in table.types:
            _replace(node, _gelu(model.graph, node))
            changed = True
        elif node.op_type == "CumSum" and node.inputs[0] is not None:
            dtype = node.inputs[0].dtype
            if dtype in (ir.DataType.INT64, ir.DataType.INT32):
                _sum_in_float(model.graph, node, dtype)
                changed = True
    if version < (10, 0):  # it computes in float16 by a flag, which strong typing has replaced
        changed = _to_opset_17(model) or changed
    elif precision == "float16" and not is_typed(model):
        _Halver(model, frozenset(state)).run()
        changed = True
    if changed:
        RemoveUnusedNodesPass()(model)
        _drop_unused(model)
    return changed


def is_typed(model: ir.Model) -> bool:
    """Tell whether a scheme has chosen float16 already, and float32 where it must be."""
    return any(value.dtype == _HALF for node in model.graph for value in node.outputs)


def _gelu(graph: ir.Graph, gelu: ir.Node) -> list[ir.Node]:
    """Write Gelu out; source: the ONNX specification of Gelu, opset 20.

    none:  x * 0.5 * (1 + Erf(x * sqrt(1/2)))
    tanh:  x * 0.5 * (1 + Tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))
    """
    x = gelu.inputs[0]
    assert x is not None
    prefix = str(gelu.name or gelu.outputs[0].name)
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value) -> ir.Value:
        assert x is not None
        node = ir.Node("", kind, inputs, name=f"{prefix}.{len(nodes)}")
        nodes.append(node)
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{prefix}.v{len(nodes)}", x.type, x.shape
        return out

    def number(value: float) -> ir.Value:
        assert x is not None and x.dtype is not None
        array = np.array(value, x.dtype.numpy())
        return _initializer(graph, f"{prefix}.c{len(graph.initializers)}", array)

    if gelu.attributes.get_string("approximate", "none") == "tanh":
        cube = add("Mul", add("Mul", x, x), x)
        inner = add("Add", x, add("Mul", cube, number(0.044715)))
        bent = add("Tanh", add("Mul", inner, number(math.sqrt(2 / math.pi))))
    else:
        bent = add("Erf", add("Mul", x, number(math.sqrt(0.5))))
    add("Mul", add("Mul", x, number(0.5)), add("Add", bent, number(1.0)))
    return nodes


def _sum_in_float(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    """Put Cast around a CumSum of integers; floats count exactly up to 2^24, more than positions.

    x int64 -> Cast float32 -> CumSum -> Cast int64
    """
    source, old = node.inputs[0], node.outputs[0]
    assert source is not None
    before = _cast(source, _FLOAT, f"{source.name}.float")
    graph.insert_before(node, before)
    node.replace_input_with(0, before.outputs[0])
    after = _cast(old, dtype, f"{old.name}.integer")
    old.replace_all_uses_with(after.outputs[0], replace_graph_outputs=True)
    after.replace_input_with(0, old)
    old.type = ir.TensorType(_FLOAT)
    graph.insert_after(node, after)


def _to_opset_17(model: ir.Model) -> bool:
    """Write reductions with axes as an attribute, as opset 17 has them all but ReduceSum."""
    if model.opset_imports.get("", 0) <= 17:
        return False
    for node in model.graph:
        if node.op_type not in _REDUCTIONS or node.op_type == "ReduceSum" or len(node.inputs) < 2:
            continue
        tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
        if tensor is None:
            continue  # the lint names it
        node.attributes["axes"] = ir.AttrInt64s("axes", tensor.numpy().tolist())
        node.attributes.pop("noop_with_empty_axes", None)
        node.resize_inputs(1)
    model.opset_imports[""] = 17
    return True


class _Halver:
    """Rewrite one graph to float16; every value is cast at most once each way."""

    def __init__(self, model: ir.Model, state: frozenset[str]) -> None:
        self._graph = model.graph
        self._state = state
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        """Go through the nodes in their order, so that the inputs of each are settled."""
        for taken in self._graph.inputs:
            if taken.dtype == _FLOAT and taken.name in self._state:
                taken.type = ir.TensorType(_HALF)
        for node in list(self._graph):
            half = self._is_half(node)
            for i, value in enumerate(node.inputs):
                if value is None or value.dtype not in (_FLOAT, _HALF):
                    continue
                if node.op_type == "Resize" and i > 0:  # its scales are float32 by definition
                    continue
                wanted = _HALF if half else _FLOAT
                if value.dtype != wanted:
                    node.replace_input_with(i, self._as(value, wanted))
            for made in node.outputs:
                if half and made.dtype == _FLOAT:
                    made.type = ir.TensorType(_HALF)
        for number, given in enumerate(list(self._graph.outputs)):
            wanted = _HALF if given.name in self._state else _FLOAT
            if given.dtype in (_FLOAT, _HALF) and given.dtype != wanted:
                self._give(number, given, wanted)

    def _is_half(self, node: ir.Node) -> bool:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return self._scale_fits(node)
        if node.op_type in _EXACT or any(a.type == ir.AttributeType.GRAPH for a in _attrs(node)):
            return False
        if node.op_type in _FOLLOWING:
            return not any(self._is_exact(value) for value in node.inputs if value is not None)
        return True

    def _is_exact(self, value: ir.Value) -> bool:
        """Tell whether a value was computed in float32 on purpose."""
        return value.producer() is not None and value.dtype == _FLOAT

    def _scale_fits(self, node: ir.Node) -> bool:
        scale = node.inputs[1]
        tensor = ir.convenience.get_const_tensor(scale) if scale is not None else None
        if tensor is None:
            return False
        factors = tensor.numpy().astype(np.float32)
        return bool((factors >= HALF_NORMAL).all() and (factors <= HALF_MAX).all())

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a value in another type: a new initializer, or a Cast right behind it."""
        key = (value, dtype)
        if key not in self._cast:
            if value.const_value is not None and value.is_initializer():
                self._cast[key] = self._weight(value)
            else:
                node = _cast(value, dtype, f"{value.name}.{dtype.name.lower()}")
                producer = value.producer()
                if producer is None:
                    self._graph.insert_before(self._graph[0], node)
                else:
                    self._graph.insert_after(producer, node)
                self._cast[key] = node.outputs[0]
        return self._cast[key]

    def _weight(self, value: ir.Value) -> ir.Value:
        """Promise a weight in float16; its data is read when it is written."""
        source = value.const_value
        assert source is not None
        name = f"{value.name}.float16"
        made = ir.Value(name=name, type=ir.TensorType(_HALF), shape=value.shape)
        made.const_value = ir.LazyTensor(
            lambda: ir.Tensor(_halved(source.numpy(), str(value.name))),
            _HALF,
            ir.Shape(source.shape.numpy()),
            name=name,
        )
        self._graph.register_initializer(made)
        return made

    def _give(self, index: int, value: ir.Value, dtype: ir.DataType) -> None:
        """Cast an output of the graph back, under its own name."""
        name = str(value.name)
        value.name = f"{name}.{'half' if dtype == _FLOAT else 'full'}"
        node = _cast(value, dtype, name)
        self._graph.append(node)
        self._graph.outputs[index] = node.outputs[0]


def _drop_unused(model: ir.Model) -> None:
    """Remove the initializers that no node reads any more."""
    graph = model.graph
    used = {value for node in graph.all_nodes() for value in node.inputs if value is not None}
    used |= set(graph.outputs)
    for name in [name for name, value in graph.initializers.items() if value not in used]:
        del graph.initializers[name]


def _halved(array: Array, name: str) -> Array:
    """Cast float32 to float16; refuse a weight that has no float16."""
    huge = np.abs(array) > HALF_MAX
    if huge.any():
        if array.size > 1:
            raise BeyondHalfError(
                f"{name} reaches {np.abs(array).max():.1e}, beyond float16: "
                "build with --precision float32"
            )
        array = np.where(huge, np.sign(array) * MASKED, array)
    return array.astype(np.float16)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], name=f"{name}.cast")
    out = node.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(dtype), value.shape
    return node


def _replace(old: ir.Node, nodes: list[ir.Node]) -> None:
    graph = old.graph
    assert isinstance(graph, ir.Graph)
    before, after = old.outputs[0], nodes[-1].outputs[0]
    graph.insert_before(old, nodes)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.remove(old, safe=True)


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)  # type: ignore[union-attr]
    graph.register_initializer(value)
    return value


def _attrs(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())
