"""Portable ONNX graphs; the only package of the core that may import onnx_ir."""
