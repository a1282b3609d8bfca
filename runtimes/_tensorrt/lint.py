"""Find in a graph what a version of TensorRT would refuse, without TensorRT and without a GPU.

Operators and types are operators.py's. The rules on Q/DQ are those of IQuantizeLayer and
IDequantizeLayer in NvInfer.h (10.x and 11.1) and of NVIDIA's "Working with Quantized Types":
symmetric only, weights per channel, activations per tensor, Q is followed by DQ, and in a strongly
typed network a scale has the type of what it scales. INT4 is known from 10.3 on, FP4 from 10.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from vlmedge.arrays import Array
from vlmedge.shelves.build_options import Finding

from .operators import Operators, Version, names, operators

# These give bool, indices or sizes: what the table limits is the type that they take.
_JUDGED_BY_INPUT = names(
    "ArgMax ArgMin Cast Equal Gather GatherND Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual "
    "NonZero Shape Size"
)
_REDUCTIONS = names(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare"
)
_ALWAYS: Version = (0, 0)
_NEVER: Version = (99, 0)
# (operator, input that must be constant, its name, first version that takes any tensor)
_CONSTANT_INPUTS: tuple[tuple[str, int, str, Version], ...] = (
    *((name, 1, "axes", _NEVER) for name in _REDUCTIONS),
    ("CumSum", 1, "axis", (10, 8)),
    ("OneHot", 1, "depth", _NEVER),
    ("Slice", 3, "axes", (10, 3)),
    ("Squeeze", 1, "axes", (10, 7)),
    ("Unsqueeze", 1, "axes", (10, 7)),
    ("TopK", 1, "K", (8, 6)),
)
_TOP_K_LIMIT = 3840
_INT4_SINCE: Version = (10, 3)
_QUANTIZED: tuple[tuple[ir.DataType, Version], ...] = (
    (ir.DataType.INT8, _ALWAYS),
    (ir.DataType.FLOAT8E4M3FN, (9, 0)),
    (ir.DataType.INT4, _INT4_SINCE),
    (ir.DataType.FLOAT4E2M1, (10, 8)),
)
_SMALL = (ir.DataType.INT4, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN)  # may be blocked

Problem = tuple[str, str]  # what, and what to do


def lint(component: str, model: ir.Model, version: Version, *, cached: bool) -> list[Finding]:
    """Return every finding of one graph, in its order.

    Args:
        component: Its name.
        model: Lowered for `version` already.
        version: TensorRT's.
        cached: Whether it has state, so that keys may be more than queries.
    """
    table = operators(version)
    found = []
    opset = model.opset_imports.get("", 0)
    if opset > (21 if _has_int4(model) and version >= _INT4_SINCE else table.opset):
        problem = f"the graph is of opset {opset}, its parser reads up to {table.opset}"
        found.append(Finding(component, "", "", problem, "export it at an older opset"))
    for node in model.graph.all_nodes():
        name = str(node.name or next((o.name for o in node.outputs), ""))
        for problem, remedy in _problems(node, table, cached):
            found.append(Finding(component, name, node.op_type, problem, remedy))
    return found


def _has_int4(model: ir.Model) -> bool:
    """Return whether a graph needs opset 21, where DequantizeLinear has blocks.

    Parsers before 10.6 read it too: "Added support for INT4 quantization" is in the change log of
    10.0. What else opset 21 changed is GroupNormalization, which came with 10.9.
    """
    kinds = {node.op_type for node in model.graph}
    return "GroupNormalization" not in kinds and any(
        value.dtype == ir.DataType.INT4 for value in model.graph.initializers.values()
    )


def _problems(node: ir.Node, table: Operators, cached: bool) -> Iterator[Problem]:
    if node.domain:
        yield f"domain {node.domain!r} is not standard ONNX", "write it in standard operators"
        return
    if node.op_type not in table.types:
        yield "its parser has no such operator", "decompose it (runtimes/_tensorrt/lower.py)"
        return
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _quantization(node, table.version)
    else:
        yield from _types(node, table)
    for kind, index, what, since in _CONSTANT_INPUTS:
        value = _input(node, index)
        limited = node.op_type == kind and value is not None and table.version < since
        if limited and _constant(value) is None:
            yield f"{what} must be constant", f"make {what} an initializer"
    if check := _RULES.get(node.op_type):
        yield from check(node, table.version, cached)


def _types(node: ir.Node, table: Operators) -> Iterator[Problem]:
    """Judge the type of the result, or of the operand where the result's says nothing."""
    values = node.inputs if node.op_type in _JUDGED_BY_INPUT else node.outputs
    value = next(iter(values), None)
    dtype = None if value is None else value.dtype
    if dtype is None:
        return
    allowed, name = table.types[node.op_type], str(dtype.name).lower()
    name = {"float": "float32"}.get(name, name)
    if name == "uint8" and node.op_type == "Cast":  # at the network's inputs and outputs
        return
    if name not in allowed:
        listed = ", ".join(sorted(allowed))
        yield f"it does not take {name}: it takes {listed}", "cast around it"


