"""ONNX Runtime on the CPU."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vlmedge.bundle import Bundle
from vlmedge.contracts import Array, Graph
from vlmedge.graph import CheckedGraph


class OrtGraph(CheckedGraph):
    """One ONNX Runtime session."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        super().__init__(bundle.spec.component(name))
        self._session = ort.InferenceSession(
            str(bundle.graph_file(name)), providers=["CPUExecutionProvider"]
        )

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run the session once."""
        names = [spec.name for spec in self.component.outputs]
        return dict(zip(names, self._session.run(names, feeds), strict=True))


class Ort:
    """ONNX Runtime."""

    def open(self, bundle: Bundle, component: str) -> Graph:
        """Open one session."""
        return OrtGraph(bundle, component)


ENGINE = Ort()
