"""Level 4 of the gate: an engine on its device against what its portable graph gives on the CPU.

PyTorch is not on a board, so it has vouched for the portable graph at the export (levels 1 and 3),
and the portable graph, on ONNX Runtime with nothing lowered, vouches for the engine here. Both run
on what a fresh engine is tried on (vlmedge/parity/probe.py): a picture, then a prompt and one token
more. ONNX Runtime's own engines are judged so too: they lower by the processor or the GPU that they
find.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.arrays import Array
from vlmedge.bundle import Bundle
from vlmedge.graphs.portable import load_graph
from vlmedge.host.hardware import RESERVE_BYTES, free_bytes
from vlmedge.parity.on_device import OnDevice, Verdict
from vlmedge.parity.probe import Probe
from vlmedge.parity.tolerances import compare, worst
from vlmedge.progress import Progress
from vlmedge.shelves.build_options import Precision
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.shelves.contracts import Engine, Graph
from vlmedge.spec import Component

REPEATS, TIMED_S = 10, 10.0  # passes that are timed, and when it is enough of them
ROOM = 1.5  # of a graph's weights: activations and what ONNX Runtime repacks


def judge(bundle: Bundle, graph: Graph, precision: Precision, probe: Probe) -> Verdict:
    """Compare an engine with its portable graph, and time it.

    Args:
        bundle: The bundle that the engine belongs to.
        graph: The engine, opened.
        precision: Number format that its float layers compute in.
        probe: Inputs to feed.
    """
    feeds = probe.steps(graph)
    graph.reset()
    ours = [graph.run(step) for step in feeds]
    latency_ms = time_ms(graph, probe)
    if not fits_here(load_graph(bundle.path, graph.component.name)):
        return Verdict(None, None, latency_ms)
    try:
        reference = _Portable(graph.component, bundle.graph_file(graph.component.name))
    except ImportError:  # a board need not have ONNX Runtime
        return Verdict(None, None, latency_ms)
    scheme = bundle.manifest.scheme
    if scheme == "float32" and precision == "float16":
        scheme = "fp16"
    found = []
    for step, outputs in zip(feeds, ours, strict=True):
        expected = reference.run(step)
        found += [
            compare(graph.component.name, scheme, expected[name], array)
            for name, array in outputs.items()
            if array.dtype.kind == "f"
        ]
    if not found:
        return Verdict(None, None, latency_ms)
    return Verdict(f"its graph on ONNX Runtime {reference.version}", worst(found), latency_ms)


def judge_all(
    engine: Engine,
    bundle: Bundle,
    precision: Precision,
    title: str,
    device: str,
    progress: Progress,
) -> list[OnDevice]:
    """Compare every component of a bundle with its portable graph; one is open at a time.

    Args:
        engine: The engine that opens the components.
        bundle: The bundle with the components.
        precision: Number format that the engine's float layers compute in.
        title: The engine's name and version.
        device: Name of the device that it runs on.
        progress: Watches.
    """
    probe, found = Probe(bundle), []
    for component in bundle.spec.components:
        with progress.step(f"checking {component.name}"):
            graph = engine.open(bundle, component.name)
            try:
                verdict = judge(bundle, graph, precision, probe)
                if not component.state:  # the next ones are fed what this one gives
                    probe.learn(graph.run(probe.steps(graph)[0]))
            finally:
                graph.close()
        found.append(OnDevice(component.name, title, device, verdict))
    return found


def fits_here(model: Any) -> bool:
    """Return whether the host has memory to run a graph beside its engine; a board may not."""
    free = free_bytes()  # 0: the system does not tell
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    return not free or free - RESERVE_BYTES > ROOM * weights


def time_ms(graph: Graph, probe: Probe) -> float:
    """Return how long one pass over what the probe has takes, the median of a few."""
    feeds = probe.steps(graph)
    times = []
    for _ in range(REPEATS):
        graph.reset()
        start = time.perf_counter()
        for step in feeds:
            graph.run(step)
        times.append(time.perf_counter() - start)
        if sum(times) > TIMED_S:
            break
    graph.reset()
    return 1000 * float(np.median(times))


class _Portable(CheckedGraph):
    """A bundle's graph on ONNX Runtime's CPU, as it is."""

    def __init__(self, component: Component, file: Path) -> None:
        import onnxruntime as ort

        super().__init__(component)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.version = ort.__version__
        self._session = ort.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        self._taken = {value.name for value in self._session.get_inputs()}
        self._outputs = [spec.name for spec in component.outputs]

    def infer(self, feeds: dict[str, Array]) -> dict[str, Any]:
        """Run the session once."""
        fed = {name: array for name, array in feeds.items() if name in self._taken}
        return dict(zip(self._outputs, self._session.run(self._outputs, fed), strict=True))
