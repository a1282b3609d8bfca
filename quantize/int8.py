"""INT8: symmetric weights per output channel, symmetric activations per tensor, explicit Q/DQ.

    x -> QuantizeLinear -> DequantizeLinear -> MatMul -> ...
                   W int8 -> DequantizeLinear --^

Encoders get both; a decoder only the weights, since one token at a time is bound by memory and
its activations have the outliers. Zero points are 0, as TensorRT wants. Embeddings, norms, softmax,
convolutions and the last projection stay float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlmedge.contracts import Array, Range
from vlmedge.manifest import KeptLayer
from vlmedge.spec import Component

LEVELS = 127  # symmetric: -127..127, -128 stays unused

# Rounding to steps of amax/127 leaves noise of step/sqrt(12). Above this share of the signal's rms
# a layer's activations stay float: that is amax > 44 rms, where ordinary layers have 4 to 20.
NOISE_LIMIT = 0.10


class Int8:
    """The scheme `int8`."""

    def rewrite(self, component: Component, model: ir.Model) -> list[KeptLayer]:
        """Put int8 weights behind DequantizeLinear, in place; see `Scheme.rewrite`."""
        kept = []
        outputs = {value.name for value in model.graph.outputs}
        for node in list(model.graph):
            weight = _float_weight(node)
            if weight is None:
                continue
            if not component.state and _ends(node, outputs):
                reason = "the last projection: its error would go straight into the output"
                kept.append(KeptLayer(component.name, str(weight.name), reason))
                continue
            _quantize_weight(model.graph, node, weight)
        return kept

    def watch(self, component: Component, model: ir.Model) -> list[str]:
        """Name the inputs of quantized MatMuls, each once; none for decoders."""
        if component.state:
            return []
        found = (node.inputs[0] for node in model.graph if _is_quantized(node))
        return list(dict.fromkeys(str(value.name) for value in found if value is not None))

    def calibrate(
        self, component: Component, model: ir.Model, ranges: Mapping[str, Range]
    ) -> list[KeptLayer]:
        """Put Q/DQ on the inputs of quantized MatMuls, in place."""
        kept = []
        rounded: dict[str, ir.Value] = {}
        for node in list(model.graph):
            x = node.inputs[0] if _is_quantized(node) else None
            if x is None or x.name not in ranges:
                continue
            name, found = str(x.name), ranges[str(x.name)]
            noise = found.amax / LEVELS / math.sqrt(12) / found.rms if found.rms else 0.0
            if noise > NOISE_LIMIT:
                reason = (
                    f"activations reach {found.amax / found.rms:.0f} times their rms: 8 bits would "
                    f"leave {noise:.0%} noise; its weights are int8"
                )
                kept.append(KeptLayer(component.name, str(node.name), reason))
                continue
            if name not in rounded:
                rounded[name] = _round_activation(model.graph, node, x, found.amax)
            node.replace_input_with(0, rounded[name])
        return kept


SCHEME = Int8()


class _Quantized:
    """One weight's int8 values and scales, made from the float tensor when asked for.

    Nothing but the scales is kept: the writer asks in its own order, and holding the values until
    it comes for them would hold the whole model.
    """

    def __init__(self, source: ir.TensorProtocol) -> None:
        self._source = source
        self._scale: NDArray[np.float32] | None = None

    def scale(self) -> ir.Tensor[NDArray[np.float32]]:
        """Return float32 [out]: the largest absolute value of each column over 127."""
        return ir.Tensor(
            self._scale_of(self._source.numpy()) if self._scale is None else self._scale
        )

    def values(self) -> ir.Tensor[NDArray[np.int8]]:
        """Return int8 [in, out]."""
        weight = self._source.numpy()
        scaled = weight / self._scale_of(weight)
        np.rint(scaled, out=scaled)
        return ir.Tensor(scaled.astype(np.int8))

    def _scale_of(self, weight: Array) -> NDArray[np.float32]:
        if self._scale is None:
            amax = np.maximum(weight.max(axis=0), -weight.min(axis=0))
            amax[amax == 0] = LEVELS  # a column of zeros: any scale will do
            self._scale = (amax / LEVELS).astype(np.float32)
        return self._scale


def _float_weight(node: ir.Node) -> ir.Value | None:
    """Return the weight of a Linear that is still float, or none."""
    if node.op_type != "MatMul":
        return None
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return None
    return weight if len(weight.const_value.shape) == 2 else None


def _ends(node: ir.Node, outputs: set[str | None]) -> bool:
    """Tell whether a MatMul, with its bias, gives an output of the graph."""
    value = node.outputs[0]
    after = [use.node for use in value.uses()]
    if len(after) == 1 and after[0].op_type == "Add":
        value = after[0].outputs[0]
    return value.name in outputs


def _is_quantized(node: ir.Node) -> bool:
    """Tell whether a node is a MatMul on an int8 weight."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return False
    producer = node.inputs[1].producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _quantize_weight(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    """Put W int8 -> DequantizeLinear in place of a float weight."""
    source = weight.const_value
    assert source is not None
    rows, columns = _sizes(source.shape)
    quantized = _Quantized(source)
    values = _initializer(
        graph,
        f"{weight.name}.int8",
        ir.LazyTensor(quantized.values, ir.DataType.INT8, ir.Shape([rows, columns])),
    )
    scale = _initializer(
        graph,
        f"{weight.name}.scale",
        ir.LazyTensor(quantized.scale, ir.DataType.FLOAT, ir.Shape([columns])),
    )
    restored = ir.Node(
        "",
        "DequantizeLinear",
        [values, scale],
        [ir.AttrInt64("axis", 1)],
        name=f"{node.name}.weight",
    )
    _describe(restored.outputs[0], f"{weight.name}.restored", ir.Shape([rows, columns]))
    graph.insert_before(node, restored)
    node.replace_input_with(1, restored.outputs[0])
    if not weight.uses():
        del graph.initializers[str(weight.name)]


def _round_activation(graph: ir.Graph, node: ir.Node, x: ir.Value, amax: float) -> ir.Value:
    """Put x -> QuantizeLinear -> DequantizeLinear before a node."""
    scale = np.array(amax / LEVELS if amax else 1.0, np.float32)
    step = _initializer(graph, f"{x.name}.scale", ir.tensor(scale))
    zero = _initializer(graph, f"{x.name}.zero", ir.tensor(np.array(0, np.int8)))
    rounded = ir.Node("", "QuantizeLinear", [x, step, zero], name=f"{x.name}.quantize")
    restored = ir.Node(
        "", "DequantizeLinear", [rounded.outputs[0], step, zero], name=f"{x.name}.dequantize"
    )
    rounded.outputs[0].name = f"{x.name}.int8"
    rounded.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    rounded.outputs[0].shape = x.shape
    _describe(restored.outputs[0], f"{x.name}.restored", x.shape)
    graph.insert_before(node, [rounded, restored])
    return restored.outputs[0]


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    value = ir.Value(name=name, const_value=tensor)
    value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(_sizes(tensor.shape))
    graph.register_initializer(value)
    return value


def _sizes(shape: ir.ShapeProtocol) -> list[int]:
    """Return the sizes of a weight, which are all known."""
    return [int(str(size)) for size in shape]


def _describe(value: ir.Value, name: str, shape: ir.Shape | None) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), shape
