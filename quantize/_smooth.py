"""Move outliers from activations into weights, where a LayerNorm stands before the Linears.

    LayerNorm(gamma, beta) -> x -> MatMul(W)   ==   LayerNorm(gamma / s, beta / s) -> MatMul(s W)

s grows with a channel's activations by an exponent between 0 and 1; the exponent with the least
error of the products wins. With rounded activations that is SmoothQuant (Xiao et al. 2022, arXiv
2211.10438), with rounded weights alone AWQ (Lin et al. 2023, arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmedge.graphs.edit import constant
from vlmedge.shelves.contracts import Stats

from ._linear import (
    Floats,
    Format,
    Linear,
    RoundRows,
    describe,
    rounded,
    scale_rows,
)

EXPONENTS = (0.0, 0.25, 0.5, 0.65, 0.8)
GAIN = 0.97  # of the error: less than 3 % better is not worth a change
COLUMNS = 256  # of each weight that are tried: enough to tell one exponent from another


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that read one LayerNorm's output, which nothing else but adapters' slots reads.

    Attributes:
        norm: The LayerNorm; `x` is what it makes.
        linears: Some read x, some one token of it (the queries of a last
            layer, export/_trace/pool_early.py).
        slots: The nodes by which it goes into adapters' slots.
        inputs: x, and what is chosen from it.
    """

    norm: ir.Node
    linears: tuple[Linear, ...]
    slots: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]

    @property
    def x(self) -> ir.Value:
        """The LayerNorm's output."""
        return self.norm.outputs[0]

    def divided(self, stats: Mapping[str, Stats], scale: Floats) -> dict[str, Stats]:
        """Return the statistics of the inputs as they are once x is divided by `scale`."""
        names = [str(value.name) for value in self.inputs]
        return {name: stats[name].divided(scale) for name in names if name in stats}


def groups(linears: list[Linear]) -> list[Group]:
    """Find the groups whose scale can be folded away."""
    by_norm: dict[str, list[Linear]] = {}
    for linear in linears:
        by_norm.setdefault(str(_whole(linear.x).name), []).append(linear)
    found = []
    for members in by_norm.values():
        x = _whole(members[0].x)
        norm = x.producer()
        if norm is None or norm.op_type != "LayerNormalization":
            continue
        choices = [use.node for use in x.uses() if _chooses(use.node)]
        inputs = (x, *(node.outputs[0] for node in choices))
        readers = {use.node for value in inputs for use in value.uses()} - set(choices)
        shared = any(len(tuple(linear.weight.uses())) > 1 for linear in members)
        read_outside = any(value.is_graph_output() for value in inputs)
        slots = tuple(node for node in readers if _enters_slot(node))
        owned = {*slots, *(linear.node for linear in members)}
        if readers == owned and not shared and not read_outside and _owns(norm):
            found.append(Group(norm, tuple(members), slots, inputs))
    return found


def smooth(
    group: Group,
    stats: Stats,
    form: Format,
    round_rows: RoundRows | None,
) -> Floats | None:
    """Fold the best scale of a group into the graph.

    Args:
        group: The Linears; their graph is changed.
        stats: Statistics of their input.
        form: Format that their weights will be quantized to.
        round_rows: How the activations will be quantized, or none if they stay float.

    Returns:
        The scale that x was divided by, float32 [channels], or none where it was best left alone.
    """
    if stats.rows is None or stats.channels is None or len(stats.rows) == 0:
        return None
    rows = stats.rows.astype(np.float32)
    strength = stats.channels if round_rows is not None else np.abs(rows).mean(axis=0)
    weights = [_some_columns(linear.read()) for linear in group.linears]
    errors = {}
    for exponent in EXPONENTS:
        scale = _scale(strength, exponent)
        errors[exponent] = sum(_error(rows, w, scale, form, round_rows) for w in weights)
    best = min(errors, key=lambda exponent: errors[exponent])
    if best == 0.0 or errors[best] > GAIN * errors[0.0]:
        return None
    scale = _scale(strength, best)
    for parameter in group.norm.inputs[1:]:
        assert parameter is not None and parameter.const_value is not None
        divided = parameter.const_value.numpy() / scale
        parameter.const_value = ir.tensor(divided.astype(np.float32), name=parameter.name)
    for linear in group.linears:
        scale_rows(linear, scale)
    if group.slots:
        _restore(group, scale)
    return scale


def _whole(x: ir.Value) -> ir.Value:
    """Return what a token was chosen from, or the value itself."""
    node = x.producer()
    whole = node.inputs[0] if node is not None and _chooses(node) else None
    return x if whole is None else whole


def _chooses(node: ir.Node) -> bool:
    """Recognise a choice among the tokens of [batch, tokens, channels]."""
    x = node.inputs[0] if node.inputs else None
    if node.domain or x is None or x.shape is None or len(x.shape) != 3:
        return False
    if node.op_type == "Gather":
        return node.attributes.get_int("axis", 0) == 1
    index = node.inputs[1] if node.op_type == "GatherND" else None
    pairs = index is not None and index.shape is not None and index.shape[-1] == 2
    return pairs and node.attributes.get_int("batch_dims", 0) == 0


def _enters_slot(node: ir.Node) -> bool:
    """Return whether x goes into an adapter's slot (lora.py) here, whose A is a graph's input."""
    if node.op_type == "Reshape":
        return all(_enters_slot(use.node) for use in node.outputs[0].uses())
    factor = node.inputs[1] if node.op_type == "MatMul" else None
    return factor is not None and factor.is_graph_input()


def _restore(group: Group, scale: Floats) -> None:
    """Give the slots x as it was: an adapter knows nothing of what moved into the weights."""
    graph = group.norm.graph
    assert graph is not None
    factor = constant(graph, f"{group.x.name}.smoothing", scale)
    for x in group.inputs:
        entered = [use for use in x.uses() if use.node in group.slots]
        if not entered:
            continue
        name, made_by = f"{x.name}.unsmoothed", x.producer()
        node = ir.Node("", "Mul", [x, factor], name=name)
        describe(node.outputs[0], name, x.shape)
        assert made_by is not None
        graph.insert_after(made_by, node)
        for slot, place in entered:
            slot.replace_input_with(place, node.outputs[0])


def _owns(norm: ir.Node) -> bool:
    """Return whether a LayerNorm's parameters are constants that nothing else reads."""
    return all(
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and len(tuple(value.uses())) == 1
        for value in norm.inputs[1:]
    )


def _scale(strength: Floats, exponent: float) -> Floats:
    """Make the scales of one exponent, with a geometric mean of 1."""
    logs = np.log(np.maximum(strength, 1e-5 * max(float(strength.max()), 1e-30)))
    return np.asarray(np.exp(exponent * (logs - logs.mean())), np.float32)


def _some_columns(weight: Floats) -> Floats:
    step = max(1, weight.shape[1] // COLUMNS)
    return np.ascontiguousarray(weight[:, ::step])


def _error(
    rows: Floats, weight: Floats, scale: Floats, form: Format, round_rows: RoundRows | None
) -> float:
    """Squared error of x W when both are quantized after the scale moved."""
    x = rows / scale
    importance = np.square(x).mean(axis=0)
    restored = rounded(form, weight * scale[:, None], importance)
    seen = x if round_rows is None else round_rows(x)
    return float(np.square(seen @ restored - rows @ weight).sum())
