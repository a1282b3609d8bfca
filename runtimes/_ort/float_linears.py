"""A float encoder's Linears as Gemm, which starts from the bias instead of adding it afterwards.

    x -> MatMul(W) -> Add(bias)     =>     x -> Reshape -> Gemm(W, bias) -> Reshape

Reshape of [batch, tokens, width] to [batch * tokens, width] and back moves nothing. The weights
stay where they are; Gemm's own factor takes what an activation between two Linears needs
(gated_activation.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmedge.graphs.edit import biased, constant, is_weight, reader, replace

from .fusion import Fusion, tally
from .gated_activation import Gate, gates, unscale

CONTRIB = "com.microsoft"


@dataclass(frozen=True, slots=True)
class _Linear:
    """One float Linear: x [batch, tokens, in] @ weight [in, out] + bias [out]."""

    product: ir.Node
    total: ir.Node
    x: ir.Value
    weight: ir.Value
    bias: ir.Value
    tokens: int


def fuse_linears(model: ir.Model) -> tuple[Fusion, Fusion]:
    """Make Gemm of every Linear of a fixed number of tokens; what is unused is removed later.

    Returns:
        What became of the Linears, and of the activations between them.
    """
    graph = model.graph
    linears, left = [], []
    for node in graph:
        linear = _match(node)
        if isinstance(linear, str):
            left.append(f"{node.name}: {linear}")
        elif linear is not None:
            linears.append(linear)
    made = {id(linear.total.outputs[0]): linear for linear in linears}
    taken = {id(linear.product): linear for linear in linears}
    alpha = {id(linear.product): 1.0 for linear in linears}
    grown: dict[int, float] = {}
    found = gates(graph)
    fit = [gate for gate in found if _between(gate, made, taken)]
    for gate in fit:
        before, behind = made[id(gate.x)], _behind(gate)
        assert behind is not None
        alpha[id(before.product)] *= gate.factor
        grown[id(before.product)] = gate.factor
        alpha[id(behind)] /= gate.factor
        unscale(gate)
    rows: dict[str, ir.Value] = {}
    for linear in linears:
        key = id(linear.product)
        _replace(graph, linear, alpha[key], grown.get(key, 1.0), rows)
    if fit:
        model.opset_imports[CONTRIB] = 1
    why = "not between two Linears that are fused"
    spare = [f"{gate.last.name}: {why}" for gate in found if gate not in fit]
    return (
        tally("float linears", len(linears) + len(left), left),
        tally("gates", len(found), spare),
    )


def _match(node: ir.Node) -> _Linear | str | None:
    """Return a Linear with a bias, why it is left alone, or none for all else."""
    if node.op_type != "MatMul" or node.domain:
        return None
    x, weight = node.inputs
    found = biased(node)
    if x is None or found is None or not is_weight(weight, ir.DataType.FLOAT, 2):
        return None
    total, bias = found
    assert weight is not None and weight.const_value is not None
    if not is_weight(bias, ir.DataType.FLOAT, 1) or bias.const_value is None:
        return None
    if bias.const_value.shape[0] != weight.const_value.shape[1]:
        return None
    if x.shape is None or len(x.shape) != 3 or not isinstance(x.shape[1], int):
        return "the number of tokens is not fixed"
    return _Linear(node, total, x, weight, bias, x.shape[1])


def _behind(gate: Gate) -> ir.Node | None:
    return reader(gate.last.outputs[0], "MatMul")


def _between(gate: Gate, made: dict[int, _Linear], taken: dict[int, _Linear]) -> bool:
    """Return whether a gate has one such Linear before it, and one behind it."""
    behind = _behind(gate)
    return id(gate.x) in made and behind is not None and id(behind) in taken


def _replace(
    graph: ir.Graph, linear: _Linear, alpha: float, grown: float, rows: dict[str, ir.Value]
) -> None:
    assert linear.weight.const_value is not None and linear.bias.const_value is not None
    into, out = linear.weight.const_value.shape.numpy()
    x, bias = linear.product.inputs[0], linear.bias  # of now: a gate before it may be a new one
    assert x is not None
    if str(x.name) not in rows:
        shape = constant(graph, f"{x.name}.rows", np.array([-1, into]))
        flat = ir.Node("", "Reshape", [x, shape], name=f"{x.name}.flat")
        flat.outputs[0].name, flat.outputs[0].type = f"{x.name}.flat", x.type
        graph.insert_before(linear.product, flat)
        rows[str(x.name)] = flat.outputs[0]
    if grown != 1:
        vector = linear.bias.const_value.numpy() * np.float32(grown)
        bias = constant(graph, f"{linear.bias.name}.grown", vector)
    attributes = [ir.AttrFloat32("alpha", alpha)]
    name = linear.product.name
    inputs = [rows[str(x.name)], linear.weight, bias]
    gemm = ir.Node("", "Gemm", inputs, attributes, name=f"{name}.gemm")
    gemm.outputs[0].name, gemm.outputs[0].type = f"{name}.gemm", x.type
    shape = constant(graph, f"{name}.tokens", np.array([-1, linear.tokens, out]))
    back = ir.Node("", "Reshape", [gemm.outputs[0], shape], name=f"{name}.back")
    replace([linear.product, linear.total], [gemm, back])