def _quantization(node: ir.Node, version: Version) -> Iterator[Problem]:
    """Judge one QuantizeLinear or DequantizeLinear."""
    quantizes = node.op_type == "QuantizeLinear"
    x, scale, zero = (_input(node, i) for i in range(3))
    stored = node.outputs[0].dtype if quantizes else (x.dtype if x is not None else None)
    if quantizes and zero is not None:
        stored = zero.dtype
    known = [dtype for dtype, since in _QUANTIZED if version >= since]
    if stored not in known:
        listed = ", ".join(dtype.name for dtype in known)
        yield f"it is of {getattr(stored, 'name', None)}, not {listed}", "quantize to signed INT8"
    if zero is not None:
        points = _constant(zero)
        if points is None or points.astype(np.float32).any():
            yield "its zero point is not 0", "quantize symmetrically"
    factors = _constant(scale)
    if factors is None:
        yield "its scale is not a constant", "calibrate before export"
        return
    if not (np.isfinite(factors) & (factors > 0)).all():
        yield "its scale has values that are not above 0", "calibrate again"
    held = _constant_shape(x) is not None
    producer = x.producer() if x is not None else None
    rounded = producer is not None and producer.op_type == "QuantizeLinear"
    source = _input(producer, 0) if rounded and producer is not None else x
    if factors.size > 1 and _constant_shape(source) is None:  # a weight may be rounded in the graph
        yield "an activation is scaled per channel", "scale activations per tensor"
    if node.attributes.get_int("block_size", 0) and stored not in _SMALL:
        yield "INT8 has no block scales", "scale per channel, or use INT4"
    if factors.ndim == 1 and factors.size > 1:
        yield from _axis(node, x, factors.size)
    floating = x.dtype if quantizes and x is not None else node.outputs[0].dtype
    scaled = scale.dtype if scale is not None else None
    if version >= (10, 0) and floating and scaled and floating != scaled:
        got = f"{scaled.name} scale, {floating.name} tensor"
        yield f"types differ: {got}", "give the scale the tensor's type"
    if quantizes:
        others = [u.node for u in node.outputs[0].uses() if u.node.op_type != "DequantizeLinear"]
        if others:
            yield f"{others[0].op_type} reads its integers", "put DequantizeLinear behind it"
    elif not held and not rounded:
        yield "its input is neither constant nor quantized", "put QuantizeLinear before it"


def _axis(node: ir.Node, x: ir.Value | None, scales: int) -> Iterator[Problem]:
    shape = _constant_shape(x) or ()
    axis = node.attributes.get_int("axis", 1)
    if shape and not -len(shape) <= axis < len(shape):
        yield f"axis {axis} is outside of {list(shape)}", "scale along the output channels"
    elif shape and shape[axis] != scales:
        yield f"{scales} scales for {shape[axis]} channels", "give one scale a channel"


def _attention(node: ir.Node, version: Version, cached: bool) -> Iterator[Problem]:
    """Attention as 10.14 to 11.2 read it; before 11.0 a causal mask begins at the upper left."""
    if any(_input(node, i) is not None for i in (4, 5, 6)) or len(node.outputs) > 1:
        yield "past, present and lengths are not supported", "concatenate the cache before it"
    if node.attributes.get_float("softcap", 0.0):
        yield "softcap is not supported", "decompose it"
    for value in list(node.inputs)[:3]:
        if value is not None and value.shape is not None and len(value.shape) != 4:
            yield "Q, K and V must have 4 axes", "split the heads before it"
            break
    if node.attributes.get_int("is_causal", 0) and cached and version < (11, 0):
        cure = "give it an explicit mask"
        yield "with a cache its causal mask would hide the newest keys", cure


def _layer_norm(node: ir.Node, version: Version, cached: bool) -> Iterator[Problem]:
    if any(output.uses() or output.is_graph_output() for output in list(node.outputs)[1:]):
        yield "only its first output is supported", "compute mean and deviation apart"


def _resize(node: ir.Node, version: Version, cached: bool) -> Iterator[Problem]:
    mode = node.attributes.get_string("mode", "nearest")
    if mode not in ("nearest", "linear"):
        yield f"mode {mode!r} is not supported: nearest and linear are", "resize before the graph"
    if node.attributes.get_int("antialias", 0):
        yield "antialias is not supported", "resize before the graph"


def _top_k(node: ir.Node, version: Version, cached: bool) -> Iterator[Problem]:
    count = _constant(_input(node, 1))
    if count is not None and count.size and int(count.flat[0]) >= _TOP_K_LIMIT:
        yield f"K is {int(count.flat[0])}", f"keep it below {_TOP_K_LIMIT}"
    if not node.attributes.get_int("sorted", 1):
        yield "sorted must be 1", "sort"


def _tensor_scatter(node: ir.Node, version: Version, cached: bool) -> Iterator[Problem]:
    if node.attributes.get_int("axis", -2) not in (-2, 2):
        yield "axis must be -2", "lay the cache out as [batch, heads, positions, width]"


def _shape(node: ir.Node, version: Version, cached: bool) -> Iterator[Problem]:
    if {"start", "end"} & set(node.attributes):
        yield "start and end are not supported: it gives all axes", "slice the whole shape"


_RULES: dict[str, Callable[[ir.Node, Version, bool], Iterator[Problem]]] = {
    "Attention": _attention,
    "LayerNormalization": _layer_norm,
    "Resize": _resize,
    "Shape": _shape,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
}


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _constant(value: ir.Value | None) -> Array | None:
    """Return the data of an initializer or a Constant; it must be small."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def _constant_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the sizes of a constant without reading it."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
