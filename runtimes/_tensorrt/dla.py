"""A vision tower on a Jetson's deep-learning accelerator (DLA), beside the GPU's and timed.

A DLA computes in float16 or int8, takes no dynamic shapes, and has no matrix products: TensorRT's
own log on an Orin says "MatMul is unsupported on DLA". What it has no units for falls back to the
GPU, with a copy on the way there and back, so that a ViT leaves it little but its first
convolution. It draws less power than the GPU. So both are built, and the faster is kept.

                 8.6 to 10.7                  10.8 to 11.4.0    11.4.1 on
    has a DLA    with JetPack 6 (5 has 8.5)   no                on AGX Orin, with JetPack 7.2.2
    types        by flag; no Q/DQ             -                 the graph's; Q/DQ

Sources: NVIDIA's guide for 11.3 and 11.4.1 (Working with DLA, Strongly Typed Networks for DLA, DLA
Supported Layers and Restrictions), for 8.x on Q/DQ. No board has run this yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.errors import BundleError, InputError
from vlmedge.host.jetpack import DLA_VERSIONS, has_dla
from vlmedge.parity.probe import not_finite
from vlmedge.shelves.build_options import AxisRange, BuildOptions
from vlmedge.spec import Component

from .._cuda import Cuda
from .._judge import judge
from . import versions as api
from .compile import compile_component, lowered
from .graph import TrtGraph
from .job import Job
from .outcome import Outcome
from .profiles import Profile
from .worker import PLAN

CORE = 0  # of one or two; a bundle has one vision tower
CONVOLUTIONS = 0.5  # of a tower's weights: with less, `auto` does not spend minutes on a build
_PRODUCTS = ("Conv", "MatMul", "Gemm")


def choose_core(job: Job) -> int | None:
    """Return the accelerator to build a component for too, or none.

    Notes say why `auto` builds for none; `refuse_without` has refused the rest.
    """
    options, auto = job.options, job.options.dla == "auto"
    if options.dla == "off" or not is_tower(job.component) or options.precision != "float16":
        return None
    why = _missing(job.trt, job.cuda)
    if not why and auto and (share := _convolutions(job)) < CONVOLUTIONS:
        why = f"{share:.0%} of its products' weights are convolutions, and a DLA runs no others"
    if why:
        job.note(f"built for the GPU alone: {why}")
        return None
    return CORE


def refuse_without(
    components: list[Component], trt: Any, cuda: Cuda, options: BuildOptions
) -> None:
    """Refuse, before any work, to build for an accelerator what cannot be.

    Raises:
        InputError: This TensorRT has none, or this board, or no component is a vision tower.
    """
    if options.dla not in ("faster", "always"):
        return
    if why := _missing(trt, cuda):
        raise InputError(f"{why}: leave --dla out")
    if not any(is_tower(component) for component in components):
        names = ", ".join(component.name for component in components)
        raise InputError(
            f"{names}: none is a vision tower of fixed sizes, as a DLA needs: leave --dla out"
        )


def build(job: Job, partial: Path, core: int) -> Outcome:
    """Write a plan for an accelerator, and hold it against the portable graph.

    Raises:
        BundleError: It cannot be built, or gives nan or inf.
    """
    built_for, typed = fixed(job.profiles), api.is_typed(job.trt, dla=True)
    compile_component(job, partial, built_for, "float16", plain=not typed, dla_core=core)
    plan = partial / PLAN
    graph = TrtGraph(job.trt, job.cuda, job.component, plan.read_bytes(), built_for, plan, core)
    try:
        if output := not_finite(graph, job.probe):
            raise BundleError(f"{output} is nan or inf in the DLA's float16")
        verdict = judge(job.bundle, graph, "float16", job.probe)
    finally:
        graph.close()
    return Outcome("float16", (), verdict, dla_core=core)


def fixed(built_for: tuple[Profile, ...]) -> tuple[Profile, ...]:
    """Return profiles of one size each, the smallest: more rows go through in pieces."""
    return tuple(
        {axis: AxisRange(r.min, r.min, r.min) for axis, r in profile.items()}
        for profile in built_for
    )


def is_tower(component: Component) -> bool:
    """Return whether a component reads pictures, keeps nothing, and has no axis but the batch."""
    axes = {a for tensor in component.inputs for a in tensor.shape if isinstance(a, str)}
    pictures = [t for t in component.inputs if len(t.shape) == 4 and np.dtype(t.dtype).kind == "f"]
    return bool(pictures) and not component.state and not component.slots and axes <= {"batch"}


def _missing(trt: Any, cuda: Cuda) -> str:
    """Return what is missing: a TensorRT version or a board that has DLAs."""
    if not has_dla(trt.__version__):
        return f"TensorRT {trt.__version__} has no DLA ({DLA_VERSIONS} have)"
    heard: list[str] = []
    log = api.logger(trt, heard.append)
    if not trt.Runtime(log).num_DLA_cores:
        return f"{cuda.name} has no DLA (Xavier, Orin NX and AGX Orin have)"
    return ""


def _convolutions(job: Job) -> float:
    """Return which part of the weights that are multiplied with is convolutions'."""
    model = lowered(job.bundle, job.component, job.version, "float32", plain=True)[0]
    sizes = dict.fromkeys(_PRODUCTS, 0)
    for node in model.graph:
        if node.op_type in sizes:
            weights = [v.const_value for v in node.inputs if v is not None and v.const_value]
            sizes[node.op_type] += sum(w.size for w in weights if len(w.shape) > 1)
    return sizes["Conv"] / max(sum(sizes.values()), 1)
