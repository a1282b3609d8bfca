"""One matrix product on one engine: `python -m vlmedge.doctor.proof ENGINE` prints its time.

The engine is used as every bundle uses it: a portable graph on disk is opened and run, and what
comes out is compared with numpy.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vlmedge.bundle import Bundle, graph_path
from vlmedge.errors import ParityError, VlmEdgeError
from vlmedge.graphs.portable import onnx_ir
from vlmedge.shelves.registry import ENGINES
from vlmedge.spec import Component, ModelSpec, TensorSpec
from vlmedge.spec.manifest import FORMAT, CheckpointId, Manifest
from vlmedge.version import __version__

SIZE = 64
OPSET = 20
TOLERANCE = 2e-2  # TF32 and float16 have 10 bits of mantissa; sums have 64 terms of order 1


def prove(engine: str, folder: Path) -> float:
    """Multiply two matrices; return milliseconds of the second run.

    Args:
        engine: Its name.
        folder: An empty one.

    Raises:
        ParityError: The product is wrong.
    """
    component = Component(
        "matmul",
        inputs=(TensorSpec("x", "float32", ("batch", SIZE)),),
        outputs=(TensorSpec("y", "float32", ("batch", SIZE)),),
    )
    rng = np.random.default_rng(0)
    weight, rows = (rng.standard_normal((SIZE, SIZE), np.float32) for _ in range(2))
    write_graph(folder / graph_path("matmul"), weight)
    spec = ModelSpec(family="doctor", components=(component,), tasks={})
    source = CheckpointId("doctor", None, "")
    manifest = Manifest(FORMAT, __version__, source, "float32", spec, (), (), {})
    graph = ENGINES[engine].open(Bundle(folder, manifest), "matmul")
    found = graph.run({"x": rows})["y"]
    start = time.perf_counter()
    graph.run({"x": rows})
    taken_ms = 1000 * (time.perf_counter() - start)
    graph.close()
    judge(found, rows @ weight)
    return taken_ms


def judge(found: np.ndarray[tuple[int, ...], np.dtype[np.float32]], right: object) -> None:
    """Refuse a wrong product."""
    reference = np.asarray(right)
    error = float(np.abs(found - reference).max() / np.abs(reference).max())
    if not error <= TOLERANCE:  # nan is wrong too
        raise ParityError(f"the matrix product is wrong by {error:.1e}: install the engine again")


def write_graph(file: Path, weight: object) -> None:
    """Write y = x @ weight as portable ONNX."""
    onnx_ir()
    import onnx_ir as ir

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("batch", SIZE)))
    w = ir.Value(name="w", const_value=ir.tensor(np.asarray(weight), name="w"))
    w.type, w.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((SIZE, SIZE))
    node = ir.Node("", "MatMul", [x, w], num_outputs=1)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", x.type, ir.Shape(("batch", SIZE))
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": OPSET}, name="g")
    file.parent.mkdir(parents=True)
    ir.save(ir.Model(graph, ir_version=10), file)


def main() -> None:
    """Prove the engine that is named."""
    with tempfile.TemporaryDirectory(prefix="vlmedge-doctor-") as folder:
        try:
            taken_ms = prove(sys.argv[1], Path(folder))
        except VlmEdgeError as error:
            sys.exit(" ".join(str(error).splitlines()))
    print(f"a product of {SIZE} x {SIZE} is right, {taken_ms:.2f} ms")


if __name__ == "__main__":
    main()
