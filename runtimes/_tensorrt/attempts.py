"""What is built for a component: float16 until its outputs are finite, and float beside int8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmedge.shelves.build_options import Precision

from .._judge import fits_here
from .compile import lowered
from .job import Job
from .outcome import Restored

Attempt = tuple[Precision, tuple[Restored, ...]]  # and the nodes of float16 that stay float32
FLOAT: Attempt = ("float32", ())


def has_rival(job: Job) -> bool:
    """Return whether quantized activations have to prove faster than float16.

    Not in 8.6, where a flag decides by layer.
    """
    options = job.options
    if options.keep_slower or options.precision != "float16" or job.version < (10, 0):
        return False
    from .unquantize import is_rounded

    return is_rounded(lowered(job.bundle, job.component, job.version, "float32")[0])


def attempts(job: Job, partial: Path, *, plain: bool) -> Iterator[Attempt]:
    """Give what to build until the outputs are finite: float16, with more in float32 each time.

    Args:
        job: The engine.
        partial: Where something may be written for a moment.
        plain: Whether rounding is left out of a quantized graph.
    """
    if job.options.precision == "float16":
        yield "float16", ()
        for restored in _repairs(job, partial, plain=plain):
            yield "float16", restored
    yield FLOAT


def _repairs(job: Job, partial: Path, *, plain: bool) -> Iterator[tuple[Restored, ...]]:
    """Give the nodes that go beyond float16, more of them each time.

    There are none where the types are not the graph's (8.6), or a scheme has chosen them.
    """
    from vlmedge.graphs.half import is_typed

    def lower() -> Any:
        return lowered(job.bundle, job.component, job.version, "float32", plain=plain)[0]

    model = lower()
    if job.version < (10, 0) or is_typed(model):
        return
    if not fits_here(model):
        job.note("too little memory to find the values that overflow float16")
        return
    try:
        from .half_repair import MARGINS, beyond_half, largest
    except ImportError as error:
        job.note(f"the values that overflow float16 cannot be found: {error}")
        return
    title = f"{job.component.name}: looking for what goes beyond float16"
    with job.progress.step(title):
        found = largest(job.component, lower(), job.probe, partial)
    before: tuple[Restored, ...] = ()
    for margin in MARGINS:
        nodes = beyond_half(model, found, margin)
        if len(nodes) > len(before):
            yield nodes
        before = nodes
