"""Compute only the token that is read: what pooling leaves out is left out of the last layer.

    x -> Linear -> Gelu -> Linear -> Add -> Gather(token 0)
                               =>
    x -> Gather(token 0) -> Linear -> Gelu -> Linear -> Add

An encoder whose class token alone goes on needs of its last layer the keys and values of all
tokens, and everything else (queries, attention, the whole MLP) of one. The choice moves up through
every operator that treats tokens alike, as long as nobody else reads what it makes; what comes out
is the same. ViT-B/16 saves 6 % of its operations, ViT-L/14 3 %.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmedge.graphs.edit import constant, replace, sizes

# Element by element of their first input; others are numbers.
ALIKE = {"Cast", "Clip", "Erf", "Gelu", "Identity", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Tanh"}
# Element by element of all their inputs, which are broadcast.
BROADCAST = {"Add", "Sub", "Mul", "Div", "Pow", "Where"}
TOKENS = 1  # the axis that is chosen from


class _Choice:
    """One token of [batch, tokens, width]: the same in every row (Gather), or not (GatherND)."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph = graph
        self.node = node
        self._made: dict[tuple[int, int], ir.Value] = {}

    def fits(self, value: ir.Value | None, axis: int) -> bool:
        """Return whether it can be made of a value; GatherND counts rows and tokens alone."""
        if value is None or value.shape is None:
            return False
        return self.node.op_type == "Gather" or (len(value.shape) == 3 and axis == TOKENS)

    def of(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the token of a value; its axis stays, with one entry."""
        key = id(value), axis
        if key not in self._made:
            name, index = f"{value.name}.read", self.node.inputs[1]
            assert index is not None and value.shape is not None
            one = _constant(self.graph, "read.one", [1])
            if self.node.op_type == "Gather":
                entry = ir.Node("", "Reshape", [index, one], name=f"{name}.index")
                told = [ir.AttrInt64("axis", axis)]
            else:  # [batch, 2] -> [batch, 1, 2]
                entry, told = ir.Node("", "Unsqueeze", [index, one], name=f"{name}.index"), []
            entry.outputs[0].name, entry.outputs[0].type = f"{name}.index", index.type
            inputs = [value, entry.outputs[0]]
            node = ir.Node("", self.node.op_type, inputs, told, name=name)
            out = node.outputs[0]
            out.name, out.type, out.shape = name, value.type, _with_one(value.shape, axis)
            self.graph.insert_before(self.node, [entry, node])
            self._made[key] = out
        return self._made[key]


def read_one_token(model: ir.Model) -> int:
    """Move the choice of a token up to where tokens are mixed, in place.

    Returns:
        How many products are made of one token in place of all.
    """
    graph = model.graph
    products = sum(_move(_Choice(graph, node)) for node in list(graph) if _chooses(node))
    if products:
        RemoveUnusedNodesPass()(model)
        graph.sort()
    return products


def _chooses(node: ir.Node) -> bool:
    """Recognise a choice on [batch, tokens, width]."""
    if node.domain or node.op_type not in ("Gather", "GatherND"):
        return False
    x, index = node.inputs[0], node.inputs[1]
    if x is None or x.is_initializer() or len(sizes(x)) != 3 or index is None:
        return False
    if node.op_type == "GatherND":
        rows = sizes(index)
        return node.attributes.get_int("batch_dims", 0) == 0 and len(rows) == 2 and rows[1] == 2
    return node.attributes.get_int("axis", 0) == TOKENS and sizes(index) in ([], [1])


def _move(choice: _Choice) -> int:
    """Rewrite what only a choice reads; leave the graph alone if that spares no product."""
    alike = _alike(choice)
    if not any(node.op_type == "MatMul" for node in alike):
        return 0
    for node, (axis, reads) in alike.items():
        for place, place_axis in reads.items():
            value = node.inputs[place]
            assert value is not None
            if value.producer() not in alike:
                node.replace_input_with(place, choice.of(value, place_axis))
        out = node.outputs[0]
        assert out.shape is not None
        out.shape = _with_one(out.shape, axis)
        if node.op_type == "Reshape":
            target = [size if isinstance(size, int) else -1 for size in sizes(out)]
            shape = _constant(choice.graph, f"{out.name}.one", target)
            node.replace_input_with(1, shape)
    _end(choice)
    return sum(node.op_type == "MatMul" for node in alike)


def _end(choice: _Choice) -> None:
    """Drop the axis that has one entry now, if the choice did."""
    x, old = choice.node.inputs[0], choice.node.outputs[0]
    assert x is not None
    kind = "Squeeze" if len(sizes(old)) == 2 else "Identity"
    axes = [_constant(choice.graph, "read.one", [TOKENS])] if kind == "Squeeze" else []
    node = ir.Node("", kind, [x, *axes], name=f"{choice.node.name}.moved")
    replace([choice.node], [node])


def _alike(choice: _Choice) -> Mapping[ir.Node, tuple[int, Mapping[int, int]]]:
    """Find the nodes of which one token is enough, in the graph's order.

    Returns:
        Of each, which axis of its output has the tokens, and which of its inputs have them where.
    """
    reads: dict[tuple[ir.Node, int], int] = {(choice.node, 0): TOKENS}
    found: dict[ir.Node, tuple[int, Mapping[int, int]]] = {}
    for node in reversed(choice.graph):
        if node.domain or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            continue
        axes = {reads.get((use.node, use.idx)) for use in node.outputs[0].uses()}
        axis = axes.pop() if len(axes) == 1 else None
        if axis is None:
            continue
        inputs = _tokens(node, axis)
        if inputs and all(choice.fits(node.inputs[i], at) for i, at in inputs.items()):
            found[node] = axis, inputs
            reads |= {(node, i): at for i, at in inputs.items()}
    return dict(reversed(found.items()))


def _tokens(node: ir.Node, axis: int) -> Mapping[int, int] | None:
    """Tell which inputs of a node have tokens, and on which axis, if its output has them on `axis`.

    None where a token of the output comes of more than that token of the inputs.
    """
    shape, rank = sizes(node.outputs[0]), len(sizes(node.outputs[0]))
    first = sizes(node.inputs[0])
    if not shape or not first:
        return None
    if node.op_type in ALIKE:
        return {0: axis}
    if node.op_type in BROADCAST:
        return _broadcast(node, axis)
    if node.op_type in ("Softmax", "LayerNormalization"):
        over = node.attributes.get_int("axis", -1) % rank
        alone = axis != over if node.op_type == "Softmax" else axis < over
        return {0: axis} if alone else None
    if node.op_type == "ReduceMean" and node.attributes.get_int("keepdims", 1) == 1:
        over_axes = _numbers(node.inputs[1]) if len(node.inputs) > 1 else None
        apart = over_axes is not None and axis not in [at % rank for at in over_axes]
        return {0: axis} if apart else None
    if node.op_type == "MatMul":
        at = axis - rank + len(first)
        rows = axis == rank - 2 or (axis < rank - 2 and len(sizes(node.inputs[1])) == 2)
        return {0: at} if rows and at >= 0 and first[at] == shape[axis] else None
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", ())
        return {0: order[axis]} if order else None
    if node.op_type == "Reshape":
        symbols = [size for i, size in enumerate(shape) if not isinstance(size, int) and i != axis]
        kept = first[: axis + 1] == shape[: axis + 1] and len(symbols) < 2
        return {0: axis} if kept and None not in first[: axis + 1] else None
    return None


def _broadcast(node: ir.Node, axis: int) -> Mapping[int, int] | None:
    """Tell which inputs have a row for every token; the others have one for all."""
    shape = sizes(node.outputs[0])
    found: dict[int, int] = {}
    for place, value in enumerate(node.inputs):
        own = sizes(value)
        at = axis - len(shape) + len(own)
        if value is None or value.shape is None:
            return None
        if at < 0 or own[at] == 1:
            continue
        if own[at] is None or own[at] != shape[axis]:
            return None
        found[place] = at
    return found


def _with_one(shape: ir.Shape, axis: int) -> ir.Shape:
    return ir.Shape([1 if i == axis else size for i, size in enumerate(shape)])


def _numbers(value: ir.Value | None) -> list[int] | None:
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().ravel()]


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    """Return a constant, the one of that name where it is there already."""
    known = graph.initializers.get(name)
    return constant(graph, name, np.array(numbers, np.int64)) if known is None else known
