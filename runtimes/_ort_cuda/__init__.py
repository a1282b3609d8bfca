"""ONNX Runtime on an NVIDIA GPU: lowering, sessions and CUDA graphs."""
