"""TensorRT: lowering, building in child processes, and running engines."""
