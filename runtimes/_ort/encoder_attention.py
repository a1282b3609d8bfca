"""An encoder's attention as one node: no cache, every position that the mask leaves is seen.

    q -> Reshape -> Transpose ------> MatMul -> (Mul) -> (Add mask) -> Softmax -> MatMul
    k -> Reshape -> Transpose(last two swapped) -^                                  ^  |
    v -> Reshape -> Transpose ------------------------------------------------------'  v
                                                             Reshape <- Transpose <-----
                                            =>
    Attention(q, k, v, mask), of opset 23, on [batch, tokens, heads * width]

Where one Linear makes all three, and Reshape, Transpose and Gather part them, one Split does.
Queries or keys that are turned or normed between the two ends stay spelt out: the kernel takes
heads that are split already, but is no faster with them.

Measured on two cores of a Zen 4, ViT-B/16, one image: 58.4 ms with int8 Linears against 60.3 spelt
out. Long rows go to com.microsoft's MultiHeadAttention, which never holds all weights of a row: of
577 tokens (12 heads of 64) a layer takes it 14.8 ms, Attention 18.7; of 257 (16 heads of 88) it is
7.1 against 5.9. com.microsoft's Attention, which brings its own projection, is slower than either,
and one MatMul for queries, keys and values gains nothing once they are parted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmedge.graphs.edit import (
    constant,
    factored,
    order,
    producer,
    reader,
    replace,
    size,
    sizes,
)
from vlmedge.graphs.heads import KEYS_TURNED, OUTSIDE, SWAPPED, third

from .fusion import Fusion, tally

CONTRIB = "com.microsoft"
LONG = 512  # tokens from which on MultiHeadAttention is taken
OPSET = 23
SINCE = (1, 26)  # of ONNX Runtime: older kernels of Attention have not been tried


@dataclass(frozen=True, slots=True)
class _Heads:
    """Queries, keys or values.

    Attributes:
        flat: float32 [batch, tokens, heads * width], or of all three [batch, tokens, 3 * ...].
        heads: How many.
        width: Width of one head.
        part: Index of its third of `flat`, or none: all of it.
    """

    flat: ir.Value
    heads: int
    width: int
    part: int | None = None


@dataclass(frozen=True, slots=True)
class _Attention:
    """One attention, all of its outside."""

    query: _Heads
    key: _Heads
    value: _Heads
    mask: ir.Value | None  # added to the scores; one row may be for all queries
    scale: float
    last: ir.Node  # makes [batch, tokens, heads * width]


def fuse_bidirectional(model: ir.Model, version: tuple[int, ...]) -> Fusion:
    """Put one node in place of every attention; what it made unused is removed later.

    Args:
        model: A component without state.
        version: Version of ONNX Runtime.
    """
    graph = model.graph
    shares = [node for node in graph if node.op_type == "Softmax" and not node.domain]
    left = []
    thirds: dict[int, list[ir.Value]] = {}
    for node in shares:
        found = _match(node) if version >= SINCE else f"ONNX Runtime is older than {SINCE}"
        if isinstance(found, str):
            left.append(f"{node.name}: {found}")
        else:
            _replace(graph, found, thirds)
    if len(left) < len(shares):
        model.opset_imports[""] = max(OPSET, model.opset_imports.get("", 0))
        model.opset_imports[CONTRIB] = 1
        graph.sort()
    return tally("attentions", len(shares), left)


def _match(shares: ir.Node) -> _Attention | str:
    """Return an attention, or what about it does not look like the sketch."""
    value, mask, scale = shares.inputs[0], None, 1.0
    if shares.attributes.get_int("axis", -1) not in (-1, 3):
        return "its Softmax is not along the last axis"
    masked = producer(value, "Add")
    if masked is not None:
        scores = [v for v in masked.inputs if _scores(v) is not None]
        if len(scores) != 1:
            return "the tensor added to its scores is not a mask"
        value = scores[0]
        mask = masked.inputs[1 - list(masked.inputs).index(value)]
    found = _scores(value)
    if found is None or value is None:
        return "its scores are not a product of queries and keys"
    product, scale = found
    mixed = reader(shares.outputs[0], "MatMul")
    if mixed is None or mixed.inputs[0] is not shares.outputs[0]:
        return "its weights are read by more than one product"
    query, key, values = (
        _split(product.inputs[0]),
        _keys(product.inputs[1]),
        _split(mixed.inputs[1]),
    )
    if query is None or key is None or values is None:
        return "queries, keys or values are changed after their heads are split"
    if len({(part.heads, part.width) for part in (query, key)}) != 1 or values.heads != query.heads:
        return "heads of queries, keys and values differ"
    if mask is not None and not _covers(mask, query.flat, key.flat):
        return f"its mask is {mask.shape}, not of its queries and keys"
    turned = reader(mixed.outputs[0], "Transpose")
    if turned is None or order(turned) != OUTSIDE:
        return "its heads are not joined again"
    last = reader(turned.outputs[0], "Reshape")
    width = values.heads * values.width
    if last is None or sizes(last.outputs[0]) != [*sizes(query.flat)[:2], width]:
        return "its heads are not joined again"
    return _Attention(query, key, values, mask, scale, last)


def _scores(value: ir.Value | None) -> tuple[ir.Node, float] | None:
    """Return the product of queries and keys, and the number that it is multiplied by."""
    scale = 1.0
    if (found := factored(producer(value))) is not None:
        value, scale = found
    product = producer(value, "MatMul")
    if product is None or reader(product.outputs[0]) is None:
        return None
    return product, scale


def _keys(value: ir.Value | None) -> _Heads | None:
    """Follow keys back; their last axes are swapped by a Transpose of its own, or with the rest."""
    turned = producer(value, "Transpose")
    if turned is None:
        return None
    return _split(turned.inputs[0]) if order(turned) == SWAPPED else _split(value, KEYS_TURNED)


def _split(value: ir.Value | None, axes: list[int] = OUTSIDE) -> _Heads | None:
    """Follow heads back to where they lie side by side, and nothing happened in between."""
    if axes == OUTSIDE and (part := third(value)) is not None:
        return _Heads(part.whole, part.heads, part.width, part.number)
    turned = producer(value, "Transpose")
    split = producer(turned.inputs[0], "Reshape") if turned is not None else None
    if turned is None or split is None or order(turned) != axes or split.inputs[0] is None:
        return None
    before, after = sizes(split.inputs[0]), sizes(split.outputs[0])
    if len(before) != 3 or len(after) != 4 or before[:2] != after[:2]:
        return None
    heads, width = after[2:]
    if not isinstance(heads, int) or not isinstance(width, int) or before[2] != heads * width:
        return None
    return _Heads(split.inputs[0], heads, width)


def _covers(mask: ir.Value, query: ir.Value, key: ir.Value) -> bool:
    """Return whether the kernel takes a mask, once it has a row for every query (`_a_row_each`)."""
    shape = sizes(mask)
    return (
        mask.dtype in (None, ir.DataType.FLOAT)
        and len(shape) in (2, 3, 4)
        and shape[-2] in (1, size(query, 1))
        and shape[-1] == size(key, 1)
        and (len(shape) < 4 or shape[0] in (1, size(query, 0)))
    )


def _a_row_each(graph: ir.Graph, mask: ir.Value, query: ir.Value) -> ir.Value:
    """Repeat a mask for queries, once for all layers: the kernel does so for rows and heads alone.

    Padding is hidden from all queries alike, so BERT's mask is [batch, 1, 1, tokens].
    """
    tokens = size(query, 1)
    if size(mask, -2) == tokens:
        return mask
    name = f"{mask.name}.for.{tokens}"
    for use in mask.uses():
        if use.node.name == name:
            return use.node.outputs[0]
    span = [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)]
    count = ir.Node("", "Shape", [query], span, name=f"{name}.count")
    one, axis = constant(graph, f"{name}.one", np.array([1])), [ir.AttrInt64("axis", 0)]
    target = ir.Node("", "Concat", [count.outputs[0], one], axis, name=f"{name}.sizes")
    node = ir.Node("", "Expand", [mask, target.outputs[0]], name=name)
    node.outputs[0].name, node.outputs[0].type = name, mask.type
    node.outputs[0].shape = ir.Shape([*sizes(mask)[:-2], tokens, size(mask, -1)])
    graph.extend([count, target, node])
    return node.outputs[0]


def _replace(graph: ir.Graph, found: _Attention, thirds: dict[int, list[ir.Value]]) -> None:
    inputs = [
        _input(graph, found.last, one, thirds) for one in (found.query, found.key, found.value)
    ]
    heads = found.query.heads
    name, scale = f"{found.last.name}.attention", ir.AttrFloat32("scale", found.scale)
    tokens = size(found.key.flat, 1)
    if found.mask is None and isinstance(tokens, int) and tokens >= LONG:
        told = [ir.AttrInt64("num_heads", heads), scale]
        node = ir.Node(CONTRIB, "MultiHeadAttention", inputs, told, name=name)
    else:
        told = [ir.AttrInt64("q_num_heads", heads), ir.AttrInt64("kv_num_heads", heads), scale]
        if found.mask is not None:
            inputs = [*inputs, _a_row_each(graph, found.mask, found.query.flat)]
        node = ir.Node("", "Attention", inputs, told, name=name)
    replace([found.last], [node])


def _input(
    graph: ir.Graph, before: ir.Node, part: _Heads, thirds: dict[int, list[ir.Value]]
) -> ir.Value:
    """Return an input of the kernel; a tensor of all three is split once."""
    if part.part is None:
        return part.flat
    if id(part.flat) not in thirds:
        axis = ir.AttrInt64("axis", -1)
        name = f"{part.flat.name}.thirds"
        target = constant(graph, f"{name}.sizes", np.full(3, part.heads * part.width))
        node = ir.Node("", "Split", [part.flat, target], [axis], num_outputs=3, name=name)
        for number, value in enumerate(node.outputs):
            value.name, value.type = f"{name}.{number}", part.flat.type
        graph.insert_before(before, node)
        thirds[id(part.flat)] = list(node.outputs)
    return thirds[id(part.flat)][part.part]
