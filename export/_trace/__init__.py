"""From torch modules without weights to portable ONNX graphs."""
