"""A decoder's attention with its cache in place: one kernel for what the portable graph spells out.

    q ---------------------------------> MatMul -> (Mul) -> Add(mask) -> Softmax -> MatMul -> ...
    past.key -> Concat -> (repeat) -> Transpose -^                                    ^
    past.value -> Concat -> (repeat) -------------------------------------------------'
                                                      =>
    GroupQueryAttention(q, k, v, past.key, past.value, lengths, total, bias = mask)

The kernel writes new keys and values into the buffer that held the past, so a step copies no cache.
It is all layers or none: a cache half in place would need two ways to keep it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from vlmedge.graphs.edit import (
    append,
    constant,
    factored,
    give_instead,
    producer,
    rank,
    reader,
    size,
)
from vlmedge.graphs.heads import REPEAT, asks_for_past, flat, leave
from vlmedge.spec import Component

from .rotary import Turn, unturned

CONTRIB = "com.microsoft"
KERNEL = "GroupQueryAttention"
ROTARY_WIDTH = 16  # the kernel turns heads of a multiple of it
TURN = "turn."  # begins the names of the constants of a kernel that turns queries and keys itself


@dataclass(frozen=True, slots=True)
class _Layer:
    """One attention."""

    query: ir.Value  # [batch, heads, tokens, width]
    key: ir.Value  # new ones, [batch, key heads, tokens, width]
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value
    mask: ir.Value  # [batch, 1 or heads, tokens, total]
    scale: float
    out: ir.Value  # [batch, heads, tokens, width]


def fuse(component: Component, model: ir.Model) -> int:
    """Put every cached attention into the kernel, in place.

    Returns:
        How many: all of the component's, or 0 where one does not look like the sketch above.
    """
    graph = model.graph
    pairs = {into: out for out, into in component.state}
    keys = [into for into in pairs if into.endswith(".key")]
    inputs = {str(value.name): value for value in graph.inputs}
    mask = next(
        ((inputs[spec.name], spec.shape.index("total")) for spec in component.inputs
         if "total" in spec.shape), None
    )  # fmt: skip
    if "token_type_ids" in inputs:  # a prompt's tokens look ahead, which the kernel never does
        return 0
    if not keys or mask is None or 2 * len(keys) != len(pairs):
        return 0
    layers = [_match(inputs[k], inputs[k.removesuffix("key") + "value"]) for k in keys]
    found = [layer for layer in layers if layer is not None]
    if len(found) != len(keys) or asks_for_past(graph, set(pairs), but_length=True):
        return 0
    tokens = next(
        ((inputs[spec.name], spec.shape.index("tokens")) for spec in component.inputs
         if "tokens" in spec.shape), None
    )  # fmt: skip
    if not _tell_past(graph, set(pairs), mask, tokens):
        return 0
    lengths, total = _lengths(graph, *mask)
    turns = [_unturned(layer) for layer in found]
    tables: dict[str, tuple[ir.Value, ir.Value]] = {}
    for number, (layer, turned) in enumerate(zip(found, turns, strict=True)):
        if turned is None:
            _replace(graph, layer, lengths, total, number, ())
            continue
        layer, turn = turned
        name = f"{turn.frequencies.name}*{turn.factor}"
        if name not in tables:
            tables[name] = _table(graph, turn, total, len(tables))
        _replace(graph, layer, lengths, total, number, tables[name])
    model.opset_imports[CONTRIB] = 1
    graph.sort()
    return len(found)


def unsplit(graph: ir.Graph) -> None:
    """Give the kernel queries, keys and values as one tensor where one MatMul makes them."""
    for node in graph:
        if node.op_type != KERNEL or node.inputs[0] is None:
            continue
        split = node.inputs[0].producer()
        if split is None or split.op_type != "Split" or len(split.outputs) != 3:
            continue
        alone = all(len(tuple(value.uses())) == 1 for value in split.outputs)
        if alone and all(a is b for a, b in zip(split.outputs, node.inputs[:3], strict=True)):
            node.replace_input_with(0, split.inputs[0])
            node.replace_input_with(1, None)
            node.replace_input_with(2, None)


def _match(past_key: ir.Value, past_value: ir.Value) -> _Layer | None:
    """Recognise the attention that a layer's cache belongs to."""
    concats = [_reader(past, "Concat") for past in (past_key, past_value)]
    if concats[0] is None or concats[1] is None:
        return None
    present_key, present_value = concats[0].outputs[0], concats[1].outputs[0]
    turned = _reader(_repeated(present_key), "Transpose")
    scores = None if turned is None else _reader(turned.outputs[0], "MatMul")
    mixed = _reader(_repeated(present_value), "MatMul")
    if scores is None or mixed is None or scores.inputs[0] is None:
        return None
    scale, value = 1.0, scores.outputs[0]
    scaled = _reader(value, "Mul") or _reader(value, "Div")
    if scaled is not None:
        found = factored(scaled)
        if found is None or found[0] is not value:
            return None
        scale, value = found[1], scaled.outputs[0]
    masked = _reader(value, "Add")
    shares = None if masked is None else _reader(masked.outputs[0], "Softmax")
    if masked is None or shares is None or mixed.inputs[0] is not shares.outputs[0]:
        return None
    mask = masked.inputs[1 - list(masked.inputs).index(value)]
    new_key, new_value = concats[0].inputs[1], concats[1].inputs[1]
    if mask is None or new_key is None or new_value is None or rank(mask) != 4:
        return None
    own = (1, _heads(scores.inputs[0]))  # one mask for all heads, or one of each (ALiBi)
    if mask.shape is None or mask.shape[1] not in own or len(tuple(shares.outputs[0].uses())) != 1:
        return None
    return _Layer(
        scores.inputs[0],
        new_key,
        new_value,
        past_key,
        past_value,
        present_key,
        present_value,
        mask,
        scale,
        mixed.outputs[0],
    )


