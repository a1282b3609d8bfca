"""float16 for engines that take the types of a graph as they stand: which nodes stay float32.

Products, convolutions and what lies between them become float16; sums of squares, exponentials and
what follows them directly stay float32. Weights and scales are cast when they are written.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
import onnx_ir as ir

from vlmedge.graphs import half
from vlmedge.graphs.half import HALF_MAX, HALF_NORMAL, BeyondHalfError, beyond

_EXACT = frozenset(
    [
        "Cast",
        "CastLike",
        "Constant",
        "ConstantOfShape",
        "CumSum",
        "Exp",
        "Log",
        "Pow",
        "RMSNormalization",
        "Range",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Sqrt",
    ]
)
# Which input is the scale of numbers that are none themselves.
SCALES = {"QuantizeLinear": 1, "DequantizeLinear": 1, "MatMulNBits": 2}
_FOLLOWING = frozenset(["Abs", "Add", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Sigmoid", "Sub"])


def halve(model: ir.Model, state: Collection[str] = (), exact: Collection[str] = ()) -> None:
    """Rewrite a graph to float16, in place; its inputs and outputs stay float32.

    Args:
        model: A float32 graph.
        state: Inputs and outputs that never leave the device; they become float16 too.
        exact: Nodes that stay float32 whatever they are, by the name of their first output.
    """
    half.halve(model.graph, partial(_is_wide, frozenset(exact)), _refuse, state)


def _is_wide(exact: frozenset[str], node: ir.Node) -> bool:
    if node.outputs[0].name in exact or beyond(node):
        return True
    if node.op_type in SCALES:
        return not _scale_fits(node.inputs[SCALES[node.op_type]])
    if node.op_type in _FOLLOWING:
        return any(_is_exact(value) for value in node.inputs if value is not None)
    return node.op_type in _EXACT


def _is_exact(value: ir.Value) -> bool:
    """Return whether a value was computed in float32 on purpose."""
    return value.producer() is not None and value.dtype == ir.DataType.FLOAT


def _scale_fits(scale: ir.Value | None) -> bool:
    tensor = ir.convenience.get_const_tensor(scale) if scale is not None else None
    if tensor is None:
        return False
    factors = tensor.numpy().astype(np.float32)
    return bool((factors >= HALF_NORMAL).all() and (factors <= HALF_MAX).all())


def _refuse(name: str, largest: float) -> BeyondHalfError:
    return BeyondHalfError(
        f"{name} reaches {largest:.1e}, beyond float16: build with --precision float32"
    )
