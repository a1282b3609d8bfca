"""ONNX Runtime on a GeForce RTX (30 and later), by the plugin of TensorRT-RTX.

It comes as a package of its own for the plain onnxruntime, compiles in seconds, and multiplies in
float16, FP8 or weight-only INT4: an int8 bundle gains nothing on it. The plain onnxruntime has no
memory on the GPU to give out, so a decoder's cache travels with every step. No GPU has run this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ._ort_cuda.session import Provider
from ._ort_cuda.tensorrt_provider import OrtTensorRt

EXPERIMENTAL = True  # no GPU has run it

PROVIDER = Provider(
    "NvTensorRTRTXExecutionProvider",
    "cpu",
    rounds=True,
    plugin="onnxruntime_ep_nv_tensorrt_rtx",
    needs="pip install onnxruntime-ep-nv-tensorrt-rtx beside onnxruntime 1.24 or later",
)


def options(folder: Path, ranges: Mapping[str, str]) -> dict[str, str]:
    """Return the provider's options: what it compiles just in time is kept.

    Source: nvidia.github.io/TensorRT-RTX-EP-ABI/_generated/provider-options.html, and the table
    "Execution Provider Options" of onnxruntime.ai's page on the provider.
    """
    return {
        "nv_runtime_cache_path": str(folder.resolve()),
        **{f"nv_profile_{which}_shapes": text for which, text in ranges.items() if text},
    }


ENGINE = OrtTensorRt("ort_tensorrt_rtx", PROVIDER, options)
