"""ONNX Runtime on an NVIDIA GPU, by its TensorRT provider.

For who has onnxruntime-gpu and TensorRT's libraries, and not TensorRT's Python; where that is, the
engine `tensorrt` does more (float16 repaired, int8 timed, two profiles). No GPU has run this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ._ort_cuda.session import CUDA, Provider
from ._ort_cuda.tensorrt_provider import OrtTensorRt

EXPERIMENTAL = True  # no GPU has run it

PROVIDER = Provider(
    "TensorrtExecutionProvider",
    "cuda",
    behind=((CUDA.name, CUDA.options),),
    rounds=True,
    needs="pip install onnxruntime-gpu in place of onnxruntime, and tensorrt for its libraries",
)


def options(folder: Path, ranges: Mapping[str, str]) -> dict[str, str]:
    """Return the provider's options: plans and timings are kept, and no precision is asked for.

    Source: onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html; its bindings
    for Python take True and False, and refuse 1.
    """
    kept = str(folder.resolve())
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": kept,
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": kept,
        **{f"trt_profile_{which}_shapes": text for which, text in ranges.items() if text},
    }


ENGINE = OrtTensorRt("ort_tensorrt", PROVIDER, options)
