"""Make one bundle's graphs small by one method, in a process of its own so that its peak counts.

    python benchmarks/_nncf_worker.py SOURCE OUT METHOD [component]

nncf_compare.py starts it. SOURCE is a float32 bundle. OUT gets graphs/, assets/ and a cost.json
with the processor seconds of each component and the peak memory. Every method calibrates on the
scenes that an export draws: the own schemes through vlmedge/make/calibrate.py, NNCF on the very
feeds that its runs give to each component, recorded on disk and read one at a time.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vlmedge.arrays import Array
from vlmedge.bench.worker import peak_memory_mib
from vlmedge.bundle import Bundle
from vlmedge.graphs.portable import load_graph, onnx_ir, save_graph
from vlmedge.make.calibrate import Calibration
from vlmedge.parity.samples import CALIBRATION_IMAGES, drawn
from vlmedge.progress import SILENT
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.shelves.contracts import Engine, Graph, Watched
from vlmedge.shelves.registry import ENGINES, SCHEMES
from vlmedge.spec import Component
from vlmedge.spec.manifest import FLOAT

FEEDS = "feeds"  # what each component was fed, an .npz a call
COST = "cost.json"
HELD_OUT_IMAGES = 2  # of each kind, for the cosines
BLOCK = 128
INT4_OPSET = 21


@dataclass(frozen=True)
class Method:
    """A way to make graphs small.

    Attributes:
        scheme: Which tolerances it is held to: int8 or int4, or float32.
        encoders: NNCF's preset (or int4) for what is not a decoder; none: the own scheme.
        decoder: The same for a decoder.
    """

    scheme: str
    encoders: str | None = None
    decoder: str | None = None

    def by_nncf(self, component: Component) -> str | None:
        """Return what NNCF shall do with a component, or none."""
        return self.decoder if component.state else self.encoders


METHODS = {
    "float32": Method(FLOAT),
    "int8": Method("int8"),
    "nncf int8 mixed": Method("int8", "mixed", "mixed"),
    "nncf int8 performance": Method("int8", "performance", "performance"),
    "int4": Method("int4"),
    "nncf int4": Method("int4", "int4", "int4"),
    "nncf int4 in the decoder": Method("int4", None, "int4"),
}


class Recorder:
    """An engine that writes what its graphs are fed, where it was told a folder."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.folder: Path | None = None

    def open(self, bundle: Bundle, component: str) -> Graph:
        """Open a graph, of the other engine where nothing is written."""
        if self.folder is None:
            return self._engine.open(bundle, component)
        return _Recorded(bundle, component, self.folder)


class _Recorded(CheckedGraph):
    """A session whose feeds, a decoder's cache among them, are written down."""

    def __init__(self, bundle: Bundle, component: str, folder: Path) -> None:
        super().__init__(bundle.spec.component(component))
        self._session = session(bundle.graph_file(component))
        self._folder, self._count = folder, 0

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Write the feeds, and run."""
        np.savez(self._folder / f"{self._count:05}.npz", **feeds)  # type: ignore[arg-type]
        self._count += 1
        names = [spec.name for spec in self.component.outputs]
        return dict(zip(names, self._session.run(names, feeds), strict=True))


def session(graph: Path) -> onnxruntime.InferenceSession:
    """Open a graph as a user of onnxruntime would, on the cores that this process may use."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def load_feeds(file: Path) -> dict[str, Array]:
    """Read one call's feeds."""
    with np.load(file) as stored:
        return dict(stored)


