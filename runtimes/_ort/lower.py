"""From a portable quantized graph to the kernels that ONNX Runtime has for it on a CPU.

The integer forms that the schemes write become one contrib node each:

    x -> QuantizeLinear -> DequantizeLinear -> MatMul -> Add <- bias     DynamicQuantizeMatMul(
                  W int8 -> DequantizeLinear --^                    =>     x, W, scale, bias)

                                      x -> MatMul -> Add <- bias         MatMulNBits(
          W int8 or int4 -> DequantizeLinear --^                    =>     x, W packed, scale, bias)

The static step of x is dropped: the kernel takes x's own range at each call, which is as close or
closer, and one kernel that quantizes, multiplies and restores is faster than three nodes. Left
alone, ONNX Runtime fuses only some of the MatMuls and restores the others' weights to float32.
What several of them read is quantized once; where int8 weights would overflow, they are stored as
uint8 (quantize_once.py).

What has no state gets its attentions as one node (encoder_attention.py), and its float Linears
with their biases (float_linears.py); activations between Linears scale nothing
(gated_activation.py).

A float16 graph is widened to float32, which is what a CPU computes in; its weights stay float16 on
disk. FP8 stays as it is: ONNX Runtime restores its weights to float32 when it opens the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmedge.arrays import Array
from vlmedge.graphs.edit import (
    biased,
    cast,
    constant,
    is_symmetric,
    is_weight,
    producer,
    promise,
    reader,
    replace,
    take_over,
    unrounded,
)
from vlmedge.spec import Component

from .cached_attention import fuse, unsplit
from .encoder_attention import fuse_bidirectional
from .float_linears import fuse_linears
from .fusion import Fusion
from .gated_activation import gates, unscale
from .last_logits import choose_tokens
from .nbits import bits_of, block_of, pack, read, size
from .quantize_once import multiply, quantize_once, unsigned
from .rms_norm import fuse_norms

CONTRIB = "com.microsoft"
INT8_COMPUTE = 4  # MatMulNBits' accuracy_level: x is quantized too, block by block
ALIGNMENT_BYTES = 4096  # so that every tensor can be mapped


@dataclass(frozen=True, slots=True)
class Lowered:
    """Result of lowering a graph.

    Attributes:
        dynamic: How many multiply integers, x being quantized at each call.
        weight_only: How many became MatMulNBits.
        attentions: How many keep their cache in place; see cached_attention.py.
        packed: Initializers whose tensors are made when asked for, and must be written.
        groups: How many MatMulNBits do the work of several that read the same.
        norms: How many RMS norms became one node.
        fusions: For each kind of pattern that was looked for, how many were replaced.
    """

    dynamic: int
    weight_only: int
    attentions: int
    packed: tuple[ir.Value, ...]
    groups: int
    norms: int
    fusions: tuple[Fusion, ...]


@dataclass(frozen=True, slots=True)
class _Linear:
    """One quantized MatMul, with the Add of its bias."""

    product: ir.Node
    total: ir.Node | None
    x: ir.Value
    rounded: bool  # x came through Q/DQ
    weight: ir.Value  # int8 or int4 [in, out], or uint8 with a zero point
    scale: ir.Value  # float32 [out], or [in / block, out] for int4
    bias: ir.Value | None  # float32 [out]
    zero: ir.Value | None = None  # uint8 []


def lower(
    component: Component, model: ir.Model, version: tuple[int, ...], *, overflows: bool = False
) -> Lowered:
    """Replace quantized MatMuls and attentions, widen float16; no big weight is read yet.

    Args:
        component: Its spec.
        model: The portable graph, changed in place.
        version: Version of ONNX Runtime.
        overflows: Whether products of uint8 and int8 are added up in 16 bits on this processor.
    """
    graph = model.graph
    _widen(graph)
    head = choose_tokens(component, graph)
    attentions = fuse(component, model)
    if component.state:
        fusions = [_cached(component, attentions), head]
    else:
        fusions = [fuse_bidirectional(model, version)]
    packed: dict[str, tuple[ir.Value, ir.Value]] = {}
    linears = [found for node in graph if (found := _match(node)) is not None]
    if not component.state:
        linears, unscaled = _unscale(graph, linears)
        floats, others = fuse_linears(model)
        done, total = unscaled + others.done, unscaled + others.total
        fusions += [floats, Fusion("gates", done, total, others.left)]
    if overflows:
        linears = [_unsigned(graph, one) if one.rounded else one for one in linears]
    groups = [group for group in _groups(linears) if len(group) > 1]
    for group in groups:
        joined = _join(graph, [pack(graph, linear.weight, linear.scale) for linear in group])
        packed[" ".join(str(linear.weight.name) for linear in group)] = joined
        _replace_group(graph, group, *joined)
    together = {id(linear.product) for group in groups for linear in group}
    sharing = Counter(id(linear.x) for linear in linears if linear.rounded)
    once: dict[int, Sequence[ir.Value]] = {}
    for linear in linears:
        if id(linear.product) in together:
            continue
        if linear.rounded and sharing[id(linear.x)] > 1:
            if id(linear.x) not in once:
                once[id(linear.x)] = quantize_once(graph, linear.x, linear.product)
            parts = once[id(linear.x)], linear.weight, linear.zero, linear.scale, linear.bias
            replace(_nodes(linear), [multiply(*parts, str(linear.product.name))])
        elif linear.rounded:
            replace(_nodes(linear), [_dynamic(linear)])
        else:
            name = str(linear.weight.name)
            if name not in packed:
                packed[name] = pack(graph, linear.weight, linear.scale)
            replace(_nodes(linear), [_weight_only(linear, *packed[name])])
    if linears:
        model.opset_imports[CONTRIB] = 1
    norms = fuse_norms(graph)
    RemoveUnusedNodesPass()(model)
    unsplit(graph)
    RemoveUnusedNodesPass()(model)
    dynamic = sum(linear.rounded for linear in linears)
    moved = dict.fromkeys(linear.weight for linear in linears if linear.zero is not None)
    made = (*(value for pair in packed.values() for value in pair), *moved)
    weight_only = len(linears) - dynamic
    told = tuple(fusion for fusion in fusions if fusion.total)
    return Lowered(dynamic, weight_only, attentions, made, len(groups), norms, told)


def write(values: Sequence[ir.Value], file: Path, location: str) -> None:
    """Write tensors one by one into `file`, and leave references to `location` in their place."""
    with file.open("wb") as stream:
        for value in values:
            tensor = value.const_value
            assert tensor is not None
            data = read(tensor)
            stream.seek(-stream.tell() % ALIGNMENT_BYTES, 1)
            place = (location, stream.tell(), data.nbytes)
            stream.write(data.data)  # ndarray.tofile would not tell a full disk from another error
            value.const_value = ir.ExternalTensor(
                *place, tensor.dtype, shape=ir.Shape(data.shape), name=str(value.name)
            )


def _match(node: ir.Node) -> _Linear | None:
    """Recognise a MatMul on an int8 or int4 weight with symmetric scales."""
    if node.op_type != "MatMul" or node.domain:
        return None
    x, restored = node.inputs
    dequantize = producer(restored, "DequantizeLinear")
    if x is None or dequantize is None:
        return None
    weight, scale = dequantize.inputs[0], dequantize.inputs[1]
    axis = dequantize.attributes.get_int("axis", 1)
    columns = is_weight(weight, ir.DataType.INT8, 2) and is_weight(scale, ir.DataType.FLOAT, 1)
    blocks = is_weight(weight, ir.DataType.INT4, 2) and is_weight(scale, ir.DataType.FLOAT, 2)
    if not (columns and axis in (1, -1)) and not (blocks and axis == 0):
        return None
    if not is_symmetric(dequantize):
        return None
    assert weight is not None and scale is not None
    total, bias = _bias(node, size(weight)[1])
    source = unrounded(x)
    return _Linear(node, total, source or x, source is not None, weight, scale, bias)


def _cached(component: Component, done: int) -> Fusion:
    """Return how many caches are in place: all or none."""
    total = sum(into.endswith(".key") for _, into in component.state)
    why = "one of them does not look like the sketch in cached_attention.py"
    return Fusion("cached attentions", done, total, () if done == total else (why,))


def _unscale(graph: ir.Graph, linears: list[_Linear]) -> tuple[list[_Linear], int]:
    """Let the scales around activations do their scaling, where both Linears are integer ones.

    Returns:
        The Linears as they are then, and the number of activations.
    """
    linears, done = list(linears), 0
    for gate in gates(graph):
        out = gate.last.outputs[0]
        before = [i for i, one in enumerate(linears) if _last(one).outputs[0] is gate.x]
        behind = [i for i, one in enumerate(linears) if one.x is out]
        around = before + behind
        if len(before) != 1 or len(behind) != 1 or not all(linears[i].rounded for i in around):
            continue
        if reader(out) is None:
            continue
        linears[before[0]] = _times(graph, linears[before[0]], gate.factor)
        divided = _times(graph, linears[behind[0]], 1 / gate.factor, bias=False)
        linears[behind[0]] = changed(divided, x=unscale(gate))
        done += 1
    return linears, done


def _times(graph: ir.Graph, linear: _Linear, factor: float, *, bias: bool = True) -> _Linear:
    """Multiply what a Linear makes, or all of it but its bias, by a number."""
    scale = _scaled(graph, linear.scale, factor)
    if linear.bias is None or not bias:
        return changed(linear, scale=scale)
    return changed(linear, scale=scale, bias=_scaled(graph, linear.bias, factor))


def _scaled(graph: ir.Graph, vector: ir.Value, factor: float) -> ir.Value:
    assert vector.const_value is not None
    return constant(graph, f"{vector.name}.times", read(vector.const_value) * np.float32(factor))


def _unsigned(graph: ir.Graph, linear: _Linear) -> _Linear:
    weight, zero = unsigned(graph, linear.weight)
    return changed(linear, weight=weight, zero=zero)


def _last(linear: _Linear) -> ir.Node:
    return linear.total or linear.product


def _bias(product: ir.Node, columns: int) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the Add that follows and what it adds, if that is one vector."""
    found = biased(product)
    if found is None or not is_weight(found[1], ir.DataType.FLOAT, 1):
        return None, None
    vector = found[1].const_value
    return found if vector is not None and vector.shape[0] == columns else (None, None)


