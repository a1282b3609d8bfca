"""Measure what bounds every engine here: reading memory, and multiplying matrices.

python measure_machine.py THREADS     prints {"read_gb_s": ..., "fp32_gops": ..., ...}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

READ_BYTES = 2**30  # far beyond any cache
SIDE = 2048
TRIALS = 8
GIGA = 1e9


def best_s(work: Callable[[], object]) -> float:
    """Return the shortest of several times: what the machine can do."""
    times = []
    for _ in range(TRIALS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def read_gb_s(threads: int) -> float:
    """Stream through a gigabyte on all cores, by the fastest of numpy's ways to look at it."""
    parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), threads)
    looks = (lambda part: part.max(), lambda part: part.dot(part), torch_sum)
    with ThreadPoolExecutor(threads) as pool:
        return max(
            READ_BYTES / GIGA / best_s(lambda look=look: list(pool.map(look, parts)))
            for look in looks
        )


def torch_sum(part: np.ndarray) -> float:
    """Add up, in PyTorch's vectorized code."""
    return float(torch.from_numpy(part).sum())


def ort_gops(threads: int, kind: str) -> float:
    """Multiply two matrices in ONNX Runtime; the second one is a weight, packed ahead."""
    rng = np.random.default_rng(0)
    if kind == "fp32":
        a, b = (rng.standard_normal((SIDE, SIDE)).astype(np.float32) for _ in range(2))
        node = helper.make_node("MatMul", ["a", "b"], ["y"])
        types = TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT
    else:
        a = rng.integers(0, 255, (SIDE, SIDE)).astype(np.uint8)
        b = rng.integers(-127, 127, (SIDE, SIDE)).astype(np.int8)
        node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
        types = TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32
    shape = [SIDE, SIDE]
    graph = helper.make_graph(
        [node],
        "gemm",
        [helper.make_tensor_value_info("a", types[0], shape)],
        [helper.make_tensor_value_info("y", types[2], shape)],
        [helper.make_tensor("b", types[1], shape, b.tobytes(), raw=True)],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return 2 * SIDE**3 / GIGA / best_s(lambda: session.run(None, {"a": a}))


def torch_gops() -> float:
    """Multiply two bfloat16 matrices in PyTorch; ONNX Runtime has no such kernel on a CPU."""
    a, b = (torch.randn(SIDE, SIDE).to(torch.bfloat16) for _ in range(2))
    with torch.inference_mode():
        return 2 * SIDE**3 / GIGA / best_s(lambda: a @ b)


def main(threads: int) -> None:
    """Print all of it."""
    torch.set_num_threads(1)  # while several threads of ours call it
    read = read_gb_s(threads)
    torch.set_num_threads(threads)
    found = {
        "read_gb_s": read,
        "fp32_gops": ort_gops(threads, "fp32"),
        "int8_gops": ort_gops(threads, "int8"),
        "bf16_gops": torch_gops(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
