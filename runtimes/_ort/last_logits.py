"""The logits of the last token alone: a head with an input for the first token to compute.

    x -> MatMul(vocabulary) -> logits     =>     x -> Slice(from) -> MatMul(vocabulary) -> logits

While a prompt is read, only what follows its last token is ever looked at. The head of a model of
1.1B parameters is 6 % of the prompt's time, and its logits over 32000 words take 128 KB a token:
369 MB for LLaVA-NeXT's 2880 tokens of one picture.

This file is read without onnx_ir where engines are there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmedge.graphs.edit import constant, rank
from vlmedge.spec import Component

from .fusion import Fusion

if TYPE_CHECKING:
    import onnx_ir as ir

FROM = "logits.from"  # an input of the lowered graph, int64 [1]: 0 for all tokens, -1 for the last
LOGITS, KIND = "logits", "heads"
TOKENS = 1  # their axis
# Between a product and the logits; of two inputs one is a constant.
ELEMENTWISE = {"Add", "Cast", "Div", "Identity", "Mul", "Sub", "Tanh"}


def choose_tokens(component: Component, graph: ir.Graph) -> Fusion:
    """Let the head of a decoder read the tokens from `FROM` on, in place."""
    outputs = {spec.name: spec for spec in component.outputs}
    if not component.state or LOGITS not in outputs:
        return Fusion(KIND, 0, 0)
    logits = next(value for value in graph.outputs if value.name == LOGITS)
    products: list[ir.Node] = []
    made: list[ir.Value] = []
    fault = "something else reads them" if list(logits.uses()) else _collect(logits, products, made)
    if fault is not None:
        return Fusion(KIND, 0, 1, (f"{LOGITS}: {fault}",))
    _insert(graph, products)
    for value in made:
        if value.shape is not None:
            value.shape = _chosen(value.shape)
    return Fusion(KIND, 1, 1)


def _collect(value: ir.Value, products: list[ir.Node], made: list[ir.Value]) -> str | None:
    """Find the products that a value is made of token by token; or say why there are none.

    Args:
        value: The value to trace back; nothing else reads it.
        products: Filled with the MatMuls, of [batch, tokens, width] each.
        made: Filled with what they and the nodes behind them make.
    """
    node = value.producer()
    if node is None or node.domain:
        return f"{value.name} is not made by a MatMul"
    made.append(value)
    if node.op_type == "MatMul":
        products.append(node)
        return None if rank(node.inputs[0]) == 3 else f"{node.name} does not read tokens"
    inputs = [v for v in node.inputs if v is not None and not v.is_initializer()]
    joins = node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (-1, 2)
    if not joins and (node.op_type not in ELEMENTWISE or len(inputs) != 1):
        return f"{node.op_type} {node.name} stands between the head and the logits"
    for v in inputs:
        if len(tuple(v.uses())) > 1 or v.is_graph_output():
            return f"something else reads {v.name}"
        fault = _collect(v, products, made)
        if fault is not None:
            return fault
    return None


def _insert(graph: ir.Graph, products: Sequence[ir.Node]) -> None:
    """Put the choice before the products; what several of them read is chosen from once."""
    import onnx_ir as ir

    start = ir.Value(name=FROM, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    graph.inputs.append(start)
    bounds = []
    for name, number in {"end": np.iinfo(np.int64).max, "axis": TOKENS}.items():
        bounds.append(constant(graph, f"{LOGITS}.{name}", np.array([number], np.int64)))
    chosen: dict[str, ir.Value] = {}
    for product in products:
        x = product.inputs[0]
        assert x is not None and x.shape is not None
        if str(x.name) not in chosen:
            node = ir.Node("", "Slice", [x, start, *bounds], name=f"{x.name}.chosen")
            out = chosen[str(x.name)] = node.outputs[0]
            out.name, out.type, out.shape = f"{x.name}.chosen", x.type, _chosen(x.shape)
            made_by = x.producer()
            if made_by is None:
                graph.insert_before(product, node)
            else:
                graph.insert_after(made_by, node)
        product.replace_input_with(0, chosen[str(x.name)])


def _chosen(shape: ir.Shape) -> ir.Shape:
    """Return a shape with another number of tokens."""
    import onnx_ir as ir

    return ir.Shape(["chosen" if i == TOKENS else size for i, size in enumerate(shape)])
