"""Move outliers from activations into weights, where a LayerNorm stands before the Linears.

    LayerNorm(gamma, beta) -> x -> MatMul(W)   ==   LayerNorm(gamma / s, beta / s) -> MatMul(s W)

s grows with a channel's activations by an exponent between 0 and 1; the exponent with the least
error of the products wins. With rounded activations that is SmoothQuant (Xiao et al. 2022, arXiv
2211.10438), with rounded weights alone AWQ (Lin et al. 2023, arXiv 2306.00978).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmedge.contracts import Stats

from ._linear import (
    Floats,
    Format,
    Linear,
    RoundRows,
    describe,
    initializer,
    rounded,
    scale_rows,
)

EXPONENTS = (0.0, 0.25, 0.5, 0.65, 0.8)
GAIN = 0.97  # of the error: less than 3 % better is not worth a change
COLUMNS = 256  # of each weight that are tried: enough to tell one exponent from another


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that read one LayerNorm's output, which nothing else but adapters' slots reads."""

    norm: ir.Node
    linears: tuple[Linear, ...]
    slots: tuple[ir.Node, ...] = ()

    @property
    def x(self) -> ir.Value:
        """What they read."""
        return self.linears[0].x


def groups(linears: list[Linear]) -> list[Group]:
    """Find the groups whose scale can be folded away."""
    by_input: dict[str, list[Linear]] = {}
    for linear in linears:
        by_input.setdefault(str(linear.x.name), []).append(linear)
    found = []
    for members in by_input.values():
        x = members[0].x
        norm = x.producer()
        if norm is None or norm.op_type != "LayerNormalization" or x.is_graph_output():
            continue
        nodes = {use.node for use in x.uses()}
        shared = any(len(tuple(linear.weight.uses())) > 1 for linear in members)
        slots = tuple(node for node in nodes if _enters_slot(node))
        owned = {*slots, *(linear.node for linear in members)}
        if nodes == owned and not shared and _owns(norm):
            found.append(Group(norm, tuple(members), slots))
    return found


def smooth(
    group: Group,
    stats: Stats,
    form: Format,
    round_rows: RoundRows | None,
) -> Floats | None:
    """Fold the best scale of a group into the graph.

    Args:
        group: Which Linears; their graph is changed.
        stats: Of what they read.
        form: What their weights will be rounded to.
        round_rows: How the activations will be rounded, or none if they stay float.

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


def _enters_slot(node: ir.Node) -> bool:
    """Tell whether x goes into an adapter's slot (lora.py) here, whose A is a graph's input."""
    if node.op_type == "Reshape":
        return all(_enters_slot(use.node) for use in node.outputs[0].uses())
    factor = node.inputs[1] if node.op_type == "MatMul" else None
    return factor is not None and factor.is_graph_input()


def _restore(group: Group, scale: Floats) -> None:
    """Give the slots x as it was: an adapter knows nothing of what moved into the weights."""
    graph, x = group.norm.graph, group.x
    assert graph is not None
    name = f"{x.name}.unsmoothed"
    factor = initializer(graph, f"{x.name}.smoothing", ir.tensor(scale))
    node = ir.Node("", "Mul", [x, factor], name=name)
    describe(node.outputs[0], name, x.shape)
    graph.insert_after(group.norm, node)
    for slot in group.slots:
        slot.replace_input_with(0, node.outputs[0])


def _owns(norm: ir.Node) -> bool:
    """Tell whether a LayerNorm's parameters are constants that nothing else reads."""
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
    """Squared error of x W when both are rounded after the scale moved."""
    x = rows / scale
    importance = np.square(x).mean(axis=0)
    restored = rounded(form, weight * scale[:, None], importance)
    seen = x if round_rows is None else round_rows(x)
    return float(np.square(seen @ restored - rows @ weight).sum())
