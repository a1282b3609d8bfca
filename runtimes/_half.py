"""float16 written into a graph, for engines that take the types as they stand.

Products, convolutions and what lies between them become float16; sums of squares, exponentials and
what follows them directly stay float32. Weights and scales are cast when they are written.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from vlmedge.arrays import Array

from ._tensorrt.operators import names
from ._tensorrt.versions import BeyondHalfError

HALF_MAX = 65504.0
HALF_NORMAL = 2.0**-14  # below it a float16 loses digits
# What reaches MASK stands for "never", as float32's -3.4e38 does in an attention mask, and becomes
# MASKED: far enough from any logit, and adding one to it stays finite, so that a row without any
# key gives an even distribution and not nan. Below it is a number, which must stay what it is.
MASK, MASKED = 1e30, 3e4

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_EXACT = names(
    "Cast CastLike Constant ConstantOfShape CumSum Exp Log Pow RMSNormalization Range Reciprocal "
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd ReduceSum "
    "ReduceSumSquare Sqrt"
)
# Which input is the scale of numbers that are none themselves.
SCALES = {"QuantizeLinear": 1, "DequantizeLinear": 1, "MatMulNBits": 2}
_BOUNDED = names("Clip Max Min")  # where 3.4e38 stands for "no bound", and 3e4 would be one
_FOLLOWING = names("Abs Add Clip Div Max Min Mul Neg Sigmoid Sub")


def is_typed(model: ir.Model) -> bool:
    """Tell whether a scheme has chosen float16 already, and float32 where it must be."""
    return any(value.dtype == _HALF for node in model.graph for value in node.outputs)


def halve(model: ir.Model, state: Collection[str] = (), exact: Collection[str] = ()) -> None:
    """Rewrite a graph to float16, in place; its inputs and outputs stay float32.

    Args:
        model: A float32 graph.
        state: Inputs and outputs that never leave the device; they become float16 too.
        exact: Nodes that stay float32 whatever they are, by the name of their first output.
    """
    _Halver(model, frozenset(state), frozenset(exact)).run()


class _Halver:
    """Rewrite one graph to float16; every value is cast at most once each way."""

    def __init__(self, model: ir.Model, state: frozenset[str], exact: frozenset[str]) -> None:
        self._graph = model.graph
        self._state = state
        self._exact = exact
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
        if node.outputs[0].name in self._exact or _has_no_half(node):
            return False
        if node.op_type in SCALES:
            return self._scale_fits(node, SCALES[node.op_type])
        if node.op_type in _EXACT or any(a.type == ir.AttributeType.GRAPH for a in _attrs(node)):
            return False
        if node.op_type in _FOLLOWING:
            return not any(self._is_exact(value) for value in node.inputs if value is not None)
        return True

    def _is_exact(self, value: ir.Value) -> bool:
        """Tell whether a value was computed in float32 on purpose."""
        return value.producer() is not None and value.dtype == _FLOAT

    def _scale_fits(self, node: ir.Node, place: int) -> bool:
        scale = node.inputs[place]
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
                node = cast(value, dtype, f"{value.name}.{dtype.name.lower()}")
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
        node = cast(value, dtype, name)
        self._graph.append(node)
        self._graph.outputs[index] = node.outputs[0]


def _has_no_half(node: ir.Node) -> bool:
    """Tell whether a node computes with a single number that float16 does not have."""
    for value in node.inputs:
        tensor = ir.convenience.get_const_tensor(value) if value is not None else None
        if tensor is None or tensor.dtype != _FLOAT or tensor.size != 1:
            continue
        size = float(np.abs(tensor.numpy()).item())
        if size > HALF_MAX and (size < MASK or node.op_type in _BOUNDED):
            return True
    return False


def _halved(array: Array, name: str) -> Array:
    """Cast float32 to float16, masks to MASKED; refuse a weight that has no float16."""
    array = np.where(np.abs(array) >= MASK, np.sign(array) * MASKED, array)
    if (largest := np.abs(array).max(initial=0.0)) > HALF_MAX:
        raise BeyondHalfError(
            f"{name} reaches {largest:.1e}, beyond float16: build with --precision float32"
        )
    return array.astype(np.float16)


def cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    """Make a node that casts a value, with its type and shape settled; it is in no graph yet."""
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], name=f"{name}.cast")
    out = node.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(dtype), value.shape
    return node


def _attrs(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())
