"""From a portable graph to what ONNX Runtime's CUDA provider is fastest at.

    int8 or int4 weight, float x     MatMulNBits: a decoder waits for its weights, they stay small
    int8 weight, rounded x           float16 weight: the provider has no product of two int8 that
                                     restores its own scale, and an encoder waits for its products
    attention                        one kernel, see attention.py
    masks, places                    on the host, see host.py

A graph that a scheme made small computes in float16, as does one that a scheme typed; one of plain
float32 stays so.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmedge.graphs.edit import replace, unrounded
from vlmedge.graphs.half import halve_state, is_typed
from vlmedge.spec import Component

from .._half import halve
from .._ort.rms_norm import fuse_norms
from .attention import CACHED, CONTRIB, MASK, Fused, fuse
from .host import split
from .pack import pack


@dataclass(frozen=True, slots=True)
class Lowered:
    """Result of lowering a graph.

    Attributes:
        fused: Its attentions.
        weight_only: How many products keep their weights in 4 or 8 bits.
        restored: How many get dequantized, float16 weights when the graph is opened.
        host: The part that runs on the host, or none.
        mask: The input that is the cached attentions' mask; empty where the device makes it.
    """

    fused: Fused
    weight_only: int
    restored: int
    host: ir.Model | None
    mask: str


def lower(component: Component, model: ir.Model) -> Lowered:
    """Rewrite a portable graph, in place; no big weight is read yet."""
    graph = model.graph
    small = any(node.op_type == "DequantizeLinear" for node in graph)
    _unround(graph)
    weight_only = 0
    for node in list(graph):
        if (packed := pack(graph, node, always=bool(component.state))) is not None:
            replace([node], [packed])
            weight_only += 1
    if weight_only:
        model.opset_imports[CONTRIB] = 1
    RemoveUnusedNodesPass()(model)
    state = {name for pair in component.state for name in pair}
    if is_typed(model):
        halve_state(model, component.state)
    elif small:
        halve(model, state)
    fuse_norms(graph)  # one kernel sums the squares in float32; in float16 they do not fit
    RemoveUnusedNodesPass()(model)
    fused = fuse(component, model)
    RemoveUnusedNodesPass()(model)
    restored = sum(node.op_type == "DequantizeLinear" for node in graph)
    waiting = set() if fused.cached else {into for _, into in component.state}
    host = split(model, waiting)
    RemoveUnusedNodesPass()(model)
    for value in [v for v in graph.inputs if not v.uses() and not v.is_graph_output()]:
        graph.inputs.remove(value)
    masks = {str(node.inputs[MASK].name) for node in graph if node.op_type == CACHED}  # type: ignore[union-attr]
    made_by_host = masks & {str(value.name) for value in graph.inputs}
    return Lowered(fused, weight_only, restored, host, next(iter(made_by_host), ""))


def shape_nodes(model: ir.Model) -> list[str]:
    """Name the nodes that compute shapes alone, which ONNX Runtime keeps on the host."""
    shapes: set[ir.Value] = set()
    names = []
    for node in model.graph:
        taken = [value for value in node.inputs if value is not None]
        of_shapes = all(value in shapes or value.is_initializer() for value in taken)
        if node.op_type in ("Shape", "Size") or (of_shapes and any(v in shapes for v in taken)):
            shapes.update(node.outputs)
            names.append(str(node.name))
    return names


def _unround(graph: ir.Graph) -> None:
    """Take away the steps that round activations: x -> Quantize -> Dequantize -> becomes x."""
    for node in list(graph):
        if (x := unrounded(node.outputs[0])) is not None:
            node.outputs[0].replace_all_uses_with(x, replace_graph_outputs=True)
