"""ONNX Runtime on the CPU.

Graphs with nothing to fuse are opened as they are. All else, which is quantized, has attentions or
a cache, is lowered once to the kernels that ONNX Runtime has for it (_ort/lower.py) and kept:

    <bundle>/engines/ort-<key>/<component>.onnx   which points to the bundle's own weights
                               <component>.bin    what had to be repacked, if anything
                               engine.json        what it was made for, what was fused and what not

A bundle that cannot be written has its engines in $VLMEDGE_CACHE, else in $XDG_CACHE_HOME/vlmedge
or ~/.cache/vlmedge.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime as ort

from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError
from vlmedge.graphs.edit import external, refer
from vlmedge.graphs.portable import load_graph
from vlmedge.host.hardware import cores, cpu_features, cpu_name
from vlmedge.host.power import saves_power
from vlmedge.parity.on_device import OnDevice
from vlmedge.progress import Progress
from vlmedge.shelves.contracts import Graph
from vlmedge.shelves.engine_store import SIDECAR, engines_folder, read_sidecar
from vlmedge.spec import Component

from ._ort.graph import InPlaceGraph, OrtGraph
from ._ort.store import GRAPHS, make, root

KERNEL = "GroupQueryAttention"  # in a lowered graph: its cache is in place
TURN = b"turn.0.row"  # in a lowered graph: the kernel counts positions by itself
# What a graph holds that can be lowered: quantized weights, fp16's, attention.
MARKS = (b"DequantizeLinear", b".float16", b"Softmax")
LOWERING = 10  # count it up when _ort/lower.py writes something else: cached engines are rebuilt

# What ONNX Runtime fuses to kernels that are slower than what they replace: at [197, 768] Add and
# LayerNormalization take 0.16 ms, SkipLayerNormalization 0.76.
SLOWER = ["SkipLayerNormFusion"]


class Ort:
    """ONNX Runtime."""

    def __init__(self, spin: bool | None = None) -> None:
        """Make one whose threads wait awake or asleep; none: as the machine's power has it."""
        self._wanted = spin

    def spinning(self, spin: bool | None) -> Ort:
        """Return it as one model's, whose threads wait awake or asleep; none: see `Spins`."""
        return Ort(spin)

    @functools.cached_property
    def _spin(self) -> bool:
        """Whether threads wait awake; the machine is asked once, and not for each session."""
        return not saves_power() if self._wanted is None else self._wanted

    def open(self, bundle: Bundle, component: str) -> Graph:
        """Open one session, on the lowered graph if there is something to lower."""
        spec, portable = bundle.spec.component(component), bundle.graph_file(component)
        graph = portable.read_bytes()
        if not spec.state and not any(mark in graph for mark in MARKS):
            return OrtGraph(spec, _session(portable, portable.parent, self._spin))
        folder = _folder(bundle, _key(bundle, component, graph))
        file = folder / portable.name
        if file.is_file():
            try:
                return _opened(spec, file, root(bundle, folder, component), self._spin)
            except BundleError:  # a broken cache is no reason to stop
                shutil.rmtree(folder, ignore_errors=True)
        make(bundle, component, folder, lambda partial: _lower(bundle, component, partial, folder))
        return _opened(spec, file, root(bundle, folder, component), self._spin)

    def judge(self, bundle: Bundle, progress: Progress) -> list[OnDevice]:
        """Hold what this processor's kernels give against the portable graphs."""
        from ._judge import judge_all  # it draws pictures, which running does not need

        title = f"ONNX Runtime {ort.__version__}"
        return judge_all(self, bundle, "float32", title, cpu_name(), progress)


ENGINE = Ort()


def _opened(component: Component, file: Path, root: Path, spin: bool) -> Graph:
    """Open a lowered graph; its kernels tell how it keeps its state."""
    session = _session(file, root, spin)
    graph, fusions = file.read_bytes(), read_sidecar(file.parent).get("fusions") or ()
    if KERNEL.encode() not in graph:
        return OrtGraph(component, session, fusions)
    return InPlaceGraph(component, session, fusions, counts=TURN in graph)


