"""Attention as one kernel of ONNX Runtime's CUDA provider, in place of what a graph spells out.

    q ------------------------> MatMul -> (Mul) -> (Add mask) -> Softmax -> MatMul -> Transpose
    k -> (Mul) -> Transpose ----^                                           ^         -> Reshape
    v ----------------------------------------------------------------------'

becomes MultiHeadAttention, or GroupQueryAttention where keys and values are a decoder's cache: that
kernel writes new ones into the buffer that holds the past, so that no step copies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from vlmedge.graphs import heads
from vlmedge.graphs.edit import append, factored, give_instead, order, producer, rank, reader, size
from vlmedge.spec import Component

CONTRIB = "com.microsoft"
CACHED, PLAIN = "GroupQueryAttention", "MultiHeadAttention"
MASK = 10  # which of GroupQueryAttention's inputs is the mask
TOTAL = "cache.total"  # begins the names of the nodes that count the positions of the buffer
LENGTHS = "cache.lengths"  # an input that the engine adds: int32 [batch], positions in use - 1

TURNED = (heads.SWAPPED, heads.KEYS_TURNED)  # keys for the product: heads outside, or inside
_HALF = ir.DataType.FLOAT16


@dataclass(frozen=True, slots=True)
class _Attention:
    """One attention.

    Attributes:
        query: [batch, heads, tokens, width].
        key: As `query`, or [batch, tokens, heads, width] if `inside`.
        inside: Whether the key's heads stand behind its tokens.
        value: As `query`.
        mask: Added to the scores, [batch or 1, heads or 1, tokens or 1, total], or none.
        scale: Factor of the scores.
        out: [batch, heads, tokens, width].
    """

    query: ir.Value
    key: ir.Value
    inside: bool
    value: ir.Value
    mask: ir.Value | None
    scale: float
    out: ir.Value


@dataclass(frozen=True, slots=True)
class _Cached:
    """An attention whose keys and values are past ones and new ones, [batch, heads, ...]."""

    attention: _Attention
    past: tuple[ir.Value, ir.Value]
    new: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]


@dataclass(frozen=True, slots=True)
class Fused:
    """Result of replacing a graph's attentions.

    Attributes:
        plain: How many became MultiHeadAttention.
        cached: How many became GroupQueryAttention: all that have a cache, or none.
        left: How many Softmax over keys nobody recognised.
    """

    plain: int
    cached: int
    left: int


def fuse(component: Component, model: ir.Model) -> Fused:
    """Put attentions into kernels, in place; a cache goes into the kernel for all layers or none.

    A cache half in place would need two ways to keep it.
    """
    graph = model.graph
    found = [_match(node) for node in graph if node.op_type == "Softmax"]
    attentions = [one for one in found if one is not None]
    pairs = {into: out for out, into in component.state}
    cached = _cached(graph, pairs, attentions)
    owned = {id(one.attention) for one in cached}
    rest = [one for one in attentions if id(one) not in owned and not _keeps(one, set(pairs))]
    split: dict[ir.Value, list[ir.Value]] = {}
    for number, one in enumerate(rest):
        _plain(graph, one, f"attention.{number}", split)
    if cached:
        lengths = ir.Value(
            name=LENGTHS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["batch"])
        )
        graph.inputs.append(lengths)
        mask = cached[0].attention.mask
        assert mask is not None
        total = _total(graph, mask)
        for number, layer in enumerate(cached):
            _in_place(graph, layer, lengths, total, f"cached.{number}")
    if rest or cached:
        model.opset_imports[CONTRIB] = 1
        graph.sort()
    return Fused(len(rest), len(cached), len(found) - len(rest) - len(cached))


def _match(softmax: ir.Node) -> _Attention | None:
    """Recognise an attention by its Softmax."""
    shares, scores = softmax.outputs[0], softmax.inputs[0]
    mixed = reader(shares, "MatMul", besides_shape=True)
    if scores is None or rank(scores) != 4 or mixed is None or mixed.inputs[0] is not shares:
        return None
    mask, scale = None, 1.0
    product = producer(scores)
    if product is not None and product.op_type == "Add":
        terms = [value for value in product.inputs if value is not None]
        inner = [value for value in terms if _is_product(producer(value))]
        if len(terms) != 2 or len(inner) != 1 or not _is_alone(scores):
            return None
        mask = terms[1 - terms.index(inner[0])]
        if rank(mask) != 4:
            return None
        product = producer(inner[0])
    if product is not None and product.op_type in ("Mul", "Div"):
        scaled = factored(product)
        if scaled is None or not _is_alone(product.outputs[0]):
            return None
        scale, product = scaled[1], producer(scaled[0])
    if product is None or product.op_type != "MatMul" or not _is_alone(product.outputs[0]):
        return None
    query, turned = product.inputs
    value = mixed.inputs[1]
    if query is None or turned is None or value is None:
        return None
    maker = producer(turned)
    if maker is not None and maker.op_type in ("Mul", "Div"):
        scaled = factored(maker)
        if scaled is None:
            return None
        turned, scale = scaled[0], scale * scaled[1]
        maker = producer(turned)
    if maker is None or maker.op_type != "Transpose" or maker.inputs[0] is None:
        return None
    turn = order(maker)
    if turn not in TURNED or any(rank(v) != 4 for v in (query, value, maker.inputs[0])):
        return None
    if not isinstance(size(query, 1), int) or not isinstance(size(query, 3), int):
        return None
    if query.dtype not in (ir.DataType.FLOAT, _HALF):
        return None
    inside = turn == TURNED[1]
    return _Attention(query, maker.inputs[0], inside, value, mask, scale, mixed.outputs[0])


def _cached(
    graph: ir.Graph, pairs: Mapping[str, str], attentions: list[_Attention]
) -> list[_Cached]:
    """Return the attentions with a cache, if they are all of it and the kernel takes them."""
    inputs = {str(value.name): value for value in graph.inputs}
    if "token_type_ids" in inputs:  # a prompt's tokens look ahead, which the kernel never does
        return []
    found = [layer for one in attentions if (layer := _layer(one)) is not None]
    held = {str(value.name) for layer in found for value in layer.past}
    masks = {id(layer.attention.mask) for layer in found}
    if not found or held != set(pairs) or len(masks) != 1:
        return []
    if heads.asks_for_past(graph, held, but_length=False):
        return []
    mask = found[0].attention.mask
    # one mask for all heads; the kernel computes in float16 alone
    half = all(layer.attention.query.dtype == _HALF for layer in found)
    return found if half and mask is not None and size(mask, 1) == 1 else []


def _layer(one: _Attention) -> _Cached | None:
    """Recognise where the cache enters an attention."""
    if one.inside or one.mask is None:
        return None
    joined = [producer(_unrepeated(value)) for value in (one.key, one.value)]
    if any(node is None or node.op_type != "Concat" or len(node.inputs) != 2 for node in joined):
        return None
    key, value = (node for node in joined if node is not None)
    parts = (key.inputs[0], value.inputs[0], key.inputs[1], value.inputs[1])
    if any(part is None for part in parts) or not all(
        part is not None and part.is_graph_input() for part in parts[:2]
    ):
        return None
    past_key, past_value, new_key, new_value = (part for part in parts if part is not None)
    return _Cached(
        one, (past_key, past_value), (new_key, new_value), (key.outputs[0], value.outputs[0])
    )


def _keeps(one: _Attention, state: set[str]) -> bool:
    """Return whether an attention reads a cache; one that is not in place stays spelt out."""
    for value in (one.key, one.value):
        node = producer(_unrepeated(value))
        if node is not None and any(v is not None and v.name in state for v in node.inputs):
            return True
    return False


def _unrepeated(value: ir.Value) -> ir.Value:
    """Go back to where each key head is there once, not once for every query head."""
    found = value
    for op_type in reversed(heads.REPEAT):
        node = producer(found)
        if node is None or node.op_type != op_type or node.inputs[0] is None:
            return value
        found = node.inputs[0]
    return found


def _plain(
    graph: ir.Graph, one: _Attention, name: str, split: dict[ir.Value, list[ir.Value]]
) -> None:
    """Put MultiHeadAttention in place of one attention."""
    count, width = _heads(one.value)
    query = _flat(graph, one.query, f"{name}.query", split)
    value = _flat(graph, one.value, f"{name}.value", split)
    if one.inside:
        key = heads.joined(graph, one.key, *_heads(one.query), f"{name}.key")
    else:
        key = _flat(graph, one.key, f"{name}.key", split)
    mask = None if one.mask is None else _full(graph, one.mask, one.query, f"{name}.mask")
    joined = append(
        graph, PLAIN, [query, key, value, None, None, mask], one.query.dtype,
        ["batch", size(one.query, 2), count * width], name,
        domain=CONTRIB, num_heads=count, scale=one.scale,
    )  # fmt: skip
    heads.leave(graph, one.out, joined, count, width, name)


def _in_place(
    graph: ir.Graph, layer: _Cached, lengths: ir.Value, total: ir.Value, name: str
) -> None:
    """Put GroupQueryAttention in place of one attention; its cache is the buffer it is given."""
    one = layer.attention
    count, width = _heads(one.query)
    query = _flat(graph, one.query, f"{name}.query", {})
    key, value = (
        _flat(graph, new, f"{name}.{role}", {})
        for new, role in zip(layer.new, ("key", "value"), strict=True)
    )
    node = ir.Node(
        CONTRIB,
        CACHED,
        [query, key, value, *layer.past, lengths, total, None, None, None, one.mask],
        [
            ir.AttrInt64("num_heads", count),
            ir.AttrInt64("kv_num_heads", int(str(size(layer.past[0], 1)))),
            ir.AttrFloat32("scale", one.scale),
        ],
        num_outputs=3,
        name=name,
    )
    graph.append(node)
    joined, *present = node.outputs
    joined.name, joined.type = f"{name}.out", ir.TensorType(_HALF)
    joined.shape = ir.Shape(["batch", "tokens", count * width])
    for old, new in zip(layer.present, present, strict=True):
        give_instead(graph, old, new, f"{old.name}.spelt_out")
    heads.leave(graph, one.out, joined, count, width, name)


def _total(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """Read how many keys the mask has, as int32 []: ONNX Runtime keeps that on the host."""
    int32, int64 = ir.DataType.INT32, ir.DataType.INT64
    length = append(graph, "Shape", [mask], int64, [1], TOTAL, start=3, end=4)
    narrow = append(graph, "Cast", [length], int32, [1], f"{TOTAL}.int32", to=int(int32))
    return append(graph, "Squeeze", [narrow], int32, [], f"{TOTAL}.scalar")


def _full(graph: ir.Graph, mask: ir.Value, query: ir.Value, name: str) -> ir.Value:
    """Repeat a mask of one row for every token, since the kernel does not."""
    if size(mask, 2) != 1 or size(query, 2) == 1:
        return mask
    parts = [
        append(graph, "Shape", [value], ir.DataType.INT64, [end - start], f"{name}.{i}",
               start=start, end=end)
        for i, (value, start, end) in enumerate(((mask, 0, 2), (query, 2, 3), (mask, 3, 4)))
    ]  # fmt: skip
    shape = append(graph, "Concat", parts, ir.DataType.INT64, [4], f"{name}.shape", axis=0)
    sizes = [size(mask, 0), size(mask, 1), size(query, 2), size(mask, 3)]
    return append(graph, "Expand", [mask, shape], mask.dtype, sizes, f"{name}.full")


def _flat(
    graph: ir.Graph, value: ir.Value, name: str, split: dict[ir.Value, list[ir.Value]]
) -> ir.Value:
    """Return [batch, heads, tokens, width] as [batch, tokens, heads * width].

    What one Linear makes with two others comes of a Split, once for all three.
    """
    third = heads.third(value)
    if third is None:
        return heads.flat(graph, value, *_heads(value), name)
    whole = third.whole
    if whole not in split:
        node = ir.Node(
            "", "Split", [whole],
            [ir.AttrInt64("axis", 2), ir.AttrInt64("num_outputs", 3)],
            num_outputs=3, name=f"{whole.name}.split",
        )  # fmt: skip
        graph.append(node)
        for number, part in enumerate(node.outputs):
            part.name = f"{whole.name}.{number}"
            part.type = ir.TensorType(whole.dtype or _HALF)
            part.shape = ir.Shape([size(whole, 0), size(whole, 1), third.heads * third.width])
        split[whole] = list(node.outputs)
    return split[whole][third.number]


def _is_product(node: ir.Node | None) -> bool:
    """Return whether a node makes scores: a product, scaled or not."""
    if node is not None and node.op_type in ("Mul", "Div"):
        scaled = factored(node)
        node = None if scaled is None else producer(scaled[0])
    return node is not None and node.op_type == "MatMul"


def _is_alone(value: ir.Value) -> bool:
    return len(tuple(value.uses())) == 1 and not value.is_graph_output()


def _heads(value: ir.Value) -> tuple[int, int]:
    """Return how many heads [batch, heads, tokens, width] has, and the width of one."""
    return int(str(size(value, 1))), int(str(size(value, 3)))