def with_nncf(graph: Path, feeds: list[Path], kind: str) -> Any:
    """Quantize one graph as NNCF's documentation does it; return an onnx.ModelProto.

    Args:
        graph: The float32 graph, weights beside it.
        feeds: To calibrate with.
        kind: A preset of nncf.quantize, or int4.
    """
    import nncf
    import onnx
    from nncf.onnx.quantization.backend_parameters import BackendParameters

    nncf.set_log_level(logging.WARNING)
    model = onnx.load(graph, load_external_data=False)
    outside = {BackendParameters.EXTERNAL_DATA_DIR: str(graph.parent.resolve())}
    data = nncf.Dataset(feeds, load_feeds)
    if kind != "int4":
        return nncf.quantize(
            model,
            data,
            preset=nncf.QuantizationPreset(kind),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(feeds),
            advanced_parameters=nncf.AdvancedQuantizationParameters(backend_params=outside),
        )
    # 4-bit types and blocks need opset 21; the operators of these graphs mean the same in both
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = max(opset.version, INT4_OPSET)
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=BLOCK,
        ratio=1.0,
        dataset=data,
        subset_size=len(feeds),
        awq=True,
        scale_estimation=True,
        # of a Conv NNCF 3.4 makes scales [out, 1, 1] on one axis, which ONNX Runtime refuses
        ignored_scope=nncf.IgnoredScope(types=["Conv"], validate=False),
        backup_mode=nncf.BackupMode.INT8_SYM,  # the vocabulary, as in the own int4
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, backend_params=outside
        ),
    )


def shrink(
    source: Bundle, out: Bundle, component: Component, method: Method, calibration: Calibration,
    recorder: Recorder,
) -> None:  # fmt: skip
    """Make one component small and write it."""
    model = load_graph(source.path, component.name)
    scheme = SCHEMES["int4" if method.scheme == FLOAT else method.scheme]
    kind = method.by_nncf(component)
    if kind is None and method.scheme != FLOAT:
        stats = calibration.observe(component, model, scheme.watch(component, model))
        small = model.clone()
        scheme.rewrite(component, small, stats)
        save_graph(small, out.path, component.name)
        return
    recorder.folder = out.path / FEEDS / component.name
    recorder.folder.mkdir(parents=True)
    # a decoder runs in calibration only where something is watched
    first = SCHEMES["int4"].watch(component, model).names[:1] if component.state else ()
    calibration.observe(component, model, Watched(first, rows=False))
    feeds, recorder.folder = sorted(recorder.folder.iterdir()), None
    if kind is None:
        save_graph(model.clone(), out.path, component.name)
        return
    import onnx_ir as ir

    found = with_nncf(source.graph_file(component.name), feeds, kind)
    save_graph(ir.from_proto(found), out.path, component.name)
    shutil.rmtree(out.path / FEEDS)


def main(source_folder: str, out_folder: str, title: str, only: str | None = None) -> None:
    """Do the components, or one."""
    onnx_ir()
    method = METHODS[title]
    source, folder = Bundle.load(source_folder), Path(out_folder)
    shutil.copytree(source.path / "assets", folder / "assets")
    out = Bundle(folder, source.manifest)
    recorder = Recorder(ENGINES["ort"])
    if method.scheme == FLOAT:  # its feeds are what the others' outputs are compared on
        samples = drawn(HELD_OUT_IMAGES, "heldout", labelled=False)
    else:
        samples = drawn(CALIBRATION_IMAGES, "calibration", labelled=False)
    calibration = Calibration(out, recorder, SCHEMES["int8"], samples, SILENT)
    seconds = {}
    for component in source.spec.components:
        if only is not None and component.name != only:  # it feeds the one
            calibration.observe(component, load_graph(source.path, component.name), Watched())
            continue
        began = time.process_time()  # all threads of this process; others may be busy too
        shrink(source, out, component, method, calibration, recorder)
        seconds[component.name] = time.process_time() - began
        if component.name == only:
            break
    calibration.close()
    cost = {"seconds": seconds, "peak_mib": peak_memory_mib()}
    (folder / COST).write_text(json.dumps(cost))


if __name__ == "__main__":
    os.environ.setdefault("NNCF_CI", "1")  # turns its telemetry off
    main(*sys.argv[1:])