def _dynamic(linear: _Linear) -> ir.Node:
    """Quantize x by its own range at every call; an int8 weight's bytes stay where they are."""
    inputs = [linear.x, linear.weight, linear.scale, linear.zero, linear.bias]
    return ir.Node(CONTRIB, "DynamicQuantizeMatMul", inputs, name=linear.product.name)


def _weight_only(linear: _Linear, packed: ir.Value, scale: ir.Value) -> ir.Node:
    """Keep x in float for all but the inner product of one block."""
    rows, columns = size(linear.weight)
    numbers = {
        "K": rows,
        "N": columns,
        "bits": bits_of(linear.weight),
        "block_size": block_of(linear.weight, linear.scale),
        "accuracy_level": INT8_COMPUTE,
    }
    return ir.Node(
        CONTRIB,
        "MatMulNBits",
        [linear.x, packed, scale, None, None, linear.bias],
        [ir.AttrInt64(name, number) for name, number in numbers.items()],
        name=linear.product.name,
    )


def _groups(linears: list[_Linear]) -> list[list[_Linear]]:
    """Put those together that multiply one x and can share a MatMulNBits, in the graph's order."""
    found: dict[object, list[_Linear]] = {}
    for linear in linears:
        if linear.rounded:
            continue
        block, rows = block_of(linear.weight, linear.scale), size(linear.weight)[0]
        alike = (id(linear.x), rows, bits_of(linear.weight), block, linear.bias is None)
        found.setdefault(alike, []).append(linear)
    return list(found.values())


