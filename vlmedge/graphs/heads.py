"""The heads of an attention: how a graph splits and joins them, for kernels that do so themselves.

[batch, tokens, heads * width] -> Reshape -> [batch, tokens, heads, width]
                               -> Transpose -> [batch, heads, tokens, width]
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmedge.graphs.edit import append, constant, order, producer, rank, reader, scalar, size, sizes

if TYPE_CHECKING:
    import onnx_ir as ir

OUTSIDE = [0, 2, 1, 3]  # [batch, tokens, heads, width] <-> [batch, heads, tokens, width]
SWAPPED = [0, 1, 3, 2]  # [batch, heads, tokens, width] -> [batch, heads, width, tokens]
KEYS_TURNED = [0, 2, 3, 1]  # [batch, tokens, heads, width] -> [batch, heads, width, tokens]
THIRDS = [2, 0, 3, 1, 4]  # [batch, tokens, 3, heads, width] -> [3, batch, heads, tokens, width]
REPEAT = ("Unsqueeze", "Expand", "Reshape")  # of each key head for the query heads that share it


@dataclass(frozen=True, slots=True)
class Third:
    """Queries, keys or values that one Linear makes at once.

    Attributes:
        whole: The output of the Linear, [batch, tokens, 3 * heads * width].
        number: Index of the third: 0, 1 or 2.
        heads: How many each third has.
        width: Width of one head.
    """

    whole: ir.Value
    number: int
    heads: int
    width: int


def third(value: ir.Value | None) -> Third | None:
    """Follow [batch, heads, tokens, width] back to the Linear that makes three of them at once.

    [batch, tokens, 3 * heads * width] -> Reshape -> Transpose -> Gather
    """
    part = producer(value, "Gather")
    turned = producer(part.inputs[0], "Transpose") if part is not None else None
    split = producer(turned.inputs[0], "Reshape") if turned is not None else None
    if part is None or turned is None or split is None or order(turned) != THIRDS:
        return None
    number = scalar(part.inputs[1])
    if number is None or rank(part.inputs[1]) or part.attributes.get_int("axis", 0):
        return None
    whole, before, after = split.inputs[0], sizes(split.inputs[0]), sizes(split.outputs[0])
    if whole is None or len(before) != 3 or len(after) != 5:
        return None
    heads, width = after[3:]
    if before[:2] != after[:2] or not isinstance(heads, int) or not isinstance(width, int):
        return None
    if after[2] != 3 or before[2] != 3 * heads * width:
        return None
    return Third(whole, int(number) % 3, heads, width)


def flat(graph: ir.Graph, value: ir.Value, heads: int, width: int, name: str) -> ir.Value:
    """Return [batch, heads, tokens, width] as [batch, tokens, heads * width]."""
    turned = producer(value, "Transpose")
    inside = turned.inputs[0] if turned is not None and order(turned) == OUTSIDE else None
    if inside is None:
        shape = [size(value, 0), size(value, 2), heads, width]
        inside = append(
            graph, "Transpose", [value], value.dtype, shape, f"{name}.turned", perm=OUTSIDE
        )
    return joined(graph, inside, heads, width, name)


def joined(graph: ir.Graph, value: ir.Value, heads: int, width: int, name: str) -> ir.Value:
    """Return [batch, tokens, heads, width] as [batch, tokens, heads * width]."""
    split = producer(value, "Reshape")
    whole = split.inputs[0] if split is not None else None
    if whole is not None and rank(whole) == 3 and size(whole, 2) == heads * width:
        return whole
    target = constant(graph, f"{name}.sizes", np.array([0, 0, heads * width]))
    shape = [size(value, 0), size(value, 1), heads * width]
    return append(graph, "Reshape", [value, target], value.dtype, shape, f"{name}.flat")


def leave(graph: ir.Graph, old: ir.Value, new: ir.Value, heads: int, width: int, name: str) -> None:
    """Give [batch, tokens, heads * width] to whoever read [batch, heads, tokens, width]."""
    turned = reader(old, "Transpose", besides_shape=True)
    if turned is not None and order(turned) == OUTSIDE:
        last = reader(turned.outputs[0], "Reshape", besides_shape=True)
        if last is not None and rank(last.outputs[0]) == 3 and (
            size(last.outputs[0], 2) == heads * width
        ):  # fmt: skip
            last.outputs[0].replace_all_uses_with(new, replace_graph_outputs=True)
            return
    target = constant(graph, f"{name}.split", np.array([0, 0, heads, width]))
    batch, tokens = size(old, 0), size(old, 2)
    shape = [batch, tokens, heads, width]
    apart = append(graph, "Reshape", [new, target], new.dtype, shape, f"{name}.apart")
    shape = [batch, heads, tokens, width]
    back = append(graph, "Transpose", [apart], new.dtype, shape, f"{name}.back", perm=OUTSIDE)
    old.replace_all_uses_with(back)


def asks_for_past(graph: ir.Graph, past: Collection[str], *, but_length: bool) -> bool:
    """Return whether a node reads a cache in a way that a buffer with spare room would break.

    Args:
        graph: A decoder's.
        past: Names of its caches' inputs, [batch, heads, past, width].
        but_length: Whether Shape(start=2, end=3), the length alone, may be asked for.
    """
    for use in (use for value in graph.inputs if value.name in past for use in value.uses()):
        if use.node.op_type == "Shape":
            start = use.node.attributes.get_int("start", 0)
            end = use.node.attributes.get_int("end", 4)
            if start <= 2 < end and not (but_length and (start, end) == (2, 3)):
                return True
        elif use.node.op_type != "Concat":
            return True
    return False
