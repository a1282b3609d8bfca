"""What a pattern asks of a graph's values, and the small edits that follow.

This folder is the only room of the core that makes parts of graphs. onnx_ir is imported where one
is made, so that all that runs without graphs, runs without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmedge.arrays import Array

if TYPE_CHECKING:
    import onnx_ir as ir


def producer(value: ir.Value | None, op_type: str | None = None) -> ir.Node | None:
    """Return the node that makes a value, if it is of this kind; none for an input or a weight."""
    node = value.producer() if value is not None else None
    return node if node is not None and op_type in (None, node.op_type) else None


def reader(
    value: ir.Value,
    op_type: str | None = None,
    *,
    besides_shape: bool = False,
    output_too: bool = False,
) -> ir.Node | None:
    """Return the only node that reads a value, if it is of this kind.

    Args:
        value: Any value.
        op_type: The operator; none: any.
        besides_shape: Whether nodes that ask for its Shape alone do not count.
        output_too: Whether the value may be an output of the graph as well.
    """
    if value.is_graph_output() and not output_too:
        return None
    users = {use.node for use in value.uses()}
    if besides_shape:
        users = {node for node in users if node.op_type != "Shape"}
    node = next(iter(users)) if len(users) == 1 else None
    return node if node is not None and op_type in (None, node.op_type) else None


def scalar(value: ir.Value | None) -> float | None:
    """Return a constant of one element, whatever its rank; none for all else."""
    tensor = value.const_value if value is not None else None
    return float(tensor.numpy().ravel()[0]) if tensor is not None and tensor.size == 1 else None


def factored(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """Return what a node multiplies or divides by one number, and the factor."""
    if node is None or node.op_type not in ("Mul", "Div") or node.domain:
        return None
    one, other = node.inputs
    number = scalar(other)
    if one is not None and number is not None:
        if node.op_type == "Mul":
            return one, number
        return (one, 1 / number) if number else None
    number = scalar(one)
    return (other, number) if node.op_type == "Mul" and other and number is not None else None


def biased(product: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add of a constant vector that alone reads a product, and the vector."""
    out = product.outputs[0]
    total = reader(out, "Add")
    bias = next((v for v in total.inputs if v is not out), None) if total is not None else None
    if total is None or bias is None or not bias.is_initializer() or rank(bias) != 1:
        return None
    return total, bias


def uncast(value: ir.Value | None) -> ir.Value | None:
    """Return what a value was before it was cast."""
    node = producer(value, "Cast")
    return uncast(node.inputs[0]) if node is not None else value


def unrounded(value: ir.Value | None) -> ir.Value | None:
    """Return what went into QuantizeLinear -> DequantizeLinear; none for all else."""
    dequantize = producer(value, "DequantizeLinear")
    quantize = producer(dequantize.inputs[0], "QuantizeLinear") if dequantize is not None else None
    return quantize.inputs[0] if quantize is not None else None


def is_symmetric(dequantize: ir.Node) -> bool:
    """Return whether the zero point of a DequantizeLinear is 0, or left out."""
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    if zero is None:
        return True
    return zero.const_value is not None and not zero.const_value.numpy().any()


def is_weight(value: ir.Value | None, dtype: ir.DataType, rank: int) -> bool:
    """Return whether a value is an initializer of this type and rank."""
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return tensor is not None and tensor.dtype == dtype and len(tensor.shape) == rank


def rank(value: ir.Value | None) -> int:
    """Return how many axes a value has, or -1 where that is not known."""
    return -1 if value is None or value.shape is None else len(value.shape)


def sizes(value: ir.Value | None) -> list[int | str | None]:
    """Return the sizes of a value, numbers or the names of axes; none of a shape not known."""
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else size.value for size in value.shape]


def size(value: ir.Value, axis: int) -> int | str | None:
    """Return one size of a value, or the name of the axis; none where it is not known."""
    known = sizes(value)
    return known[axis] if known else None


