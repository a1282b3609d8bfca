"""Which nodes of a graph go beyond float16, so that they alone are put back to float32.

A half engine that gives nan or inf is not thrown away whole: the portable graph runs once in
float32 on ONNX Runtime's CPU, on what the engine was tried on, with a meter at each value:

    value -> Abs -> Reshape [-1] -> Concat with 0 -> ReduceMax -> "<value>.largest"

The meters give one number each, so that no value is kept. _half.py leaves in float32 every node
that reads or writes a value beyond the limit, and casts where it meets the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from vlmedge.arrays import Array
from vlmedge.graphs.edit import append, constant
from vlmedge.graphs.half import HALF_MAX, MASK, masked
from vlmedge.graphs.portable import EXTERNAL_THRESHOLD_BYTES
from vlmedge.parity.probe import Probe
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.spec import Component

from .outcome import Restored

# Shares of float16's largest number: other pictures reach further than the one that was tried. The
# second takes what is masked (MASKED) too.
MARGINS = (0.5, 0.125)
_SUMS = ("LayerNormalization", "RMSNormalization")  # which square what they read, and add it up
_LARGEST = ".largest"
_FLOAT = ir.DataType.FLOAT


def largest(component: Component, model: ir.Model, probe: Probe, folder: Path) -> dict[str, float]:
    """Run a float32 graph on what the probe has; return every float value's largest |number|.

    Args:
        component: The graph's component.
        model: The float32 graph; it gets outputs for measuring and cannot be used afterwards.
        probe: Inputs to feed.
        folder: Where the graph may be written for a moment.
    """
    names = _meter(model)
    file, weights = folder / "metered.onnx", folder / "metered.bin"
    ir.save(model, file, external_data=weights.name, size_threshold_bytes=EXTERNAL_THRESHOLD_BYTES)
    try:
        graph = _Metered(component, file, names)
        for feeds in probe.steps(graph):
            graph.run(feeds)
    finally:
        file.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
    return graph.largest


def beyond_half(model: ir.Model, found: Mapping[str, float], margin: float) -> tuple[Restored, ...]:
    """Name the nodes that read, write or add up to a value near the end of float16.

    Args:
        model: The graph as it is lowered, before meters or float16.
        found: Result of `largest`.
        margin: A share of float16's largest number.
    """
    beyond = []
    for node in model.graph:
        names = [str(v.name) for v in (*node.inputs, *node.outputs) if v is not None]
        if node.op_type in _SUMS:
            names.append(f"{node.outputs[0].name}.sum")
        worst = max((found.get(name, 0.0) for name in names), default=0.0)
        if not worst <= margin * HALF_MAX:
            output = str(node.outputs[0].name)
            beyond.append(Restored(str(node.name or output), node.op_type, output, worst))
    return tuple(beyond)


class _Metered(CheckedGraph):
    """A graph with meters on ONNX Runtime's CPU; it keeps the largest that each has shown."""

    def __init__(self, component: Component, file: Path, names: Collection[str]) -> None:
        super().__init__(component)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        self._taken = {value.name for value in self._session.get_inputs()}
        self._outputs = [spec.name for spec in component.outputs]
        self._names = tuple(names)
        self.largest = dict.fromkeys(self._names, 0.0)

    def infer(self, feeds: dict[str, Array]) -> dict[str, Any]:
        """Run once and read the meters."""
        wanted = [*self._outputs, *(f"{name}{_LARGEST}" for name in self._names)]
        fed = {name: array for name, array in feeds.items() if name in self._taken}
        found = dict(zip(wanted, self._session.run(wanted, fed), strict=True))
        for name in self._names:
            shown = float(found.pop(f"{name}{_LARGEST}"))
            self.largest[name] = max(self.largest[name], shown if shown == shown else np.inf)
        return found


def _meter(model: ir.Model) -> list[str]:
    """Put a meter at every float32 value that is computed or fed; return their names."""
    graph = model.graph
    _mask(graph)
    zero = constant(graph, "meter.zero", np.zeros(1, np.float32))
    flat = constant(graph, "meter.flat", np.array([-1], np.int64))
    last = constant(graph, "meter.last", np.array([-1], np.int64))
    names = []

    def show(name: str, value: ir.Value) -> None:
        row = append(graph, "Reshape", [value, flat], _FLOAT, None)
        whole = append(graph, "Concat", [row, zero], _FLOAT, None, axis=0)
        shown = append(graph, "ReduceMax", [whole], _FLOAT, [], keepdims=0)
        shown.name = f"{name}{_LARGEST}"
        graph.outputs.append(shown)
        names.append(name)

    made = [value for node in list(graph) if not _is_constant(node) for value in node.outputs]
    sums = [node for node in graph if node.op_type in _SUMS]
    for value in [*graph.inputs, *made]:
        if value.dtype == _FLOAT and value.name:
            show(value.name, append(graph, "Abs", [value], _FLOAT, None))
    for node in sums:
        square = append(graph, "Mul", [node.inputs[0]] * 2, _FLOAT, None)
        total = append(graph, "ReduceSum", [square, last], _FLOAT, None)
        show(f"{node.outputs[0].name}.sum", total)
    return names


def _mask(graph: ir.Graph) -> None:
    """Give masks the number that they have in float16, so that they are not taken for overflow."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.size != 1 or tensor.dtype != _FLOAT:
            continue
        if np.abs(number := tensor.numpy()) >= MASK:
            value.const_value = ir.tensor(masked(number), name=value.name)


def _is_constant(node: ir.Node) -> bool:
    """Return whether a node's outputs hang on no input: weights on their way."""
    return all(value is None or value.is_initializer() for value in node.inputs)
