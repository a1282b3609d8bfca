"""A cache in float16 on its way in and out, where a scheme has typed the graph between.

    past float32 -> Cast -> Concat float16 -> Cast -> present float32
    past float16 ---------> Concat float16 ---------> present float16

What a portable graph says of its state is float32, whatever computes it. Nobody sees it on the
GPU, and each step would read, cast and write twice the bytes of the whole cache.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def halve_state(model: ir.Model, pairs: Iterable[tuple[str, str]]) -> bool:
    """Type state tensors as float16 where that loses nothing, in place; tell whether any was.

    Args:
        model: A graph with types of its own.
        pairs: (output, the input that it becomes).
    """
    graph, changed = model.graph, False
    taken = {value.name: value for value in graph.inputs}
    given = {value.name: number for number, value in enumerate(graph.outputs)}
    for out, into in pairs:
        source, number = taken[into], given[out]
        made = graph.outputs[number]
        widens = made.producer()
        if source.dtype != _FLOAT or not _casts(source) or widens is None:
            continue
        narrow = widens.inputs[0] if widens.op_type == "Cast" else None
        if narrow is None or narrow.dtype != _HALF or made.uses() or narrow.is_graph_output():
            continue
        _narrow_input(graph, source)
        graph.outputs[number] = narrow
        graph.remove(widens, safe=True)
        made.name, narrow.name = None, out
        narrow.shape = narrow.shape or made.shape
        changed = True
    return changed


def _casts(source: ir.Value) -> bool:
    """Tell whether all that reads a value casts it to float16."""
    readers = [use.node for use in source.uses()]
    return bool(readers) and all(
        n.op_type == "Cast" and n.outputs[0].dtype == _HALF for n in readers
    )


def _narrow_input(graph: ir.Graph, source: ir.Value) -> None:
    source.type = ir.TensorType(_HALF)
    for use in list(source.uses()):
        use.node.outputs[0].replace_all_uses_with(source)
        graph.remove(use.node, safe=True)
