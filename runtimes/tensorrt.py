"""TensorRT 8.6 to 11.x: compiled on the device that runs it, kept beside the bundle.

    portable graph --lower--> graph of this version --worker (a child)--> plan
    plan + record --store--> engines/trt-<key>/ --graph--> a graph that runs

What differs between the versions is in _tensorrt/versions.py. Neither TensorRT nor CUDA is imported
before it is needed, so that the lint runs anywhere.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vlmedge.arrays import Array
from vlmedge.bundle import Bundle
from vlmedge.bundle.writer import refuse_full_disk, terminate_as_interrupt
from vlmedge.errors import BundleError, MissingExtraError
from vlmedge.graphs.half import BeyondHalfError
from vlmedge.parity.probe import Probe, not_finite
from vlmedge.progress import Advance, Progress
from vlmedge.shelves.build_options import BuildOptions, Built, Finding
from vlmedge.shelves.contracts import Engine, Graph
from vlmedge.shelves.engine_store import engines_folder, read_sidecar
from vlmedge.shelves.registry import ENGINES
from vlmedge.spec import Component

from ._cuda import Cuda, connect
from ._judge import judge
from ._tensorrt import dla
from ._tensorrt import store as cache
from ._tensorrt import versions as api
from ._tensorrt.attempts import FLOAT, attempts, has_rival
from ._tensorrt.compile import compile_component, lowered
from ._tensorrt.cuda_graphs import RecordedGraph, proven, recordable, repeated, together, walked
from ._tensorrt.graph import TrtGraph, read_profiles
from ._tensorrt.job import Job
from ._tensorrt.operators import version_of
from ._tensorrt.outcome import Outcome, read_outcome
from ._tensorrt.profiles import refuse_unknown_axes
from ._tensorrt.worker import PLAN, TIMING

SLOWER = 1.05  # times differ by this much from run to run
_LOG = logging.getLogger("vlmedge.tensorrt")


class _Logged:
    """Tells the log what happens when a graph is opened whose engine has to be built first."""

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        if total is None:
            _LOG.warning("%s: this takes minutes, once", title)
        yield lambda amount: None

    def note(self, text: str) -> None:
        _LOG.warning("%s", text)


class TensorRt:
    """NVIDIA's compiler and its runtime."""

    def open(self, bundle: Bundle, component: str) -> Graph:
        """Open an engine that fits this machine; it is built first if there is none.

        Opens the engine of the most recent `build`, whatever options it used.
        """
        spec = bundle.spec.component(component)
        trt, cuda = api.load(), connect()
        options = cache.last_options(bundle, component, cuda.name)
        job = Job(bundle, spec, trt, cuda, options, Probe(bundle), _Logged())
        folder, _ = cache.find(bundle, _identify(job))
        if folder is None:
            folder = self._built(job).folder
        return _opened(trt, cuda, spec, folder)

    def falling_back(self) -> Engine:
        """Return it as one that opens with ONNX Runtime what it cannot build."""
        return _OrOrt(self)

    def build(self, bundle: Bundle, options: BuildOptions, progress: Progress) -> list[Built]:
        """Compile a bundle's components for this machine; what fits is not built again."""
        components = _chosen(bundle, options)
        trt, cuda = api.load(), connect()
        dla.refuse_without(components, trt, cuda, options)
        probe = Probe(bundle)
        return [
            self._built(Job(bundle, component, trt, cuda, options, probe, progress))
            for component in components
        ]

    def lint(self, bundle: Bundle, options: BuildOptions, version: str) -> list[Finding]:
        """Name all that a version would refuse; neither TensorRT nor a GPU is needed."""
        number = version_of(version)
        found = []
        for component in _chosen(bundle, options):
            precision, record = options.precision, options.record
            found += lowered(bundle, component, number, precision, record=record)[2]
        return found

    def _built(self, job: Job) -> Built:
        """Return one engine, built if it is not there; two processes build it once."""
        bundle, component, name = job.bundle, job.component, job.component.name
        identity = _identify(job)
        folder, why = cache.find(bundle, identity)
        if folder is not None:
            return _report(component, folder, 0.0)
        if why:
            job.note(f"built again: {why}")
        engines = engines_folder(bundle, identity.key)
        start = time.monotonic()
        with (
            terminate_as_interrupt(),
            _full_disk(engines),
            cache.workshop(
                engines, name, lambda: job.note("another process builds it, waiting")
            ) as partial,
        ):
            folder, _ = cache.find(bundle, identity)  # the other process may have been faster
            if folder is not None:
                return _report(component, folder, 0.0)
            timings = cache.timing_file(engines, identity)
            if timings.is_file():
                (partial / TIMING).write_bytes(timings.read_bytes())
            outcome = self._compile(job, partial)
            cache.keep_timing(partial / TIMING, timings)
            folder = cache.store(partial, bundle, identity, job.options, outcome)
        return _report(component, folder, time.monotonic() - start)

    def _compile(self, job: Job, partial: Path) -> Outcome:
        """Write the plan that is kept of the GPU's and a deep-learning accelerator's."""
        on_gpu, wanted = self._on_gpu(job, partial), job.options.dla
        core = dla.choose_core(job)
        if core is None:
            return on_gpu
        plan, kept = partial / PLAN, partial / "gpu.plan"
        plan.replace(kept)
        try:
            on_dla = dla.build(job, partial, core)
        except BundleError as error:
            if wanted == "always":
                raise
            job.note(f"no DLA: {error}")
            kept.replace(plan)
            return on_gpu
        before, after = on_gpu.level4.latency_ms, on_dla.level4.latency_ms
        told = f"the GPU takes {before:.2f} ms, the DLA {after:.2f} ms"
        equal = on_dla.level4.parity is None or on_dla.level4.parity.passed
        if wanted == "always" or (equal and before > SLOWER * after):
            job.note(f"{told}: the DLA is kept")
            return msgspec.structs.replace(on_dla, dropped={**on_gpu.dropped, "GPU": before})
        job.note(f"{told}: the GPU is kept")
        kept.replace(plan)
        return msgspec.structs.replace(on_gpu, dropped={**on_gpu.dropped, "DLA": after})

    def _on_gpu(self, job: Job, partial: Path) -> Outcome:
        """Write a plan; of one that rounds activations and one that does not, the faster."""
        first, scheme = self._finite(job, partial, plain=False), job.bundle.manifest.scheme
        if not has_rival(job):
            return first
        plan, kept = partial / PLAN, partial / "rounded.plan"
        plan.replace(kept)
        try:
            second = self._finite(job, partial, plain=True)
        except BundleError as error:
            job.note(f"{scheme} was not timed against float: {error}")
            kept.replace(plan)
            return first
        before, after = first.level4.latency_ms, second.level4.latency_ms
        other = second.computed_in
        told = f"{scheme} takes {before:.2f} ms, {other} {after:.2f} ms"
        equal = second.level4.parity is None or second.level4.parity.passed
        if equal and before > SLOWER * after:
            job.note(f"{told}: {scheme} is dropped for it")
            return msgspec.structs.replace(second, dropped={scheme: before})
        job.note(f"{told}: {scheme} is kept")
        kept.replace(plan)
        return msgspec.structs.replace(first, dropped={other: after})

    def _finite(self, job: Job, partial: Path, *, plain: bool) -> Outcome:
        """Write a plan whose outputs are finite, and hold it against the portable graph."""
        bundle, component, probe = job.bundle, job.component, job.probe
        left, output = attempts(job, partial, plain=plain), ""
        while attempt := next(left, None):
            precision, restored = attempt
            if output:
                how = f"{len(restored)} nodes in float32, " if restored else ""
                job.note(f"{output} is nan or inf in float16: {how}built again")
            exact = {node.output for node in restored}
            try:
                compile_component(job, partial, job.profiles, precision, exact, plain=plain)
            except BeyondHalfError as error:
                job.note(f"{str(error).split(':')[0]}: built in float32")
                left, output = iter([FLOAT]), ""
                continue
            plan = partial / PLAN
            opening = job.trt, job.cuda, component, plan.read_bytes(), job.profiles, plan
            graph = TrtGraph(*opening)
            try:
                output = not_finite(graph, probe)
                if not output:
                    verdict = judge(bundle, graph, precision, probe)
                    recorded = job.options.record and recordable(graph)
                    steps = walked(graph, probe) if recorded else None
            finally:
                graph.close()
            if not output:
                records = steps is not None and _is_faster(job, opening, steps)
                return Outcome(precision, restored, verdict, records=records)
        raise BundleError(
            f"{component.name}: {output} is nan or inf even in float32: check the bundle with "
            f"`vlmedge check {bundle.path} --against {bundle.manifest.checkpoint.id}`"
        )


