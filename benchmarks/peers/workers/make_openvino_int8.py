"""Quantize an image tower as OpenVINO's own documentation does it: nncf.quantize.

python make_openvino_int8.py GRAPH.onnx OUT.xml
"""

from __future__ import annotations

import sys

import nncf
import numpy as np
import openvino

SAMPLES = 8  # speed does not depend on what it is calibrated with


def main(graph: str, out: str) -> None:
    """Write OUT.xml and OUT.bin."""
    model = openvino.Core().read_model(graph)
    shape = [1, *(int(str(size)) for size in list(model.inputs[0].partial_shape)[1:])]
    rng = np.random.default_rng(0)
    pixels = [rng.standard_normal(shape).astype(np.float32) for _ in range(SAMPLES)]
    small = nncf.quantize(
        model, nncf.Dataset(pixels), model_type=nncf.ModelType.TRANSFORMER, subset_size=SAMPLES
    )
    openvino.save_model(small, out, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
