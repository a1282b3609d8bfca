"""Quantize a graph as ONNX Runtime's own documentation does it: quantize_dynamic.

python make_ort_int8.py GRAPH.onnx OUT.onnx
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
from onnxruntime.quantization import quantize_dynamic

PROTOBUF_BYTES_MAX = 2**31


def main(graph: str, out: str) -> None:
    """Write OUT.onnx, with its weights beside it where they are too many for one file."""
    weights = Path(f"{graph}.data")
    # of a Conv it would make a ConvInteger, which is slower than the float one
    kinds = sorted({n.op_type for n in onnx.load(graph, load_external_data=False).graph.node})
    quantize_dynamic(
        graph,
        out,
        op_types_to_quantize=[kind for kind in ("MatMul", "Gemm") if kind in kinds],
        per_channel=True,
        use_external_data_format=weights.is_file()
        and weights.stat().st_size > PROTOBUF_BYTES_MAX / 2,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
