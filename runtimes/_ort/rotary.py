"""Rotary positions (Su et al. 2021, arXiv 2104.09864) that GroupQueryAttention can turn by itself.

    x -> Mul(cos) ------------------------------------------> Add
    x -> Slice(half:) -> Neg -> Concat <- Slice(:half) <- x     ^
                                   '--> Mul(sin) ---------------'

The kernel turns each token by its place in the cache, the graph by its place among real tokens. On
a row that is padded on the left the two differ by one number for the whole row, and attention knows
differences alone. `cos` and `sin` come from a constant, one frequency for each pair:

    positions -> Unsqueeze -> Cast -> Mul(frequencies) -> Concat(twice) -> Cos -> (Mul) -> Unsqueeze
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmedge.graphs.edit import producer, scalar


@dataclass(frozen=True, slots=True)
class Turn:
    """Rotary position embedding of queries and keys.

    Attributes:
        frequencies: Frequency of each pair, radians a position, float32 [width / 2].
        factor: Multiplies cos and sin (YaRN has it), or 1.
    """

    frequencies: ir.Value
    factor: float


def unturned(value: ir.Value) -> tuple[ir.Value, Turn] | None:
    """Return the tensor before the rotation, and its `Turn`; none where the sketch does not fit."""
    total = producer(value, "Add")
    if total is None:
        return None
    for near, far in ((0, 1), (1, 0)):
        plain, swapped = _product(total.inputs[near]), _product(total.inputs[far])
        if plain is None or swapped is None:
            continue
        for x, cos in (plain, plain[::-1]):
            for halves, sin in (swapped, swapped[::-1]):
                if _is_swap(halves, x) and (turn := _turn(cos, sin)) is not None:
                    return x, turn
    return None


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    node = producer(value, "Mul")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    return node.inputs[0], node.inputs[1]


def _is_swap(value: ir.Value, x: ir.Value) -> bool:
    """Return whether a value is (-second half, first half) of x along its last axis."""
    joined = producer(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or x.shape is None:
        return False
    width = x.shape[-1]
    rank = len(x.shape)
    if joined.attributes.get_int("axis", 0) not in (-1, rank - 1) or not isinstance(width, int):
        return False
    turned = producer(joined.inputs[0], "Neg")
    if turned is None:
        return False
    half = width // 2
    second, first = _cut(turned.inputs[0], x, rank), _cut(joined.inputs[1], x, rank)
    return (
        second is not None
        and first is not None
        and second[0] == half
        and second[1] >= width
        and first == (0, half)
    )


def _cut(value: ir.Value | None, x: ir.Value, rank: int) -> tuple[int, int] | None:
    """Return from where to where a Slice takes x along its last axis."""
    node = producer(value, "Slice")
    if node is None or node.inputs[0] is not x or len(node.inputs) < 4:
        return None
    begin, end, axis = (scalar(v) for v in node.inputs[1:4])
    step = scalar(node.inputs[4]) if len(node.inputs) > 4 else 1.0
    if begin is None or end is None or axis not in (-1, rank - 1) or step != 1:
        return None
    return int(begin), int(end)


def _turn(cos: ir.Value, sin: ir.Value) -> Turn | None:
    """Follow cos and sin to the frequencies that both are made of."""
    found = [_angles(value, kind) for value, kind in ((cos, "Cos"), (sin, "Sin"))]
    if found[0] is None or found[1] is None or found[0] != found[1]:
        return None
    angles, factor = found[0]
    twice = producer(angles, "Concat")
    if twice is None or len(twice.inputs) != 2 or twice.inputs[0] is not twice.inputs[1]:
        return None
    product = _product(twice.inputs[0])
    if product is None:
        return None
    for positions, frequencies in (product, product[::-1]):
        tensor = frequencies.const_value
        cast = producer(positions, "Cast")
        if cast is not None and tensor is not None and tensor.size == tensor.shape.numpy()[-1]:
            return Turn(frequencies, factor)
    return None


def _angles(value: ir.Value, kind: str) -> tuple[ir.Value, float] | None:
    heads = producer(value, "Unsqueeze")
    inner, factor = (heads.inputs[0] if heads is not None else None), 1.0
    if (product := _product(inner)) is not None:
        numbers = [scalar(v) for v in product]
        if (numbers[0] is None) == (numbers[1] is None):
            return None
        inner = product[0] if numbers[0] is None else product[1]
        factor = next(n for n in numbers if n is not None)
    node = producer(inner, kind)
    angles = node.inputs[0] if node is not None else None
    return None if angles is None else (angles, factor)
