"""Attention as one kernel of ONNX Runtime's CUDA provider, in place of what a graph spells out.

    q ------------------------> MatMul -> (Mul) -> (Add mask) -> Softmax -> MatMul -> Transpose
    k -> (Mul) -> Transpose ----^                                           ^         -> Reshape
    v ----------------------------------------------------------------------'

becomes MultiHeadAttention, or GroupQueryAttention where keys and values are a decoder's cache: that
kernel writes new ones into the buffer that holds the past, so that no step copies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmedge.arrays import Array
from vlmedge.spec import Component

from .._ort_match import factored

CONTRIB = "com.microsoft"
CACHED, PLAIN = "GroupQueryAttention", "MultiHeadAttention"
MASK = 10  # which of GroupQueryAttention's inputs is the mask
TOTAL = "cache.total"  # begins the names of the nodes that count the positions of the buffer
LENGTHS = "cache.lengths"  # an input that the engine adds: int32 [batch], positions in use - 1

HEADS_INSIDE = [0, 2, 1, 3]  # [batch, tokens, heads, width] <-> [batch, heads, tokens, width]
TURNED = ([0, 1, 3, 2], [0, 2, 3, 1])  # keys for the product: from heads outside, or inside
PACKED = [2, 0, 3, 1, 4]  # [batch, tokens, 3, heads, width] -> [3, batch, heads, tokens, width]
REPEAT = ("Unsqueeze", "Expand", "Reshape")  # of each key head for the query heads that share it
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
        scale: Of the scores.
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
    """What became of a graph's attentions.

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
    mixed = _only_user(shares, "MatMul")
    if scores is None or _rank(scores) != 4 or mixed is None or mixed.inputs[0] is not shares:
        return None
    mask, scale = None, 1.0
    product = _maker(scores)
    if product is not None and product.op_type == "Add":
        terms = [value for value in product.inputs if value is not None]
        inner = [value for value in terms if _is_product(_maker(value))]
        if len(terms) != 2 or len(inner) != 1 or not _is_alone(scores):
            return None
        mask = terms[1 - terms.index(inner[0])]
        if _rank(mask) != 4:
            return None
        product = _maker(inner[0])
    if product is not None and product.op_type in ("Mul", "Div"):
        scaled = factored(product)
        if scaled is None or not _is_alone(product.outputs[0]):
            return None
        scale, product = scaled[1], _maker(scaled[0])
    if product is None or product.op_type != "MatMul" or not _is_alone(product.outputs[0]):
        return None
    query, turned = product.inputs
    value = mixed.inputs[1]
    if query is None or turned is None or value is None:
        return None
    maker = _maker(turned)
    if maker is not None and maker.op_type in ("Mul", "Div"):
        scaled = factored(maker)
        if scaled is None:
            return None
        turned, scale = scaled[0], scale * scaled[1]
        maker = _maker(turned)
    if maker is None or maker.op_type != "Transpose" or maker.inputs[0] is None:
        return None
    order = _order(maker)
    if order not in TURNED or any(_rank(v) != 4 for v in (query, value, maker.inputs[0])):
        return None
    if not isinstance(_size(query, 1), int) or not isinstance(_size(query, 3), int):
        return None
    if query.dtype not in (ir.DataType.FLOAT, _HALF):
        return None
    inside = order == TURNED[1]
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
    if not found or held != set(pairs) or len(masks) != 1 or _asks_for_past(graph, held):
        return []
    mask = found[0].attention.mask
    # one mask for all heads; the kernel computes in float16 alone
    half = all(layer.attention.query.dtype == _HALF for layer in found)
    return found if half and mask is not None and _size(mask, 1) == 1 else []


def _layer(one: _Attention) -> _Cached | None:
    """Recognise where the cache enters an attention."""
    if one.inside or one.mask is None:
        return None
    joined = [_maker(_unrepeated(value)) for value in (one.key, one.value)]
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
    """Tell whether an attention reads a cache; one that is not in place stays spelt out."""
    for value in (one.key, one.value):
        node = _maker(_unrepeated(value))
        if node is not None and any(v is not None and v.name in state for v in node.inputs):
            return True
    return False


def _unrepeated(value: ir.Value) -> ir.Value:
    """Go back to where each key head is there once, not once for every query head."""
    found = value
    for op_type in reversed(REPEAT):
        node = _maker(found)
        if node is None or node.op_type != op_type or node.inputs[0] is None:
            return value
        found = node.inputs[0]
    return found