def order(transpose: ir.Node) -> list[int]:
    """Return the axes of a Transpose in their new order."""
    return list(transpose.attributes.get_ints("perm", ()))


def constant(graph: ir.Graph, name: str, data: Array | ir.TensorProtocol) -> ir.Value:
    """Register a constant, of its data's type and shape; the name must be new."""
    import numpy as np
    import onnx_ir as ir

    tensor = ir.tensor(data) if isinstance(data, np.ndarray) else data
    tensor.name = name
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def promise(
    graph: ir.Graph,
    name: str,
    dtype: ir.DataType,
    shape: Iterable[int],
    make: Callable[[], ir.TensorProtocol],
) -> ir.Value:
    """Register a constant that is made when it is written, or return the one of this name."""
    import onnx_ir as ir

    if name in graph.initializers:
        return graph.initializers[name]
    return constant(graph, name, ir.LazyTensor(make, dtype, ir.Shape(shape)))


def cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    """Make a node that casts a value, with its type and shape settled; it is in no graph yet."""
    import onnx_ir as ir

    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], name=f"{name}.cast")
    out = node.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(dtype), value.shape
    return node


def append(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    dtype: ir.DataType | None,
    shape: Sequence[int | str | None] | None,
    name: str | None = None,
    *,
    domain: str = "",
    **attributes: int | float | list[int],
) -> ir.Value:
    """Append a node of one output to a graph, and return what it makes; sort the graph afterwards.

    Args:
        graph: Where the node goes, behind all others.
        op_type: Its operator.
        inputs: Values that the node reads.
        dtype: The type of what it makes.
        shape: The shape of that, or none where it is not known.
        name: Name of the node; none: the graph finds one.
        domain: The operator's.
        attributes: The node's.
    """
    import onnx_ir as ir

    given = ir.convenience.convert_attributes(attributes)
    node = ir.Node(domain, op_type, inputs, given, name=name)
    graph.append(node)
    out = node.outputs[0]
    if name is not None:
        out.name = f"{name}.out"
    out.type = None if dtype is None else ir.TensorType(dtype)
    out.shape = None if shape is None else ir.Shape(shape)
    return out


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Give a new value the name, type, shape and readers of an old one, in the graph's outputs too.

    The node that made the old value should go next: two values of one name are in the graph.
    """
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def give_instead(graph: ir.Graph, old: ir.Value, new: ir.Value, called: str) -> None:
    """Let a graph give a new value in the place of an old one, whose readers keep it.

    Args:
        graph: The graph; nothing changes where the old value is none of its outputs.
        old: The value that was the output.
        new: The value that takes its place, under the old value's name.
        called: The old value's name from now on.
    """
    for index, output in enumerate(graph.outputs):
        if output is old:
            name, old.name = old.name, called
            new.name, new.type, new.shape = name, old.type, old.shape
            graph.outputs[index] = new


def replace(old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """Put nodes in the place of others; the last new one makes what the last old one made."""
    import onnx_ir as ir

    graph = old[-1].graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(
        graph, old[-1], old, new, old[-1].outputs[:1], new[-1].outputs[:1]
    )


def drop_unread(graph: ir.Graph) -> None:
    """Remove the initializers that no node reads."""
    unread = [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]
    for name in unread:
        del graph.initializers[name]


def external(model: ir.Model) -> list[ir.Value]:
    """Return the initializers whose data lies in files beside the graph, those of subgraphs too."""
    import onnx_ir as ir

    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return [value for value in values if isinstance(value.const_value, ir.ExternalTensor)]


def refer(values: Iterable[ir.Value], root: Path, folder: str) -> None:
    """Name the files of external tensors from `root`, below which they lie in `folder`."""
    import onnx_ir as ir

    for value in values:
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            f"{folder}/{tensor.location}",
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=str(value.name),
            base_dir=root,
        )
