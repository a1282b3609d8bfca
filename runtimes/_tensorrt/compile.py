"""From a component of a bundle to a plan: lower, check, compile in a child process, watch it.

Plans hold their weights. To strip them (STRIP_PLAN, 10.0) would save no disk: such a plan is refit
from the ONNX file that it was parsed from, which is the lowered graph, with weights of its own
(float16, unpacked int4, transposed), so that this file would lie beside it, of the size that was
saved. The bundle's own file serves only where lowering changes nothing, and there too every opening
would read and place all weights again, where a whole plan is mapped; 8.6 cannot strip at all.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import msgspec

from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError
from vlmedge.graphs.portable import EXTERNAL_THRESHOLD_BYTES, load_graph, promised
from vlmedge.host.hardware import RESERVE_BYTES, free_bytes
from vlmedge.progress import Advance, Progress
from vlmedge.shelves.build_options import BuildOptions, Finding, Precision
from vlmedge.spec import Component
from vlmedge.units import MIB

from . import worker
from .job import Job
from .operators import Version
from .profiles import Profile, shapes

DISK_MARGIN_BYTES = 64 * MIB  # beside the plan: timings, the graph
WORKSPACE_SHARE = 0.5  # of the GPU's free memory; weights and activations need room too
_TICK_S = 0.2
_LAST_WORDS = 300  # characters of what TensorRT said


def lowered(
    bundle: Bundle,
    component: Component,
    version: Version,
    precision: Precision,
    exact: Collection[str] = (),
    *,
    plain: bool = False,
    record: bool = False,
) -> tuple[Any, bool, list[Finding]]:
    """Return a component's graph for a version, whether it was changed, and what is wrong.

    `exact` are nodes that stay float32, by the name of their first output; a `plain` graph has no
    rounding (unquantize.py); one to `record` has no loops.
    """
    model = load_graph(bundle.path, component.name)
    from .lint import lint  # onnx_ir is not needed once the engine is there
    from .lower import lower

    if plain:
        from .unquantize import unround

        unround(model)
    # a cache that float16 cannot hold is float32 on its way in and out
    state = [pair for pair in component.state if pair[0] not in exact]
    changed = lower(model, version, precision, state, exact, record=record) or plain
    return model, changed, lint(component.name, model, version, cached=bool(component.state))


def compile_component(
    job: Job,
    partial: Path,
    profiles: tuple[Profile, ...],
    precision: Precision,
    exact: Collection[str] = (),
    *,
    plain: bool = False,
    dla_core: int | None = None,
) -> None:
    """Write engine.plan of a component into `partial`.

    Args:
        job: The engine.
        partial: The folder to build in; it may hold timings.
        profiles: Shapes that it is built for, `job.profiles` or some of their sizes.
        precision: Number format that float layers compute in.
        exact: Nodes that stay float32, by the name of their first output.
        plain: Whether to leave out the rounding of a quantized graph.
        dla_core: The deep-learning accelerator that it is for, or none: the GPU.

    Raises:
        BundleError: TensorRT refuses the graph, or there is too little memory or disk.
    """
    from vlmedge.graphs.half import is_typed

    component, version, options = job.component, job.version, job.options
    by_flag = dla_core is not None and version < (11, 0)
    in_graph = "float32" if by_flag else precision
    model, changed, findings = lowered(
        job.bundle, component, version, in_graph, exact, plain=plain, record=options.record
    )
    if findings:
        first, more = findings[0], len(findings) - 1
        raise BundleError(
            f"{component.name}: TensorRT {version[0]}.{version[1]} refuses {first.operator} "
            f"{first.node!r}: {first.problem}: {first.remedy}"
            + (f" (and {more} more: run vlmedge build --check-only)" if more else "")
        )
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    memory = job.cuda.memory()
    _refuse_too_small(component.name, weights, 2 if changed else 1, partial, memory)
    request = worker.Request(
        graph=str(_write(model, changed, job.bundle, component.name, partial)),
        profiles=tuple(shapes(component, profile) for profile in profiles),
        half=precision == "float16" or is_typed(model),
        quantized=any(node.op_type == "DequantizeLinear" for node in model.graph),
        level=options.level,
        workspace_bytes=options.workspace_mib * MIB
        if options.workspace_mib
        else max(int(memory[0] * WORKSPACE_SHARE), MIB),
        dla_core=dla_core,
    )
    (partial / worker.REQUEST).write_bytes(msgspec.json.encode(request))
    _run(component.name, partial, options, job.progress)


def _refuse_too_small(
    name: str, weights: int, copies: int, partial: Path, memory: tuple[int, int]
) -> None:
    """Refuse before minutes of work what cannot end well: the weights alone do not fit."""
    disk, gpu = shutil.disk_usage(partial).free, memory[0]
    needed = copies * weights + DISK_MARGIN_BYTES
    if disk < needed:
        raise BundleError(
            f"{name}: the disk has {disk / MIB:.0f} MiB free, building takes about "
            f"{needed / MIB:.0f} MiB: free some space or set VLMEDGE_CACHE"
        )
    if gpu < weights:
        raise BundleError(
            f"{name}: the GPU has {gpu / MIB:.0f} MiB free, its weights alone take "
            f"{weights / MIB:.0f} MiB: close other programs, or use a smaller --scheme"
        )


def _write(model: Any, changed: bool, bundle: Bundle, name: str, partial: Path) -> Path:
    """Write the graph that TensorRT parses, if it is not the bundle's own; return its path.

    Its weights are written beside it even where they are the bundle's: ONNX forbids a file outside
    of the graph's folder, and readers refuse links.
    """
    if not changed:
        return bundle.graph_file(name).resolve()
    import onnx_ir as ir

    file = partial / "graph.onnx"
    with promised():
        ir.save(
            model, file, external_data="graph.bin", size_threshold_bytes=EXTERNAL_THRESHOLD_BYTES
        )
    return file


def _run(name: str, partial: Path, options: BuildOptions, progress: Progress) -> None:
    """Run the worker to its end, or end it: on Ctrl-C, or when memory gets scarce."""
    command = [sys.executable, "-m", worker.__name__, str(partial)]
    free = free_bytes()
    log = partial / "build.log"
    with log.open("wb") as stderr:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        try:
            peak, scarce = _watch(name, child, options, progress)
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    _judge(name, partial, child.returncode, scarce, peak, free)


def _judge(name: str, partial: Path, code: int, scarce: bool, peak: int, free: int) -> None:
    """Say in one line how it went, if it did not go well."""
    result = None
    if not scarce:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            file = partial / worker.RESULT
            result = msgspec.json.decode(file.read_bytes(), type=worker.Result)
    if result is not None and result.error is None:
        return
    if result is not None and result.disk:
        space = shutil.disk_usage(partial).free / MIB
        raise BundleError(
            f"{name}: the disk is full ({space:.0f} MiB free, nothing was kept): "
            "free some space or set VLMEDGE_CACHE"
        )
    if scarce or (result is not None and result.memory) or (result is None and code == -9):
        took = f"{peak / MIB:.0f} MiB" + (f" of {free / MIB:.0f} MiB free" if free else "")
        raise BundleError(
            f"{name}: the build ran out of memory (it took {took}): try, in this order: close "
            "other programs and the desktop; add swap; --level 1; --workspace 256; a shorter text "
            "(--axis past=1:64:256); int8 weights (vlmedge quantize --int8); --engine ort"
        )
    if result is not None:
        words = str(result.error)[:_LAST_WORDS]
        raise BundleError(
            f"{name}: TensorRT cannot build it: {words}: run `vlmedge doctor` to see why"
        )
    with contextlib.suppress(OSError):
        words = " ".join((partial / "build.log").read_text(errors="replace").split())
        raise BundleError(
            f"{name}: TensorRT's builder ended with {_ending(code)}: {words[-_LAST_WORDS:]}: "
            "try --level 1 or --precision float32"
        )


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _watch(
    name: str, child: subprocess.Popen[bytes], options: BuildOptions, progress: Progress
) -> tuple[int, bool]:
    """Draw the bar and look at memory until the child ends.

    Returns:
        The most host memory it took, bytes, and whether it was too much.
    """
    assert child.stdout is not None
    limit = options.memory_mib * MIB if options.memory_mib else None
    peak, lines = 0, _Lines(child.stdout)
    with contextlib.ExitStack() as bars, selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        advance: Advance = bars.enter_context(progress.step(f"building {name}"))
        while True:
            if selector.select(_TICK_S):
                messages = lines.read()
                if messages is None:
                    break
                for message in messages:
                    if "total" in message:
                        bars.close()
                        step = progress.step(f"building {name}", message["total"])
                        advance = bars.enter_context(step)
                    else:
                        advance(message["done"])
            peak = max(peak, _resident_bytes(child.pid))
            free = free_bytes()
            if (limit and peak > limit) or (free and free < RESERVE_BYTES):
                return peak, True
    while child.poll() is None:  # it has closed its channel and is about to end
        time.sleep(_TICK_S / 10)
    return peak, False


class _Lines:
    """Messages of the worker, as they come in pieces."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._handle = stream.fileno()
        self._rest = b""

    def read(self) -> list[dict[str, int]] | None:
        """Return what is there; none at the end."""
        piece = os.read(self._handle, 1 << 16)
        if not piece:
            return None
        *whole, self._rest = (self._rest + piece).split(b"\n")
        return [msgspec.json.decode(line, type=dict[str, int]) for line in whole]


def _resident_bytes(process: int) -> int:
    """Return the memory that a process holds; 0 where the system does not tell, or it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGESIZE"
        )
    return 0
