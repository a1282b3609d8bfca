"""ONNX Runtime on an NVIDIA GPU, by its CUDA provider.

    portable graph --lower--> contrib kernels, and a part for the host
    engines/ort_cuda-<key>/ --session--> sessions --graph--> a graph that runs

The cache of a decoder stays on the device, steps of one shape are recorded (CUDA graphs), and a
node that would fall back to the CPU is an error that names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime as ort

from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError
from vlmedge.host.hardware import cpu_name
from vlmedge.parity.on_device import OnDevice
from vlmedge.progress import Progress
from vlmedge.shelves.contracts import Graph
from vlmedge.spec import Component

from ._cuda import connect
from ._ort_cuda.graph import CachedGraph, DeviceGraph, Opened
from ._ort_cuda.session import CUDA, Provider, open_session, refuse_strays, require
from ._ort_cuda.store import Stored, stored

if TYPE_CHECKING:
    import onnx_ir as ir

LOWERING = 3  # count it up when _ort_cuda/lower.py writes something else: engines are made again
IN_PLACE, MASK, SHAPES = "vlmedge.in_place", "vlmedge.mask", "vlmedge.shapes"
UNRECORDABLE = "graph capture"  # in ONNX Runtime's words when a session cannot record its runs


class OrtCuda:
    """ONNX Runtime's CUDA provider."""

    def __init__(self, provider: Provider, *, allow_fallback: bool = False) -> None:
        self._provider = provider
        self._allow_fallback = allow_fallback

    def falling_back(self) -> OrtCuda:
        """Return it as one that lets nodes run on the CPU."""
        return OrtCuda(self._provider, allow_fallback=True)

    def open(self, bundle: Bundle, component: str) -> Graph:
        """Open one component, lowered to the provider's kernels."""
        require(self._provider)
        spec = bundle.spec.component(component)
        files = stored(bundle, component, "ort_cuda", LOWERING, _lower)
        opened = _opened(files, component, self._provider, self._allow_fallback)
        return (CachedGraph if opened.in_place else DeviceGraph)(spec, opened)

    def judge(self, bundle: Bundle, progress: Progress) -> list[OnDevice]:
        """Hold what the device gives against the portable graphs."""
        from ._judge import judge_all  # it draws pictures, which running does not need

        require(self._provider)
        title = f"ONNX Runtime {ort.__version__}, {self._provider.name}"
        device = connect().name if self._provider.device == CUDA.device else cpu_name()
        # its kernels for a cache are of float16, whatever the bundle
        return judge_all(self, bundle, "float16", title, device, progress)


ENGINE = OrtCuda(CUDA)


def _lower(component: Component, model: ir.Model) -> ir.Model | None:
    """Lower a graph and write into it what its reader must know."""
    from ._ort_cuda.lower import lower, shape_nodes

    lowered = lower(component, model)
    model.metadata_props[IN_PLACE] = "1" if lowered.fused.cached else ""
    model.metadata_props[MASK] = lowered.mask
    model.metadata_props[SHAPES] = "\n".join(shape_nodes(model))
    return lowered.host


def _opened(files: Stored, name: str, provider: Provider, allow_fallback: bool) -> Opened:
    """Open the sessions of a component, one that records its runs where that can be."""
    graph = files.graph.read_bytes()
    try:
        session = open_session(graph, name, provider, files.root, capture=provider.captures)
        records = provider.captures
    except BundleError as error:
        if UNRECORDABLE not in str(error):
            raise
        session, records = open_session(graph, name, provider, files.root), False
    known = session.get_modelmeta().custom_metadata_map
    if not allow_fallback:
        refuse_strays(session, name, provider, frozenset(known[SHAPES].splitlines()))
    host = None
    if files.host is not None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1  # it adds and compares a few numbers
        host = ort.InferenceSession(
            files.host.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    return Opened(session, host, provider, records, bool(known[IN_PLACE]))
