"""Clean a traced graph, and bind its weights to where they lie on disk.

Every pass works without the weights' data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmedge.arrays import Array
from vlmedge.bundle.embedding_table import ROWS_AT_ONCE
from vlmedge.bundle.weights import RowReader
from vlmedge.graphs.edit import order, replace

Read = Callable[[str], Array]


def clean(model: ir.Model) -> set[str]:
    """Write every Linear as MatMul and Add on a weight of [in, out], in place.

        x, W[out, in], b -> Gemm(transB)               x, W[in, out] -> MatMul -> Add <- b
        x, W[out, in] -> Transpose -> MatMul     =>

    One form means that a scheme and an engine need to know one pattern.

    Returns:
        Names of the weights that are now transposed against the checkpoint.
    """
    graph = model.graph
    transposed: set[str] = set()
    for node in list(graph):
        if node.op_type == "Gemm" and _is_linear(node):
            _split_gemm(graph, node, transposed)
        elif node.op_type == "Transpose" and _turns_weight(node):
            weight = node.inputs[0]
            assert weight is not None
            node.outputs[0].replace_all_uses_with(_turned(graph, weight, transposed))
    RemoveUnusedNodesPass()(model)
    return transposed


def bind(
    model: ir.Model,
    read: Read,
    rows: Callable[[str], RowReader],
    buffers: Mapping[str, Array],
    transposed: set[str],
) -> None:
    """Give every weight a tensor that is read from the checkpoint when it is asked for.

    Args:
        model: The graph, in place.
        read: Reads a weight as float32 by the checkpoint's name.
        rows: Gives what reads rows of a weight, likewise.
        buffers: Values that no checkpoint holds.
        transposed: Names of weights that are stored the other way round.
    """
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.shape is not None and value.dtype is not None
        if name in buffers:
            value.const_value = ir.tensor(buffers[name], name=name)
            continue
        if name in transposed:
            source, shape = name.removesuffix(_TURNED), tuple(int(str(n)) for n in value.shape)
            load = partial(_load_turned, rows, source, shape)
        else:
            load = partial(_load, read, name)

        value.const_value = ir.LazyTensor(load, value.dtype, value.shape, name=name)


def _load(read: Read, name: str) -> ir.Tensor[Array]:
    return ir.Tensor(np.ascontiguousarray(read(name)))


def _load_turned(
    rows: Callable[[str], RowReader], name: str, shape: tuple[int, ...]
) -> ir.Tensor[Array]:
    """Read a weight the other way round, some rows at a time: a second copy may be gigabytes."""
    read, found = rows(name), np.empty(shape, np.float32)
    for start in range(0, shape[1], ROWS_AT_ONCE):
        found[:, start : start + ROWS_AT_ONCE] = read(start, start + ROWS_AT_ONCE).T
    return ir.Tensor(found)


_TURNED = ".transposed"


def _is_linear(node: ir.Node) -> bool:
    weight = node.inputs[1]
    scale = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return (
        weight is not None
        and weight.is_initializer()
        and scale == [1.0, 1.0]
        and not node.attributes.get_int("transA", 0)
    )


def _turns_weight(node: ir.Node) -> bool:
    weight = node.inputs[0]
    return (
        weight is not None
        and weight.is_initializer()
        and weight.const_value is None
        and order(node) == [1, 0]
    )


def _split_gemm(graph: ir.Graph, node: ir.Node, transposed: set[str]) -> None:
    """Replace Gemm by MatMul and Add."""
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    assert weight is not None
    if node.attributes.get_int("transB", 0):
        weight = _turned(graph, weight, transposed)
    out = node.outputs[0]
    product = ir.Node("", "MatMul", [x, weight], name=f"{node.name}_MatMul")
    nodes, last = [product], product.outputs[0]
    if bias is not None:
        last.type, last.shape = out.type, out.shape
        total = ir.Node("", "Add", [last, bias], name=f"{node.name}_Add")
        nodes = [product, total]
    replace([node], nodes)


def _turned(graph: ir.Graph, weight: ir.Value, transposed: set[str]) -> ir.Value:
    """Return the initializer that holds `weight` the other way round."""
    name = f"{weight.name}{_TURNED}"
    if name not in graph.initializers:
        assert weight.shape is not None
        rows, columns = weight.shape
        graph.register_initializer(
            ir.Value(
                name=name,
                type=weight.type,
                shape=ir.Shape([columns, rows]),
                const_value=ir.LazyTensor(
                    _unbound, ir.DataType.FLOAT, ir.Shape([columns, rows]), name=name
                ),
            )
        )
        graph.initializers[name].const_value = None
        transposed.add(name)
    return graph.initializers[name]


def _unbound() -> ir.Tensor[Array]:
    raise RuntimeError("a weight was read before it was bound")