def _join(graph: ir.Graph, parts: list[tuple[ir.Value, ir.Value]]) -> tuple[ir.Value, ir.Value]:
    """Promise packed weights, and their scales, one after the other."""
    joined = []
    for values in zip(*parts, strict=True):
        tensors = [value.const_value for value in values]

        def make(tensors: list[ir.TensorProtocol | None] = tensors) -> ir.Tensor[Array]:
            return ir.Tensor(np.concatenate([t.numpy() for t in tensors if t is not None]))

        first = values[0]
        assert first.shape is not None and first.dtype is not None
        columns = sum(int(value.shape[0]) for value in values if value.shape is not None)
        shape = [columns, *(int(str(size)) for size in first.shape[1:])]
        joined.append(promise(graph, f"{first.name}.joined", first.dtype, shape, make))
    return joined[0], joined[1]


def _replace_group(
    graph: ir.Graph, group: list[_Linear], packed: ir.Value, scale: ir.Value
) -> None:
    """Multiply once for several Linears, and part what comes of it."""
    first, columns = group[0], [size(linear.weight)[1] for linear in group]
    node = _weight_only(first, packed, scale)
    node.attributes["N"] = ir.AttrInt64("N", sum(columns))
    if first.bias is not None:
        biases = [linear.bias.const_value for linear in group if linear.bias is not None]
        whole = np.concatenate([read(tensor) for tensor in biases if tensor is not None])
        node.replace_input_with(5, constant(graph, f"{first.bias.name}.joined", whole))
    sizes = constant(graph, f"{first.weight.name}.columns", np.array(columns))
    split = ir.Node(
        "",
        "Split",
        [node.outputs[0], sizes],
        [ir.AttrInt64("axis", -1)],
        num_outputs=len(group),
        name=f"{first.product.name}.parts",
    )
    node.outputs[0].name = f"{split.name}.whole"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(first.product, [node, split])
    for linear, new in zip(group, split.outputs, strict=True):
        take_over(_last(linear).outputs[0], new)
        graph.remove(_nodes(linear), safe=True)


def _widen(graph: ir.Graph) -> None:
    """Compute in float32 what is float16; constants are cast when the graph is opened."""
    half, whole = ir.DataType.FLOAT16, ir.DataType.FLOAT
    if not any(v.dtype == half for node in graph for v in node.outputs):
        return
    for value in list(graph.initializers.values()):
        if value.dtype == half:
            wide = cast(value, whole, f"{value.name}.float32")
            value.replace_all_uses_with(wide.outputs[0])
            wide.replace_input_with(0, value)
            graph.insert_before(graph[0], wide)
    for node in graph:
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(half):
            node.attributes["to"] = ir.AttrInt64("to", int(whole))
        held = node.attributes.get("value")
        if held is not None and held.type == ir.AttributeType.TENSOR:
            tensor = held.as_tensor()
            if tensor.dtype == half:
                wider = ir.tensor(tensor.numpy().astype(np.float32))
                node.attributes["value"] = ir.AttrTensor("value", wider)
        for value in node.outputs:
            if value.dtype == half:
                value.type = ir.TensorType(whole)


def _nodes(linear: _Linear) -> list[ir.Node]:
    return [linear.product] if linear.total is None else [linear.product, linear.total]