def _session(file: Path, root: Path, spin: bool = True) -> ort.InferenceSession:
    """Open a graph whose weight files are named from `root`.

    ONNX Runtime maps the weights and lets each go once it is packed, so memory does not double.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: they are raised anyhow, warnings are for developers
    options.intra_op_num_threads = cores()
    # A plan of a run's memory is one more block beside what the first run took and keeps: five of
    # SegGPT-L's layers take 2428 MiB with it, 1612 without, in the same time. (An arena that grows
    # by what is asked for saves 230 more and costs 2 to 4 %; none at all costs 8 %.)
    options.enable_mem_pattern = False
    # Threads wait awake between operators, which idle machines gain by (ViT-B/16: 66 ms, asleep
    # 87), but not for the milliseconds of the default, which busy machines lose by (222 and 164).
    # On a battery they sleep: a caption of 20 tokens by tiny-blip2 takes 12.1 ms of the cores'
    # time, not 15.7 (and on that machine, which was busy, 0.61 ms a token, not 0.75).
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _overflows():  # what was not lowered gets uint8 weights too, right and slower
        options.add_session_config_entry("session.x64quantprecision", "1")
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(root.resolve()))
    try:
        data = file.read_bytes()  # from memory, since older versions ignore the folder for files
        return ort.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOWER
        )
    except Exception as error:  # ONNX Runtime has a dozen exceptions without a common base
        line = " ".join(str(error).split())[:300]
        raise BundleError(f"{file} cannot be opened by ONNX Runtime: {line}") from None


@functools.cache
def _overflows() -> bool:
    """Return whether products of uint8 and int8 are added up in 16 bits here.

    So it is on x86 before AVX512-VNNI and AVX-VNNI, and assumed where the CPU does not say. Tests
    replace this function to have the engines of such a processor on any other.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not {"avx512_vnni", "avx_vnni"}.intersection(cpu_features())


def _identity(component: str) -> dict[str, Any]:
    """Return what an engine is made for; its graph and weights are in its key alone."""
    return {
        "component": component,
        "onnxruntime": ort.__version__,
        "machine": platform.machine(),
        "cpu": cpu_features(),
        "overflows": _overflows(),
        "lowering": LOWERING,
    }


def _key(bundle: Bundle, component: str, graph: bytes) -> str:
    """Digest all that an engine is made from and for."""
    weights = [f for f in bundle.manifest.files if f.path.endswith(".bin")]
    used = [f.sha256 for f in weights if Path(f.path).name.encode() in graph]
    made_for = json.dumps([*used, _identity(component)])
    return hashlib.sha256(graph + made_for.encode()).hexdigest()[:16]


def _folder(bundle: Bundle, key: str) -> Path:
    """Return where an engine is, or will be: in the bundle if that can be written."""
    name = f"ort-{key}"
    return engines_folder(bundle, name) / name


def _lower(bundle: Bundle, component: str, partial: Path, folder: Path) -> None:
    """Write the lowered graph, and the weights that had to be repacked, into `partial`."""
    model = load_graph(bundle.path, component)
    import onnx_ir as ir  # not needed once the engine is there

    from ._ort.lower import lower, write

    spec = bundle.spec.component(component)
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    lowered, weights = lower(spec, model, version, overflows=_overflows()), f"{component}.bin"
    if folder.is_relative_to(bundle.path):
        place = folder.relative_to(bundle.path)
        kept, repacked, location = external(model), [*lowered.packed], (place / weights).as_posix()
    elif lowered.packed:
        kept, repacked, location = [], [*lowered.packed, *external(model)], weights
    else:
        kept, repacked, location = external(model), [], weights
    refer(kept, bundle.path, GRAPHS)
    if repacked:
        write(repacked, partial / weights, location)
    ir.save(model, partial / f"{component}.onnx")
    fusions = [asdict(fusion) for fusion in lowered.fusions]
    record = {"identity": _identity(component), "fusions": fusions}
    (partial / SIDECAR).write_text(json.dumps(record, indent=2), encoding="utf-8")
