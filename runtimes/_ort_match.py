"""What the patterns of the lowering ask of a value: who makes it, and which number it is."""

from __future__ import annotations

import onnx_ir as ir


def producer(value: ir.Value | None, op_type: str | None = None) -> ir.Node | None:
    """Return the node that makes a value, if it is of this kind; none for an input or a weight."""
    node = value.producer() if value is not None else None
    return node if node is not None and op_type in (None, node.op_type) else None


def scalar(value: ir.Value | None) -> float | None:
    """Return a constant of one element, whatever its rank; none for all else."""
    tensor = value.const_value if value is not None else None
    return float(tensor.numpy().ravel()[0]) if tensor is not None and tensor.size == 1 else None


def reader(value: ir.Value, op_type: str | None = None) -> ir.Node | None:
    """Return the only node that reads a value, if it is of this kind; none for an output."""
    users = {use.node for use in value.uses()}
    if value.is_graph_output() or len(users) != 1:
        return None
    node = next(iter(users))
    return node if op_type in (None, node.op_type) else None


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
