"""Portable ONNX graphs: what is asked of them and changed in them, wherever that is done."""
