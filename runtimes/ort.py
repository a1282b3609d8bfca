"""ONNX Runtime on the CPU.

Graphs with nothing to fuse are opened as they are. All else, which is quantized, has attentions or
a cache, is lowered once to the kernels that ONNX Runtime has for it (_ort_lower.py) and kept:

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vlmedge.arrays import Array, Arrays
from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError, InputError
from vlmedge.graphs.edit import external, refer
from vlmedge.graphs.portable import load_graph
from vlmedge.host.hardware import cores, cpu_features, cpu_name
from vlmedge.host.power import saves_power
from vlmedge.parity.on_device import OnDevice
from vlmedge.progress import Progress
from vlmedge.shelves.checked_graph import CheckedGraph
from vlmedge.shelves.contracts import Graph
from vlmedge.shelves.engine_store import SIDECAR, engines_folder, read_sidecar
from vlmedge.spec import Component

from ._ort.last_logits import FROM
from ._ort.store import GRAPHS, make, root

KERNEL = "GroupQueryAttention"  # in a lowered graph: its cache is in place
TURN = b"turn.0.row"  # in a lowered graph: the kernel counts positions by itself
# What a graph holds that can be lowered: quantized weights, fp16's, attention.
MARKS = (b"DequantizeLinear", b".float16", b"Softmax")
CAPACITY_MIN = 64  # positions of a new cache
LOWERING = 10  # count it up when _ort_lower.py writes something else: cached engines are rebuilt

# What ONNX Runtime fuses to kernels that are slower than what they replace: at [197, 768] Add and
# LayerNormalization take 0.16 ms, SkipLayerNormalization 0.76.
SLOWER = ["SkipLayerNormFusion"]

# What a head that can choose is fed: the first token that it reads.
ALL = ort.OrtValue.ortvalue_from_numpy(np.array([0]))
LAST = ort.OrtValue.ortvalue_from_numpy(np.array([-1]))


class OrtGraph(CheckedGraph):
    """One session; the state stays in ONNX Runtime's own memory from call to call."""

    def __init__(
        self,
        component: Component,
        session: ort.InferenceSession,
        fusions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Wrap a session; `fusions` is what the lowering tells of it (_ort_fusion.py)."""
        super().__init__(component)
        self.fusions = fusions
        self._session: ort.InferenceSession | None = session
        self._outputs = [spec.name for spec in component.outputs]
        # whether its head can be told to read the last token alone (_ort_head.py)
        self._chooses = any(put.name == FROM for put in session.get_inputs())

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run the session once; state goes in and comes out as OrtValues."""
        if self._session is None:
            raise RuntimeError(f"{self.component.name} is closed")
        values = {name: _held(value) for name, value in feeds.items()}
        if self._chooses:
            values[FROM] = LAST if self._last else ALL
        found = self._session.run_with_ort_values(self._outputs, values)
        return {
            name: value if name in self._became else value.numpy()
            for name, value in zip(self._outputs, found, strict=True)
        }

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now, in place where the number of rows stays.

        Fresh memory for a whole cache is what costs: its pages are made one by one.
        """
        arrays = {name: self.fetch(name, value) for name, value in self._state.items()}
        batch = next((len(array) for array in arrays.values()), 0)
        if np.array_equal(rows, np.arange(batch)):
            return
        self.follow(rows)
        buffer = np.empty(0)
        for name, array in arrays.items():
            if len(rows) != batch:
                arrays[name] = array[rows]
                continue
            if (buffer.shape, buffer.dtype) != (array.shape, array.dtype):
                buffer = array[rows]
            # a mode other than "raise" spares another copy; the line above has checked the rows
            np.take(array, rows, axis=0, out=buffer, mode="clip")
            array[...] = buffer
        self._state = arrays

    def fetch(self, name: str, value: Any) -> Array:
        """Return a tensor of the state, without a copy."""
        array: Array = value.numpy() if isinstance(value, ort.OrtValue) else value
        return array

    def hold(self, array: Array) -> ort.OrtValue:
        """Wrap an array once: a decoder with slots has hundreds of them at every step."""
        return _held(array)

    def close(self) -> None:
        """Free the session."""
        super().close()
        self._session = None


class InPlaceGraph(OrtGraph):
    """A decoder whose cache lies in buffers that its kernels write into; no step copies it.

    Buffers are float32 [rows, heads, capacity, width] and grow by doubling. After a prompt is
    repeated for beams, rows of one origin hold the same prompt, which is never copied again.
    """

    def __init__(
        self,
        component: Component,
        session: ort.InferenceSession,
        fusions: Sequence[Mapping[str, Any]] = (),
        *,
        counts: bool = False,
    ) -> None:
        """Wrap a session; `counts` tells that its kernels count positions, padding included."""
        super().__init__(component, session, fusions)
        self._counts = counts
        self._specs = {i.name: i for i in component.inputs if i.name in self._became.values()}
        self._buffers: dict[str, Array] = {}
        self._binding: ort.IOBinding | None = None
        self._used = 0
        self._origin = np.zeros(0, np.int64)  # of each row: the row that it was repeated from
        self._shared = 0  # positions that rows of one origin have in common
        self._slots: dict[str, Any] | None = None  # what the binding has of adapters

    def run(self, feeds: Arrays, *, last: bool = False) -> dict[str, Array]:
        """Run once; see `vlmedge.shelves.contracts.Graph.run`."""
        if self._session is None:
            raise RuntimeError(f"{self.component.name} is closed")
        axes = self._check(feeds)
        if self._counts and (np.diff(feeds["attention_mask"], axis=1) < 0).any():
            raise InputError(
                f"{self.component.name}: attention_mask has a gap: its rows may only begin with "
                "zeros: pad on the left"
            )
        given = {name: value for name, value in feeds.items() if name in self._specs}
        if given:
            self._used, self._shared = axes["past"], 0
            self._buffers = {}
        self._make_room(axes["batch"], axes["total"])
        for name, value in given.items():
            self._buffers[name][:, :, : self._used] = value
        binding = self._bound()
        held = {name: _held(value) for name, value in feeds.items() if name not in given}
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        if self._chooses:
            binding.bind_ortvalue_input(FROM, LAST if last else ALL)
        if self.component.slots and self._slots is not (slots := self._adapter_feeds(axes)):
            for name, value in slots.items():
                binding.bind_ortvalue_input(name, value)
            self._slots = slots
        plain = [name for name in self._outputs if name not in self._became]
        for name in plain:  # anew: what is bound already has the shape of the call before
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        self._used = axes["total"]
        found = binding.get_outputs()[-len(plain) :]
        return {name: value.numpy() for name, value in zip(plain, found, strict=True)}

    def reset(self) -> None:
        """Forget the state; the buffers stay for the next text."""
        self._used = self._shared = 0
        self.follow(None)

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make state row i the row `rows[i]` of now."""
        batch = len(self._origin)
        if np.array_equal(rows, np.arange(batch)):
            return
        self.follow(rows)
        if len(rows) != batch:
            capacity = self._capacity()
            self._allocate(len(rows), capacity, rows)
            self._origin = self._origin[rows] if self._shared else rows.copy()
            self._shared = self._shared or self._used
            return
        start = self._shared if np.array_equal(self._origin[rows], self._origin) else 0
        moved = np.flatnonzero(rows != np.arange(batch))
        for buffer in self._buffers.values():
            buffer[moved, :, start : self._used] = buffer[rows[moved], :, start : self._used]
        self._origin = self._origin[rows]

    def rewind(self, tokens: int) -> None:
        """Keep the first `tokens` positions of row 0; of one row nothing is copied."""
        self._used, self._shared = tokens, min(self._shared, tokens)
        if len(self._origin) > 1:
            self.reorder(np.zeros(1, np.int64))

    def snapshot(self, tokens: int) -> dict[str, Array]:
        """Copy the first `tokens` positions of row 0."""
        return {name: buffer[:1, :, :tokens].copy() for name, buffer in self._buffers.items()}

    def close(self) -> None:
        """Free the session and the buffers."""
        super().close()
        self._buffers, self._binding, self._slots = {}, None, None

    def _capacity(self) -> int:
        return next(iter(self._buffers.values())).shape[2] if self._buffers else 0

    def _make_room(self, batch: int, total: int) -> None:
        """See that the buffers hold `total` positions of `batch` rows."""
        if self._used == 0 or not self._buffers:
            self._origin = np.arange(batch)
        rows = next(iter(self._buffers.values())).shape[0] if self._buffers else 0
        if rows == batch and total <= self._capacity():
            return
        if self._used and self._buffers and batch != rows:
            raise InputError(
                f"{self.component.name}: the cache has {rows} rows, the feeds {batch}: reset first"
            )
        capacity = max(CAPACITY_MIN, 1 << (total - 1).bit_length())
        self._allocate(batch, capacity, np.arange(rows))

    def _allocate(self, batch: int, capacity: int, rows: NDArray[np.int64]) -> None:
        """Make new buffers, with the given rows of the old ones as far as they are used."""
        for name, spec in self._specs.items():
            _, heads, _, width = spec.shape
            fresh = np.empty((batch, int(heads), capacity, int(width)), spec.dtype)
            if self._used and name in self._buffers:
                fresh[:, :, : self._used] = self._buffers[name][rows, :, : self._used]
            self._buffers[name] = fresh
        self._binding = None

    def _bound(self) -> ort.IOBinding:
        """Bind each buffer as the past and as what comes of it, once."""
        if self._binding is None:
            assert self._session is not None
            self._binding, self._slots = self._session.io_binding(), None
            for out, into in self._became.items():
                value = ort.OrtValue.ortvalue_from_numpy(self._buffers[into])
                self._binding.bind_ortvalue_input(into, value)
                self._binding.bind_ortvalue_output(out, value)
        return self._binding


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
    """Tell whether products of uint8 and int8 are added up in 16 bits here.

    So it is on x86 before AVX512-VNNI and AVX-VNNI, and assumed where the CPU does not say. Tests
    replace this function to have the engines of such a processor on any other.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not {"avx512_vnni", "avx_vnni"}.intersection(cpu_features())


def _held(value: Any) -> ort.OrtValue:
    """Wrap a numpy array without a copy; leave an OrtValue alone."""
    if isinstance(value, ort.OrtValue):
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))


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
