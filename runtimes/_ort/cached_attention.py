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

from vlmedge.spec import Component

from .._ort_match import factored, producer
from .rotary import Turn, unturned

CONTRIB = "com.microsoft"
KERNEL = "GroupQueryAttention"
ROTARY_WIDTH = 16  # the kernel turns heads of a multiple of it
HEADS_INSIDE = [0, 2, 1, 3]  # [batch, tokens, heads, width] <-> [batch, heads, tokens, width]
TURN = "turn."  # begins the names of the constants of a kernel that turns queries and keys itself
REPEAT = ("Unsqueeze", "Expand", "Reshape")  # of each key head for the query heads that share it


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
    if len(found) != len(keys) or _asks_for_past(graph, set(pairs)):
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
    concats = [_only_user(past, "Concat") for past in (past_key, past_value)]
    if concats[0] is None or concats[1] is None:
        return None
    present_key, present_value = concats[0].outputs[0], concats[1].outputs[0]
    turned = _only_user(_repeated(present_key), "Transpose")
    scores = None if turned is None else _only_user(turned.outputs[0], "MatMul")
    mixed = _only_user(_repeated(present_value), "MatMul")
    if scores is None or mixed is None or scores.inputs[0] is None:
        return None
    scale, value = 1.0, scores.outputs[0]
    scaled = _only_user(value, "Mul") or _only_user(value, "Div")
    if scaled is not None:
        found = factored(scaled)
        if found is None or found[0] is not value:
            return None
        scale, value = found[1], scaled.outputs[0]
    masked = _only_user(value, "Add")
    shares = None if masked is None else _only_user(masked.outputs[0], "Softmax")
    if masked is None or shares is None or mixed.inputs[0] is not shares.outputs[0]:
        return None
    mask = masked.inputs[1 - list(masked.inputs).index(value)]
    new_key, new_value = concats[0].inputs[1], concats[1].inputs[1]
    if mask is None or new_key is None or new_value is None or _rank(mask) != 4:
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


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the one node that reads a value, if it is of this kind; its shape may be asked."""
    users = {use.node for use in value.uses() if use.node.op_type != "Shape"}
    node = next(iter(users)) if len(users) == 1 else None
    return node if node is not None and node.op_type == op_type else None


def _repeated(value: ir.Value) -> ir.Value:
    """Follow keys or values to where each of their heads is there once for every query head."""
    found = value
    for op_type in REPEAT:
        node = _only_user(found, op_type)
        if node is None:
            return value
        found = node.outputs[0]
    return found


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


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
    ends = [_constant(graph, f"{TURN}{number}.{i}", np.array(i, np.int32)) for i in (0, 1)]
    places = _node(graph, "Range", [ends[0], total, ends[1]], ir.DataType.INT32, ["total"])
    column = _constant(graph, f"{TURN}{number}.column", np.array([-1, 1]))
    row = _constant(graph, f"{TURN}{number}.row", np.array([1, -1]))
    narrow = _node(graph, "Cast", [places], kind, ["total"], to=int(kind))
    left = _node(graph, "Reshape", [narrow, column], kind, ["total", 1])
    right = _node(graph, "Reshape", [turn.frequencies, row], kind, [1, width])
    angles = _node(graph, "Mul", [left, right], kind, ["total", width])
    found = [_node(graph, name, [angles], kind, ["total", width]) for name in ("Cos", "Sin")]
    if turn.factor != 1:
        factor = _constant(graph, f"{TURN}{number}.factor", np.array(turn.factor, np.float32))
        found = [_node(graph, "Mul", [v, factor], kind, ["total", width]) for v in found]
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
            _node(graph, "Shape", [value], kind, [1], start=axis, end=axis + 1)
            for value, axis in (mask, tokens)
        ]
        length = _node(graph, "Sub", sizes, kind, [1])
        for node in asking:
            node.outputs[0].replace_all_uses_with(length)
    return True


def _asks_for_past(graph: ir.Graph, past: set[str]) -> bool:
    """Tell whether a node asks more of the past than its length, which the buffer does not tell."""
    for value in graph.inputs:
        if value.name not in past:
            continue
        for use in value.uses():
            node = use.node
            if node.op_type == "Shape":
                start = node.attributes.get_int("start", 0)
                end = node.attributes.get_int("end", 4)
                if start <= 2 < end and (start, end) != (2, 3):
                    return True
            elif node.op_type != "Concat":
                return True
    return False


def _lengths(graph: ir.Graph, mask: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
    """Compute what the kernel wants: int32 [batch], all total - 1, and total as int32 []."""
    int32, int64 = ir.DataType.INT32, ir.DataType.INT64
    batch = _node(graph, "Shape", [mask], int64, [1], start=0, end=1)
    length = _node(graph, "Shape", [mask], int64, [1], start=axis, end=axis + 1)
    narrow = _node(graph, "Cast", [length], int32, [1], to=int(int32))
    total = _node(graph, "Squeeze", [narrow], int32, [])
    one = _constant(graph, "cache.one", np.array([1], np.int32))
    last = _node(graph, "Sub", [narrow, one], int32, [1])
    return _node(graph, "Expand", [last, batch], int32, ["batch"]), total


def _replace(
    graph: ir.Graph,
    layer: _Layer,
    lengths: ir.Value,
    total: ir.Value,
    number: int,
    turn: tuple[ir.Value, ...],
) -> None:
    """Put the kernel in place of one attention; what it made unused is removed later."""
    key_heads, width = _heads(layer.past_key), _last(layer.past_key)
    query, query_heads = _flat(graph, layer.query, width, number, "query")
    key, _ = _flat(graph, layer.key, width, number, "key", key_heads)
    value, _ = _flat(graph, layer.value, width, number, "value", key_heads)
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
        name=f"attention.{number}",
    )  # fmt: skip
    graph.append(node)
    joined, *present = node.outputs
    joined.name, joined.type = f"attention.{number}.out", ir.TensorType(ir.DataType.FLOAT)
    joined.shape = ir.Shape(["batch", "tokens", query_heads * width])
    for old, new in zip((layer.present_key, layer.present_value), present, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.spelt_out"
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
    _leave(graph, layer.out, joined, query_heads, width, number)


def _unscaled(query: ir.Value, scale: float) -> tuple[ir.Value, float]:
    """Let the kernel do a query's own scaling: OPT multiplies before it splits the heads."""
    found = factored(producer(query))
    if found is not None:
        return found[0], scale * found[1]
    return query, scale


