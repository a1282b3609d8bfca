"""ONNX Runtime on a CPU: lowering portable graphs, and running them."""
