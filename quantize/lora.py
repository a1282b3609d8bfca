"""LoRA adapters as inputs of a graph, so that they come and go without a new one.

    x -> MatMul(W) -> Add(b) -> y ---> Add -> y'
    |                                   |
    +--> MatMul(down) -> MatMul(up) ----+        zeros in down and up: y' = y

down is [adapters, in, rank] and up [adapters, rank, out]: 1 adapter serves every row of the batch,
as many as there are rows serve one each. Where x has folded the batch into its rows, as OPT's MLP
does, or has more axes, it is unfolded first: x -> Reshape [adapters, -1, in].

It is done before a scheme: what a scheme folds into the weights (_smooth.py) it can then undo on
the way into a slot, and the branch stays in float.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from vlmedge.errors import InputError
from vlmedge.graphs.edit import biased, constant, give_instead
from vlmedge.spec import AdapterSlot, Component, TensorSpec

from ._linear import Linear, linears

AXIS = "adapters"
FLOAT = ir.DataType.FLOAT


class LoraSlots:
    """The slots of PEFT's LoRA."""

    def add(
        self, component: Component, model: ir.Model, rank: int, modules: Sequence[str] = ()
    ) -> tuple[AdapterSlot, ...]:
        """Give Linears the inputs of an adapter, in place; see `Slotter.add`."""
        if rank < 1:
            raise InputError(f"lora_slots is {rank}: it must be at least 1")
        if component.slots:
            raise InputError(f"{component.name} has slots already: export it without them")
        batched = {spec.name for spec in component.inputs if spec.shape[:1] == ("batch",)}
        found: dict[str, tuple[AdapterSlot, ir.Value, ir.Value]] = {}
        for linear in linears(model):
            module = _module(linear)
            if module is None or not _wanted(module, modules):
                continue
            if module not in found:  # a Linear that is used twice has one slot
                slot = _slot(module, linear, rank)
                found[module] = (slot, _input(model, slot.down), _input(model, slot.up))
            _, down, up = found[module]
            _branch(model.graph, linear, module, down, up, direct=bool(batched))
        return tuple(slot for slot, _, _ in found.values())


SLOTS = LoraSlots()


def _module(linear: Linear) -> str | None:
    """Return the path of a Linear in the checkpoint; none for a weight that is no Linear's."""
    path, dot, _ = linear.name.partition(".weight")
    return path if dot else None


def _wanted(module: str, modules: Sequence[str]) -> bool:
    """Return whether a module gets a slot; a number in its path means that it is in a layer."""
    if modules:
        return any(module == end or module.endswith(f".{end}") for end in modules)
    return any(part.isdigit() for part in module.split("."))


def _slot(module: str, linear: Linear, rank: int) -> AdapterSlot:
    rows, columns = linear.shape
    return AdapterSlot(
        module,
        TensorSpec(f"{module}.lora_A", "float32", (AXIS, rows, rank)),
        TensorSpec(f"{module}.lora_B", "float32", (AXIS, rank, columns)),
    )


def _input(model: ir.Model, spec: TensorSpec) -> ir.Value:
    value = ir.Value(name=spec.name, type=ir.TensorType(FLOAT), shape=ir.Shape(spec.shape))
    model.graph.inputs.append(value)
    return value


def _branch(
    graph: ir.Graph, linear: Linear, module: str, down: ir.Value, up: ir.Value, *, direct: bool
) -> None:
    """Add (x down) up to what the Linear gives, behind its bias."""
    found = biased(linear.node)
    last = linear.node if found is None else found[0]
    y = last.outputs[0]
    uses = list(y.uses())
    name = f"{linear.node.name or module}.lora"
    x = linear.x
    nodes: list[ir.Node] = []

    def put(op_type: str, inputs: list[ir.Value], shape: ir.Shape | None,
            dtype: ir.DataType = FLOAT, **attributes: int) -> ir.Value:  # fmt: skip
        attrs = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs, name=f"{name}.{len(nodes)}")
        nodes.append(node)
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{name}.{len(nodes)}", ir.TensorType(dtype), shape
        return out

    straight = direct and _keeps_batch(x)
    if not straight:
        assert down.shape is not None
        count = put("Shape", [down], ir.Shape([1]), ir.DataType.INT64, start=0, end=1)
        rest = constant(graph, f"{name}.rest", np.array([-1, linear.shape[0]], np.int64))
        sizes = put("Concat", [count, rest], ir.Shape([3]), ir.DataType.INT64, axis=0)
        x = put("Reshape", [x, sizes], ir.Shape([AXIS, None, linear.shape[0]]))
    assert x.shape is not None and up.shape is not None and down.shape is not None
    inner = put("MatMul", [x, down], ir.Shape([*list(x.shape)[:-1], down.shape[-1]]))
    delta = put("MatMul", [inner, up], ir.Shape([*list(x.shape)[:-1], up.shape[-1]]))
    if not straight:
        sizes = put("Shape", [y], ir.Shape([len(y.shape or ())]), ir.DataType.INT64)
        delta = put("Reshape", [delta, sizes], y.shape)
    total = put("Add", [y, delta], y.shape)
    graph.insert_after(last, nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, total)
    give_instead(graph, y, total, f"{name}.base")


def _keeps_batch(x: ir.Value) -> bool:
    """Return whether x is [batch, tokens, in], which a batch of adapters multiplies as it is."""
    return x.shape is not None and len(x.shape) == 3 and str(x.shape[0]) == "batch"
