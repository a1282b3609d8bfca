"""A decoder's attentions in pieces, where TensorRT would fuse them to a kernel that is wrong.

    softmax -> MatMul        =>        softmax -> Relu -> MatMul

8.6.0 computes the attention of one query, which is a decoder's step, by a kernel mha7_vec. It reads
scratch memory that nobody has written (compute-sanitizer's initcheck counts 30816 reads in the
texts of tiny-blip in float32), so that of several rows those from the second or third on depend on
what ran before: logits were off by up to their own size, in float32, float16 and int8, recorded or
not. What softmax gives is never negative, so that Relu changes nothing, and nothing is found to
fuse: no such reads, all rows right to 2e-6, and a step of BLIP base takes 1.80 ms and not 2.60
(recorded, on an H200). An addition of zero in its place, or a lower bound before the softmax, does
not keep it from fusing; 8.6.0 fails to build a softmax that is written out in operators.
"""

from __future__ import annotations

import onnx_ir as ir


def keep_apart(model: ir.Model) -> bool:
    """Put a Relu behind every Softmax, in place; tell whether there was one."""
    graph = model.graph
    found = [node for node in graph if node.op_type == "Softmax"]
    for node in found:
        weights = node.outputs[0]
        relu = ir.node("Relu", [weights], name=f"{node.name or weights.name}.apart")
        made = relu.outputs[0]
        made.name, made.type, made.shape = f"{weights.name}.apart", weights.type, weights.shape
        weights.replace_all_uses_with(made, replace_graph_outputs=True)
        relu.replace_input_with(0, weights)
        graph.insert_after(node, relu)
    return bool(found)
