"""From a portable graph to what ONNX Runtime's CUDA provider is fastest at.

    int8 or int4 weight, float x     MatMulNBits: a decoder waits for its weights, they stay small
    int8 weight, rounded x           float16 weight: the provider has no product of two int8 that
                                     restores its own scale, and an encoder waits for its products
    attention                        one kernel, see _ort_cuda_attention.py
    masks, places                    on the host, see _ort_cuda_host.py

A graph that a scheme made small computes in float16, as does one that a scheme typed; one of plain
float32 stays so.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmedge.spec import Component

from .._half import halve, is_typed
from .._ort.rms_norm import fuse_norms
from .attention import CACHED, CONTRIB, MASK, Fused, fuse
from .host import split
from .pack import pack

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True, slots=True)
class Lowered:
    """What became of a graph.

    Attributes:
        fused: Its attentions.
        weight_only: How many products keep their weights in 4 or 8 bits.
        restored: How many get float16 weights when the graph is opened.
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
            graph.insert_before(node, packed)
            old, new = node.outputs[0], packed.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            weight_only += 1
    if weight_only:
        model.opset_imports[CONTRIB] = 1
    _clean(model)
    state = {name for pair in component.state for name in pair}
    if is_typed(model):
        _keep_half(graph, component)
    elif small:
        halve(model, state)
    fuse_norms(graph)  # one kernel sums the squares in float32; in float16 they do not fit
    _clean(model)
    fused = fuse(component, model)
    _clean(model)
    restored = sum(node.op_type == "DequantizeLinear" for node in graph)
    waiting = set() if fused.cached else {into for _, into in component.state}
    host = split(model, waiting)
    _clean(model)
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
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            continue
        maker = node.inputs[0].producer()
        if maker is not None and maker.op_type == "QuantizeLinear" and maker.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(maker.inputs[0], replace_graph_outputs=True)


def _keep_half(graph: ir.Graph, component: Component) -> None:
    """Let the state of a typed graph be float16, as it is inside, since it never leaves.

    past float32 -> Cast -> float16 ... float16 -> Cast -> present float32
    """
    inputs = {str(value.name): value for value in graph.inputs}
    outputs = {str(value.name): index for index, value in enumerate(graph.outputs)}
    for out, into in component.state:
        past, index = inputs[into], outputs[out]
        present = graph.outputs[index]
        casts = [use.node for use in past.uses() if use.node.op_type == "Cast"]
        maker = present.producer()
        others = [use.node for use in past.uses() if use.node.op_type not in ("Cast", "Shape")]
        if past.dtype != _FLOAT or len(casts) != 1 or others or maker is None:
            continue
        inner = maker.inputs[0] if maker.op_type == "Cast" else None
        if casts[0].outputs[0].dtype != _HALF or inner is None or inner.dtype != _HALF:
            continue
        if present.uses():
            continue
        past.type = ir.TensorType(_HALF)
        casts[0].outputs[0].replace_all_uses_with(past)
        graph.remove(casts[0], safe=True)
        graph.outputs[index] = inner
        graph.remove(maker, safe=True)
        inner.name = out


def _clean(model: ir.Model) -> None:
    """Remove the nodes and initializers that nobody reads any more."""
    RemoveUnusedNodesPass()(model)
    graph = model.graph
    used = {value for node in graph.all_nodes() for value in node.inputs if value is not None}
    used |= set(graph.outputs)
    for name in [name for name, value in graph.initializers.items() if value not in used]:
        del graph.initializers[name]
