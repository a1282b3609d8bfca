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
from vlmedge.graphs.half import HALF_MAX, MASK, beyond, halve, to_half
from vlmedge.shelves.contracts import LayerError, Stats, Watched
from vlmedge.spec import Component
from vlmedge.spec.manifest import KeptLayer

from ._linear import Floats, layer_error, linears

HEADROOM = 4.0  # calibration has not seen everything

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class Fp16:
    """The scheme `fp16`."""

    timed = False
    table = "float16"

    def watch(self, component: Component, model: ir.Model) -> Watched:
        """Name every float tensor that a node makes; a decoder's are not seen."""
        names = (v.name for node in model.graph for v in node.outputs if v.dtype == FLOAT)
        return Watched(tuple(str(name) for name in names), rows=False)

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
        halve(graph, wide.__contains__, _refuse)
        return layers

    def harms(
        self, component: Component, model: ir.Model, stats: Mapping[str, Stats]
    ) -> dict[str, LayerError]:
        """Return the error that quantizing each layer alone causes; see `Scheme.harms`."""
        return {linear.name: layer_error(linear, stats, _Half(), None) for linear in linears(model)}


SCHEME = Fp16()


class _Half:
    """float16 as a format without scales: only `harms` asks for it."""

    dtype = HALF
    bits = 16
    attributes: list[ir.Attr] = []  # noqa: RUF012 - never changed

    def scale(self, weight: Floats, importance: Floats | None = None) -> Floats:
        return np.ones(1, np.float32)

    def round(self, weight: Floats, scale: Floats) -> Array:
        return to_half(weight, "a constant", _refuse)

    def restore(self, values: Array, scale: Array) -> Floats:
        return np.asarray(values, np.float32)

    def scale_shape(self, rows: int, columns: int) -> list[int]:
        return [1]


def _refuse(name: str, largest: float) -> CheckpointError:
    return CheckpointError(
        f"{name} reaches {largest:.3g}, and float16 ends at {HALF_MAX:.0f}: leave it in float32 "
        f"(--keep '{name}=float32')"
    )


def _reason(component: Component, node: ir.Node, stats: Mapping[str, Stats]) -> KeptLayer | None:
    """Return why a node stays in float32, or none."""
    seen = [
        stats[str(value.name)].amax
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.name in stats
    ]
    if node.op_type == "ReduceMean" and node.outputs[0].name in stats:
        seen.append(stats[str(node.outputs[0].name)].amax * _added(node))
    worst = max((amax for amax in seen if amax < MASK), default=0.0)
    if worst * HEADROOM < HALF_MAX:
        worst = beyond(node)
    if not worst:
        return None
    name = str(node.name or node.outputs[0].name)
    text = f"values reach {worst:.3g}, and float16 ends at {HALF_MAX:.0f}"
    return KeptLayer(component.name, name, text)


def _added(node: ir.Node) -> int:
    """Count the elements that a ReduceMean adds up, as far as the graph tells."""
    value, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or value.shape is None:
        return 1
    tensor = axes.const_value if axes is not None else None
    chosen = range(len(value.shape)) if tensor is None else tensor.numpy().ravel().tolist()
    sizes_ = [value.shape[axis] for axis in chosen]
    return math.prod(size for size in sizes_ if isinstance(size, int))
