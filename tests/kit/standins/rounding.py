"""float16 that is one on ONNX Runtime's CPU.

Where it has no kernel for float16 it casts to float32 and back, and then takes out the casts that
meet: numbers beyond 65504 would live on. Two nodes that have kernels for float16 keep the casts
apart (one alone is cast too):

    MatMul -> Cast float16 -> Identity -> Identity -> Cast float32 -> Gelu
"""

from __future__ import annotations

import onnx
import onnxruntime


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Open a graph with its weights inside; every float16 in it is rounded to one."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    values = [*model.graph.value_info, *model.graph.output]
    half = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    if half:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = _rounded(model, half)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _rounded(model: onnx.ModelProto, half: set[str]) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    del made.graph.value_info[:]
    for node in model.graph.node:
        kept = made.graph.node.add()
        kept.CopyFrom(node)
        for i, name in enumerate(node.output):
            if name in half:
                whole, rounded = f"{name}.whole", f"{name}.rounded"
                kept.output[i] = whole
                made.graph.node.append(onnx.helper.make_node("Identity", [whole], [rounded]))
                made.graph.node.append(onnx.helper.make_node("Identity", [rounded], [name]))
    return made