class _OrOrt:
    """TensorRT, and ONNX Runtime's CPU for each component that it refuses."""

    def __init__(self, first: TensorRt) -> None:
        self._first = first

    def open(self, bundle: Bundle, component: str) -> Graph:
        try:
            return self._first.open(bundle, component)
        except (BundleError, MissingExtraError) as error:
            _LOG.warning("%s: runs on the CPU, for %s", component, error)
            return ENGINES["ort"].open(bundle, component)


ENGINE = TensorRt()


def _chosen(bundle: Bundle, options: BuildOptions) -> list[Component]:
    refuse_unknown_axes(bundle.spec, options.axes)
    names = options.components or tuple(c.name for c in bundle.spec.components)
    return [bundle.spec.component(name) for name in names]


def _identify(job: Job) -> cache.Identity:
    machine = (str(job.trt.__version__), job.cuda.name, job.cuda.capability)
    return cache.identify(job.bundle, job.component.name, machine, job.profiles, job.options)


def _is_faster(
    job: Job, opening: tuple[Any, ...], steps: tuple[list[dict[str, Array]], float]
) -> bool:
    """Return whether an engine's steps are the same when they are recorded, and take less time."""
    plain, before = steps
    graph = RecordedGraph(*opening)
    try:
        played, after = walked(graph, job.probe)
        several, rows = together(graph, job.probe)
        recorded = graph.recorded
    finally:
        graph.close()
    scheme = job.bundle.manifest.scheme
    alone = [repeated(job.component, step, rows) for step in plain]
    tolerated = "fp16" if scheme == "float32" else scheme
    parity = proven(tolerated, [*plain, *alone], [*played, *several])
    told = f"a step takes {before:.2f} ms, recorded {after:.2f} ms"
    if not recorded:
        job.note("its steps cannot be recorded")
    elif not parity.passed:
        job.note(f"recorded steps give other outputs (cosine {parity.cosine:.4f})")
    elif before < SLOWER * after:
        job.note(f"{told}: steps are not recorded")
    else:
        job.note(f"{told}: steps are recorded")
        return True
    return False


