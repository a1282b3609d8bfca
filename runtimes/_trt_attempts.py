"""What is built for a component: float16 until its outputs are finite, and float beside int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlmedge.building import BuildOptions, Precision
from vlmedge.bundle import Bundle
from vlmedge.progress import Progress
from vlmedge.spec import Component

from ._level4 import fits_here
from ._probe import Probe
from ._trt_build import lowered
from ._trt_operators import Version
from ._trt_outcome import Restored

Attempt = tuple[Precision, tuple[Restored, ...]]  # and the nodes of float16 that stay float32
FLOAT: Attempt = ("float32", ())


def has_rival(
    bundle: Bundle, component: Component, version: Version, options: BuildOptions
) -> bool:
    """Tell whether rounded activations have to show that they are faster than float16.

    Not in 8.6, where a flag decides by layer.
    """
    if options.keep_slower or options.precision != "float16" or version < (10, 0):
        return False
    from ._trt_plain import is_rounded

    return is_rounded(lowered(bundle, component, version, "float32")[0])


def attempts(
    component: Component,
    version: Version,
    options: BuildOptions,
    lower: Callable[[], Any],
    probe: Probe,
    progress: Progress,
    partial: Path,
) -> Iterator[Attempt]:
    """Give what to build until the outputs are finite: float16, with more in float32 each time."""
    if options.precision == "float16":
        yield "float16", ()
        for restored in _repairs(component, version, lower, probe, progress, partial):
            yield "float16", restored
    yield FLOAT


def _repairs(
    component: Component,
    version: Version,
    lower: Callable[[], Any],
    probe: Probe,
    progress: Progress,
    partial: Path,
) -> Iterator[tuple[Restored, ...]]:
    """Give the nodes that go beyond float16, more of them each time.

    There are none where the types are not the graph's (8.6), or a scheme has chosen them.
    """
    from ._half import is_typed

    model = lower()[0]
    if version < (10, 0) or is_typed(model):
        return
    if not fits_here(model):
        progress.note(f"{component.name}: too little memory to find what goes beyond float16")
        return
    try:
        from ._trt_repair import MARGINS, beyond_half, largest
    except ImportError as error:
        progress.note(f"{component.name}: what goes beyond float16 cannot be found: {error}")
        return
    with progress.step(f"{component.name}: looking for what goes beyond float16"):
        found = largest(component, lower()[0], probe, partial)
    before: tuple[Restored, ...] = ()
    for margin in MARGINS:
        nodes = beyond_half(model, found, margin)
        if len(nodes) > len(before):
            yield nodes
        before = nodes