def _asks_for_past(graph: ir.Graph, past: set[str]) -> bool:
    """Tell whether a node wants to know how long the past is, which the buffer does not tell."""
    for value in graph.inputs:
        if value.name not in past:
            continue
        for use in value.uses():
            if use.node.op_type == "Shape":
                start = use.node.attributes.get_int("start", 0)
                if start <= 2 < use.node.attributes.get_int("end", 4):
                    return True
            elif use.node.op_type != "Concat":
                return True
    return False


def _plain(
    graph: ir.Graph, one: _Attention, name: str, split: dict[ir.Value, list[ir.Value]]
) -> None:
    """Put MultiHeadAttention in place of one attention."""
    heads, width = int(str(_size(one.query, 1))), int(str(_size(one.query, 3)))
    query = _flat(graph, one.query, f"{name}.query", split)
    value = _flat(graph, one.value, f"{name}.value", split)
    if one.inside:
        key = _joined(graph, one.key, f"{name}.key")
    else:
        key = _flat(graph, one.key, f"{name}.key", split)
    mask = None if one.mask is None else _full(graph, one.mask, one.query, f"{name}.mask")
    joined = _add(
        graph, PLAIN, [query, key, value, None, None, mask], name, one.query.dtype,
        ["batch", _size(one.query, 2), heads * int(str(_size(one.value, 3)))],
        domain=CONTRIB, num_heads=heads, scale=one.scale,
    )  # fmt: skip
    _leave(graph, one.out, joined, heads, width, name)


def _in_place(
    graph: ir.Graph, layer: _Cached, lengths: ir.Value, total: ir.Value, name: str
) -> None:
    """Put GroupQueryAttention in place of one attention; its cache is the buffer it is given."""
    one = layer.attention
    heads, width = int(str(_size(one.query, 1))), int(str(_size(one.query, 3)))
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
            ir.AttrInt64("num_heads", heads),
            ir.AttrInt64("kv_num_heads", int(str(_size(layer.past[0], 1)))),
            ir.AttrFloat32("scale", one.scale),
        ],
        num_outputs=3,
        name=name,
    )
    graph.append(node)
    joined, *present = node.outputs
    joined.name, joined.type = f"{name}.out", ir.TensorType(_HALF)
    joined.shape = ir.Shape(["batch", "tokens", heads * width])
    for old, new in zip(layer.present, present, strict=True):
        new.name, new.type = old.name, old.type
        new.shape = old.shape
        old.name = f"{old.name}.spelt_out"
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
    _leave(graph, one.out, joined, heads, width, name)


