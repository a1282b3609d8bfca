"""What the schemes share: find the Linears of a graph, and make their weights small on demand.

A Linear is MatMul on a constant weight of [in, out], which is the one form that export writes. Its
small form is

    x ---------------------------> MatMul
    W -> DequantizeLinear(scale) ---^

Every tensor stays lazy: it is read, rounded and let go when the writer asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlmedge.arrays import Array
from vlmedge.graphs.edit import constant, is_weight, promise, reader
from vlmedge.shelves.contracts import LayerError, Stats
from vlmedge.spec import Component

Floats = NDArray[np.float32]
FLOAT = "float32"  # the precision of a layer that is left alone


@dataclass(frozen=True, slots=True)
class Linear:
    """One MatMul on a float weight.

    Attributes:
        node: The MatMul.
        x: The input of the MatMul, [..., in].
        weight: The initializer, [in, out].
    """

    node: ir.Node
    x: ir.Value
    weight: ir.Value

    @property
    def name(self) -> str:
        """The weight's name: the checkpoint's, but for a suffix where it was transposed."""
        return str(self.weight.name)

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        assert self.weight.const_value is not None
        rows, columns = self.weight.const_value.shape.numpy()
        return rows, columns

    def read(self) -> Floats:
        """Read the weight, float32 [in, out]."""
        assert self.weight.const_value is not None
        return self.weight.const_value.numpy()


class Format(Protocol):
    """How the values of one weight are quantized."""

    def scale(self, weight: Floats, importance: Floats | None = None) -> Floats:
        """Choose the scales of a weight.

        Args:
            weight: float32 [in, out].
            importance: Mean square of each input channel, float32 [in], or none.

        Returns:
            float32 of `scale_shape`.
        """
        ...

    def round(self, weight: Floats, scale: Floats) -> Array:
        """Round a weight of float32 [in, out] to values of `dtype`."""
        ...

    def restore(self, values: Array, scale: Array) -> Floats:
        """Dequantize values to float32 [in, out]."""
        ...

    def scale_shape(self, rows: int, columns: int) -> list[int]:
        """Return the shape of a weight's scales."""
        ...

    @property
    def dtype(self) -> ir.DataType:
        """Type of the quantized values."""
        ...

    @property
    def bits(self) -> int:
        """Bits of one value."""
        ...

    @property
    def attributes(self) -> list[ir.Attr]:
        """Attributes of DequantizeLinear."""
        ...


def linears(model: ir.Model) -> list[Linear]:
    """List the MatMuls on float weights, in the graph's order."""
    found = []
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        x, weight = node.inputs
        if x is not None and weight is not None and is_weight(weight, ir.DataType.FLOAT, 2):
            found.append(Linear(node, x, weight))
    return found


def last_projections(component: Component, model: ir.Model) -> set[str]:
    """Name the weights whose product, with its bias, is an output of the graph.

    Their error would go straight into the output. A decoder's is its vocabulary, which is large
    and whose error meets a softmax: it is no exception there.
    """
    if component.state:
        return set()
    outputs = {value.name for value in model.graph.outputs}
    found = set()
    for linear in linears(model):
        value = linear.node.outputs[0]
        if (total := reader(value, "Add", output_too=True)) is not None:
            value = total.outputs[0]
        if value.name in outputs:
            found.add(linear.name)
    return found


def shrink(graph: ir.Graph, linear: Linear, form: Format, importance: Floats | None = None) -> None:
    """Put W -> DequantizeLinear in place of a float weight; a shared weight is shrunk once."""
    suffix = str(form.dtype).lower()
    restored_name = f"{linear.name}.restored"
    known = [
        use.node.outputs[0]
        for use in graph.initializers[f"{linear.name}.{suffix}"].uses()
        if use.node.outputs[0].name == restored_name
    ] if f"{linear.name}.{suffix}" in graph.initializers else []  # fmt: skip
    if known:
        linear.node.replace_input_with(1, known[0])
    else:
        source = linear.weight.const_value
        assert source is not None
        made = _Rounded(source, form, importance)
        rows, columns = linear.shape
        name, scale_shape = f"{linear.name}.{suffix}", form.scale_shape(rows, columns)
        values = promise(graph, name, form.dtype, linear.shape, made.values)
        name = f"{linear.name}.scale"
        scale = promise(graph, name, ir.DataType.FLOAT, scale_shape, made.scale)
        restored = ir.Node(
            "",
            "DequantizeLinear",
            [values, scale],
            form.attributes,
            name=f"{linear.node.name}.weight",
        )
        describe(restored.outputs[0], restored_name, ir.Shape([rows, columns]))
        graph.insert_before(linear.node, restored)
        linear.node.replace_input_with(1, restored.outputs[0])
    if not linear.weight.uses():
        graph.initializers.pop(linear.name, None)


