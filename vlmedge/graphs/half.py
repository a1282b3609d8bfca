"""float16 written into a graph: one way to do it, for whoever chooses what stays float32.

    inputs -> Cast(float16) -> ... nodes in float16 ... -> Cast(float32) -> outputs

Weights are cast when they are written. Inputs and outputs stay float32, but for a state that never
leaves the device:

    past float32 -> Cast -> Concat float16 -> Cast -> present float32
    past float16 ---------> Concat float16 ---------> present float16
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np

from vlmedge.arrays import Array
from vlmedge.errors import BundleError
from vlmedge.graphs.edit import cast, drop_unread, promise

if TYPE_CHECKING:
    import onnx_ir as ir

HALF_MAX = 65504.0
HALF_NORMAL = 2.0**-14  # below it a float16 loses digits

# What reaches MASK stands for "never", as float32's -3.4e38 does in an attention mask, and becomes
# MASKED; below it is a number, which must stay what it is. Two masks may be added (causal and
# padding), and a logit to them: 2 * 30000 leaves 5504 up to 65504 for the logit. Of 32752, the
# most that can be added twice, nothing would be left: 2 * 32752 = 65504, and with a logit of -16
# that rounds to -inf, so that a row without any key gives nan and not an even distribution. One
# mask and a logit also stay below half of 65504, where the repair of TensorRT's engines looks for
# overflow first. exp(-30000) is 0 in every type.
MASK, MASKED = 1e30, 3e4

BOUNDED = frozenset({"Clip", "Max", "Min"})  # where 3.4e38 is "no bound", and 3e4 would be one

IsWide = Callable[["ir.Node"], bool]
Refuse = Callable[[str, float], Exception]  # a weight's name, its largest number -> what to raise


class BeyondHalfError(BundleError):
    """A weight has no float16."""


def is_typed(model: ir.Model) -> bool:
    """Return whether a scheme has chosen float16 already, and float32 where it must be."""
    import onnx_ir as ir

    half = ir.DataType.FLOAT16
    return any(value.dtype == half for node in model.graph for value in node.outputs)


def halve(graph: ir.Graph, is_wide: IsWide, refuse: Refuse, state: Collection[str] = ()) -> None:
    """Rewrite a float32 graph to float16, in place; its inputs and outputs stay float32.

    Args:
        graph: Its nodes are sorted.
        is_wide: Tells whether a node stays float32. It is asked once for each node, in the graph's
            order, when the types of what the node reads are settled.
        refuse: Makes the error for a weight that float16 does not have.
        state: Inputs and outputs that never leave the device; they become float16 too.
    """
    _Halver(graph, is_wide, refuse, state).run()


def halve_state(model: ir.Model, pairs: Iterable[tuple[str, str]]) -> bool:
    """Type the state of a typed graph as float16 where that loses nothing, in place.

    What a portable graph says of its state is float32, whatever computes it. Nobody sees it on the
    device, and each step would read, cast and write twice the bytes of the whole cache.

    Args:
        model: A graph with types of its own.
        pairs: (output, the input that it becomes).

    Returns:
        Whether any became float16.
    """
    import onnx_ir as ir

    graph, changed = model.graph, False
    taken = {value.name: value for value in graph.inputs}
    given = {value.name: number for number, value in enumerate(graph.outputs)}
    for out, into in pairs:
        source, number = taken[into], given[out]
        made = graph.outputs[number]
        widens = made.producer()
        if source.dtype != ir.DataType.FLOAT or widens is None or not _is_narrowed(source):
            continue
        narrow = widens.inputs[0] if widens.op_type == "Cast" else None
        if narrow is None or narrow.dtype != ir.DataType.FLOAT16:
            continue
        if made.uses() or narrow.is_graph_output():
            continue
        _narrow(graph, source)
        graph.outputs[number] = narrow
        graph.remove(widens, safe=True)
        made.name, narrow.name = None, out
        narrow.shape = narrow.shape or made.shape
        changed = True
    return changed


def beyond(node: ir.Node) -> float:
    """Return the single number that a node computes with and float16 does not have, or 0."""
    import onnx_ir as ir

    for value in node.inputs:
        tensor = ir.convenience.get_const_tensor(value) if value is not None else None
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size != 1:
            continue
        number = float(np.abs(tensor.numpy()).item())
        if number > HALF_MAX and (number < MASK or node.op_type in BOUNDED):
            return number
    return 0.0


def masked(array: Array) -> Array:
    """Give masks the number that they have in float16; the type stays."""
    return np.where(np.abs(array) >= MASK, np.sign(array) * MASKED, array).astype(array.dtype)


def to_half(array: Array, name: str, refuse: Refuse) -> Array:
    """Cast float32 to float16, masks to MASKED; refuse a weight that has no float16."""
    array = masked(array)
    if (largest := float(np.abs(array).max(initial=0.0))) > HALF_MAX:
        raise refuse(name, largest)
    return array.astype(np.float16)


class _Halver:
    """Rewrites one graph to float16; every value is cast at most once each way."""

    def __init__(
        self, graph: ir.Graph, is_wide: IsWide, refuse: Refuse, state: Collection[str]
    ) -> None:
        import onnx_ir as ir

        self._float, self._half = ir.DataType.FLOAT, ir.DataType.FLOAT16
        self._halves = ir.TensorType(self._half)
        self._graph, self._is_wide, self._refuse, self._state = graph, is_wide, refuse, state
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        """Go through the nodes in their order, so that the inputs of each are settled."""
        for taken in self._graph.inputs:
            if taken.dtype == self._float and taken.name in self._state:
                taken.type = self._halves
        for node in list(self._graph):
            wide = _has_graph(node) or self._is_wide(node)
            self._settle(node, self._float if wide else self._half)
        for number, given in enumerate(list(self._graph.outputs)):
            wanted = self._half if given.name in self._state else self._float
            if given.dtype in (self._float, self._half) and given.dtype != wanted:
                self._give(number, given, wanted)
        drop_unread(self._graph)

    def _settle(self, node: ir.Node, wanted: ir.DataType) -> None:
        """Let a node read and make floats of one type."""
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype not in (self._float, self._half):
                continue
            if node.op_type == "Resize" and place > 0:  # its scales are float32 by definition
                continue
            if value.dtype != wanted:
                node.replace_input_with(place, self._as(value, wanted))
        if wanted == self._half:
            self._retype(node)
            for made in node.outputs:
                if made.dtype == self._float:
                    made.type = self._halves

    def _retype(self, node: ir.Node) -> None:
        """Change what a node's attributes say about float32."""
        import onnx_ir as ir

        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(self._float):
            node.attributes["to"] = ir.AttrInt64("to", int(self._half))
        elif node.op_type == "ConstantOfShape" and "value" not in node.attributes:
            zero = ir.tensor(np.zeros(1, np.float16))  # without a value it is a float32 zero
            node.attributes["value"] = ir.AttrTensor("value", zero)
        elif node.op_type in ("ConstantOfShape", "Constant") and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype == self._float:
                name = str(node.outputs[0].name)
                half = ir.tensor(to_half(tensor.numpy(), name, self._refuse))
                node.attributes["value"] = ir.AttrTensor("value", half)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a value in another type: a new initializer, or a Cast right behind it."""
        key = (value, dtype)
        if key not in self._cast:
            if value.const_value is not None and value.is_initializer():
                self._cast[key] = self._weight(value)
            else:
                node = cast(value, dtype, f"{value.name}.{dtype.name.lower()}")
                producer = value.producer()
                if producer is None:
                    self._graph.insert_before(self._graph[0], node)
                else:
                    self._graph.insert_after(producer, node)
                self._cast[key] = node.outputs[0]
        return self._cast[key]

    def _weight(self, value: ir.Value) -> ir.Value:
        """Promise a weight in float16; its data is read when it is written."""
        import onnx_ir as ir

        source, name, refuse = value.const_value, str(value.name), self._refuse
        assert source is not None

        def make() -> ir.Tensor[Array]:
            return ir.Tensor(to_half(source.numpy(), name, refuse))

        return promise(self._graph, f"{name}.float16", self._half, source.shape.numpy(), make)

    def _give(self, index: int, value: ir.Value, dtype: ir.DataType) -> None:
        """Cast an output of the graph back, under its own name."""
        name = str(value.name)
        value.name = f"{name}.{'half' if dtype == self._float else 'full'}"
        node = cast(value, dtype, name)
        self._graph.append(node)
        self._graph.outputs[index] = node.outputs[0]


def _has_graph(node: ir.Node) -> bool:
    """Return whether a node runs graphs of its own, which are left as they are."""
    import onnx_ir as ir

    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _is_narrowed(source: ir.Value) -> bool:
    """Return whether all that reads a value casts it to float16, or asks for its shape."""
    import onnx_ir as ir

    readers = [use.node for use in source.uses() if use.node.op_type != "Shape"]
    return bool(readers) and all(
        n.op_type == "Cast" and n.outputs[0].dtype == ir.DataType.FLOAT16 for n in readers
    )


def _narrow(graph: ir.Graph, source: ir.Value) -> None:
    """Type an input as float16, and let those read it that read its Casts."""
    import onnx_ir as ir

    source.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in [use.node for use in source.uses() if use.node.op_type == "Cast"]:
        node.outputs[0].replace_all_uses_with(source)
        graph.remove(node, safe=True)
