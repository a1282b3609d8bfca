"""From a module of torch to a graph: what the models of the registry meet only now and then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from kit.shelf import module

from vlmedge.spec import Component, TensorSpec

trace = module("export", "_trace.trace")


class Masks(torch.nn.Module):
    """Makes a constant on the device of its input, as transformers' eager masks do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float [batch, 2] to as much."""
        return torch.where(x > 0, torch.tensor(0.25, device=x.device, dtype=x.dtype), -7.5)


def test_constant_made_on_the_device_of_the_input_keeps_its_value() -> None:
    shape = ("batch", 2)
    component = Component(
        "masks",
        inputs=(TensorSpec("x", "float32", shape),),
        outputs=(TensorSpec("y", "float32", shape),),
    )
    before = torch.tensor
    model, _ = trace.trace(component, Masks)
    assert torch.tensor is before
    import onnx_ir as ir

    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    x = np.array([[1, -1], [-2, 3], [0, 1]], np.float32)
    (y,) = session.run(None, {"x": x})
    assert y.tolist() == [[0.25, -7.5], [-7.5, 0.25], [-7.5, 0.25]]


def test_graph_tells_nothing_of_the_machine_that_traced_it() -> None:
    """No path, no line of Python: one checkpoint gives the same bytes everywhere."""
    shape = ("batch", 2)
    x, y = (TensorSpec(name, "float32", shape) for name in "xy")
    model, _ = trace.trace(Component("masks", inputs=(x,), outputs=(y,)), Masks)
    import onnx_ir as ir

    assert Path(__file__).name.encode() not in ir.serde.serialize_model(model).SerializeToString()
    assert not any(node.metadata_props or node.doc_string for node in model.graph)