def scale_rows(linear: Linear, factor: Floats) -> None:
    """Multiply a weight's input channels by `factor`, float32 [in], when it is read."""
    source = linear.weight.const_value
    assert source is not None
    rows, columns = linear.shape

    def scaled() -> ir.Tensor[Floats]:
        return ir.Tensor(source.numpy() * factor[:, None])

    linear.weight.const_value = ir.LazyTensor(
        scaled, ir.DataType.FLOAT, ir.Shape([rows, columns]), name=linear.name
    )


def round_activation(
    graph: ir.Graph, node: ir.Node, x: ir.Value, scale: float, dtype: ir.DataType
) -> ir.Value:
    """Put x -> QuantizeLinear -> DequantizeLinear before a node; return what comes out."""
    step = constant(graph, f"{x.name}.scale", np.array(scale, np.float32))
    zero = constant(graph, f"{x.name}.zero", ir.tensor(np.array(0, dtype.numpy()), dtype))
    rounded = ir.Node("", "QuantizeLinear", [x, step, zero], name=f"{x.name}.quantize")
    restored = ir.Node(
        "", "DequantizeLinear", [rounded.outputs[0], step, zero], name=f"{x.name}.dequantize"
    )
    rounded.outputs[0].name = f"{x.name}.{str(dtype).lower()}"
    rounded.outputs[0].type = ir.TensorType(dtype)
    rounded.outputs[0].shape = x.shape
    describe(restored.outputs[0], f"{x.name}.restored", x.shape)
    graph.insert_before(node, [rounded, restored])
    return restored.outputs[0]


RoundRows = Callable[[Floats], Floats]


def layer_error(
    linear: Linear, stats: Mapping[str, Stats], form: Format, round_rows: RoundRows | None
) -> LayerError:
    """Measure the error of a Linear's output; it is 0 where its input was not seen.

    Args:
        linear: Its weight is float still.
        stats: Statistics of its input.
        form: Format that its weight would be quantized to.
        round_rows: How its input would be quantized, or none.
    """
    seen = stats.get(str(linear.x.name))
    if seen is None or seen.rows is None or len(seen.rows) == 0:
        return LayerError(0.0, form.bits)
    rows, weight = seen.rows.astype(np.float32), linear.read()
    exact = rows @ weight
    restored = rounded(form, weight, importance(stats, linear))
    error = (rows if round_rows is None else round_rows(rows)) @ restored - exact
    size = max(float(np.linalg.norm(exact)), 1e-30)
    return LayerError(float(np.linalg.norm(error)) / size, form.bits)


def rounded(form: Format, weight: Floats, importance: Floats | None) -> Floats:
    """Return a weight quantized and dequantized, float32 [in, out]."""
    scale = form.scale(weight, importance)
    return form.restore(form.round(weight, scale), scale)


def importance(stats: Mapping[str, Stats], linear: Linear) -> Floats | None:
    """Return the mean square of each input channel over the rows that were seen, or none."""
    seen = stats.get(str(linear.x.name))
    if seen is None or seen.rows is None or len(seen.rows) == 0:
        return None
    rows = seen.rows.astype(np.float32)
    return np.asarray(np.square(rows).mean(axis=0), np.float32)


def describe(value: ir.Value, name: str, shape: ir.Shape | None) -> None:
    """Name a float value."""
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), shape


class _Rounded:
    """One weight's values and scales, made from the float tensor when asked for.

    Nothing but the scales is kept: the writer asks in its own order, and holding the values until
    it comes for them would hold the whole model.
    """

    def __init__(self, source: ir.TensorProtocol, form: Format, importance: Floats | None) -> None:
        self._source, self._form, self._importance = source, form, importance
        self._scale: Floats | None = None

    def scale(self) -> ir.Tensor[Floats]:
        return ir.Tensor(self._scale_of(self._source.numpy()))

    def values(self) -> ir.Tensor[Array]:
        weight = self._source.numpy()
        return ir.Tensor(self._form.round(weight, self._scale_of(weight)), self._form.dtype)

    def _scale_of(self, weight: Floats) -> Floats:
        if self._scale is None:
            self._scale = self._form.scale(weight, self._importance)
        return self._scale
