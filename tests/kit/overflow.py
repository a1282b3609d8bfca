"""A CLIP whose first MLP reaches far beyond float16 inside, and comes back from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from vlmedge.bundle import Bundle

COMPONENT = "vision_encoder"
FACTOR = np.float32(6e4)  # the weights themselves stay below 65504
_MLP = "vision_model.encoder.layers.0.mlp."


def overflowing(source: Path, folder: Path) -> Bundle:
    """Copy tiny-clip's bundle; scale what its first MLP reads up, and what it writes down."""
    target = folder / "overflowing"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("engines"))
    bundle = Bundle.load(target)
    file = bundle.graph_file(COMPONENT)
    model = onnx.load(file)
    factors = {
        f"{_MLP}fc1.weight.transposed": FACTOR,
        f"{_MLP}fc1.bias": FACTOR,
        f"{_MLP}fc2.weight.transposed": 1 / FACTOR,
    }
    for tensor in model.graph.initializer:
        if tensor.name in factors:
            scaled = numpy_helper.to_array(tensor) * factors.pop(tensor.name)
            tensor.CopyFrom(numpy_helper.from_array(scaled.astype(np.float32), tensor.name))
    assert not factors, factors
    onnx.save(model, file)
    return bundle
