"""FP16: every weight and activation in half precision, but where a number would not fit.

    inputs -> Cast(float16) -> ... nodes in float16 ... -> Cast(float32) -> outputs

A node stays in float32 when what it reads, writes or adds up came near the largest float16 on the
calibration data: that is measured, since no list of operators knows a checkpoint's outliers. So
does one that computes with a single number that float16 does not have. The types are in the graph,
so it is the same on every engine. Inputs and outputs stay float32.

The sum behind a mean counts, though no tensor holds it: an H100 adds up squares in float16, and an
RMS norm of 128 channels was infinite there at a mean square of 630.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from vlmedge.arrays import Array
from vlmedge.errors import CheckpointError
from vlmedge.shelves.contracts import Harm, Stats, Wanted
from vlmedge.spec import Component
from vlmedge.spec.manifest import KeptLayer

from ._linear import Floats, harm, linears, sizes

LARGEST = 65504.0
HEADROOM = 4.0  # calibration has not seen everything
MASK = 1e30  # what reaches it is no value, but the lowest float32 of an attention mask
CLAMP = LARGEST / 2  # for constants such as a mask's -3.4e38, so that two of them still fit
BOUNDED = ("Clip", "Max", "Min")  # where 3.4e38 stands for "no bound", and CLAMP would be one

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class Fp16:
    """The scheme `fp16`."""

    timed = False
    table = "float16"

    def watch(self, component: Component, model: ir.Model) -> Wanted:
        """Name every float tensor that a node makes; a decoder's are not seen."""
        names = (v.name for node in model.graph for v in node.outputs if v.dtype == FLOAT)
        return Wanted(tuple(str(name) for name in names), rows=False)

    def rewrite(
        self,
        component: Component,
        model: ir.Model,
        stats: Mapping[str, Stats],
        keep: Mapping[str, str] = {},
    ) -> list[KeptLayer]:
        """Turn the graph to float16, in place; see `Scheme.rewrite`."""
        graph = model.graph
        kept = [_reason(component, node, stats) for node in graph]
        layers = [layer for layer in kept if layer is not None]
        nodes = list(graph)
        wide = {node for node, layer in zip(nodes, kept, strict=True) if layer is not None}
        wide |= {node for node in nodes if any(v and v.name in keep for v in node.inputs)}
        _Halver(graph, wide).run(nodes)
        return layers

    def harms(
        self, component: Component, model: ir.Model, stats: Mapping[str, Stats]
    ) -> dict[str, Harm]:
        """Say what rounding each layer alone would do; see `Scheme.harms`."""
        return {linear.name: harm(linear, stats, _Half(), None) for linear in linears(model)}


SCHEME = Fp16()


class _Half:
    """float16 as a format without scales: only `harms` asks for it."""

    dtype = HALF
    bits = 16
    attributes: list[ir.Attr] = []  # noqa: RUF012 - never changed

    def scale(self, weight: Floats, importance: Floats | None = None) -> Floats:
        return np.ones(1, np.float32)

    def round(self, weight: Floats, scale: Floats) -> Array:
        return _halved(weight)

    def restore(self, values: Array, scale: Array) -> Floats:
        return np.asarray(values, np.float32)

    def scale_shape(self, rows: int, columns: int) -> list[int]:
        return [1]