def _reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the only node that reads a value; the graph may give it too, as it gives the cache."""
    return reader(value, op_type, besides_shape=True, output_too=True)


def _repeated(value: ir.Value) -> ir.Value:
    """Follow keys or values to where each of their heads is there once for every query head."""
    found = value
    for op_type in REPEAT:
        node = _reader(found, op_type)
        if node is None:
            return value
        found = node.outputs[0]
    return found


def _unturned(layer: _Layer) -> tuple[_Layer, Turn] | None:
    """Return the layer before its queries and keys are turned, if one turn does both."""
    if _last(layer.past_key) % ROTARY_WIDTH:
        return None
    query, key = unturned(layer.query), unturned(layer.key)
    if query is None or key is None or query[1] != key[1]:
        return None
    return replace(layer, query=query[0], key=key[0]), query[1]


def _table(graph: ir.Graph, turn: Turn, total: ir.Value, number: int) -> tuple[ir.Value, ir.Value]:
    """Compute cos and sin of every position so far, float32 [total, width / 2], once a step."""
    kind = ir.DataType.FLOAT
    width = turn.frequencies.const_value.size if turn.frequencies.const_value is not None else 0
    ends = [constant(graph, f"{TURN}{number}.{i}", np.array(i, np.int32)) for i in (0, 1)]
    places = append(graph, "Range", [ends[0], total, ends[1]], ir.DataType.INT32, ["total"])
    column = constant(graph, f"{TURN}{number}.column", np.array([-1, 1]))
    row = constant(graph, f"{TURN}{number}.row", np.array([1, -1]))
    narrow = append(graph, "Cast", [places], kind, ["total"], to=int(kind))
    left = append(graph, "Reshape", [narrow, column], kind, ["total", 1])
    right = append(graph, "Reshape", [turn.frequencies, row], kind, [1, width])
    angles = append(graph, "Mul", [left, right], kind, ["total", width])
    found = [append(graph, name, [angles], kind, ["total", width]) for name in ("Cos", "Sin")]
    if turn.factor != 1:
        factor = constant(graph, f"{TURN}{number}.factor", np.array(turn.factor, np.float32))
        found = [append(graph, "Mul", [v, factor], kind, ["total", width]) for v in found]
    return found[0], found[1]


def _tell_past(
    graph: ir.Graph,
    past: set[str],
    mask: tuple[ir.Value, int],
    tokens: tuple[ir.Value, int] | None,
) -> bool:
    """Let the length of the past be total - tokens, for nodes that ask its Shape."""
    asking = [
        use.node
        for value in graph.inputs
        if value.name in past
        for use in value.uses()
        if use.node.op_type == "Shape" and use.node.attributes.get_int("start", 0) == 2
    ]
    if asking and tokens is None:
        return False
    if asking and tokens is not None:
        kind = ir.DataType.INT64
        sizes = [
            append(graph, "Shape", [value], kind, [1], start=axis, end=axis + 1)
            for value, axis in (mask, tokens)
        ]
        length = append(graph, "Sub", sizes, kind, [1])
        for node in asking:
            node.outputs[0].replace_all_uses_with(length)
    return True


def _lengths(graph: ir.Graph, mask: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
    """Compute what the kernel wants: int32 [batch], all total - 1, and total as int32 []."""
    int32, int64 = ir.DataType.INT32, ir.DataType.INT64
    batch = append(graph, "Shape", [mask], int64, [1], start=0, end=1)
    length = append(graph, "Shape", [mask], int64, [1], start=axis, end=axis + 1)
    narrow = append(graph, "Cast", [length], int32, [1], to=int(int32))
    total = append(graph, "Squeeze", [narrow], int32, [])
    one = constant(graph, "cache.one", np.array([1], np.int32))
    last = append(graph, "Sub", [narrow, one], int32, [1])
    return append(graph, "Expand", [last, batch], int32, ["batch"]), total


def _replace(
    graph: ir.Graph,
    layer: _Layer,
    lengths: ir.Value,
    total: ir.Value,
    number: int,
    turn: tuple[ir.Value, ...],
) -> None:
    """Put the kernel in place of one attention; what it made unused is removed later."""
    name, query_heads = f"attention.{number}", _heads(layer.query)
    key_heads, width = _heads(layer.past_key), _last(layer.past_key)
    query = flat(graph, layer.query, query_heads, width, f"{name}.query")
    key = flat(graph, layer.key, key_heads, width, f"{name}.key")
    value = flat(graph, layer.value, key_heads, width, f"{name}.value")
    query, scale = _unscaled(query, layer.scale)
    node = ir.Node(
        CONTRIB,
        KERNEL,
        [query, key, value, layer.past_key, layer.past_value, lengths, total,
         *(turn or (None, None)), None, layer.mask],
        [
            ir.AttrInt64("num_heads", query_heads),
            ir.AttrInt64("kv_num_heads", key_heads),
            ir.AttrInt64("do_rotary", int(bool(turn))),
            ir.AttrFloat32("scale", scale),
        ],
        num_outputs=3,
        name=name,
    )  # fmt: skip
    graph.append(node)
    joined, *present = node.outputs
    joined.name, joined.type = f"{name}.out", ir.TensorType(ir.DataType.FLOAT)
    joined.shape = ir.Shape(["batch", "tokens", query_heads * width])
    for old, new in zip((layer.present_key, layer.present_value), present, strict=True):
        give_instead(graph, old, new, f"{old.name}.spelt_out")
    leave(graph, layer.out, joined, query_heads, width, name)


def _unscaled(query: ir.Value, scale: float) -> tuple[ir.Value, float]:
    """Let the kernel do a query's own scaling: OPT multiplies before it splits the heads."""
    found = factored(producer(query))
    if found is not None:
        return found[0], scale * found[1]
    return query, scale


def _heads(value: ir.Value) -> int:
    return int(str(size(value, 1)))


def _last(value: ir.Value) -> int:
    """Return the last size, or -1 where it is not known."""
    last = size(value, -1)
    return last if isinstance(last, int) else -1