def _opened(trt: Any, cuda: Cuda, component: Component, folder: Path) -> Graph:
    record = read_sidecar(folder)
    stored = read_profiles(record["identity"]["profiles"])
    outcome = read_outcome(record)
    parity = outcome.level4.parity
    if parity is not None and not parity.passed:
        _LOG.warning(
            "%s: its engine is not what its graph gives (cosine %.4f): build it with "
            "--precision float32",
            component.name,
            parity.cosine,
        )
    plan = folder / PLAN
    if outcome.dla_core is not None:
        stored = dla.fixed(stored)
        return TrtGraph(trt, cuda, component, plan.read_bytes(), stored, plan, outcome.dla_core)
    made = RecordedGraph if outcome.records else TrtGraph
    return made(trt, cuda, component, plan.read_bytes(), stored, plan)


def _report(component: Component, folder: Path, seconds: float) -> Built:
    record = read_sidecar(folder)
    outcome = read_outcome(record)
    return Built(
        component.name,
        folder,
        outcome.computed_in,
        record["plan"]["bytes"],
        seconds,
        not seconds,
        tuple(node.node for node in outcome.restored),
        outcome.level4.parity,
        outcome.level4.latency_ms,
        outcome.dropped,
        outcome.dla_core is not None,
    )


@contextlib.contextmanager
def _full_disk(engines: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        refuse_full_disk(error, engines, "set VLMEDGE_CACHE")
        raise
