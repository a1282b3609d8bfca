"""What a graph computes from masks and positions alone goes to the host.

A decoder makes its mask, and the places where it looks up positions, from integers of a few bytes.
On a GPU these are dozens of kernels that do nothing else than wait, some of which the provider does
not have; and they depend on the length so far, so that no step is like the one before. Cut out,
what is left has the same shapes at every step, and can be recorded as a CUDA graph.

    attention_mask, position_ids --> host graph --> mask, places --> device graph
"""

from __future__ import annotations

import onnx_ir as ir

from vlmedge.graphs.edit import uncast

from .attention import TOTAL

SMALL_BYTES = 1 << 16  # constants that the host may have too
_INTEGERS = {
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.BOOL,
    ir.DataType.UINT8,
    ir.DataType.INT8,
}


def split(model: ir.Model, stays: set[str]) -> ir.Model | None:
    """Cut out of a graph, in place, what depends on integers and shapes alone.

    Args:
        model: The graph; what it loses becomes inputs of it.
        stays: Inputs whose shape only the device knows: a cache that is not in place.

    Returns:
        The part for the host, whose outputs are the new inputs of `model`; none if there is none.
    """
    graph = model.graph
    held, shaped = _classify(graph, stays)
    edge = [
        value
        for node in graph
        if node in held
        for value in node.outputs
        if any(use.node not in held for use in value.uses()) or value.is_graph_output()
    ]
    edge = [value for value in edge if not value.is_graph_output()]
    if not edge:
        return None
    host = _copied(graph, edge, held | shaped)
    opsets = {domain: version for domain, version in model.opset_imports.items() if domain == ""}
    part = ir.Model(
        ir.Graph(host.inputs, host.outputs, nodes=host.nodes, initializers=host.constants,
                 opset_imports=opsets, name=f"{graph.name}.host"),
        ir_version=model.ir_version,
    )  # fmt: skip
    for value in edge:
        taken = ir.Value(name=value.name, type=value.type, shape=value.shape)
        value.name = f"{value.name}.host"
        for use in list(value.uses()):
            if use.node not in held:
                use.node.replace_input_with(use.idx, taken)
        graph.inputs.append(taken)
    return part


class _Part:
    """A graph under construction."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []


def _classify(graph: ir.Graph, stays: set[str]) -> tuple[set[ir.Node], set[ir.Node]]:
    """Return the nodes of integers, and those of shapes and constants that they may need."""
    integers = {value for value in graph.inputs if value.dtype in _INTEGERS}
    outer = {v for v in graph.inputs if v not in integers and v.name not in stays}
    data: set[ir.Value] = set(integers)
    free: set[ir.Value] = set()
    held: set[ir.Node] = set()
    shaped: set[ir.Node] = set()
    for node in graph:
        taken = [value for value in node.inputs if value is not None]
        if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()) or node.domain:
            continue
        if str(node.name).startswith(TOTAL):  # it counts the buffer, not what is written of it
            continue
        if node.op_type == "Cast" and taken[0] in outer:
            outer.add(node.outputs[0])  # of the same shape
            continue
        if node.op_type == "Shape" and taken[0] in outer:
            known, free_of_data = True, True
        else:
            known = all(v in data or v in free or _is_small(v) for v in taken)
            free_of_data = not any(v in data for v in taken)
        if not known:
            continue
        (shaped if free_of_data else held).add(node)
        (free if free_of_data else data).update(node.outputs)
    return held, shaped


def _is_small(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and tensor.nbytes <= SMALL_BYTES


def _copied(graph: ir.Graph, edge: list[ir.Value], allowed: set[ir.Node]) -> _Part:
    """Copy what makes the values of `edge`."""
    needed: set[ir.Node] = set()
    waiting = [node for value in edge if (node := value.producer()) is not None]
    while waiting:
        node = waiting.pop()
        if node in needed:
            continue
        needed.add(node)
        makers = (v.producer() for v in node.inputs if v is not None)
        waiting += [maker for maker in makers if maker is not None and maker in allowed]
    part, copies = _Part(), dict[ir.Value, ir.Value]()

    def copied(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in copies:
            return None if value is None else copies[value]
        made = ir.Value(name=value.name, type=value.type, shape=value.shape)
        if value.is_initializer():
            made.const_value = value.const_value
            part.constants.append(made)
        else:
            part.inputs.append(made)
        copies[value] = made
        return made

    for node in graph:
        if node not in needed:
            continue
        taken = [uncast(value) if node.op_type == "Shape" else value for value in node.inputs]
        twin = ir.Node(
            node.domain, node.op_type, [copied(value) for value in taken],
            list(node.attributes.values()), num_outputs=len(node.outputs), name=node.name,
        )  # fmt: skip
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            copies[old] = new
        part.nodes.append(twin)
    part.outputs = [copies[value] for value in edge]
    return part