def _leave(
    graph: ir.Graph, old: ir.Value, joined: ir.Value, heads: int, width: int, number: int
) -> None:
    """Give [batch, tokens, heads * width] to whoever read [batch, heads, tokens, width]."""
    turned = _only_user(old, "Transpose")
    if turned is not None and list(turned.attributes.get_ints("perm", ())) == HEADS_INSIDE:
        flat = _only_user(turned.outputs[0], "Reshape")
        if flat is not None and _rank(flat.outputs[0]) == 3:
            flat.outputs[0].replace_all_uses_with(joined)
            return
    shape = _constant(graph, f"attention.{number}.split", np.array([0, 0, heads, width]))
    split = _node(
        graph, "Reshape", [joined, shape], ir.DataType.FLOAT, ["batch", "tokens", heads, width]
    )
    old.replace_all_uses_with(
        _node(
            graph,
            "Transpose",
            [split],
            ir.DataType.FLOAT,
            ["batch", heads, "tokens", width],
            perm=HEADS_INSIDE,
        )
    )


def _flat(
    graph: ir.Graph,
    value: ir.Value,
    width: int,
    number: int,
    role: str,
    heads: int | None = None,
) -> tuple[ir.Value, int]:
    """Return [batch, heads, tokens, width] as [batch, tokens, heads * width], and the heads."""
    heads = heads or _heads(value)
    turned = value.producer()
    if turned is not None and turned.op_type == "Transpose":
        split = turned.inputs[0].producer() if turned.inputs[0] is not None else None
        right = list(turned.attributes.get_ints("perm", ())) == HEADS_INSIDE
        if right and split is not None and split.op_type == "Reshape":
            whole = split.inputs[0]
            if whole is not None and _rank(whole) == 3 and _last(whole) == heads * width:
                return whole, heads
    back = _node(
        graph,
        "Transpose",
        [value],
        ir.DataType.FLOAT,
        ["batch", "tokens", heads, width],
        perm=HEADS_INSIDE,
    )
    shape = _constant(graph, f"attention.{number}.{role}", np.array([0, 0, heads * width]))
    flat = _node(
        graph, "Reshape", [back, shape], ir.DataType.FLOAT, ["batch", "tokens", heads * width]
    )
    return flat, heads


def _heads(value: ir.Value) -> int:
    assert value.shape is not None
    return int(str(value.shape[1]))


def _last(value: ir.Value) -> int:
    """Return the last size, or -1 where it is not known."""
    assert value.shape is not None
    size = value.shape[-1]
    return size if isinstance(size, int) else -1


def _node(
    graph: ir.Graph,
    op_type: str,
    inputs: list[ir.Value],
    dtype: ir.DataType,
    shape: list[int | str],
    **attributes: int | list[int],
) -> ir.Value:
    given = [
        ir.AttrInt64s(name, value) if isinstance(value, list) else ir.AttrInt64(name, value)
        for name, value in attributes.items()
    ]
    node = ir.Node("", op_type, inputs, given)
    graph.append(node)
    out = node.outputs[0]
    out.type, out.shape = ir.TensorType(dtype), ir.Shape(shape)
    return out


def _constant(
    graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor)
    value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(list(array.shape))
    graph.register_initializer(value)
    return value
