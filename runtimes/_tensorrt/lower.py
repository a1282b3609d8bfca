"""From a portable graph to one that a version of TensorRT parses, with its types in the graph.

    Gelu                  below 10.6    x * (1 + Erf(x / sqrt 2)) / 2, or tanh's approximation
    CumSum of integers    always        Cast -> CumSum -> Cast: it sums floats alone
    the same, recorded    below 10.8    a sum of pairs: its parser makes a loop of CumSum
    Clip of integers      always        Max -> Min: it clips floats alone
    Shape from and to     always        Shape -> Slice: 8.6 passes over both and says nothing
    no zero point         8.6           a zero: its parser reads one, be it there or not
    int8 weights          8.6           float32, rounded in the graph beside rounded activations
    opset 18 and above    8.6           opset 17: axes of reductions become attributes
    a decoder's softmax   8.6           a Relu behind it, which keeps a wrong kernel away

float16 is written into the graph, since TensorRT 11 knows no other way (and 10 takes it); a graph
that a scheme has typed keeps its types.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmedge.graphs.edit import constant, replace
from vlmedge.graphs.half import halve_state, is_typed
from vlmedge.shelves.build_options import Precision

from .._half import halve
from .cumsum import SUMS_AT_ONCE, is_over_last_axis, sum_in_float, sum_of_pairs
from .operators import Version, names, operators
from .softmax_guard import keep_apart
from .unquantize import restored

_FLOAT = ir.DataType.FLOAT
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_LAST = 2**31 - 1  # more than there are axes, and an INT32
_REDUCTIONS = names(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare"
)


def lower(
    model: ir.Model,
    version: Version,
    precision: Precision,
    state: Collection[tuple[str, str]] = (),
    exact: Collection[str] = (),
    *,
    record: bool = False,
) -> bool:
    """Make a graph fit for a version, in place; tell whether anything changed.

    Args:
        model: A portable graph; its weights are not read, but for scales.
        version: TensorRT's.
        precision: Number format that float layers compute in.
        state: Pairs (output, the input that it becomes) that never leave the device; they become
            float16 too.
        exact: Nodes that stay float32, by the name of their first output.
        record: Whether its steps are to be recorded, as those with a loop cannot be.
    """
    table = operators(version)
    changed = False
    for node in list(model.graph):
        dtype = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
        if node.op_type == "Gelu" and "Gelu" not in table.types:
            replace([node], _gelu(model.graph, node))
        elif node.op_type == "CumSum" and dtype in _INTEGERS:
            if record and version < SUMS_AT_ONCE and is_over_last_axis(node):
                replace([node], sum_of_pairs(model.graph, node))
            else:
                sum_in_float(model.graph, node, dtype)
        elif node.op_type == "Clip" and dtype in _INTEGERS:
            replace([node], _bounds(node))
        elif node.op_type == "Shape" and {"start", "end"} & set(node.attributes):
            replace([node], _part_of_shape(model.graph, node))
        else:
            continue
        changed = True
    if version < (10, 0):  # it computes in float16 by a flag, which strong typing has replaced
        changed = _to_opset_17(model) or changed
        changed = _weights_in_float(model.graph) or changed
        changed = _add_zero_points(model.graph) or changed
        changed = (bool(state) and keep_apart(model)) or changed
    elif precision == "float16" and not is_typed(model):
        halve(model, {name for pair in state for name in pair}, exact)
        changed = True
    if is_typed(model):
        changed = halve_state(model, state) or changed
    if changed:
        RemoveUnusedNodesPass()(model)
    return changed


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
        return constant(graph, f"{prefix}.c{len(graph.initializers)}", array)

    if gelu.attributes.get_string("approximate", "none") == "tanh":
        cube = add("Mul", add("Mul", x, x), x)
        inner = add("Add", x, add("Mul", cube, number(0.044715)))
        bent = add("Tanh", add("Mul", inner, number(math.sqrt(2 / math.pi))))
    else:
        bent = add("Erf", add("Mul", x, number(math.sqrt(0.5))))
    add("Mul", add("Mul", x, number(0.5)), add("Add", bent, number(1.0)))
    return nodes


def _bounds(clip: ir.Node) -> list[ir.Node]:
    """Write a Clip as x -> Max with its lower bound -> Min with its upper bound; either may lack.

    Where the bounds cross, both give the upper one (ONNX's Clip, opset 13).
    """
    x = clip.inputs[0]
    assert x is not None
    prefix = str(clip.name or clip.outputs[0].name)
    nodes: list[ir.Node] = []
    for kind, bound in zip(("Max", "Min"), list(clip.inputs)[1:], strict=False):
        if bound is None:
            continue
        node = ir.Node("", kind, [x, bound], name=f"{prefix}.{kind}")
        x = node.outputs[0]
        x.name, x.type = f"{prefix}.{kind}.value", clip.outputs[0].type
        x.shape = clip.outputs[0].shape
        nodes.append(node)
    return nodes or [ir.Node("", "Identity", [x], name=f"{prefix}.Identity")]


def _part_of_shape(graph: ir.Graph, shape: ir.Node) -> list[ir.Node]:
    """Write Shape(start, end) as the whole shape and a Slice of it.

    Seen on 8.6.0: a class token that was expanded to Shape(end=1) became one of all axes.
    """
    name = str(shape.name or shape.outputs[0].name)
    whole = ir.Node("", "Shape", [shape.inputs[0]], name=f"{name}.whole")
    value = whole.outputs[0]
    value.name, value.type = f"{name}.whole", shape.outputs[0].type
    bounds = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", _LAST)
    constants = [
        constant(graph, f"{name}.{what}", np.array([number], np.int64))
        for what, number in zip(("start", "end", "axis"), (*bounds, 0), strict=True)
    ]
    return [whole, ir.Node("", "Slice", [value, *constants], name=f"{name}.part")]


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


def _weights_in_float(graph: ir.Graph) -> bool:
    """Have weights as float32: 8.6.0 ends a build that meets int8 constants; seen on a GPU.

        W int8 -> DequantizeLinear    =>    W float32 -> QuantizeLinear -> DequantizeLinear

    Without quantized activations there is no integer product, and only W in float32 is left.
    """
    stored = [
        (node, source)
        for node in graph
        if node.op_type == "DequantizeLinear"
        and (source := node.inputs[0]) is not None
        and source.const_value is not None
    ]
    for node, source in stored:
        out, weight = node.outputs[0], restored(graph, node, source)
        if not all(_is_beside_rounded(use.node, out) for use in out.uses()):
            out.replace_all_uses_with(weight)
            graph.remove(node, safe=True)
            continue
        rounded = ir.Node(
            "",
            "QuantizeLinear",
            [weight, *node.inputs[1:]],
            [ir.AttrInt64("axis", node.attributes.get_int("axis", 1))],
            name=f"{node.name}.quantize",
        )
        made = rounded.outputs[0]
        made.name, made.type, made.shape = f"{source.name}.rounded", source.type, source.shape
        graph.insert_before(node, rounded)
        node.replace_input_with(0, made)
    return bool(stored)


def _is_beside_rounded(node: ir.Node, weight: ir.Value) -> bool:
    """Return whether all that a node reads beside a weight comes from DequantizeLinear."""
    others = [value for value in node.inputs if value is not None and value is not weight]
    producers = [value.producer() for value in others]
    return bool(others) and all(
        producer is not None and producer.op_type == "DequantizeLinear" for producer in producers
    )


def _add_zero_points(graph: ir.Graph) -> bool:
    """Give a zero to every Q and DQ that leaves it out; seen on 8.6.0."""
    bare = [n for n in graph if n.op_type in _ROUNDING and len(n.inputs) < 3]
    for node in bare:
        values = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        scale = node.inputs[1]
        assert values is not None and values.dtype is not None and scale is not None
        sizes = () if scale.shape is None else scale.shape.numpy()
        name = f"{scale.name}.zero"
        zero = graph.initializers.get(name) or constant(
            graph, name, np.zeros(sizes, values.dtype.numpy())
        )
        node.resize_inputs(3)
        node.replace_input_with(2, zero)
    return bool(bare)