class _Halver:
    """Changes the types of one graph."""

    def __init__(self, graph: ir.Graph, wide: set[ir.Node]) -> None:
        self._graph = graph
        self._wide = wide
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._half: dict[str, ir.Value] = {}

    def run(self, nodes: list[ir.Node]) -> None:
        """Convert."""
        floats = {v for node in nodes for v in node.outputs if v.dtype == FLOAT}
        sources = {v for v in self._graph.inputs if v.dtype == FLOAT}
        for node in nodes:
            to = FLOAT if node in self._wide else HALF
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != FLOAT or value in self._half.values():
                    continue
                if value.is_initializer():
                    if to is HALF:
                        node.replace_input_with(index, self._halved(value))
                elif value in floats or value in sources:
                    made_by = value.producer()
                    given = FLOAT if made_by is None or made_by in self._wide else HALF
                    if given is not to:
                        node.replace_input_with(index, self._as(value, to, node))
            if to is HALF:
                _retype(node)
        outputs = list(self._graph.outputs)
        for index, value in enumerate(outputs):
            made_by = value.producer()
            if value in floats and made_by is not None and made_by not in self._wide:
                self._out(index, value, made_by)
        for value in floats:
            made_by = value.producer()
            if made_by is not None and made_by not in self._wide:
                value.type = ir.TensorType(HALF)
        for name in [n for n, v in self._graph.initializers.items() if not v.uses()]:
            del self._graph.initializers[name]

    def _halved(self, value: ir.Value) -> ir.Value:
        """Return the float16 twin of a constant."""
        name = f"{value.name}.float16"
        if name not in self._half:
            source = value.const_value
            assert source is not None
            shape = ir.Shape(sizes(source.shape))

            def load() -> ir.Tensor[Array]:
                return ir.Tensor(_halved(source.numpy(), str(value.name)))

            twin = ir.Value(name=name, type=ir.TensorType(HALF), shape=shape)
            twin.const_value = ir.LazyTensor(load, HALF, shape, name=name)
            self._graph.register_initializer(twin)
            self._half[name] = twin
        return self._half[name]

    def _as(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return a value in another type, cast once."""
        key = (value, dtype)
        if key not in self._cast:
            node = _cast(value, dtype, f"{value.name}.{str(dtype).lower()}")
            maker = value.producer()
            if maker is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(maker, node)
            self._cast[key] = node.outputs[0]
        return self._cast[key]

    def _out(self, index: int, value: ir.Value, made_by: ir.Node) -> None:
        """Give an output of the graph back in float32, under its name."""
        name = value.name
        value.name = f"{name}.half"
        node = _cast(value, FLOAT, str(name))
        self._graph.insert_after(made_by, node)
        self._graph.outputs[index] = node.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], name=f"{name}.cast")
    out = node.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(dtype), value.shape
    return node


def _retype(node: ir.Node) -> None:
    """Change what a node's attributes say about float32."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(FLOAT):
        node.attributes["to"] = ir.AttrInt64("to", int(HALF))
    elif node.op_type == "ConstantOfShape" and "value" not in node.attributes:
        zero = ir.tensor(np.zeros(1, np.float16))  # without a value it is a float32 zero
        node.attributes["value"] = ir.AttrTensor("value", zero)
    elif node.op_type in ("ConstantOfShape", "Constant") and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
        if tensor.dtype == FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_halved(tensor.numpy())))


def _halved(array: Array, name: str = "a constant") -> Array:
    """Cast to float16, masks to what still fits twice; refuse a weight that has no float16."""
    array = np.where(np.abs(array) >= MASK, np.sign(array) * CLAMP, array)
    if (largest := np.abs(array).max(initial=0.0)) > LARGEST:
        raise CheckpointError(
            f"{name} reaches {largest:.3g}, and float16 ends at {LARGEST:.0f}: leave it in float32 "
            f"(--keep '{name}=float32')"
        )
    return array.astype(np.float16)


def _reason(component: Component, node: ir.Node, stats: Mapping[str, Stats]) -> KeptLayer | None:
    """Say why a node stays in float32, or none."""
    seen = [
        stats[str(value.name)].amax
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.name in stats
    ]
    if node.op_type == "ReduceMean" and node.outputs[0].name in stats:
        seen.append(stats[str(node.outputs[0].name)].amax * _added(node))
    worst = max((amax for amax in seen if amax < MASK), default=0.0)
    if worst * HEADROOM < LARGEST:
        worst = _beyond(node)
    if not worst:
        return None
    name = str(node.name or node.outputs[0].name)
    text = f"values reach {worst:.3g}, and float16 ends at {LARGEST:.0f}"
    return KeptLayer(component.name, name, text)


def _beyond(node: ir.Node) -> float:
    """Return the single number in a node that float16 does not have, or 0; a mask has one."""
    for value in node.inputs:
        tensor = value.const_value if value is not None else None
        if tensor is None or tensor.dtype != FLOAT or tensor.size != 1:
            continue
        size = float(np.abs(tensor.numpy()).item())
        if size > LARGEST and (size < MASK or node.op_type in BOUNDED):
            return size
    return 0.0


def _added(node: ir.Node) -> int:
    """Count the elements that a ReduceMean adds up, as far as the graph tells."""
    value, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or value.shape is None:
        return 1
    tensor = axes.const_value if axes is not None else None
    chosen = range(len(value.shape)) if tensor is None else tensor.numpy().ravel().tolist()
    sizes_ = [value.shape[axis] for axis in chosen]
    return math.prod(size for size in sizes_ if isinstance(size, int))
