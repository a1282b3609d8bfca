"""Rows of device tensors in another order: one Gather for each, all in one run.

ONNX Runtime has no call for it, so it is a graph made on the spot. Beams ask for it at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from .session import Provider

_TYPES = {"tensor(float16)": ir.DataType.FLOAT16, "tensor(float)": ir.DataType.FLOAT}
_ROWS = "rows"


class Gatherer:
    """Moves rows on one provider; sessions are kept by what they move."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._sessions: dict[tuple[tuple[str, int], ...], ort.InferenceSession] = {}

    def take(
        self,
        held: Sequence[ort.OrtValue],
        rows: NDArray[np.int64],
        into: Sequence[ort.OrtValue] | None = None,
    ) -> list[ort.OrtValue]:
        """Return row `rows[i]` of each as row i, in `into` where that is given."""
        kinds = tuple((value.data_type(), len(value.shape())) for value in held)
        if kinds not in self._sessions:
            self._sessions[kinds] = self._session(kinds)
        session, device = self._sessions[kinds], self._provider.device
        binding = session.io_binding()
        order = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(rows), device, 0)
        binding.bind_ortvalue_input(_ROWS, order)
        for number, value in enumerate(held):
            binding.bind_ortvalue_input(f"i{number}", value)
            if into is None:
                binding.bind_output(f"o{number}", device)
            else:
                binding.bind_ortvalue_output(f"o{number}", into[number])
        session.run_with_iobinding(binding)
        return list(into) if into is not None else list(binding.get_outputs())

    def _session(self, kinds: tuple[tuple[str, int], ...]) -> ort.InferenceSession:
        rows = _value(_ROWS, ir.DataType.INT64, 1)
        inputs = [_value(f"i{n}", _TYPES[kind], rank) for n, (kind, rank) in enumerate(kinds)]
        nodes = [
            ir.Node("", "Gather", [value, rows], name=f"g{n}") for n, value in enumerate(inputs)
        ]
        for number, (node, (kind, rank)) in enumerate(zip(nodes, kinds, strict=True)):
            out = node.outputs[0]
            out.name, out.type = f"o{number}", ir.TensorType(_TYPES[kind])
            out.shape = ir.Shape([None] * rank)
        graph = ir.Graph(
            [rows, *inputs], [node.outputs[0] for node in nodes], nodes=nodes,
            opset_imports={"": 20}, name="gather",
        )  # fmt: skip
        data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        chosen = [(self._provider.name, dict(self._provider.options))]
        if self._provider.behind:  # what copies rows is no work for a compiler
            chosen = [(name, dict(more)) for name, more in self._provider.behind]
        if self._provider.plugin:  # whose tensors are the host's between runs
            chosen = [("CPUExecutionProvider", {})]
        return ort.InferenceSession(data, options, providers=chosen)


def _value(name: str, dtype: ir.DataType, rank: int) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([None] * rank))
