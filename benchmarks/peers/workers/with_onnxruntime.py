"""ONNX Runtime as it comes: a session on a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from _pictures import classified
from _serve import Opened, Task, serve, timed


def _session(task: Task) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = task["threads"]
    return onnxruntime.InferenceSession(task["graph"], options, ["CPUExecutionProvider"])


def tower(task: Task) -> Opened:
    """Open an image tower."""
    session = _session(task)
    pixels = np.load(task["pixels"])
    return Opened(timed(lambda: session.run(None, {"pixel_values": pixels})))


def classify(task: Task) -> Opened:
    """Open CLIP's image tower behind a front end."""
    session = _session(task)

    def encode(pixels: Any) -> Any:
        return session.run(None, {"pixel_values": pixels})[0]  # its only output

    return Opened(classified(encode, task))


if __name__ == "__main__":
    serve({"tower": tower, "classify": classify}, ("onnxruntime",))