def _total(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """Read how many keys the mask has, as int32 []: ONNX Runtime keeps that on the host."""
    length = _add(graph, "Shape", [mask], TOTAL, ir.DataType.INT64, [1], start=3, end=4)
    narrow = _add(
        graph, "Cast", [length], f"{TOTAL}.int32", ir.DataType.INT32, [1],
        to=int(ir.DataType.INT32),
    )  # fmt: skip
    return _add(graph, "Squeeze", [narrow], f"{TOTAL}.scalar", ir.DataType.INT32, [])


def _full(graph: ir.Graph, mask: ir.Value, query: ir.Value, name: str) -> ir.Value:
    """Repeat a mask of one row for every token, since the kernel does not."""
    if _size(mask, 2) != 1 or _size(query, 2) == 1:
        return mask
    parts = [
        _add(graph, "Shape", [value], f"{name}.{i}", ir.DataType.INT64, [end - start],
             start=start, end=end)
        for i, (value, start, end) in enumerate(((mask, 0, 2), (query, 2, 3), (mask, 3, 4)))
    ]  # fmt: skip
    shape = _add(graph, "Concat", parts, f"{name}.shape", ir.DataType.INT64, [4], axis=0)
    sizes = [_size(mask, 0), _size(mask, 1), _size(query, 2), _size(mask, 3)]
    return _add(graph, "Expand", [mask, shape], f"{name}.full", mask.dtype, sizes)


def _flat(
    graph: ir.Graph, value: ir.Value, name: str, split: dict[ir.Value, list[ir.Value]]
) -> ir.Value:
    """Return [batch, heads, tokens, width] as [batch, tokens, heads * width]."""
    heads, width = int(str(_size(value, 1))), int(str(_size(value, 3)))
    node = _maker(value)
    inner = node.inputs[0] if node is not None and node.op_type == "Transpose" else None
    if inner is not None and node is not None and _order(node) == HEADS_INSIDE:
        return _joined(graph, inner, name)
    third = _third(graph, value, split)
    if third is not None:
        return third
    turned = _add(
        graph, "Transpose", [value], f"{name}.turned", value.dtype,
        [_size(value, 0), _size(value, 2), heads, width], perm=HEADS_INSIDE,
    )  # fmt: skip
    return _joined(graph, turned, name)


def _joined(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Return [batch, tokens, heads, width] as [batch, tokens, heads * width]."""
    heads, width = int(str(_size(value, 2))), int(str(_size(value, 3)))
    node = _maker(value)
    if node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        whole = node.inputs[0]
        if _rank(whole) == 3 and _size(whole, 2) == heads * width:
            return whole
    shape = _constant(graph, f"{name}.sizes", np.array([0, 0, heads * width]))
    sizes = [_size(value, 0), _size(value, 1), heads * width]
    return _add(graph, "Reshape", [value, shape], f"{name}.flat", value.dtype, sizes)


def _third(
    graph: ir.Graph, value: ir.Value, split: dict[ir.Value, list[ir.Value]]
) -> ir.Value | None:
    """Take one of query, key and value out of the product that makes all three.

    [batch, tokens, 3 * heads * width] -> Reshape -> Transpose -> Gather     =>     -> Split
    """
    gather = _maker(value)
    if gather is None or gather.op_type != "Gather" or gather.attributes.get_int("axis", 0) != 0:
        return None
    index = None if gather.inputs[1] is None else gather.inputs[1].const_value
    turned = None if gather.inputs[0] is None else _maker(gather.inputs[0])
    if index is None or index.size != 1 or turned is None or turned.op_type != "Transpose":
        return None
    if _order(turned) != PACKED or turned.inputs[0] is None:
        return None
    shaped = _maker(turned.inputs[0])
    whole = None if shaped is None or shaped.op_type != "Reshape" else shaped.inputs[0]
    width = int(str(_size(value, 1))) * int(str(_size(value, 3)))
    if whole is None or _rank(whole) != 3 or _size(whole, 2) != 3 * width:
        return None
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
            part.shape = ir.Shape([_size(whole, 0), _size(whole, 1), width])
        split[whole] = list(node.outputs)
    return split[whole][int(index.numpy().ravel()[0])]


def _leave(
    graph: ir.Graph, old: ir.Value, joined: ir.Value, heads: int, width: int, name: str
) -> None:
    """Give [batch, tokens, heads * width] to whoever read [batch, heads, tokens, width]."""
    turned = _only_user(old, "Transpose")
    if turned is not None and _order(turned) == HEADS_INSIDE:
        flat = _only_user(turned.outputs[0], "Reshape")
        if flat is not None and _rank(flat.outputs[0]) == 3 and (
            _size(flat.outputs[0], 2) == heads * width
        ):  # fmt: skip
            flat.outputs[0].replace_all_uses_with(joined, replace_graph_outputs=True)
            return
    shape = _constant(graph, f"{name}.split", np.array([0, 0, heads, width]))
    sizes = [_size(old, 0), _size(old, 2), heads, width]
    apart = _add(graph, "Reshape", [joined, shape], f"{name}.apart", joined.dtype, sizes)
    back = _add(
        graph, "Transpose", [apart], f"{name}.back", joined.dtype,
        [_size(old, 0), heads, _size(old, 2), width], perm=HEADS_INSIDE,
    )  # fmt: skip
    old.replace_all_uses_with(back)


def _is_product(node: ir.Node | None) -> bool:
    """Tell whether a node makes scores: a product, scaled or not."""
    if node is not None and node.op_type in ("Mul", "Div"):
        scaled = factored(node)
        node = None if scaled is None else _maker(scaled[0])
    return node is not None and node.op_type == "MatMul"


def _is_alone(value: ir.Value) -> bool:
    return len(tuple(value.uses())) == 1 and not value.is_graph_output()


def _order(transpose: ir.Node) -> list[int]:
    return list(transpose.attributes.get_ints("perm", ()))


def _maker(value: ir.Value) -> ir.Node | None:
    return value.producer()


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the one node that reads a value, if it is of this kind; its shape may be asked."""
    users = {use.node for use in value.uses() if use.node.op_type != "Shape"}
    node = next(iter(users)) if len(users) == 1 and not value.is_graph_output() else None
    return node if node is not None and node.op_type == op_type else None


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _size(value: ir.Value, axis: int) -> int | str:
    """Return a size, or the name of one that is not known yet."""
    assert value.shape is not None
    size = value.shape[axis]
    return size if isinstance(size, int) else str(size)


def _add(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    dtype: ir.DataType | None,
    shape: list[int | str],
    domain: str = "",
    **attributes: int | float | list[int],
) -> ir.Value:
    """Append a node of one output."""
    node = ir.Node(
        domain, op_type, inputs,
        [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()],
        name=name,
    )  # fmt: skip
    graph.append(node)
    out = node.outputs[0]
    out.name, out.type = f"{name}.out", ir.TensorType(dtype or _HALF)
    out.shape = ir.Shape(shape)
    return out


def _constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value
