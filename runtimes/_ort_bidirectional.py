"""An encoder's attention as one node: no cache, every position that the mask leaves is seen.

    q -> Reshape -> Transpose ------> MatMul -> (Mul) -> (Add mask) -> Softmax -> MatMul
    k -> Reshape -> Transpose(last two swapped) -^                                  ^  |
    v -> Reshape -> Transpose ------------------------------------------------------'  v
                                                             Reshape <- Transpose <-----
                                            =>
    Attention(q, k, v, mask), of opset 23, on [batch, tokens, heads * width]

Queries, keys or values that are not simply split (one Linear made all three, or they are turned)
go in as [batch, heads, tokens, width], and so comes what is mixed of them.

Measured on two cores of a Zen 4, ViT-B/16, one image: 58.4 ms with int8 Linears against 60.3 spelt
out; MultiHeadAttention and com.microsoft's Attention, which brings its own projection, are not
faster than that, and one MatMul for queries, keys and values gains nothing once they are parted.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ._ort_fusion import Fusion, tally
from ._ort_match import producer, reader, scalar

OPSET = 23
SINCE = (1, 26)  # of ONNX Runtime: older kernels of Attention have not been tried
HEADS_OUTSIDE = [0, 2, 1, 3]  # [batch, tokens, heads, width] -> [batch, heads, tokens, width]
KEYS_TURNED = [0, 2, 3, 1]  # -> [batch, heads, width, tokens]
SWAPPED = [0, 1, 3, 2]


@dataclass(frozen=True, slots=True)
class _Heads:
    """Queries, keys or values.

    Attributes:
        value: float32 [batch, tokens, heads * width] or [batch, heads, tokens, width].
        tokens: How many, or the name of their axis.
        heads: How many.
        width: Of one head.
    """

    value: ir.Value
    tokens: int | str | None
    heads: int
    width: int


@dataclass(frozen=True, slots=True)
class _Attention:
    """One attention, all of its outside."""

    query: _Heads
    key: _Heads
    value: _Heads
    mask: ir.Value | None
    scale: float
    last: ir.Node  # makes what the new node makes, of the rank of queries


def fuse_bidirectional(model: ir.Model, version: tuple[int, ...]) -> Fusion:
    """Put one node in place of every attention; what it made unused is removed later.

    Args:
        model: A component without state.
        version: Of ONNX Runtime.
    """
    graph = model.graph
    shares = [node for node in graph if node.op_type == "Softmax" and not node.domain]
    left = []
    for node in shares:
        found = _match(node) if version >= SINCE else f"ONNX Runtime is older than {SINCE}"
        if isinstance(found, str):
            left.append(f"{node.name}: {found}")
        else:
            _replace(graph, found)
    if len(left) < len(shares):
        model.opset_imports[""] = max(OPSET, model.opset_imports.get("", 0))
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
            return "what is added to the scores is no mask"
        value = scores[0]
        mask = masked.inputs[1 - list(masked.inputs).index(value)]
    found = _scores(value)
    if found is None or value is None:
        return "its scores are no product of queries and keys"
    product, scale = found
    mixed = reader(shares.outputs[0], "MatMul")
    if mixed is None or mixed.inputs[0] is not shares.outputs[0]:
        return "its weights are read by more than one product"
    parts = _split(product.inputs[0]), _keys(product.inputs[1]), _split(mixed.inputs[1])
    last = _joined(mixed, parts[2])
    if last is None or None in parts:
        last = mixed
        parts = _apart(product.inputs[0]), _swapped(product.inputs[1]), _apart(mixed.inputs[1])
    query, key, values = parts
    if query is None or key is None or values is None:
        return "queries, keys or values are not [batch, heads, tokens, width]"
    same = query.heads == key.heads == values.heads
    if not same or query.width != key.width or key.tokens != values.tokens:
        return "heads of queries, keys and values differ"
    batch = _shape(query.value)[0]
    if mask is not None and not _covers(mask, batch, query.tokens, key.tokens):
        return f"its mask is {mask.shape}: it must have a row for every query"
    return _Attention(query, key, values, mask, scale, last)


def _scores(value: ir.Value | None) -> tuple[ir.Node, float] | None:
    """Return the product of queries and keys, and the number that it is multiplied by."""
    scale = 1.0
    scaled = producer(value, "Mul")
    if scaled is not None:
        numbers = [scalar(v) for v in scaled.inputs]
        if (numbers[0] is None) == (numbers[1] is None):
            return None
        value = scaled.inputs[0] if numbers[0] is None else scaled.inputs[1]
        scale = next(n for n in numbers if n is not None)
    product = producer(value, "MatMul")
    if product is None or reader(product.outputs[0]) is None:
        return None
    return product, scale


def _keys(value: ir.Value | None) -> _Heads | None:
    """Follow keys back; their last axes are swapped by a Transpose of its own, or with the rest."""
    turned = producer(value, "Transpose")
    if turned is None:
        return None
    return _split(turned.inputs[0]) if _order(turned) == SWAPPED else _split(value, KEYS_TURNED)


def _split(value: ir.Value | None, order: list[int] = HEADS_OUTSIDE) -> _Heads | None:
    """Follow heads back to where they lie side by side, and nothing happened in between."""
    turned = producer(value, "Transpose")
    split = producer(turned.inputs[0], "Reshape") if turned is not None else None
    if turned is None or split is None or _order(turned) != order or split.inputs[0] is None:
        return None
    before, after = _shape(split.inputs[0]), _shape(split.outputs[0])
    if len(before) != 3 or len(after) != 4 or before[:2] != after[:2]:
        return None
    heads, width = after[2:]
    if not isinstance(heads, int) or not isinstance(width, int) or before[2] != heads * width:
        return None
    return _Heads(split.inputs[0], before[1], heads, width)


def _joined(mixed: ir.Node, values: _Heads | None) -> ir.Node | None:
    """Return the node that lays the heads side by side again, if that is all that follows."""
    turned = reader(mixed.outputs[0], "Transpose")
    if values is None or turned is None or _order(turned) != HEADS_OUTSIDE:
        return None
    last, before = reader(turned.outputs[0], "Reshape"), _shape(turned.outputs[0])
    if last is None or _shape(last.outputs[0]) != [*before[:2], values.heads * values.width]:
        return None
    return last


def _apart(value: ir.Value | None) -> _Heads | None:
    """Take heads as they are, [batch, heads, tokens, width]."""
    shape = [] if value is None else _shape(value)
    if value is None or len(shape) != 4:
        return None
    _, heads, tokens, width = shape
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    return _Heads(value, tokens, heads, width)


def _swapped(value: ir.Value | None) -> _Heads | None:
    """Take keys before their last axes are swapped."""
    turned = producer(value, "Transpose")
    return _apart(turned.inputs[0]) if turned is not None and _order(turned) == SWAPPED else None


def _covers(
    mask: ir.Value, batch: int | str | None, queries: int | str | None, keys: int | str | None
) -> bool:
    """Tell whether the kernel takes a mask: it repeats one for rows and heads, not for queries."""
    shape = _shape(mask)
    return (
        mask.dtype in (None, ir.DataType.FLOAT)
        and len(shape) in (2, 3, 4)
        and shape[-2:] == [queries, keys]
        and (len(shape) < 4 or shape[0] in (1, batch))
    )


def _shape(value: ir.Value) -> list[int | str | None]:
    """Return the sizes: numbers, or the names of axes."""
    if value.shape is None:
        return []
    return [size if isinstance(size, int) else size.value for size in value.shape]


def _order(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm", ()))


def _replace(graph: ir.Graph, found: _Attention) -> None:
    inputs = [found.query.value, found.key.value, found.value.value]
    flat = len(_shape(found.query.value)) == 3  # the kernel is told the heads, else sees them
    names = ("q_num_heads", "kv_num_heads") if flat else ()
    told = [ir.AttrInt64(name, found.query.heads) for name in names]
    node = ir.Node(
        "",
        "Attention",
        inputs if found.mask is None else [*inputs, found.mask],
        [*told, ir.AttrFloat32("scale", found.scale)],
        name=f"{found.last.name}.attention",
    )
    old, new = found.last.outputs[0], node.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(found.last, node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(found.last, safe=True)
