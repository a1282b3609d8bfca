"""Cut a graph into pieces that run one after the other, where its weights do not fit at once.

    inputs --> [nodes] --> live values --> [nodes] --> live values --> [nodes] --> outputs

A piece takes those of the graph's inputs that it reads and what earlier pieces gave; it gives what
later ones read. What the graph gives itself, it does not give: pieces are for looking inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from vlmedge.graphs.edit import drop_unread
from vlmedge.spec import Component, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Piece:
    """Some nodes of a graph, as a graph.

    Attributes:
        model: Its weights are the whole graph's, unread.
        component: Inputs and outputs: the values that come from outside the piece, and those that
            later pieces need. It has no state.
        made: Names of all values that its nodes make.
    """

    model: ir.Model
    component: Component
    made: frozenset[str]


def cut(component: Component, model: ir.Model, most_bytes: int) -> Iterator[Piece]:
    """Cut a graph of sorted nodes into pieces in the order in which they run.

    Args:
        component: Its spec.
        model: The graph; it stays as it is.
        most_bytes: Limit on the weights of one piece; a single node may have more.
    """
    for start, stop in _shares(list(model.graph), most_bytes):
        yield _piece(component, model.clone(), start, stop)


def _shares(nodes: list[ir.Node], most_bytes: int) -> Iterator[tuple[int, int]]:
    """Return which nodes each piece has: from one up to another."""
    start, held = 0, 0
    seen: set[ir.Value] = set()
    for place, node in enumerate(nodes):
        weights = {v for v in node.inputs if v is not None and v.is_initializer()} - seen
        size = sum(v.const_value.nbytes for v in weights if v.const_value is not None)
        if held and held + size > most_bytes:
            yield start, place
            start, held, seen = place, 0, set()
        held += size
        seen |= weights
    yield start, len(nodes)


def _piece(component: Component, model: ir.Model, start: int, stop: int) -> Piece:
    """Take all nodes but some out of a copy of the graph."""
    import onnx_ir as ir

    graph, nodes = model.graph, list(model.graph)
    inside, later = nodes[start:stop], set(nodes[stop:])
    own = {spec.name: spec for spec in component.inputs}
    made = [value for node in inside for value in node.outputs]
    live = [v for v in made if any(use.node in later for use in v.uses())]
    graph.outputs.clear()
    graph.remove(nodes[stop:], safe=True)
    read = dict.fromkeys(v for node in inside for v in node.inputs if v is not None)
    given = [v for v in read if not v.is_initializer() and v.producer() not in inside]
    graph.inputs.clear()
    for value in given:
        if value.producer() is None:
            graph.inputs.append(value)
            continue
        stand_in = ir.Value(name=value.name, type=value.type, shape=value.shape)
        for use in tuple(value.uses()):
            if use.node in inside:
                use.node.replace_input_with(use.idx, stand_in)
        graph.inputs.append(stand_in)
    graph.remove(nodes[:start], safe=True)
    graph.outputs.extend(live)
    drop_unread(graph)
    inputs = tuple(own.get(str(value.name)) or _spec(value) for value in given)
    outputs = tuple(_spec(value) for value in live)
    spec = msgspec.structs.replace(component, inputs=inputs, outputs=outputs, state=(), slots=())
    return Piece(model, spec, frozenset(str(value.name) for value in made))


def _spec(value: ir.Value) -> TensorSpec:
    """Describe a value between two nodes; nothing is known of its axes but the fixed ones."""
    assert value.dtype is not None and value.shape is not None, value.name
    shape = tuple(
        size if isinstance(size, int) else f"{value.name}.{axis}"
        for axis, size in enumerate(value.shape)
    )
    return TensorSpec(str(value.name), value.dtype.numpy().name, shape)
